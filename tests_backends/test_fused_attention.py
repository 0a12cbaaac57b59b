"""Attention through a backend's kernel gives what attention by plain operations gives."""

import itertools

import keras
import numpy as np
import pytest
from helpers.layer_cases import Case, cases
from keras import ops

import keras_lipattn as kl
from keras_lipattn.layers import _block_layout, _distance_attention, _fused_attention
from keras_lipattn.layers._autodiff import vector_jacobian
from keras_lipattn.layers._fused_attention import (
    fused_attention,
    plain_attention,
    use_fused_kernel,
)
from keras_lipattn.layers._masks import Mask
from tools.benchmark._backend_accuracy import row_error

# What rounding weights and outputs to the dtype leaves, relative to the largest value: scores are
# as accurate in each of them. PyTorch keeps weights in the dtype between its passes, twice rounded.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-7, "float16": 2.0**-10}
LENGTH, KEY_DIM = 37, 6
_rng = np.random.default_rng(1)
_pairs = _rng.random((2, 1, LENGTH, LENGTH)) < 0.4
_valid = np.arange(LENGTH)[None] < np.array([[20], [LENGTH]])
MASKS = {
    "full": {},
    "causal": {"use_causal_mask": True},
    "window": {"sliding_window": 3},
    "pairs": {"attention_mask": _pairs},
    "nothing visible": {"attention_mask": np.zeros((1, 1, LENGTH, LENGTH), bool)},
    "padding": {"valid": _valid},
    "causal padding": {"valid": _valid, "use_causal_mask": True},
    "all": {
        "valid": _valid,
        "use_causal_mask": True,
        "sliding_window": 9,
        "attention_mask": _pairs,
    },
}


def _mask(name):
    given = dict(MASKS[name])
    for key in ("valid", "attention_mask"):
        if key in given:
            given[key] = ops.convert_to_tensor(given[key])
    return Mask(**given)


def _rounded(y, dtype):
    """Numbers of a dtype, in float64."""
    y = ops.cast(ops.cast(ops.convert_to_tensor(y, "float32"), dtype), "float32")
    return np.asarray(ops.convert_to_numpy(y), np.float64)


def _weights(y, name):
    """The rows of attention in float64 by their formula."""
    given = MASKS[name]
    lag = np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))
    visible = np.broadcast_to(given.get("attention_mask", True), (2, 1, LENGTH, LENGTH))
    if given.get("use_causal_mask"):
        visible = visible & (lag >= 0)
    if "sliding_window" in given:
        visible = visible & (abs(lag) < given["sliding_window"])
    visible = visible | (lag == 0)
    if "valid" in given:
        visible = visible & given["valid"][:, None, None, :]
    scores = -np.square(y[..., :, None, :] - y[..., None, :, :]).sum(axis=-1)
    scores = np.where(visible, scores, -np.inf)
    peak = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(peak), peak, 0.0))
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)


@pytest.mark.parametrize(
    ("name", "dtype", "spread"),
    [
        *itertools.product(MASKS, TOLERANCE, (1.0,)),
        *itertools.product(("full", "all"), TOLERANCE, (0.1, 30.0)),
    ],
)
def test_the_kernel_computes_the_formula(name, dtype, spread):
    y = _rounded(spread * _rng.normal(size=(2, 3, LENGTH, KEY_DIM)), dtype)
    expected = np.matmul(_weights(y, name), y)
    found = fused_attention(ops.convert_to_tensor(y, "float32"), _mask(name), dtype)
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    found = ops.convert_to_numpy(ops.cast(found, "float32"))
    assert np.isfinite(found).all()
    if "valid" in MASKS[name]:
        # Rows of padding are set to zero by the layer.
        rows = np.broadcast_to(_valid[:, None, :, None], expected.shape)
        found, expected = found[rows], expected[rows]
    tolerance = TOLERANCE[dtype] * np.abs(y).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("center", [0.0, 5.0])
def test_rows_are_accurate_where_squares_cancel(dtype, center):
    # Rounding a row to bfloat16 twice moves it by 2**-8 at most, that is 4e-3. Not the scores.
    assert row_error(dtype, center=center) < 1e-2


@pytest.mark.parametrize("center", [0.0, 5.0, 30.0])
def test_three_parts_of_the_bias_are_as_accurate_as_the_rounding_of_rows(center):
    # A row rounded to bfloat16 twice is wrong by 2**-8 at most, that is 4e-3. Not the scores.
    assert row_error("bfloat16", center=center) < 4e-3
    if center >= 5.0:
        # Squares of 16 features of 5 are 400: one part leaves errors of the scores near 1.
        assert row_error("bfloat16", center=center, parts=1) > 0.1
    if center == 30.0:
        assert row_error("bfloat16", center=center, parts=2) > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["full", "all"])
def test_gradients_are_those_of_plain_operations(name, dtype):
    y = _rounded(_rng.normal(size=(2, 3, LENGTH, KEY_DIM)), dtype)
    upstream = _rng.normal(size=y.shape)
    weights = _weights(y, name)
    # d/dy of sum(upstream * P y) with P from the scores 2 y_i.y_j - |y_j|^2.
    if "valid" in MASKS[name]:
        upstream = upstream * _valid[:, None, :, None]
    above = np.einsum("bhid,bhjd->bhij", upstream, y)
    slope = weights * (above - np.sum(weights * above, axis=-1, keepdims=True))
    pairs = slope @ y + np.swapaxes(slope, -1, -2) @ y
    expected = 2.0 * (pairs - slope.sum(axis=-2)[..., None] * y)
    expected = expected + np.swapaxes(weights, -1, -2) @ upstream
    found = _gradient(
        lambda y: fused_attention(y, _mask(name), dtype), y.astype("float32"), upstream
    )
    # Weights, their slopes and sums over 37 of them are rounded to the dtype on the way.
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}[dtype]
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def _gradient(function, y, upstream):
    def loss(y):
        return ops.sum(
            ops.cast(function(y), "float32") * ops.convert_to_tensor(upstream, "float32")
        )

    if keras.backend.backend() == "jax":
        import jax  # pyright: ignore[reportMissingImports]

        return np.asarray(jax.grad(loss)(y))
    point = ops.convert_to_tensor(y).requires_grad_()
    loss(point).backward()
    return point.grad.numpy()


@pytest.fixture
def through_the_kernel(monkeypatch):
    """Sends the attention of every layer through the kernel, unless it must be plain."""
    taken = []

    def taken_by_kernel(y, mask, dtype):
        taken.append(y.shape)
        return fused_attention(y, mask, dtype)

    def unless_plain(y, dtype, flash_attention):
        return not _fused_attention.must_be_plain()

    monkeypatch.setattr(_distance_attention, "fused_attention", taken_by_kernel)
    monkeypatch.setattr(_distance_attention, "use_fused_kernel", unless_plain)
    return taken


@pytest.mark.parametrize(
    "case",
    cases(options=("plain", "window", "two axes", "one token"), dtypes=("float32",)),
    ids=str,
)
def test_layers_give_the_same_with_and_without(case, through_the_kernel):
    layer, x = case.layer(), case.inputs().astype("float32")
    with plain_attention():
        plain = ops.convert_to_numpy(case.run(layer, x))
    assert not through_the_kernel
    found = ops.convert_to_numpy(case.run(layer, x))
    assert through_the_kernel
    np.testing.assert_allclose(found, plain, rtol=0, atol=1e-5 * max(1.0, np.abs(plain).max()))


def test_estimates_go_around_the_kernel(through_the_kernel):
    layer, x = Case(dtype="float32").layer(), Case().inputs().astype("float32")
    found = kl.estimate_lipschitz(layer, x, steps=3, restarts=1)
    count = len(through_the_kernel)
    # The value of the function is looked at once, before any derivative.
    assert count == 1
    with plain_attention():
        expected = kl.estimate_lipschitz(layer, x, steps=3, restarts=1)
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-6)


def test_flash_attention_is_honored():
    for length in (16, 4096):
        y = ops.zeros((1, 1, length, 8))
        assert not use_fused_kernel(y, "float32", False)
        assert not use_fused_kernel(y, "float64", True)
        if keras.backend.backend() == "torch":
            # Found faster from about 1024 tokens on; asked for, it is taken at any length.
            assert use_fused_kernel(y, "float32", True)
            assert use_fused_kernel(y, "float32", None) == (length > 1024)
        else:
            # On a CPU, JAX has none.
            assert not use_fused_kernel(y, "bfloat16", True)


@pytest.mark.parametrize("blocks", [False, True])
def test_estimates_run_over_long_sequences(blocks, monkeypatch):
    monkeypatch.setattr(_distance_attention, "BLOCKWISE_MIN_LENGTH", 1 if blocks else 10**9)
    layer, x = Case(dtype="float32").layer(), Case().inputs().astype("float32")
    found = kl.estimate_lipschitz(layer, x, steps=5, restarts=1)
    monkeypatch.setattr(_distance_attention, "BLOCKWISE_MIN_LENGTH", 10**9)
    expected = kl.estimate_lipschitz(layer, x, steps=5, restarts=1)
    # The ascent follows second derivatives: wrong ones would lead it elsewhere.
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-4)


@pytest.mark.parametrize(("window", "causal"), [(None, False), (None, True), (4, False), (4, True)])
def test_blocks_have_the_values_and_gradients_of_the_full_matrix(window, causal, monkeypatch):
    # Several steps of several blocks.
    monkeypatch.setattr(_block_layout, "BLOCK_SIZES", (4, 4))
    monkeypatch.setattr(_block_layout, "BLOCK_ENTRIES", 400)
    rng = np.random.default_rng(0)
    y, direction = (
        ops.convert_to_tensor(rng.normal(size=(1, 2, 40, 3)).astype("float32")) for _ in range(2)
    )
    pairs = ops.convert_to_tensor(rng.random((1, 2, 40, 40)) < 0.5)
    for attention_mask in (None, pairs):
        mask = Mask(attention_mask=attention_mask, use_causal_mask=causal, sliding_window=window)
        expected, found = (
            (f(y), vector_jacobian(f, y, direction, differentiable=False))
            for f in (
                lambda y, mask=mask: ops.matmul(_distance_attention.attention_weights(y, mask), y),
                lambda y, mask=mask: _distance_attention.attend_blockwise(y, mask),
            )
        )
        for a, b in zip(expected, found, strict=True):
            # Float32 sums of different order.
            a, b = (ops.convert_to_numpy(tensor) for tensor in (a, b))
            np.testing.assert_allclose(b, a, atol=2e-5)
