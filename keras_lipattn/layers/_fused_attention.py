"""Attention by distance through a backend's own kernel for dot-product attention.

Softmax ignores a term constant in the key, so `softmax_j(-|y_i - y_j|^2)` is dot-product attention
of `2 y_i` over keys with a bias `-|y_j|^2` of their own. No kernel takes such a bias at less than a
matrix of `T * T` entries. It rides along as further features instead, which queries meet with
constants: one feature in float32, three in half precision, where each holds what the ones before
left over. A product of features is exact in the float32 in which kernels add, so the scores are as
accurate as the tokens.

Kernels have a first derivative in reverse mode, nothing else: `plain_attention` keeps them out
where more is needed.
"""

import contextlib
import threading

import keras
from keras import ops

from keras_lipattn.layers._masks import HIDDEN

# What queries meet the parts of the bias with: steps wide enough for the squares of all float16,
# the finest last. bfloat16 has the range of float32.
_STEPS = {"float32": (1.0,), "bfloat16": (1.0, 1.0, 1.0), "float16": (2.0**15, 2.0**4, 1.0)}
# The own score is at least zero, that of any other key at most the own one: this far below, weights
# are zero in float32.
_PADDED = -1e4
_LOWEST = {"float32": HIDDEN, "bfloat16": HIDDEN, "float16": -6e4}
_ALIGNMENT = 8
# The most features of a head which cuDNN takes on every card.
_MOST_FEATURES = 128
# On a CPU the kernel of PyTorch pays off from here on; below, the features cost more than it saves.
_LONG = 1024
_plain = threading.local()


@contextlib.contextmanager
def plain_attention():
    """Context in which attention is made of operations that have derivatives of every kind."""
    before = must_be_plain()
    _plain.on = True
    try:
        yield
    finally:
        _plain.on = before


def must_be_plain():
    return getattr(_plain, "on", False)


def handwritten_gradient_suffices():
    """Whether attention in blocks has the derivatives that are asked for in this thread.

    Its gradient is written by hand; JAX alone differentiates that in turn.
    """
    return not must_be_plain() or keras.backend.backend() == "jax"


def use_fused_kernel(y, dtype, flash_attention):
    """Whether attention over `y` `(B, H, T, k)` should go through the backend's kernel.

    Args:
        y: What `fused_attention` takes.
        dtype: The compute dtype.
        flash_attention: The layer's argument: `False` for never, `True` for wherever the backend
            has a kernel that keeps scores accurate, `None` for where it is expected to pay.
    """
    _, _, length, key_dim = y.shape
    if flash_attention is False or must_be_plain() or dtype not in _STEPS:
        return False
    backend = keras.backend.backend()
    if backend == "torch":
        import torch  # pyright: ignore[reportMissingImports]

        if torch.cuda.is_available():
            # In float32 it may round its factors to TensorFloat-32, features and all.
            return dtype != "float32"
        return flash_attention is True or length >= _LONG
    if backend == "jax":
        import jax  # pyright: ignore[reportMissingImports]

        # The one kernel is cuDNN's, for half precision. Elsewhere `dot_product_attention` is what
        # the plain operations are, and slower on a CPU.
        fits = _padded_features(key_dim, dtype) <= _MOST_FEATURES
        return jax.default_backend() in ("gpu", "cuda") and dtype != "float32" and fits
    return False


def fused_attention(y, mask, dtype):
    """`softmax_j(-|y_i - y_j|^2) y` by the kernel, `(B, H, T, k)` in `dtype`.

    Args:
        y: Tensor `(B, H, T, k)`, float32, entries of `dtype`, near the origin.
        mask: `Mask` of the call.
        dtype: Dtype the kernel computes in.
    """
    half = -0.5 * ops.sum(ops.square(y), axis=-1, keepdims=True)
    if mask.valid is not None:
        valid = mask.valid[:, None, :, None]
        y = ops.where(valid, y, ops.zeros_like(y))
        half = ops.where(valid, half, _PADDED)
    steps = _STEPS[dtype]
    values = ops.cast(y, dtype)
    ones = ops.ones_like(values[..., :1])
    key_dim = y.shape[-1]
    # The kernel adds scores in float32, where the scale of two is exact.
    attended = ops.dot_product_attention(
        *(
            _laid_out(features, _padded_features(key_dim, dtype))
            for features in (
                [values, *(ones * step for step in steps)],
                [values, *_parts(half, steps, dtype)],
                [values],
            )
        ),
        bias=_bias(y, mask, dtype),
        scale=2.0,
        is_causal=_is_causal(mask),
    )
    return ops.transpose(attended, (0, 2, 1, 3))[..., :key_dim]


def _parts(number, steps, dtype):
    """Tensors of `dtype` whose sum, weighted with `steps`, is `number` to float32's precision.

    The derivative takes the last one, whose step is 1: through a step of `2**15` it would leave the
    range of float16.
    """
    parts, rest = [], number
    for step in steps[:-1]:
        part = ops.stop_gradient(ops.cast(rest / step, dtype))
        parts.append(part)
        rest = rest - step * ops.cast(part, number.dtype)
    return [*parts, ops.cast(rest, dtype)]


def _laid_out(features, size):
    """Features side by side, as `(B, T, H, size)`, zeros at the end."""
    missing = size - sum(part.shape[-1] for part in features)
    joined = ops.pad(ops.concatenate(features, axis=-1), ((0, 0), (0, 0), (0, 0), (0, missing)))
    return ops.transpose(joined, (0, 2, 1, 3))


def _padded_features(key_dim, dtype):
    return -(-(key_dim + len(_STEPS[dtype])) // _ALIGNMENT) * _ALIGNMENT


def _is_causal(mask):
    """Whether the kernel's own causal mask is all there is besides padding."""
    return mask.use_causal_mask and mask.attention_mask is None and mask.sliding_window is None


def _bias(y, mask, dtype):
    """Zero for visible pairs and very negative for hidden ones; `None` if there are none."""
    if mask.hides_padding_only or _is_causal(mask):
        return None
    positions = ops.arange(ops.shape(y)[2], dtype="int32")
    visible = mask.visible(positions, positions, mask.attention_mask)
    if len(visible.shape) == 2:
        visible = visible[None, None]
    return ops.cast(ops.where(visible, 0.0, _LOWEST[dtype]), dtype)
