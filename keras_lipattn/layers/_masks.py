"""Masks of attention: padding, visible pairs, and the class that decides which theorem applies."""

import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lipattn.bounds.visible_pairs import (
    Cliques,
    mask_cliques,
    mask_degrees,
    require_square,
)
from keras_lipattn.layers._backend import has_value
from keras_lipattn.linalg import cached_by_content

# Far below any score: the own score is at least zero. Finite, so that a row in which everything is
# padded stays finite until it is set to zero.
HIDDEN = -1e30


@dataclass(frozen=True)
class MaskClass:
    """Class of a mask, as the bounds need it.

    Attributes:
        mask: `"full"` (padding included), `"causal"` (padding included, tokens in any order) or
            `"any"`.
        n_keys: For `"any"`, the most other keys a query sees; `None` if unknown.
        n_queries: For `"any"`, the most other queries that see a key; `None` if unknown.
        causal: Whether later tokens are known to be hidden.
        cliques: For `"any"`, the `Cliques` of the mask; `None` if unknown.
        window: For `"any"`, the window if it alone, or with `causal`, decides what is visible.
        tensors: Number of tensors that attention is between: 1 for self-attention, 2 where keys and
            values are another tensor than the queries, 3 where all may differ.
    """

    mask: str
    n_keys: int | None = None
    n_queries: int | None = None
    causal: bool = False
    cliques: Cliques | None = None
    window: int | None = None
    tensors: int = 1

    def intersect(self, other):
        """The class of masks whose pairs are visible under both."""
        degrees = (_least(self.n_keys, other.n_keys), _least(self.n_queries, other.n_queries))
        return MaskClass("any", *degrees, self.causal or other.causal, tensors=self.tensors)

    def arguments(self, tokens):
        """Arguments of `unit_head_bound` for at most `tokens` tokens, `None` if unknown."""
        cliques = self.cliques
        if self.window is not None and tokens is not None:
            if tokens <= self.window:
                return {"mask": "causal" if self.causal else "full"}
            if not self.causal:
                # A key that many queries see on one side is seen by few on the other side.
                root = 2.0 * math.sqrt(min(self.window - 1.0, 0.5 * (tokens - 1.0)))
                cliques = Cliques(root, True)
        degrees = {"n_keys": self.n_keys, "n_queries": self.n_queries}
        return {"mask": self.mask, **degrees, "cliques": cliques}


def _least(a, b):
    return b if a is None else a if b is None else min(a, b)


def mask_class(mask, *, sliding_window=None):
    """`MaskClass` of `mask`: `"full"`, `"causal"`, `"any"`, or an array.

    Arrays have shape `(..., T, T)`, in which either `T` may be 1 and broadcasts. A mask
    `(..., 1, 1)` does not tell the number of tokens: nothing is known of it.

    Raises:
        ValueError: If `mask` is none of these.
    """
    if not isinstance(mask, str):
        return _class_of_array(mask, False, sliding_window)
    if mask not in ("full", "causal", "any"):
        raise ValueError(
            '`mask` must be "full", "causal", "any" or a boolean array of shape `(T, T)`. '
            f"Received: mask={mask!r}"
        )
    causal = mask == "causal"
    if sliding_window is None:
        return MaskClass(mask, causal=causal)
    reach = sliding_window - 1
    seen = reach if causal else 2 * reach
    if mask == "any":
        return MaskClass("any", seen, seen)
    cliques = Cliques((1.0 if causal else 2.0) * math.sqrt(reach), not causal)
    return MaskClass("any", seen, seen, causal, cliques, sliding_window)


def class_of_call(attention_mask, use_causal_mask, sliding_window):
    """`MaskClass` of a call with these arguments.

    Only one mask for all examples that is a constant where the layer is called is known. A mask per
    example is data: the mask of one example must not change the cap of another.
    """
    if attention_mask is None:
        return mask_class("causal" if use_causal_mask else "full", sliding_window=sliding_window)
    if isinstance(attention_mask, np.ndarray) and attention_mask.ndim == 2:
        queries, keys = attention_mask.shape
        # `call` refuses other shapes.
        if queries == keys or 1 in (queries, keys):
            return _class_of_array(attention_mask, use_causal_mask, sliding_window)
    others = mask_class("causal" if use_causal_mask else "any", sliding_window=sliding_window)
    return MaskClass("any").intersect(others)


def _class_of_array(mask, causal, sliding_window):
    """The class of an array, restricted to earlier tokens if `causal` and to a window."""
    sides = np.shape(mask)[-2:]
    if sides == (1, 1):
        others = mask_class("causal" if causal else "any", sliding_window=sliding_window)
        return MaskClass("any").intersect(others)
    mask = np.asarray(mask).astype(bool)
    if len(sides) == 2 and 1 in sides:
        mask = np.broadcast_to(mask, (*mask.shape[:-2], max(sides), max(sides)))
    require_square(mask)
    return cached_by_content(_recognized, mask, causal, sliding_window)


def _recognized(mask, causal, sliding_window):
    position = np.arange(mask.shape[-1])
    lag = position[:, None] - position
    if causal:
        mask = mask & (lag >= 0)
    if sliding_window is not None:
        mask = mask & (np.abs(lag) < sliding_window)
    mask = mask | (lag == 0)
    if mask.all():
        return MaskClass("full")
    hides_later = not mask[..., lag < 0].any()
    if hides_later and mask[..., lag > 0].all():
        return MaskClass("causal", causal=True)
    if mask[..., lag < 0].all() and not mask[..., lag > 0].any():
        # A causal mask for the tokens in reverse order.
        return MaskClass("causal")
    return MaskClass("any", *mask_degrees(mask), hides_later, mask_cliques(mask))


@dataclass(frozen=True)
class Mask:
    """What is visible in one call, and what else enters the scores.

    Attributes:
        valid: Boolean `(B, T)`, false where a token is padding, or `None`.
        attention_mask: Boolean, broadcastable to `(B, H, T, T)`, or `None`.
        use_causal_mask: Whether later tokens are hidden.
        sliding_window: `None`, or the distance from which on tokens are hidden.
        log_weights: Logarithms of the weights of the tokens, `(B, T)`, or `None`.
        relative_bias: `RelativeBias` of the scores, or `None`.
        valid_keys: Boolean `(B, S)` where keys are other tokens than queries, or `None`.
        is_cross: Whether keys are other tokens than queries. `valid` is about queries alone then.
        keeps_diagonal: Whether a token always sees itself.
    """

    valid: Any = None
    attention_mask: Any = None
    use_causal_mask: bool = False
    sliding_window: int | None = None
    log_weights: Any = None
    relative_bias: Any = None
    valid_keys: Any = None
    is_cross: bool = False
    keeps_diagonal: bool = True

    @property
    def hides_padding_only(self):
        """Whether every valid token sees every valid token."""
        return (
            self.attention_mask is None and not self.use_causal_mask and self.sliding_window is None
        )

    @property
    def may_hide_all(self):
        """Whether the row of a query that is not padded may see no key."""
        if self.is_cross:
            return not self.hides_padding_only or self.valid_keys is not None
        return self.attention_mask is not None and not self.keeps_diagonal

    def visible(self, rows, columns, attention_mask):
        """Boolean tensor, broadcastable to `(B, H, R, T)`, of visible pairs; `None` if all are.

        With `keeps_diagonal` a token always sees itself: without it attention by distance on all of
        space has no Lipschitz constant.

        Args:
            rows: Positions of the queries, an integer tensor `(R,)`.
            columns: Positions of the keys, an integer tensor `(T,)`.
            attention_mask: The rows of the attention mask, or `None`.
        """
        lag = ops.expand_dims(rows, 1) - ops.expand_dims(columns, 0)
        parts = []
        if attention_mask is not None:
            parts.append(attention_mask)
        if self.use_causal_mask:
            parts.append(lag >= 0)
        if self.sliding_window is not None:
            parts.append(ops.abs(lag) < self.sliding_window)
        if not parts:
            return None
        visible = parts[0]
        for part in parts[1:]:
            visible = ops.logical_and(visible, part)
        if not self.keeps_diagonal:
            return visible
        return ops.logical_or(visible, ops.equal(lag, 0))

    def visible_pairs(self, queries, keys=None):
        """`visible` for all pairs of so many queries and keys: padding does not count."""
        if self.hides_padding_only:
            return None
        rows = ops.arange(queries, dtype="int32")
        columns = rows if keys is None else ops.arange(keys, dtype="int32")
        return self.visible(rows, columns, self.attention_mask)

    def visible_keys(self, queries, keys):
        """The keys that every query sees, broadcastable to `(B, H, T, S)`; `None` if all."""
        visible = self.visible_pairs(queries, keys)
        valid = self.valid_keys if self.is_cross else self.valid
        if valid is None:
            return visible
        valid = valid[:, None, None, :]
        return valid if visible is None else ops.logical_and(visible, valid)

    def softmax(self, scores):
        """Softmax of scores `(B, H, T, S)` over the keys that a query sees, padding hidden.

        A row that sees nothing is zero. Those of padded queries may also be uniform: their outputs
        are set to zero later.
        """
        _, _, queries, keys = ops.shape(scores)
        visible = self.visible_keys(queries, keys)
        weights = masked_softmax(scores, visible)
        if visible is None or not self.may_hide_all:
            return weights
        return ops.where(ops.any(visible, axis=-1, keepdims=True), weights, 0.0)


def masked_softmax(scores, visible):
    """Softmax over the last axis, of a single entry too, where `visible`, or everywhere."""
    if visible is not None:
        scores = ops.where(visible, scores, HIDDEN)
    if scores.shape[-1] == 1:
        # Keras warns of a softmax over a single entry.
        return ops.ones_like(scores)
    return ops.softmax(scores, axis=-1)


def check_token_masks(query_shape, axes, token_masks, of="query"):
    """Raises a `ValueError` for a mask of tokens that does not fit the tensor that it is for.

    Args:
        query_shape: Static shape `(B, ..., D)`.
        axes: `AttentionAxes` of the tensor.
        token_masks: Masks per token by name, each a tensor or `None`.
        of: Name of the tensor.
    """
    for name, mask in token_masks.items():
        if mask is None:
            continue
        # One mask may serve all examples.
        shared = axes.is_plain and tuple(mask.shape)[:1] == (1,)
        batch = 1 if shared else query_shape[0]
        if not _fits(mask.shape, (batch, *query_shape[1:-1])):
            raise ValueError(
                f"`{name}` must have the shape of `{of}` without its last axis, "
                f"{tuple(query_shape[:-1])}. Received: {name} of shape {tuple(mask.shape)}"
            )


def check_attention_mask(query_shape, axes, num_heads, attention_mask, key_shape=None):
    """Raises a `ValueError` for a mask of pairs that does not fit queries and keys.

    Args:
        query_shape: Static shape `(B, ..., D)`.
        axes: `AttentionAxes` of the query.
        num_heads: Number of heads.
        attention_mask: A tensor or `None`.
        key_shape: Static shape of the keys; that of the query by default.
    """
    if attention_mask is None:
        return
    shape = tuple(attention_mask.shape)
    legal = axes.mask_shapes(query_shape, num_heads, key_shape)
    if not _broadcasts(shape, legal.get(len(shape))):
        *others, last = map(str, legal.values())
        raise ValueError(
            f"`attention_mask` must have shape {', '.join(others)} or {last}, or 1 in place of any "
            f"of these sides. Received: attention_mask of shape {shape}"
        )


def _broadcasts(shape, full):
    return full is not None and _fits(
        shape, [1 if own == 1 else side for own, side in zip(shape, full, strict=True)]
    )


def _fits(shape, expected):
    return len(shape) == len(expected) and all(
        side is None or full is None or side == full
        for side, full in zip(shape, expected, strict=True)
    )


def valid_tokens(masks):
    """The tokens `(B, T)` that every given mask calls valid; `None` if none is given."""
    valid = None
    for mask in masks:
        if mask is not None:
            mask = ops.cast(mask, "bool")
            valid = mask if valid is None else ops.logical_and(valid, mask)
    return valid


def check_token_weights(weights, lipschitz_bound):
    """Raises a `ValueError` for negative weights, and for any weights under a cap."""
    if lipschitz_bound is not None:
        raise ValueError(
            "`lipschitz_bound` caps a bound for tokens of equal weight: a layer that is called "
            "with `token_weights` cannot have it. "
            f"Received: lipschitz_bound={lipschitz_bound}"
        )
    if isinstance(weights, keras.KerasTensor) or not has_value(weights):
        return
    least = float(ops.min(weights)) if 0 not in weights.shape else 0.0
    if least < 0.0:
        raise ValueError(f"`token_weights` must not be negative. Received: a weight of {least}")


def log_weights(weights, valid, dtype):
    """What weights add to the scores of their keys, `(B, T)`.

    In a graph a negative weight becomes NaN, and so does every output that sees it. At padded
    tokens, those of weight 0 included, value and derivative are 0.
    """
    weights = ops.cast(weights, dtype)
    return ops.log(ops.where(valid, weights, ops.ones_like(weights)))
