"""Attention on bounded tokens on this backend: values, other tensors, decoding, conversion."""

import keras
import numpy as np
import pytest
from helpers import loop_attention, loop_cosine, loop_product
from helpers.layer_cases import BOUNDED_OPTIONS, FEATURES, LENGTH, Case, cases

import keras_lipattn as kl
from keras_lipattn.layers._fused_attention import plain_attention

KIND = kl.BoundedMultiHeadAttention
# Those of the same property on TensorFlow: rounding of the dtype, times the largest output.
TOLERANCE = {"float32": 1e-5, "mixed_bfloat16": 0.15, "mixed_float16": 0.02}
RNG = np.random.default_rng(0)


def _numpy(tensor):
    return keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32")).astype(np.float64)


def _close(found, expected, tolerance):
    expected = np.asarray(expected)
    size = max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(_numpy(found), expected, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize(
    "case",
    [
        *cases(options=("plain",), dtypes=("float32",), kind=KIND),
        *cases(
            options=[name for name in BOUNDED_OPTIONS if name != "plain"],
            calls=("everything",),
            dtypes=("float32",),
            kind=KIND,
        ),
        *cases(
            options=("plain", "shared heads"),
            calls=("no mask", "causal", "everything"),
            dtypes=("mixed_bfloat16", "mixed_float16"),
            kind=KIND,
        ),
    ],
    ids=str,
)
def test_output_and_scores_equal_the_loops(case):
    layer, x = case.layer(), case.inputs()
    table = None if layer.relative_bias is None else _numpy(layer.relative_bias)
    expected, scores = loop_attention.attend_over_axes(
        _numpy(keras.ops.cast(x, layer.compute_dtype)),
        *loop_cosine.weights(layer),
        **case.loop_arguments(),
        attend=loop_product.attending(layer.token_radius, table),
    )
    tolerance = TOLERANCE[case.dtype]
    # The kernel of the backend where there is one, then plain operations.
    _close(case.run(layer, x), expected, tolerance)
    both = case.run(layer, x, return_attention_scores=True)
    _close(both[0], expected, tolerance)
    _close(both[1], scores, tolerance)


OTHERS = {
    "value": [(2, 5, 4), (2, 7, 4)],
    "value of other features": [(2, 5, 4), (2, 3, 6)],
    "value and key": [(2, 5, 4), (2, 7, 6), (2, 7, 3)],
}
CALLS = {
    "no mask": {},
    "causal": {"use_causal_mask": True},
    "value mask": {"value_mask": np.arange(7)[None] < np.array([[2], [7]])},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("tensors", OTHERS)
def test_other_tensors_give_what_the_standard_layer_gives(tensors, call):
    given = [RNG.normal(size=shape).astype("float32") for shape in OTHERS[tensors]]
    arguments = {name: np.array(mask) for name, mask in CALLS[call].items()}
    if "value_mask" in arguments:
        arguments["value_mask"] = arguments["value_mask"][:, : given[1].shape[1]]
    standard = keras.layers.MultiHeadAttention(2, 3)
    bounded = KIND(2, 3, token_radius=1e3)
    standard(*given)
    bounded(*given)
    for name in ("query", "key", "value", "output"):
        dense = getattr(standard, f"_{name}_dense")
        for part in ("kernel", "bias"):
            values = RNG.normal(size=getattr(dense, part).shape)
            getattr(dense, part).assign(values)
            getattr(bounded, f"{name}_{part}").assign(values)
    _close(bounded(*given, **arguments), _numpy(standard(*given, **arguments)), 1e-5)


@pytest.mark.parametrize("call", ["no mask", "everything"])
@pytest.mark.parametrize("options", ["plain", "relative", "shared heads"])
def test_estimates_go_around_the_kernel_and_stay_below_the_certificate(options, call):
    case = Case(options, call, dtype="float32", kind=KIND)
    layer, x = case.layer(), case.inputs().astype("float32")

    def run(points):
        return case.run_copies(layer, points)

    points = np.repeat(x[:1], 2, axis=0)
    found = kl.estimate_lipschitz(run, points, steps=5, restarts=1)
    with plain_attention():
        plain = kl.estimate_lipschitz(run, points, steps=5, restarts=1)
    np.testing.assert_allclose(found.value, plain.value, rtol=1e-5)
    bound = layer.lipschitz(LENGTH, mask=case.visible()).value
    # The attack is evaluated in float32.
    assert 0.0 < found.value <= bound * (1.0 + 1e-5)


def test_decoding_gives_what_the_full_pass_gives():
    for options in ("value dim", "shared heads", "relative, window"):
        layer = Case(options, dtype="float32", kind=KIND).layer()
        x = Case().inputs().astype("float32")
        full = _numpy(layer(x, use_causal_mask=True))
        cache = layer.init_cache(len(x), LENGTH)
        parts = []
        for position in range(LENGTH):
            part, cache = layer.decode(x[:, position : position + 1], cache, position)
            parts.append(_numpy(part))
        _close(np.concatenate(parts, axis=1), full, 1e-5)


def test_tokens_are_projected_onto_the_ball():
    x = RNG.normal(size=(3, 4, 5)) * 10.0 ** RNG.uniform(-3, 3, size=(3, 4, 1))
    sizes = np.linalg.norm(x, axis=-1, keepdims=True)
    found = kl.TokenProjection(2.0)(x.astype("float32"))
    _close(found, x * np.minimum(1.0, 2.0 / sizes), 1e-5)
    assert np.linalg.norm(_numpy(found), axis=-1).max() <= 2.0


@pytest.mark.parametrize(
    "build",
    [
        lambda: KIND(2, 4, token_radius=0.5, max_relative_position=2),
        lambda: KIND(2, 4, token_radius=0.5, lipschitz_bound=1.0, lipschitz_norm="token"),
        lambda: kl.L2MultiHeadAttention(2, 4, token_radius=0.5),
    ],
    ids=["relative", "capped", "by distance"],
)
def test_layers_train_under_a_penalty_and_are_certified(build):
    inputs = keras.Input((LENGTH, FEATURES))
    model = keras.Model(inputs, build()(inputs))
    x = Case().inputs().astype("float32")
    model.compile("sgd", "mse")
    monitor = kl.LipschitzMonitor(penalty=0.1, target=0.01)
    losses = model.fit(x, 0.0 * x, epochs=2, verbose=0, callbacks=[monitor]).history["loss"]
    assert losses[1] < losses[0]
    lower = kl.estimate_lipschitz(model, x, steps=3, restarts=1).value
    # The attack is evaluated in float32.
    assert 0.0 < lower <= kl.certify(model).total * (1.0 + 1e-5)


def test_a_converted_model_gives_the_same_outputs():
    inputs = keras.Input((LENGTH, FEATURES))
    tokens = keras.layers.LayerNormalization()(inputs)
    outputs = keras.layers.MultiHeadAttention(2, 3)(tokens, tokens)
    model = keras.Model(inputs, outputs)
    x = RNG.normal(size=(16, LENGTH, FEATURES)).astype("float32")
    found = kl.convert_attention(model, x[8:], to="bounded", calibration=x[:8])
    assert len(found.replaced) == 1 and not found.kept
    # Normalized tokens have equal sizes: all are inside the ball with its margin.
    assert max(found.touching.values()) == 0.0
    assert found.relative_error is not None and found.relative_error < 1e-5
    assert kl.certify(found.model).is_finite
