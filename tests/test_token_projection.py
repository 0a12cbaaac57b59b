"""The projection of tokens: values, derivatives, constants, rounding, masks, ranges, export."""

# The annotations of TensorFlow and numpy do not cover what is passed and returned here.
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lipattn as kl
from keras_lipattn.certification.registry import LAYER_RULES

DTYPES = ("float64", "float32", "mixed_bfloat16", "mixed_float16")
NORMS = ("l2", "token", "linf")


def _numpy(tensor):
    return keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float64"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 5), (2, 3, 4, 1)])
def test_tokens_outside_move_to_the_edge_and_others_stay(dtype, shape):
    layer = kl.TokenProjection(1.5, dtype=dtype)
    x = np.random.default_rng(0).normal(size=shape)
    x[0] *= 0.1
    x = _numpy(keras.ops.cast(x, layer.compute_dtype))
    sizes = np.linalg.norm(x, axis=-1, keepdims=True)
    found = layer(keras.ops.cast(x, layer.compute_dtype))
    assert found.dtype == layer.compute_dtype
    inside = sizes < 1.5 * 0.98
    np.testing.assert_array_equal(np.where(inside, _numpy(found) - x, 0.0), 0.0)
    tolerance = {"float64": 1e-13, "float32": 1e-5}.get(dtype, 0.03)
    expected = x * np.minimum(1.0, 1.5 / np.maximum(sizes, 1e-300))
    np.testing.assert_allclose(_numpy(found), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 64, 768])
def test_projected_tokens_are_inside_the_ball_after_rounding(dtype, width):
    rng = np.random.default_rng(1)
    for radius in (0.3, 1.0, 7.7):
        layer = kl.TokenProjection(radius, dtype=dtype)
        scales = np.geomspace(0.5, 1e3, 200)[:, None] * radius / np.sqrt(width)
        x = keras.ops.cast(rng.normal(size=(200, width)) * scales, layer.compute_dtype)
        assert np.linalg.norm(_numpy(layer(x)), axis=-1).max() <= radius


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e10, 1e28])
def test_tokens_of_any_size_stay_finite(size):
    layer = kl.TokenProjection(2.0)
    x = tf.constant([[size, 0.0], [0.6 * size, -0.8 * size]], "float32")
    with tf.GradientTape() as tape:
        tape.watch(x)
        output = layer(x)
        loss = tf.reduce_sum(output)
    expected = np.minimum(np.linalg.norm(_numpy(x), axis=-1), 2.0)
    np.testing.assert_allclose(np.linalg.norm(_numpy(output), axis=-1), expected, rtol=1e-5)
    assert np.isfinite(tape.gradient(loss, x)).all()


@pytest.mark.parametrize("scale", [0.3, 1.0 - 1e-6, 1.0 + 1e-6, 1.3, 40.0])
def test_the_derivative_is_that_of_a_projection_at_the_edge_too(scale):
    layer = kl.TokenProjection(1.0, dtype="float64")
    rng = np.random.default_rng(2)
    unit = rng.normal(size=4)
    unit /= np.linalg.norm(unit)
    x = tf.constant(scale * unit[None])
    with tf.GradientTape() as tape:
        tape.watch(x)
        output = layer(x)
    found = tape.jacobian(output, x).numpy()[0, :, 0]
    outside = scale > 1.0
    expected = (np.eye(4) - np.outer(unit, unit)) / scale if outside else np.eye(4)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_a_model_learns_through_the_edge():
    # All tokens start outside, where only the direction of a token matters.
    model = keras.Sequential([keras.layers.Dense(4), kl.TokenProjection(1.0)])
    rng = np.random.default_rng(3)
    x = rng.normal(size=(64, 4)) * 5.0
    target = x / np.linalg.norm(x, axis=-1, keepdims=True)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    history = model.fit(x, target, epochs=30, verbose=0).history["loss"]
    assert history[-1] < 0.05 * history[0]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("width", [1, 2, 3, 16])
def test_the_constants_are_attained(norm, width):
    layer = kl.TokenProjection(1.0, dtype="float64")
    layer.build((None, 2, width))
    bound = layer.lipschitz(norm=norm)
    assert bound.kind == "certified" and layer.graph_bound(norm=norm) == bound.value
    # A row of the derivative just outside, where its absolute sum is largest.
    angle = 0.5 * np.arctan(np.sqrt(width - 1.0))
    x = np.full(width, np.cos(angle) / np.sqrt(max(width - 1.0, 1.0)))
    x[0] = np.sin(angle)
    if norm != "linf" or width == 1:
        x *= 0.5
    jac = np.eye(width)
    if np.linalg.norm(x) > 0.9:
        jac = jac - np.outer(x, x)
    found = np.abs(jac).sum(axis=1).max() if norm == "linf" else np.linalg.norm(jac, 2)
    assert found <= bound.value * (1.0 + 1e-9)
    assert found >= bound.value * (1.0 - 1e-6)


def test_masks_are_passed_on_and_the_shape_is_kept():
    x = np.ones((1, 3, 2), "float32")
    x[0, 2] = 0.0
    masked = keras.layers.Masking()(x)
    output = kl.TokenProjection(0.5)(masked)
    np.testing.assert_array_equal(output._keras_mask, [[True, True, False]])
    assert kl.TokenProjection(0.5)(keras.Input((None, 4))).shape == (None, None, 4)


@pytest.mark.parametrize("radius", [0.0, -1.0, float("inf"), None, "1"])
def test_radii_out_of_range_are_refused(radius):
    with pytest.raises(ValueError, match=r"`radius` must be a positive number\. Received: radius="):
        kl.TokenProjection(radius)


def test_the_constant_needs_a_built_layer_and_a_norm():
    with pytest.raises(ValueError, match="Received: built=False"):
        kl.TokenProjection(1.0).lipschitz()
    layer = kl.TokenProjection(1.0)
    layer.build((None, 4))
    with pytest.raises(ValueError, match="Received: norm='l3'"):
        layer.lipschitz(norm="l3")


def test_a_model_with_it_reloads(tmp_path):
    inputs = keras.Input((3, 4))
    model = keras.Model(inputs, kl.TokenProjection(0.7)(inputs))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    np.testing.assert_array_equal(again(x), model(x))
    assert again.layers[-1].radius == 0.7


def test_an_export_carries_its_certificate(tmp_path):
    inputs = keras.Input((3, 4))
    x = kl.BoundedMultiHeadAttention(2, 2)(kl.TokenProjection(0.7)(inputs))
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(x))
    certificate, path = kl.export_saved_model(model, tmp_path / "served", verbose=False)
    assert certificate.is_finite
    served = tf.saved_model.load(str(path))
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    (found,) = served.signatures["serving_default"](tf.constant(x)).values()
    np.testing.assert_allclose(found, model(x), atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_standard_attention_after_it_has_a_constant(norm):
    assert kl.TokenProjection in LAYER_RULES
    inputs = keras.Input((5, 4))
    alone = keras.layers.MultiHeadAttention(2, 3)
    bare = keras.Model(inputs, alone(inputs, inputs))
    assert not kl.certify(bare, norm=norm).is_finite
    x = kl.TokenProjection(1.0)(inputs)
    assert kl.certify(keras.Model(inputs, alone(x, x)), norm=norm, check=True).is_finite
    # Where the input is in a smaller ball, that one counts.
    small, large = (
        kl.certify(keras.Model(inputs, alone(x, x)), norm=norm, input_radius=radius).total
        for radius in (0.3, 2.0)
    )
    assert small < 0.8 * large
