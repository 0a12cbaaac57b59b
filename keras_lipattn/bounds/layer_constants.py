"""Section 8 of docs/theory.md: Lipschitz constants of ordinary layers.

`norm` is `"l2"` (2-norm of all entries), `"token"` (largest Euclidean norm along the last axis)
or `"linf"` (largest absolute entry). Tokens are the positions along all axes but the last. Every
constant is for inference; kernels and scales that hold NaN give `inf`.
"""

import math
import typing

import numpy as np
import numpy.typing as npt

from keras_lipattn.bounds.convolution_symbol import symbol_norm
from keras_lipattn.bounds.lipschitz_bound import NORMS
from keras_lipattn.linalg import SAFETY, operator_norm

# One integer per spatial axis.
Sizes = typing.Sequence[int]

# Largest slopes, rounded up; each holds in all three norms. Parameters at Keras's defaults.
ACTIVATIONS = {
    "celu": 1.0,
    "elu": 1.0,
    "gelu": 1.128905,
    "gelu_tanh": 1.128994,
    "hard_sigmoid": 0.166667,
    "hard_silu": 1.5,
    "hard_tanh": 1.0,
    "leaky_relu": 1.0,
    "linear": 1.0,
    "log_sigmoid": 1.0,
    "mish": 1.088499,
    "relu": 1.0,
    "relu6": 1.0,
    "selu": 1.758100,
    "sigmoid": 0.25,
    "silu": 1.099840,
    "soft_shrink": 1.0,
    "softmax": 0.5,
    "softplus": 1.0,
    "softsign": 1.0,
    "sparse_plus": 1.0,
    "sparse_sigmoid": 0.5,
    "squareplus": 1.0,
    "tanh": 1.0,
    "tanh_shrink": 1.0,
}

# Smallest slopes, rounded down, where they are negative.
LEAST_SLOPES = {
    "gelu": -0.128905,
    "gelu_tanh": -0.128994,
    "hard_silu": -0.5,
    "mish": -0.113,
    "silu": -0.099840,
}

# Reasons why an activation has no finite constant.
UNBOUNDED_ACTIVATIONS = {
    "exponential": "the exponential has unbounded slope",
    "glu": "a gate multiplies two functions of the input and has unbounded slope",
    "hard_shrink": "hard shrinkage is discontinuous",
    "sparsemax": "sparsemax in Keras 3.15 is not the projection: it jumps with its support",
    "threshold": "a threshold is discontinuous",
}


def activation_constant(name: str, norm: str = "l2", *, width: int | None = None) -> float:
    """Constant of an activation with Keras's default parameters.

    Softmax and log-softmax act along the last axis.

    Args:
        name: name of the activation in `keras.activations`; `"gelu_tanh"` is the tanh
            approximation, `"groupsort"` and `"maxmin"` sort entries.
        norm: see the module.
        width: length of the last axis, needed for `"log_softmax"`.

    Returns:
        A float.

    Raises:
        KeyError: if `name` is unknown or has no finite constant.
    """
    _check_norm(norm)
    if name in ("groupsort", "maxmin"):
        return 1.0
    if name == "log_softmax" and width is not None:
        # Rows of I - 1 p^T; both norms are convex in p, hence largest at a corner.
        return 2.0 if norm == "linf" else SAFETY * math.sqrt(width)
    return ACTIVATIONS[name]


def slope_constant(slope: npt.ArrayLike) -> float:
    """Constant of a leaky activation, `max(1, |slope|)`: leaky ReLU, PReLU, ELU.

    Args:
        slope: slope or slopes on the negative side.

    Returns:
        A float.
    """
    # Not Python's `max`, which drops a NaN.
    return _clean(float(np.maximum(1.0, np.max(np.abs(slope)))))


def convolution_constant(
    kernel: npt.ArrayLike,
    norm: str = "l2",
    *,
    strides: int | Sizes = 1,
    dilation: int | Sizes = 1,
    groups: int = 1,
    input_shape: Sizes | None = None,
    max_work: float = 2e9,
) -> float:
    """Constant of a convolution with zero padding of any kind, or none.

    Args:
        kernel: shape `(k_1, ..., k_r, in / groups, out)`. A depthwise kernel
            `(k_1, ..., k_r, in, multiplier)` is `reshape(k_1, ..., k_r, 1, in * multiplier)`
            with `groups=in`.
        norm: see the module.
        strides: an integer or one per axis.
        dilation: an integer or one per axis.
        groups: number of groups of channels.
        input_shape: spatial shape `(n_1, ..., n_r)`; when given, the frequencies of its size are
            tried. Without it, or with strides, those of the symbol are, which hold for all sizes.
        max_work: the frequency bound is skipped when it needs more multiplications.

    Returns:
        A float. Exact for `"l2"` when stride and kernel are equal (patches).

    Raises:
        ValueError: if shapes do not fit.
    """
    _check_norm(norm)
    kernel = np.asarray(kernel, np.float64)
    rank = kernel.ndim - 2
    if rank < 1 or kernel.shape[-1] % groups:
        raise ValueError(
            "`kernel` must have shape `(k_1, ..., k_r, in / groups, out)` with `out` divisible by "
            f"`groups`. Received: kernel.shape={kernel.shape}, groups={groups}"
        )
    if not np.isfinite(kernel).all():
        return math.inf
    sizes, (depth, out) = kernel.shape[:rank], kernel.shape[rank:]
    strides, dilation = _per_axis(strides, rank), _per_axis(dilation, rank)
    if norm == "linf":
        return SAFETY * float(np.abs(kernel).sum(axis=tuple(range(rank + 1))).max())
    # (groups, offsets, in / groups, out / groups)
    blocks = kernel.reshape(-1, depth, groups, out // groups).transpose(2, 0, 1, 3)
    matrix = float(operator_norm(blocks.reshape(groups, -1, out // groups)).max())
    if norm == "token":
        # A token's norm is taken over all groups: a block-diagonal matrix for each offset.
        offsets = float(operator_norm(blocks).max(axis=0).sum())
        return SAFETY * min(offsets, math.sqrt(math.prod(sizes)) * matrix)
    overlap = math.prod(
        -(-k * math.gcd(s, d) // s) for k, s, d in zip(sizes, strides, dilation, strict=True)
    )
    best = math.sqrt(overlap) * matrix
    if input_shape is not None and overlap > 1:
        best = min(best, _frequency_norm(blocks, sizes, dilation, input_shape, max_work))
    strided = any(stride > 1 for stride in strides)
    if overlap > 1 and groups == 1 and set(dilation) == {1} and (strided or input_shape is None):
        # The frequencies above ignore the strides.
        best = min(best, symbol_norm(kernel, strides, max_work))
    return SAFETY * best


def _frequency_norm(
    blocks: np.ndarray, sizes: Sizes, dilation: Sizes, input_shape: Sizes, max_work: float
) -> float:
    """Largest norm over the frequencies of the circular convolution on an enlarged grid.

    The zero-padded convolution is the circular one, restricted to some rows and columns.
    """
    groups, _, depth, out = blocks.shape
    spans = [(k - 1) * d + 1 for k, d in zip(sizes, dilation, strict=True)]
    grid = [n + span - 1 for n, span in zip(input_shape, spans, strict=True)]
    if groups * math.prod(grid) * depth * out * min(depth, out) > max_work:
        return math.inf
    spread = np.zeros((groups, *spans, depth, out))
    spread[(slice(None), *(slice(None, None, d) for d in dilation))] = blocks.reshape(
        groups, *sizes, depth, out
    )
    axes = tuple(range(1, 1 + len(sizes)))
    # The kernel is real: the other half of the frequencies has the same norms.
    spectrum = np.fft.rfftn(spread, s=grid, axes=axes)
    return float(np.linalg.norm(spectrum, 2, axis=(-2, -1)).max())


def batch_normalization_constant(
    gamma: npt.ArrayLike, variance: npt.ArrayLike, epsilon: float
) -> float:
    """BatchNormalization at inference: `max |gamma| / sqrt(variance + epsilon)`, any norm.

    Args:
        gamma: scales, shape `(d,)`.
        variance: moving variances, shape `(d,)`.
        epsilon: `epsilon` of the layer.

    Returns:
        A float, `inf` unless every `variance + epsilon` is positive.
    """
    total = np.asarray(variance, np.float64) + epsilon
    if not (total > 0.0).all():
        return math.inf
    slopes = np.abs(np.asarray(gamma, np.float64)) / np.sqrt(total)
    return _clean(SAFETY * float(slopes.max()))


def center_normalization_constant(gamma: npt.ArrayLike, norm: str = "l2") -> float:
    """CenterNormalization: `d / (d - 1) diag(gamma) (x - mean(x))` over the last axis.

    Args:
        gamma: scales, shape `(d,)`, `d >= 2`.
        norm: see the module.

    Returns:
        A float, exact in every norm.

    Raises:
        ValueError: if `d < 2`.

    Reference: Qi et al., "LipsFormer", ICLR 2023.
    """
    _check_norm(norm)
    gamma = np.asarray(gamma, np.float64)
    size = gamma.size
    if size < 2:
        raise ValueError(
            f"`gamma` must have at least two entries. Received: gamma.shape={gamma.shape}"
        )
    if not np.isfinite(gamma).all():
        return math.inf
    if norm == "linf":
        return SAFETY * 2.0 * float(np.abs(gamma).max())
    return size / (size - 1.0) * centered_diagonal_norm(gamma)


def centered_diagonal_norm(gamma: np.ndarray) -> float:
    """`|| diag(gamma) (I - 11^T / d) ||`, exact up to rounding upwards.

    Its square is the largest eigenvalue of `D^2 - g g^T / d` with `D = diag(gamma)`, the root of
    `1 + sum_i (g_i^2 / d) / (x - g_i^2)` between the two largest `g_i^2`. The sum decreases there.
    The result is the upper end of the last interval of a bisection.

    Args:
        gamma: float64, finite, shape `(d,)`.

    Returns:
        A float.
    """
    scale = float(np.abs(gamma).max(initial=0.0))
    if scale == 0.0 or gamma.size == 1:
        return 0.0
    squares = np.sort(np.square(gamma / scale))
    low, high = squares[-2], squares[-1]
    for _ in range(100):
        middle = 0.5 * (low + high)
        with np.errstate(divide="ignore"):
            sums = 1.0 + float(np.sum(squares / (middle - squares))) / squares.size
        if not low < middle < high:
            break
        # Between the root and the largest square the sum is negative.
        low, high = (middle, high) if sums > 0.0 else (low, middle)
    return SAFETY * scale * math.sqrt(high)


def average_pooling_constant(
    norm: str, *, pool_size: Sizes, strides: Sizes, input_shape: Sizes, padding: str
) -> float:
    """Average pooling that does not count padded positions.

    Args:
        norm: see the module.
        pool_size: shape `(r,)`, window.
        strides: shape `(r,)`.
        input_shape: spatial shape `(n_1, ..., n_r)`.
        padding: `"valid"` or `"same"`.

    Returns:
        A float.
    """
    _check_norm(norm)
    if norm != "l2":
        return 1.0
    loads = _loads(pool_size, strides, input_shape, padding)
    return SAFETY * math.sqrt(math.prod(float(weighted.max()) for _, weighted in loads))


def max_pooling_constant(
    norm: str,
    *,
    pool_size: Sizes,
    strides: Sizes,
    input_shape: Sizes,
    padding: str,
    channels: int,
) -> float:
    """Max pooling.

    Args:
        norm: see the module.
        pool_size: shape `(r,)`, window.
        strides: shape `(r,)`.
        input_shape: spatial shape `(n_1, ..., n_r)`.
        padding: `"valid"` or `"same"`.
        channels: length of the last axis.

    Returns:
        A float.
    """
    _check_norm(norm)
    if norm == "linf":
        return 1.0
    if norm == "token":
        return SAFETY * math.sqrt(min(math.prod(pool_size), channels))
    loads = _loads(pool_size, strides, input_shape, padding)
    return SAFETY * math.sqrt(math.prod(int(count.max()) for count, _ in loads))


def global_average_constant(norm: str, tokens: int) -> float:
    """Mean over at least `tokens` valid tokens."""
    _check_norm(norm)
    return SAFETY / math.sqrt(tokens) if norm == "l2" else 1.0


def regroup_constant(norm: str, merged: int) -> float:
    """A permutation of entries in which a new token takes them from at most `merged` old ones.

    Flattening `T` tokens has `merged = T`. A permutation that moves the last axis has
    `merged` equal to the new last dimension.
    """
    _check_norm(norm)
    return SAFETY * math.sqrt(merged) if norm == "token" else 1.0


def conversion_constant(source: str, target: str, *, tokens: int, width: int) -> float:
    """Largest ratio of the norm `target` to the norm `source` of a `(tokens, width)` array.

    A map that is `L`-Lipschitz from the norm `a` of its input to the norm `b` of its output is
    `L * conversion_constant(c, a, ...)`-Lipschitz from `c` to `b`.

    Args:
        source: norm that is known.
        target: norm that is wanted.
        tokens: number of tokens.
        width: length of the last axis.

    Returns:
        A float, 1 when `target` is the smaller norm.
    """
    _check_norm(source)
    _check_norm(target)
    entries = {"l2": 1, "token": tokens, "linf": tokens * width}
    return SAFETY * math.sqrt(max(1.0, entries[source] / entries[target]))


def _loads(
    pool_size: Sizes, strides: Sizes, input_shape: Sizes, padding: str
) -> typing.Iterator[tuple[np.ndarray, np.ndarray]]:
    """Per axis and position: windows that contain it, and the sum of 1 / (their true sizes)."""
    for size, stride, length in zip(pool_size, strides, input_shape, strict=True):
        if padding == "same":
            windows = -(-length // stride)
            first = -(max((windows - 1) * stride + size - length, 0) // 2)
        elif padding == "valid":
            windows, first = (length - size) // stride + 1, 0
        else:
            raise ValueError(f'`padding` must be "valid" or "same". Received: padding={padding!r}')
        count, weighted = np.zeros(length, int), np.zeros(length)
        for window in range(windows):
            start = first + window * stride
            inside = slice(max(start, 0), min(start + size, length))
            count[inside] += 1
            weighted[inside] += 1.0 / (inside.stop - inside.start)
        yield count, weighted


def _per_axis(value: int | Sizes, rank: int) -> tuple[int, ...]:
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank:
        raise ValueError(f"One value or {rank} are needed. Received: {value}")
    return values


def _clean(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _check_norm(norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"`norm` must be one of {sorted(NORMS)}. Received: norm={norm!r}")
