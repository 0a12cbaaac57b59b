"""Layers and their inverses undo each other, and their certificates hold."""

# The annotations of TensorFlow and numpy do not cover what is passed and returned here.
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false, reportOptionalOperand=false, reportOptionalSubscript=false

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.invertible_cases import BY_NAME, CASES, flat_jacobian
from keras import ops

import keras_lipattn as kl

# Solutions have a residual of a few rounding errors, which the inverse magnifies by at most 10 for
# the coefficient 0.9, and the next layer of the transformer by 2 more.
INVERSE_TOLERANCE = {"float64": 1e-13, "float32": 5e-5}


def numpy(tensor):
    return ops.convert_to_numpy(tensor)


def parts(layer):
    return getattr(layer, "layers", [layer])


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request):
    """A layer in float64, its mask and inputs."""
    return request.param.build()


def test_inverse_undoes_forward_and_forward_undoes_inverse(case):
    check_inverse(*case, "float64")


@pytest.mark.parametrize("name", ["attention", "token norm", "perceptron", "transformer"])
def test_inverse_in_single_precision(name):
    check_inverse(*BY_NAME[name].build("float32"), "float32")


def check_inverse(layer, x, mask, dtype):
    tolerance = INVERSE_TOLERANCE[dtype]
    found = layer.inverse(layer(x, mask=mask), mask=mask)
    np.testing.assert_allclose(numpy(found.solution), x, rtol=0, atol=tolerance)
    assert numpy(found.converged).all()
    assert (numpy(found.steps) >= 1).all()
    other = layer.inverse(2.0 * x, mask=mask).solution
    np.testing.assert_allclose(numpy(layer(other, mask=mask)), 2.0 * x, rtol=0, atol=tolerance)


def test_log_determinant_is_that_of_the_jacobian_and_the_inverse_has_minus_it(case):
    layer, x, mask = case
    value = numpy(layer.log_det_jacobian(x, mask).value)
    assert np.isfinite(value).all()
    forward = flat_jacobian(layer, x, mask)
    np.testing.assert_allclose(value, np.linalg.slogdet(forward)[1], rtol=1e-9, atol=1e-12)
    y = numpy(layer(x, mask=mask))
    # Derivatives of the inverse come from a second iteration with the same tolerance.
    backward = flat_jacobian(lambda y, mask: layer.inverse(y, mask).solution, y, mask)
    np.testing.assert_allclose(np.linalg.slogdet(backward)[1], -value, rtol=1e-8, atol=1e-10)


def test_same_function_in_training_and_at_inference(case):
    layer, x, mask = case
    np.testing.assert_array_equal(
        numpy(layer(x, mask=mask, training=True)), numpy(layer(x, mask=mask, training=False))
    )


def test_certificates_hold_for_the_map_and_its_inverse(case):
    layer, x, mask = case
    forward = flat_jacobian(layer, x, mask)
    stretch = np.linalg.norm(forward, 2, axis=(1, 2)).max()
    assert layer.lipschitz(norm="l2").value >= stretch
    shrinkage = np.linalg.norm(np.linalg.inv(forward), 2, axis=(1, 2)).max()
    assert layer.inverse_lipschitz(norm="l2").value >= shrinkage
    own = layer.lipschitz(norm=layer.norm).value
    assert own <= np.prod([1.0 + part.coefficient for part in parts(layer)]) * (1.0 + 1e-8)
    assert layer.inverse_lipschitz(layer.norm).value <= layer.inverse_constant * (1.0 + 1e-8)
    assert layer.lipschitz(norm="linf").value > 1.0


@pytest.mark.parametrize("norm", ["l2", "token"])
def test_certificate_of_a_model_is_the_product_of_its_layers(norm):
    layer, _, _ = BY_NAME["transformer"].build("float32")
    model = keras.Sequential([keras.Input((None, 4)), layer, keras.layers.Rescaling(3.0)])
    certificate = kl.certify(model, norm=norm)
    assert certificate.total == pytest.approx(3.0 * layer.lipschitz(norm=norm).value, rel=1e-6)
    assert certificate.threat_model.max_tokens == 5


def test_bound_in_the_graph_is_above_the_certificate_and_close(case):
    layer, _, _ = case
    for part in parts(layer):
        in_graph = float(part._branch.graph_bound(part.norm, part.max_sequence_length))
        certified = part._branch.lipschitz(part.norm, part.max_sequence_length).value
        # Caps in the graph use norms with an allowance of 1e-6, the certificate uses exact norms.
        assert certified <= in_graph * (1.0 + 2e-6)
        # The host minimizes over scalings of the heads and counts the tokens in a window. Gram
        # iteration alone exceeds a norm by one part in a thousand.
        assert in_graph <= 1.3 * certified


def test_padded_tokens_pass_through_and_do_not_affect_others():
    for name in ("padded", "perceptron", "mixed branch", "transformer"):
        layer, x, mask = BY_NAME[name].build()
        noisy = np.where(mask[..., None], x, np.nan)
        y = numpy(layer(noisy, mask=mask))
        np.testing.assert_array_equal(y[mask], numpy(layer(x, mask=mask))[mask])
        assert np.isnan(y[~mask]).all()
        short = layer(x[:1, :3])
        np.testing.assert_allclose(y[:1, :3], numpy(short), rtol=1e-12)
        np.testing.assert_allclose(
            numpy(layer.log_det_jacobian(x, mask).value)[:1],
            numpy(layer.log_det_jacobian(x[:1, :3]).value),
            rtol=1e-10,
        )


def test_later_tokens_do_not_reach_earlier_ones_of_a_causal_inverse():
    layer, x, _ = BY_NAME["causal"].build()
    y = numpy(layer(x))
    changed = y.copy()
    changed[:, -1] += 1.0
    before, after = (numpy(layer.inverse(t).solution)[:, :-1] for t in (y, changed))
    np.testing.assert_allclose(before, after, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["attention", "token norm", "perceptron", "transformer"])
def test_true_error_is_under_the_error_bound(name):
    layer, x, mask = BY_NAME[name].build()
    y = layer(x, mask=mask)
    for tolerance in (1e-2, 1e-5):
        found = layer.inverse(y, mask=mask, tolerance=tolerance)
        error = numpy(found.solution) - x
        if layer.norm == "l2":
            error = np.linalg.norm(error.reshape(len(x), -1), axis=1)
        else:
            error = np.linalg.norm(error, axis=-1).max(axis=1)
        assert (error <= numpy(found.error_bound)).all()
        assert (numpy(found.residual) <= numpy(found.error_bound) * (1 + 1e-9) / 0.5).all()


def test_layer_stays_invertible_while_it_trains():
    layer, x, _ = BY_NAME["attention"].build("float32")
    model = keras.Sequential([keras.Input((5, 4)), layer])
    model.compile(keras.optimizers.Adam(0.3), "mse")
    model.fit(np.repeat(x, 8, 0), 5.0 * np.repeat(x, 8, 0), epochs=3, batch_size=4, verbose=0)
    jacobian = flat_jacobian(layer, x)
    second_term = jacobian - np.eye(jacobian.shape[-1])
    assert np.linalg.norm(second_term, 2, axis=(1, 2)).max() <= 0.9 * (1.0 + 1e-5)
    y = numpy(model(x))
    back = numpy(layer.inverse(y).solution)
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-4 * np.abs(x).max())


def test_branch_of_zeros_is_the_identity_and_can_be_trained():
    layer, x, _ = BY_NAME["attention"].build("float32")
    for weight in layer.trainable_variables:
        weight.assign(ops.zeros_like(weight.value))
    np.testing.assert_array_equal(numpy(layer(x)), x)
    with tf.GradientTape() as tape:
        loss = ops.sum(layer(x) ** 2)
    for gradient in tape.gradient(loss, layer.trainable_variables):
        assert np.isfinite(gradient.numpy()).all()


def test_inverse_in_a_graph_equals_the_eager_one_and_compiles():
    layer, x, mask = BY_NAME["padded"].build("float32")
    y = layer(x, mask=mask)
    eager = layer.inverse(y, mask=mask)
    for jit_compile in (False, True):
        # AutoGraph would take longer than the rest of this test.
        inverse = tf.function(layer.inverse, autograph=False, jit_compile=jit_compile)
        compiled = inverse(y, mask=mask)
        np.testing.assert_allclose(compiled.solution, eager.solution, rtol=0, atol=1e-5)
        assert compiled.converged.numpy().all()


def test_unknown_batch_and_length_in_a_graph():
    case = BY_NAME["attention"]
    layer, x, _ = case.build("float32")

    @tf.function(input_signature=[tf.TensorSpec((None, None, 4))], autograph=False)
    def there_and_back(x):
        return layer.inverse(layer(x)).solution

    np.testing.assert_allclose(there_and_back(x[:, :3]), x[:, :3], rtol=0, atol=1e-5)
    assert np.isnan(there_and_back(np.concatenate([x, x], axis=1)).numpy()).all()


def test_condensed_layer_inverts_and_certifies_what_it_runs_with():
    layer, x, _ = BY_NAME["transformer"].build("float32")
    model = keras.Sequential([keras.Input((5, 4)), layer])
    plain = numpy(model(x))
    with kl.condensed(model):
        y = model(x)
        assert layer.lipschitz().value <= 1.5 * 1.9 * (1.0 + 1e-6)
        back = layer.inverse(y).solution
    np.testing.assert_allclose(numpy(back), x, rtol=0, atol=1e-4)
    # Exact norms replace those of Gram iteration: the second terms grow by about 1 in 1000.
    np.testing.assert_allclose(numpy(y), plain, rtol=0, atol=0.3)


@pytest.mark.parametrize("name", ["padded", "mixed branch", "transformer"])
def test_saved_model_is_the_same_function(name, tmp_path):
    layer, x, _ = BY_NAME[name].build("float32")
    model = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Masking(), layer])
    x[0, -1] = 0.0
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    y = model(x)
    np.testing.assert_array_equal(numpy(loaded(x)), numpy(y))
    back = loaded.layers[-1].inverse(y).solution
    np.testing.assert_allclose(numpy(back), x, rtol=0, atol=5e-5)


def test_nested_sequences_add_up():
    layer, x, _ = BY_NAME["transformer"].build()
    inner = kl.InvertibleSequential(layer.layers, dtype="float64")
    nested = kl.InvertibleSequential([inner], dtype="float64")
    np.testing.assert_array_equal(numpy(nested(x)), numpy(layer(x)))
    assert nested.inverse_constant == pytest.approx(layer.inverse_constant)
    found, other = (each.inverse(layer(x)) for each in (nested, layer))
    np.testing.assert_allclose(numpy(found.error_bound), numpy(other.error_bound), rtol=1e-9)
