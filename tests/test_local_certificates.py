"""Local certificates: valid in the whole ball, never above the global one, sharp at the center."""

import dataclasses
import math
from typing import Any

import keras
import numpy as np
import pytest
from helpers.certify_cases import (
    array_of,
    default_dtype,
    jacobian_norm,
    jacobians,
    layer_cases,
    model_of,
    points_of,
    randomize,
    snapshot,
)
from keras import layers

import keras_lipattn as kl
from keras_lipattn.certification import Certificate, certified_radii, certify
from keras_lipattn.certification.certifying import LocalCertifier
from keras_lipattn.certification.options import Options
from keras_lipattn.estimation.norms import norm_of

CASES = {case.name: case for case in layer_cases()}
NORMS = ("l2", "token", "linf")
# Of a measured derivative in float64, as for global certificates.
ROUNDING = 1.0 + 1e-9
# Layers whose caps are only known to their graph or whose values have no rule, and what TensorFlow
# has only in float32: the values are not known there, and later layers get global constants.
LOST = {
    "average_pool3d",
    "cosine_attention",
    "cosine_attention_capped",
    "cosine_attention_causal",
    "l2_attention_capped",
    "max_pool3d",
    "ops_conv_transpose",
    "spectral_conv",
    "spectral_conv_patches",
    "spectral_conv_strided",
    "spectral_dense",
}


# Keras computes in float32 here: a low-rank update, a wrapped layer, images between their pixels.
ROUGH = (
    "dense_lora",
    "dense_leaky",
    "spectral_normalization",
    "resizing",
    "ops_resize",
    "crop_small",
    "bilinear",
)


# The kernel that runs is computed in float32 by the layer: an allowance of 1e-5 for it.
COMPUTED = ("orthogonal_conv", "orthogonal_dense", "normalized_dense")


def values_near(model, x, radius, norm="l2", **options):
    settings = Options(
        **{
            **dict(
                norm=norm,
                sequence_length=None,
                input_radius=None,
                assume_fixed_mask=False,
                mask=None,
            ),
            **options,
        }
    )
    certifier = LocalCertifier(model, settings, None, x)
    return certifier.near(certifier.examples, radius)


@pytest.mark.parametrize("name", CASES)
def test_rules_hold_near_an_input_and_values_are_those_of_the_model(name):
    case = CASES[name]
    model = model_of(case)
    x = points_of(case, count=1)[0].astype(case.dtype)
    rng = np.random.default_rng(1)
    norm = NORMS[list(CASES).index(name) % 3]
    radius = 0.1 * case.spread
    steps = rng.normal(size=(6, *x.shape))
    steps *= (radius / np.linalg.norm(steps.reshape(6, -1), axis=1)).reshape(-1, *[1] * x.ndim)
    # A ball of the 2-norm lies in those of the other norms.
    points = x + np.concatenate([np.zeros((1, *x.shape)), steps])
    certificate, (near,) = values_near(model, x, radius, norm, **dict(case.options))
    assert certificate.is_finite
    globally = certify(model, norm=norm, **dict(case.options)).total
    assert certificate.total <= globally
    expected = np.asarray(model(x[None], training=False))
    if name in LOST:
        assert certificate.threat_model.lost
    else:
        assert not certificate.threat_model.lost
        assert near is not None
        is_rough = any(rough in name for rough in ROUGH + COMPUTED)
        precision = 1e-6 if is_rough else 1e-9
        np.testing.assert_allclose(near.value, expected, rtol=precision, atol=precision)
        allowed = 2e-5 if name.startswith(COMPUTED) else 1e-6
        size = 1.0 + np.linalg.norm(expected) + certificate.total
        assert near.rounding_error <= allowed * size
    if certificate.total == globally:
        # Its Jacobians are measured elsewhere.
        return
    measured = jacobians(lambda x: model(x, training=False), points.astype(case.dtype))
    shape = model.output_shape[1:]
    widths = case.shape[-1], shape[-1] if shape else 1
    found = max(jacobian_norm(jacobian, norm, widths) for jacobian in measured)
    rounding = ROUNDING if case.dtype == "float64" else 1.0 + 1e-5
    assert found <= certificate.total * rounding


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(4, 4), (6, 5)])
def test_pixels_rounded_to_float32_are_within_the_rounding_error(size, interpolation):
    inputs = keras.Input((4, 4, 1), dtype="float64")
    resizing = layers.Resizing(*size, interpolation=interpolation, dtype="float64")
    model = keras.Model(inputs, resizing(inputs))
    x = np.random.default_rng(0).normal(size=(4, 4, 1))
    _, (near,) = values_near(model, x, 0.0)
    assert near is not None
    gap = np.linalg.norm(near.value - np.asarray(model(x[None], training=False)))
    assert gap <= near.rounding_error
    # The nearest pixel is not rounded.
    precision = 1e-9 if interpolation == "nearest" else 1e-5
    assert near.rounding_error <= precision * np.linalg.norm(near.value)


def attention_model(tokens=5, features=4, dtype="float64", seed=0, build=None, **options):
    """Two attention layers with a normalization and a dense layer between them."""
    with default_dtype(dtype):
        inputs = keras.Input((tokens, features), dtype=dtype)
        first = kl.L2MultiHeadAttention(2, 3, **options)
        second = kl.L2MultiHeadAttention(1, 2)
        call = build or (lambda layer, x: layer(x))
        x = layers.LayerNormalization()(kl.Residual(0.5)([inputs, call(first, inputs)]))
        x = call(second, layers.Dense(features, activation="gelu")(x))
        x = layers.GlobalAveragePooling1D()(x)
        model = keras.Model(inputs, layers.Dense(3)(x))
    randomize(model, seed)
    return model


CALLS = {
    "full": lambda layer, x: layer(x),
    "causal": lambda layer, x: layer(x, use_causal_mask=True),
    "pairs": lambda layer, x: layer(x, attention_mask=np.eye(5, k=2, dtype=bool)[None]),
    "padded": lambda layer, x: layer(x, query_mask=np.array([[1, 1, 0, 1, 1]], bool)),
}
OPTIONS = {
    "plain": {},
    "window": {"sliding_window": 2},
    "relative": {"max_relative_position": 2, "value_dim": 5},
}


@pytest.mark.parametrize("call", CALLS)
def test_no_ascent_inside_the_ball_climbs_over_the_certificate(call):
    index = list(CALLS).index(call)
    model = attention_model(build=CALLS[call], **OPTIONS[list(OPTIONS)[index % 3]])
    x = np.random.default_rng(1).normal(size=(5, 4))
    for norm in NORMS:
        globally = certify(model, norm=norm).total
        totals = []
        for radius in (0.01, 0.1, 100.0):
            local = certify(model, norm=norm, center=x, radius=radius)
            assert not local.threat_model.lost
            totals.append(local.total)
        assert totals == sorted(totals)
        # Far away the certificate is the global one, or that of fewer tokens, or with biases that
        # of the pairs themselves, of which all inputs know the degrees.
        assert totals[0] < totals[2] <= globally
        assert call in ("padded", "pairs") or totals[2] == pytest.approx(globally, rel=1e-9)
        if norm == NORMS[index % 3]:
            found = kl.estimate_lipschitz(model, x[None], norm, radius=0.1, steps=8, restarts=1)
            assert norm_of(norm, (found.point - x)[None])[0] <= 0.1 * ROUNDING
            assert 0.0 < found.value <= totals[1] * ROUNDING


def test_at_radius_zero_it_is_within_the_known_factor_of_the_jacobian():
    ratios = []
    for seed in range(6):
        with default_dtype("float64"):
            inputs = keras.Input((6, 3), dtype="float64")
            layer: Any = kl.L2MultiHeadAttention(1, 3, use_bias=False)
            model = keras.Model(inputs, layer(inputs))
        # The unit head itself: B is the identity, and so is C.
        eye = np.eye(3) * 3**0.25
        layer.set_weights([eye.reshape(3, 1, 3), *layer.get_weights()[1:]])
        layer.value_kernel.assign((eye / 3**0.25).reshape(3, 1, 3))
        layer.output_kernel.assign(np.eye(3).reshape(1, 3, 3))
        x = np.random.default_rng(seed).normal(size=(6, 3))
        measured = np.linalg.norm(jacobians(model, x[None])[0], 2)
        ratios.append(certify(model, center=x, radius=0.0).total / measured)
    # Norms of blocks lose their signs, nothing else: 1.5 was the largest of hundreds.
    assert 1.0 <= min(ratios) and max(ratios) <= 1.6
    assert certify(model).total / measured > 2.0


def test_a_batch_holds_in_each_of_its_balls():
    model = attention_model()
    x = np.random.default_rng(2).normal(size=(3, 5, 4)) * np.array([0.1, 1.0, 3.0])[:, None, None]
    alone = [certify(model, center=one, radius=0.05) for one in x]
    together = certify(model, center=x, radius=0.05)
    assert together.total == max(one.total for one in alone)
    np.testing.assert_array_equal(
        together.pairwise_constants, np.max([one.pairwise_constants for one in alone], axis=0)
    )
    assert "3 inputs" in together.threat_model.center


def test_float32_models_are_followed_with_the_weights_as_they_run():
    single = attention_model(dtype="float32")
    double = attention_model(dtype="float64")
    double.set_weights(single.get_weights())
    x = np.random.default_rng(3).normal(size=(5, 4))
    _, (near,) = values_near(single, x, 0.0)
    expected = np.asarray(double(x[None]))
    assert near is not None
    # Folded kernels are rounded once, and `rounding_error` says so.
    assert np.linalg.norm(near.value - expected) <= near.rounding_error <= 1e-4
    found = np.linalg.norm(jacobians(double, x[None])[0], 2)
    assert found <= certify(single, center=x, radius=0.0).total < 0.1 * certify(single).total


def test_kernels_in_low_precision_are_those_that_run():
    with default_dtype("mixed_bfloat16"):
        inputs = keras.Input((4,))
        model = keras.Model(inputs, layers.Dense(3, activation="tanh")(inputs))
    randomize(model)
    x = np.random.default_rng(4).normal(size=4)
    kernel, bias = (
        array_of(keras.ops.cast(w.value, "bfloat16")).astype(np.float64)
        for w in model.layers[1].weights
    )
    _, (near,) = values_near(model, x, 0.1)
    assert near is not None
    np.testing.assert_allclose(near.value[0], np.tanh(x @ kernel + bias), rtol=1e-12)


def test_padding_from_token_ids_is_followed():
    ids = keras.Input((6,), dtype="int32", name="ids")
    with default_dtype("float64"):
        x = layers.Embedding(9, 4, mask_zero=True)(ids)
        first, second = kl.L2MultiHeadAttention(2, 2), kl.L2MultiHeadAttention(2, 2)
        y = second(layers.Dense(4)(first(x)))
        model = keras.Model(ids, layers.Dense(3)(layers.GlobalAveragePooling1D()(y)))
    randomize(model)
    padded = np.array([3, 1, 4, 5, 0, 0])
    certificate, (near,) = values_near(model, padded, 0.05)
    assert near is not None and not certificate.threat_model.lost
    np.testing.assert_allclose(near.value, np.asarray(model(padded[None])), rtol=1e-9)
    assert certificate.total < certify(model).total
    # The ball is around the embeddings.
    assert certificate.threat_model.fixed_inputs == ("ids",)
    # What is not seen does not count: the embedding of the padding.
    table = model.layers[1].embeddings
    table.assign(array_of(table) * np.where(np.arange(9) == 0, 1e3, 1.0)[:, None])
    moved, _ = values_near(model, padded, 0.05)
    assert moved.row(first.name).constant == pytest.approx(certificate.row(first.name).constant)


def test_capped_layers_are_followed_once_their_norms_are_settled():
    model = attention_model(lipschitz_bound=1.0, spectral_norm=1.0, dtype="float64")
    attention: Any = model.layers[1]
    x = np.random.default_rng(5).normal(size=(5, 4))
    certificate = certify(model, center=x, radius=0.01)
    assert "condense()" in dict(certificate.threat_model.lost)[attention.name]
    assert "condense()" in str(certificate)
    assert certificate.total <= certify(model).total
    attention.condense()
    remembered, (near,) = values_near(model, x, 0.01)
    assert near is not None and not remembered.threat_model.lost
    assert remembered.total < certificate.total
    difference = np.linalg.norm(near.value - np.asarray(model(x[None])))
    assert difference <= near.rounding_error
    with kl.condensed(model):
        served, (near,) = values_near(model, x, 0.01)
        assert near is not None
        np.testing.assert_allclose(near.value, np.asarray(model(x[None])), rtol=1e-9)
    assert served.total <= remembered.total


def test_normalizations_use_the_size_of_their_tokens():
    x = np.array([[3.0, 4.0], [6.0, 8.0]])
    for layer, constant in (
        (layers.UnitNormalization(), 1.0 / (5.0 - 0.5)),
        (layers.RMSNormalization(epsilon=1e-6), math.sqrt(2.0) / (5.0 - 0.5)),
        # centered, the smaller token is (-1/2, 1/2); nothing is left when it may move by that.
        (layers.LayerNormalization(epsilon=1e-2), math.sqrt(2.0) / (math.sqrt(0.5) - 0.5)),
    ):
        inputs = keras.Input((2, 2))
        model = keras.Model(inputs, layer(inputs))
        local = certify(model, center=x, radius=0.5)
        assert local.total == pytest.approx(constant, rel=0.2 if "layer" in layer.name else 1e-5)
        assert local.total < certify(model).total
        assert certify(model, center=x, radius=50.0).total == certify(model).total


def test_several_inputs_share_one_ball():
    a, b = keras.Input((2,), name="a"), keras.Input((2,), name="b")
    model = keras.Model([a, b], layers.Multiply()([a, b]))
    assert not certify(model).is_finite
    x, y = np.array([3.0, 0.0]), np.array([0.0, 4.0])
    for center in ([x, y], {"a": x, "b": y}):
        local = certify(model, center=center, radius=1.0)
        # |d(a b)| <= 5 |da| + 4 |db|.
        assert local.total == pytest.approx(math.hypot(5.0, 4.0), rel=1e-6)
    assert certify(model, "token", center=[x, y], radius=1.0).is_finite


def test_subclassed_models_and_layers_without_a_rule_are_followed():
    class Block(layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(4, activation="tanh")

        def build(self, shape):
            self.dense.build(shape)
            self.scale = self.add_weight(name="scale", shape=(4,))

        def call(self, x):
            return x + self.dense(x) * self.scale

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.block, self.norm = Block(), layers.LayerNormalization()

        def call(self, x):
            return self.norm(self.block(x))

    with default_dtype("float64"):
        model = Model()
        model(np.zeros((1, 3, 4)))
    randomize(model)
    x = np.random.default_rng(6).normal(size=(3, 4))
    local, (near,) = values_near(model, x, 0.01)
    assert near is not None and local.total < 0.5 * certify(model).total
    np.testing.assert_allclose(near.value, np.asarray(model(x[None])), rtol=1e-9)


def test_certifying_locally_changes_nothing_and_works_while_fit_runs():
    model = attention_model(dtype="float32", spectral_norm=1.0)
    model.compile("adam", "mse", jit_compile=False)
    x = np.random.default_rng(7).normal(size=(4, 5, 4)).astype("float32")
    totals = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            before = snapshot(model)
            totals.append(certify(model, center=x[0], radius=0.1).total)
            assert snapshot(model) == before

    model.fit(x, np.zeros((4, 3)), batch_size=2, verbose=0, callbacks=[Watch()])
    assert len(set(totals)) == 2


@pytest.mark.parametrize("norm", NORMS)
def test_the_class_stays_within_the_certified_radius(norm):
    model = attention_model(seed=3)
    rng = np.random.default_rng(8)
    x = rng.normal(size=(3, 5, 4))
    logits = np.asarray(model(x))
    radii = kl.certified_radius(model, x, norm, steps=6)
    globally = certify(model, norm=norm).certified_radius(logits)
    assert (radii >= globally * (1.0 - 1e-6)).all()
    if norm != "linf":
        # There attention keeps its global constant, and only the normalization gains.
        assert (radii > 2.0 * globally).all()
    for point, radius, label in zip(x, radii, logits.argmax(-1), strict=True):
        local = certify(model, norm=norm, center=point, radius=radius * 0.999)
        assert local.certified_radius(np.asarray(model(point[None]))[0]) == pytest.approx(
            radius * 0.999
        )
        steps = rng.normal(size=(100, 5, 4))
        if norm == "linf":
            steps = np.sign(steps)
        axes = {"l2": (1, 2), "token": (2,), "linf": ()}[norm]
        sizes = np.sqrt(np.square(steps).sum(axis=axes, keepdims=True)) if axes else 1.0
        moved = np.asarray(model(point + 0.999 * radius * steps / sizes))
        assert (moved.argmax(-1) == label).all()
    assert kl.certified_radius(model, x[0], norm, steps=6) == radii[0]


def test_radii_of_a_local_certificate_end_where_it_ends():
    model = attention_model()
    x = np.random.default_rng(9).normal(size=(5, 4))
    certificate = certify(model, center=x, radius=1e-6)
    logits = np.asarray(model(x[None]))[0]
    assert certificate.certified_radius(logits) == 1e-6
    again = Certificate.from_json(certificate.to_json())
    assert again == certificate and again.certified_radius(logits) == 1e-6
    assert again.threat_model.radius == 1e-6
    assert "ONLY for inputs within 1e-06 of 1 input of shape (5, 4)" in str(again)
    other = certify(model, center=x + 1.0, radius=1e-6).threat_model.center
    assert other != certificate.threat_model.center


@pytest.mark.parametrize("given", [False, True])
def test_radii_are_those_of_the_length_of_the_example(given):
    class Summed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(keras.ops.sum(x, axis=1))

    model = Summed()
    short, long = (np.random.default_rng(0).normal(size=(1, n, 4)) for n in (3, 27))
    model(short)
    options = {"inputs": keras.KerasTensor((None, 3, 4))} if given else {}
    radius = certified_radii.certified_radius(model, long, **options)
    logits = np.asarray(model(long))
    kernel = np.asarray(model.dense.kernel)
    # The change of the logits is linear, so that this radius is the largest.
    exact = abs(logits[0, 0] - logits[0, 1]) / (
        np.sqrt(27.0) * np.linalg.norm(kernel[:, 0] - kernel[:, 1])
    )
    # Without a global certificate for this length, ten steps of bisection start at 0.
    assert 0.99 * exact <= radius <= (1.0 + 1e-5) * exact


def test_what_has_no_meaning_is_refused():
    model = attention_model()
    x = np.zeros((5, 4))
    broken = x.copy()
    broken[0, 0] = np.nan
    refused: list[dict[str, Any]] = [
        dict(center=x),
        dict(radius=0.1),
        dict(center=x, radius=-0.1),
        dict(center=x, radius=math.nan),
        dict(center=x, radius=math.inf),
        dict(center=x, radius=True),
        dict(center=x, radius="0.1"),
        dict(center=broken, radius=0.1),
        dict(center=np.zeros((4, 4)), radius=0.1),
        dict(center=np.zeros(4), radius=0.1),
        dict(center=np.zeros((0, 5, 4)), radius=0.1),
        dict(center=np.zeros((5, 4), complex), radius=0.1),
        dict(center=[x, x], radius=0.1),
        dict(center={"wrong": x}, radius=0.1),
        dict(center=x, radius=0.1, sequence_length=5),
        dict(center=x + 1.0, radius=0.1, input_radius=1.0),
    ]
    for arguments in refused:
        with pytest.raises(ValueError, match="Received"):
            certify(model, **arguments)
    with pytest.raises(ValueError, match="Received"):
        kl.certified_radius(model, x, steps=0)
    inputs = keras.Input((5, 4))
    with pytest.raises(ValueError, match="head"):
        kl.certified_radius(keras.Model(inputs, layers.Dense(2)(inputs)), x)


def assert_no_class_changes(model, x, radii, norm="l2", count=200):
    """Random steps of the size of the radius, and steps along the gradient of each margin."""
    rng = np.random.default_rng(11)
    axes = {"l2": tuple(range(1, x.ndim)), "token": (-1,), "linf": ()}[norm]
    for point, radius in zip(x, radii, strict=True):
        label = array_of(model(point[None], training=False)).argmax()
        gradients = jacobians(lambda z: model(z, training=False), point[None])[0]
        gradients = gradients.reshape(-1, *point.shape)
        steps = np.concatenate([rng.normal(size=(count, *point.shape)), gradients, -gradients])
        if norm == "linf":
            steps = np.sign(steps)
        sizes = np.sqrt(np.square(steps).sum(axis=axes, keepdims=True)) if axes else 1.0
        moved = point + 0.999 * radius * steps / np.maximum(sizes, 1e-30)
        assert (array_of(model(moved, training=False)).argmax(-1) == label).all()


ENDS = {"logits": None, "softmax": "softmax", "log_softmax": "log_softmax", "unit": "sigmoid"}


@pytest.mark.parametrize("name", sorted(LOST | {"dense", "orthogonal_dense", "bounded_capped"}))
def test_radii_need_no_values_and_are_never_below_the_global_ones(name):
    build = {
        "bounded_capped": lambda x: kl.BoundedMultiHeadAttention(
            2, 2, token_radius=2.0, spectral_norm=0.5
        )(x, x)
    }
    case = CASES.get(name) or dataclasses.replace(CASES["dense"], build=build[name])
    end = list(ENDS)[sorted(LOST).index(name) % 4] if name in LOST else "logits"
    with default_dtype(case.dtype):
        inputs = keras.Input(case.shape, dtype=case.dtype)
        features = layers.Flatten()(case.build(inputs))
        units = 1 if end == "unit" else 3
        model = keras.Model(inputs, layers.Dense(units, activation=ENDS[end])(features))
    randomize(model)
    x = points_of(case, count=2).astype(case.dtype)
    plain = keras.Model(inputs, layers.Dense(units, dtype=case.dtype)(features))
    plain.set_weights(model.get_weights())
    options = dict(case.options)
    norm = NORMS[sorted(LOST).index(name) % 3] if name in LOST else "l2"
    radii = kl.certified_radius(model, x, norm, steps=3, **options)
    certificate, logits = certify(model, norm, **options), array_of(plain(x))
    assert (certificate.certified_radius(logits) > 0.0).all()
    for point, radius, found in zip(x, radii, logits, strict=True):
        _, (near,) = values_near(model, point, 0.0, norm, **options)
        # Caps agree to one part in 10^6, and probabilities are rounded.
        error = 1e-6 * (1.0 + np.abs(found).max()) + (0.0 if near is None else near.rounding_error)
        assert radius >= certificate.certified_radius(found, allowance=2.0 * error) * (1.0 - 1e-9)
    if end != "unit":
        assert_no_class_changes(plain, x, radii, norm)


CAPPED = {
    "l2": lambda x, mask: kl.L2MultiHeadAttention(2, 3, lipschitz_bound=1.0)(x),
    "l2 masked": lambda x, mask: kl.L2MultiHeadAttention(2, 3, lipschitz_bound=1.0)(
        x, query_mask=mask
    ),
    "l2 attention mask": lambda x, mask: kl.L2MultiHeadAttention(2, 3, lipschitz_bound=1.0)(
        x, attention_mask=mask[:, None, :]
    ),
    "bounded": lambda x, mask: kl.BoundedMultiHeadAttention(
        2, 3, token_radius=2.0, lipschitz_bound=1.0
    )(x, x, key_mask=mask),
    "dense": lambda x, mask: kl.SpectralDense(4, spectral_norm=1.0)(x),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CAPPED)
def test_radii_of_capped_models_need_no_condensing(name, training):
    with default_dtype("float64"):
        inputs = keras.Input((5, 4), dtype="float64", name="x")
        mask = keras.Input((5,), dtype="bool", name="mask")
        x = kl.Residual(0.5)([inputs, CAPPED[name](inputs, mask)])
        x = layers.LayerNormalization()(x)
        model = keras.Model(
            {"x": inputs, "mask": mask}, layers.Dense(3)(layers.GlobalAveragePooling1D()(x))
        )
    randomize(model)
    rng = np.random.default_rng(12)
    data = {"x": 2.0 * rng.normal(size=(2, 5, 4)), "mask": np.arange(5) < np.array([[5], [3]])}
    if training:
        # Weights that were trained after the last inference.
        model.compile("sgd", "mse", jit_compile=False)
        model.predict(data, verbose=0)
        model.fit(data, np.zeros((2, 3)), verbose=0)
    before = [array_of(weight) for weight in model.weights]
    radii = kl.certified_radius(model, data, steps=4)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(array_of(weight), value)
    logits = model.predict(data, verbose=0)
    globally = certify(model).certified_radius(logits)
    if "attention mask" in name:
        # Its cap depends on the mask, so that no values are known.
        assert (radii >= globally * (1.0 - 1e-6)).all()
    else:
        # The constant of the normalization is smaller near an input.
        assert (radii > 1.2 * globally).all()
    for index, radius in enumerate(radii):
        seen = data["mask"][index : index + 1]
        assert_no_class_changes(
            lambda z, training, seen=seen: model(
                {"x": keras.ops.convert_to_tensor(z), "mask": keras.ops.repeat(seen, len(z), 0)},
                training=training,
            ),
            data["x"][index : index + 1],
            [radius],
        )
    with kl.condensed(model):
        condensed = kl.certified_radius(model, data, steps=4)
    assert (radii <= condensed * (1.0 + 1e-3)).all()


@pytest.mark.parametrize("structure", ["list", "dict", "arguments", "one dict"])
def test_predicted_logits_are_those_of_every_structure_of_inputs(structure):
    first, second = kl.ScaledCosineAttention(2, 2), layers.Dense(4)
    pooling, last = layers.GlobalAveragePooling1D(), layers.Dense(3)

    class Classifier(keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = [first, second, pooling, last]

        def call(self, x, y=None):
            if isinstance(x, dict):
                x, y = x["x"], x["y"]
            first, second, pooling, last = self.parts
            return last(pooling(first(x) + second(y)))

    rng = np.random.default_rng(14)
    x, y = (rng.normal(size=shape).astype("float32") for shape in ((2, 3, 4), (2, 3, 5)))
    if structure in ("list", "dict"):
        a, b = keras.Input((3, 4), name="x"), keras.Input((3, 5), name="y")
        outputs = last(pooling(layers.Add()([first(a), second(b)])))
        model = keras.Model([a, b] if structure == "list" else {"y": b, "x": a}, outputs)
        data = [x, y] if structure == "list" else {"y": y, "x": x}
        logits = array_of(model(data))
    else:
        model = Classifier()
        data = (x, y) if structure == "arguments" else {"x": x, "y": y}
        logits = array_of(model(x, y) if structure == "arguments" else model(data))
    inputs = data if structure == "arguments" else None
    globally = certify(model, inputs=inputs).certified_radius(logits)
    assert (globally > 0.0).all()
    radii = kl.certified_radius(model, data, steps=1, inputs=inputs)
    np.testing.assert_allclose(radii, globally, rtol=1e-5)


def test_radii_are_zero_where_nothing_is_certified():
    inputs = keras.Input((5, 4))
    unknown = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(layers.LSTM(3)(inputs))))
    assert kl.certified_radius(unknown, np.zeros((5, 4))) == 0.0


def test_the_search_ends_where_the_local_constant_is_the_global_one(monkeypatch):
    inputs = keras.Input((8,))
    head = layers.Dense(2, kernel_initializer="orthogonal")
    model = keras.Model(inputs, head(layers.LayerNormalization(epsilon=1.0)(inputs)))
    # The constant is 0.3 at this input, and 1 long before the margin is used up.
    head.bias.assign([20.0, 0.0])
    x = 3.0 * np.array([[1.0, -1.0] * 4])
    globally = certify(model).certified_radius(np.asarray(model(x)))
    tried = []

    class Counting(LocalCertifier):
        def near(self, examples, radius):
            tried.append(radius)
            return super().near(examples, radius)

    monkeypatch.setattr(certified_radii, "LocalCertifier", Counting)
    np.testing.assert_allclose(kl.certified_radius(model, x), globally, rtol=2e-3)
    assert len(tried) == 2


@pytest.mark.parametrize("activation", ["sigmoid", None])
def test_a_radius_is_that_of_the_logits_whatever_computes_them(activation):
    contract = layers.EinsumDense("abc,bcd->ad", output_shape=1, activation=activation)
    classifier = keras.Sequential([keras.Input((4, 3)), contract])
    kernel = array_of(contract.kernel).astype(np.float64).ravel()
    points = np.random.default_rng(0).normal(size=(3, 4, 3))
    # The distance to the hyperplane on which the logit is 0.
    distances = np.abs(points.reshape(3, -1) @ kernel) / np.linalg.norm(kernel)
    radii = kl.certified_radius(classifier, points)
    assert (radii <= distances * ROUNDING).all()
    np.testing.assert_allclose(radii, distances, rtol=1e-5)
    assert kl.certified_radius(classifier, np.zeros((4, 3))) == 0.0


@pytest.mark.parametrize(
    "activation",
    [layers.LayerNormalization, layers.RMSNormalization, layers.UnitNormalization],
)
def test_a_normalization_as_an_activation_is_not_bounded_by_the_input_of_the_layer(activation):
    shrinking = layers.Dense(4, kernel_initializer=_hundredth, activation=activation())
    normalized = keras.Sequential([keras.Input((4,)), shrinking])
    x = np.array([[1.0, 2.0, 3.0, -1.0]], "float32")
    (jacobian,) = jacobians(lambda x: normalized(x, training=False), x)
    certificate = certify(normalized, center=x[0], radius=0.0)
    assert certificate.total >= jacobian_norm(jacobian, "l2", (4, 4)) * (1.0 - 1e-5)


def _hundredth(shape, dtype=None):
    return 0.01 * np.eye(*shape)
