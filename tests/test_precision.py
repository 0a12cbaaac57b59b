"""Training, bounds and outputs under every dtype policy."""

import math
from typing import Any

import keras
import numpy as np
import pytest
from helpers import export_cases
from sklearn import datasets

import keras_lipattn as kl
from precision import POLICIES, deviations, table

MANTISSA = {"float64": 53, "float32": 24, "mixed_float16": 11, "mixed_bfloat16": 8}


@pytest.fixture(scope="module", autouse=True)
def client():
    with export_cases.one_serving_process():
        yield


def digits(examples=256):
    bunch: Any = datasets.load_digits()
    return (bunch.images[:examples] / 16.0).astype("float32"), bunch.target[:examples]


def build():
    inputs = keras.Input((8, 8))
    x = kl.SpectralDense(16, name="embed")(inputs)
    y = kl.L2MultiHeadAttention(2, 8, spectral_norm=2.0, lipschitz_bound=1.5, name="attention")(x)
    x = kl.Residual(0.3, name="sum")([x, y])
    x = keras.layers.Flatten()(x)
    return keras.Model(inputs, kl.SpectralDense(10, spectral_norm=None, name="logits")(x))


def built_under(policy):
    keras.utils.set_random_seed(5)
    keras.config.set_dtype_policy(policy)
    try:
        return build()
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="module", params=["float64", "mixed_float16", "mixed_bfloat16"])
def trained(request):
    """A model trained under a policy with monitor, penalty and caps, and what was recorded."""
    model: Any = built_under(request.param)
    model.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    monitor = kl.LipschitzMonitor(penalty=0.05, target={"logits": 1.0, "attention": 0.5})
    model.fit(*digits(), batch_size=32, epochs=6, verbose=0, callbacks=[monitor])
    return request.param, model, monitor


def test_training_lowers_the_loss_under_finite_bounds(trained):
    policy, model, monitor = trained
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    loss = model.history.history["loss"]
    assert np.isfinite(loss).all() and loss[-1] < 0.7 * loss[0]
    assert all(np.isfinite(values).all() for values in monitor.history.values())
    assert monitor.infinite == {}
    # Caps hold in every epoch, whatever the precision.
    assert max(monitor.history["lipschitz_embed"]) <= 1.0
    assert max(monitor.history["lipschitz_attention"]) <= 1.5
    weights = "float64" if policy == "float64" else "float32"
    for variable in (
        *model.trainable_variables,
        *model.get_layer("logits").non_trainable_variables,
    ):
        assert variable.dtype == (weights if variable.trainable else "float32")


def test_the_certificate_is_for_the_weights_as_they_are_cast(trained):
    policy, model, _ = trained
    layer = model.get_layer("logits")
    as_run = keras.ops.convert_to_numpy(
        keras.ops.cast(keras.ops.cast(layer.kernel, layer.compute_dtype), "float64")
    )
    # An oracle of its own; the certificate adds a safety of at most a millionth.
    norm = np.linalg.norm(as_run, 2)
    assert norm <= kl.certify(model).row("logits").constant <= norm * (1.0 + 2e-6)
    rounded = not np.array_equal(as_run, layer.kernel.numpy())
    assert rounded == (policy != "float64")


def test_no_two_inputs_pass_the_certificate_by_more_than_rounding(trained):
    policy, model, _ = trained
    total = kl.certify(model).total
    x, _ = digits(64)
    pairs = np.random.default_rng(3).permutation(64)
    images, others = x.astype(np.float64), x[pairs].astype(np.float64)
    outputs = np.asarray(model.predict(x, verbose=0)).astype(np.float64)
    moved = np.linalg.norm(outputs - outputs[pairs], axis=-1)
    distance = np.linalg.norm((images - others).reshape(64, -1), axis=-1)
    # Each output errs by some units of the dtype it is computed in.
    rounding = 16.0 * 2.0 ** -MANTISSA[policy] * (1.0 + np.abs(outputs).max()) * math.sqrt(10.0)
    assert (moved <= total * distance + rounding).all()


def test_deviations_shrink_with_the_precision_and_stay_below_the_allowance():
    model = built_under("float32")
    x, _ = digits(128)
    rows = list(deviations(build, model, x))
    assert [row.policy for row in rows] == list(POLICIES)
    largest = [row.largest for row in rows]
    assert largest[0] < largest[1] < largest[2] < 0.1
    assert largest[0] < 1e-5
    for row in rows:
        assert row.median <= row.largest <= row.allowance
        assert 0.0 < row.constant < math.inf
    assert rows[0].radius > rows[1].radius >= rows[2].radius
    assert len(table(rows).splitlines()) == 2 + len(POLICIES)
