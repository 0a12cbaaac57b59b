"""Who sees whom: padding, masks, and the class of mask that decides which theorem applies."""

from dataclasses import dataclass

import numpy as np
from keras import ops

from keras_lipattn.bounds.unit_head import mask_degrees

# Far below any score: the own token's score is at least zero. Finite, so that a row in which
# everything is padded stays finite until it is set to zero.
HIDDEN = -1e30


@dataclass(frozen=True)
class Visibility:
    """Class of a mask, as the bounds want it.

    Attributes:
        mask: `"full"` (padding included), `"causal"` (padding included) or `"any"`.
        n_keys: For `"any"`, the most other keys a query sees; `None` if unknown.
        n_queries: For `"any"`, the most other queries that see a key; `None` if unknown.
        causal: Whether later tokens are known to be hidden.
    """

    mask: str
    n_keys: int | None = None
    n_queries: int | None = None
    causal: bool = False

    def within(self, other):
        """The class of what both this and another `Visibility` leave visible."""
        degrees = (_least(self.n_keys, other.n_keys), _least(self.n_queries, other.n_queries))
        return Visibility("any", *degrees, self.causal or other.causal)


def _least(a, b):
    return b if a is None else a if b is None else min(a, b)


def classify(mask, *, sliding_window=None):
    """`Visibility` of `mask`: `"full"`, `"causal"`, `"any"`, or what `degrees_of` takes.

    A window is narrower than what the theorems of full and causal masks speak of (their column
    sums run over all tokens), so it makes any mask one that is known by its degrees only.

    Raises:
        ValueError: If `mask` is none of these.
    """
    degrees = (None, None)
    if not isinstance(mask, str):
        degrees, mask = degrees_of(mask), "any"
    if mask not in ("full", "causal", "any"):
        raise ValueError(
            '`mask` must be "full", "causal", "any" or a boolean array of shape `(T, T)`. '
            f"Received: mask={mask!r}"
        )
    causal = mask == "causal"
    if sliding_window is None:
        return Visibility(mask, *degrees, causal)
    reach = sliding_window - 1
    seen = reach if causal else 2 * reach
    n_keys, n_queries = (seen if d is None else min(d, seen) for d in degrees)
    return Visibility("any", n_keys, n_queries, causal)


def degrees_of(mask):
    """The degrees of an array `(..., T, T)`, in which either `T` may be 1 and broadcasts.

    A mask `(..., 1, 1)` leaves the number of tokens open: its degrees are `(None, None)`.
    """
    sides = np.shape(mask)[-2:]
    if sides == (1, 1):
        return None, None
    if len(sides) == 2 and 1 in sides:
        length = sides[0] if sides[1] == 1 else sides[1]
        mask = np.broadcast_to(mask, (*np.shape(mask)[:-2], length, length))
    return mask_degrees(mask)


def visible_pairs(rows, columns, *, attention_mask, use_causal_mask, sliding_window):
    """Boolean tensor, broadcastable to `(B, H, R, T)`, of the pairs a mask leaves visible.

    The diagonal is always visible: without it no Lipschitz constant exists. `None` if all is.

    Args:
        rows: Positions of the queries, an integer tensor `(R,)`.
        columns: Positions of the keys, an integer tensor `(T,)`.
        attention_mask: Boolean tensor broadcastable to `(B, H, R, T)`, or `None`.
        use_causal_mask: Whether later keys are hidden.
        sliding_window: `None`, or the distance from which on keys are hidden.
    """
    lag = ops.expand_dims(rows, 1) - ops.expand_dims(columns, 0)
    parts = []
    if attention_mask is not None:
        parts.append(attention_mask)
    if use_causal_mask:
        parts.append(lag >= 0)
    if sliding_window is not None:
        parts.append(ops.abs(lag) < sliding_window)
    if not parts:
        return None
    visible = parts[0]
    for part in parts[1:]:
        visible = ops.logical_and(visible, part)
    return ops.logical_or(visible, ops.equal(lag, 0))


def check_masks(query_shape, axes, num_heads, token_masks, attention_mask):
    """Raises a `ValueError` for a mask that does not fit the query.

    Args:
        query_shape: Static shape `(B, ..., D)`.
        axes: `AttentionAxes` of the query.
        num_heads: Number of heads.
        token_masks: Masks per token by name, each a tensor or `None`.
        attention_mask: A tensor or `None`.
    """
    for name, mask in token_masks.items():
        if mask is None:
            continue
        # One mask may serve all examples.
        shared = axes.is_plain and tuple(mask.shape)[:1] == (1,)
        batch = 1 if shared else query_shape[0]
        if not _fits(mask.shape, (batch, *query_shape[1:-1])):
            raise ValueError(
                f"`{name}` must have the shape of `query` without its last axis, "
                f"{tuple(query_shape[:-1])}. Received: {name} of shape {tuple(mask.shape)}"
            )
    if attention_mask is None:
        return
    shape = tuple(attention_mask.shape)
    legal = axes.mask_shapes(query_shape, num_heads)
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
    """The tokens `(B, T)` which every given mask calls valid; `None` if none is given."""
    valid = None
    for mask in masks:
        if mask is not None:
            mask = ops.cast(mask, "bool")
            valid = mask if valid is None else ops.logical_and(valid, mask)
    return valid
