"""L2 attention in float64 loops, written from its formula and from nothing in the package.

With tokens `x_i`, head `h` and `A_h = W_Q,h W_Q,h^T / sqrt(key_dim)`:

    P_ij     = exp(-|(x_i - x_j) W_Q,h|^2 / sqrt(key_dim) + b_h[i - j])
               / (sum of these over the j that i sees)
    output_i = sum_h sum_j P_ij x_j A_h W_V,h W_O,h + bias
"""

import itertools
import math
from typing import Any

import numpy as np


def sees(i, j, *, attention_mask: Any = None, causal=False, window=None):
    """Whether query `i` sees key `j`, padding apart: a token always sees itself."""
    if i == j:
        return True
    if causal and j > i:
        return False
    if window is not None and abs(i - j) >= window:
        return False
    return attention_mask is None or bool(attention_mask[i][j])


def attend(
    x,
    kernels,
    bias=None,
    *,
    valid=None,
    attention_mask: Any = None,
    causal=False,
    window=None,
    relative_bias: Any = None,
    radius=None,
):
    """One sequence.

    Args:
        x: tokens, `(T, D)`.
        kernels: `(D, H, K)`, `(D, H, V)` and `(H, V, ...)`.
        bias: `(...)` or `None`.
        valid: `(T,)`, false where a token is padding.
        attention_mask: `(T, T)` or `(H, T, T)`.
        causal: whether later tokens are hidden.
        window: distance from which on tokens are hidden.
        relative_bias: `(H, 2 * R)`, of the keys R to 1 places after a query, then 1 to R before.
        radius: of the ball that tokens are projected onto, or `None`.

    Returns:
        `(output, scores)` of shapes `(T, ...)` and `(H, T, T)`.
    """
    query, value, output = (np.asarray(kernel, np.float64) for kernel in kernels)
    x = in_ball(np.asarray(x, np.float64), radius)
    length, heads, key_dim = len(x), query.shape[1], query.shape[2]
    flat = output.reshape(heads, output.shape[1], -1)
    result = np.zeros((length, flat.shape[-1]))
    scores = np.zeros((heads, length, length))
    for h in range(heads):
        pull = query[:, h] @ query[:, h].T / math.sqrt(key_dim)
        mask = attention_mask if np.ndim(attention_mask) != 3 else attention_mask[h]
        for i in range(length):
            if valid is not None and not valid[i]:
                continue
            keys = [
                j
                for j in range(length)
                if (valid is None or valid[j])
                and sees(i, j, attention_mask=mask, causal=causal, window=window)
            ]
            squares = [np.square((x[i] - x[j]) @ query[:, h]).sum() for j in keys]
            logits = [
                -square / math.sqrt(key_dim) + by_place(relative_bias, h, i - j)
                for j, square in zip(keys, squares, strict=True)
            ]
            weights = [math.exp(logit - max(logits)) for logit in logits]
            mixed = np.zeros(x.shape[1])
            for j, weight in zip(keys, weights, strict=True):
                scores[h, i, j] = weight / math.fsum(weights)
                mixed += scores[h, i, j] * x[j]
            result[i] += mixed @ pull @ value[:, h] @ flat[h]
    for i in range(length):
        if bias is not None and (valid is None or valid[i]):
            result[i] += np.asarray(bias, np.float64).reshape(-1)
    return result.reshape(length, *output.shape[2:]), scores


def in_ball(x, radius):
    """Tokens `(T, D)` projected onto the ball about the origin; as they are without a radius."""
    if radius is None:
        return x
    return np.array([row * min(1.0, radius / max(np.linalg.norm(row), radius)) for row in x])


def by_place(relative_bias, head, lag):
    """What is added to a score at distance `lag = i - j`."""
    if relative_bias is None or lag == 0:
        return 0.0
    reach = len(relative_bias[head]) // 2
    if lag > 0:
        return relative_bias[head][reach - 1 + min(lag, reach)]
    return relative_bias[head][reach - min(-lag, reach)]


def attend_over_axes(
    x,
    kernels,
    bias,
    *,
    axes,
    valid=None,
    attention_mask: Any = None,
    causal=False,
    window=None,
    attend: Any = attend,
):
    """A batch `(B, ..., D)` with attention over some axes, every other index a sequence of its own.

    `attend` is the function of one sequence. `axes` may be in any order, which is the one of the
    axes in masks and scores; the tokens of a sequence are in row-major order.

    Returns:
        `(output, scores)`, `(B, ..., O)` and `(B, ..., H, queries..., keys...)` as Keras has them.
    """
    x = np.asarray(x, np.float64)
    axes, heads = [axis % x.ndim for axis in axes], kernels[0].shape[1]
    sides = [x.shape[axis] for axis in axes]
    pairs = None
    if attention_mask is not None:
        pairs = pairs_of_sequences(attention_mask, x.shape, axes, heads)
    result: Any = None
    all_scores: Any = None
    for other, places in sequences(x.shape, axes):
        output, scores = attend(
            np.array([x[place] for place in places]),
            kernels,
            bias,
            valid=None if valid is None else [valid[place] for place in places],
            attention_mask=None if pairs is None else pairs[other],
            causal=causal,
            window=window,
        )
        if result is None:
            result = np.zeros((*x.shape[:-1], *output.shape[1:]))
            outer = [side for axis, side in enumerate(x.shape[:-1]) if axis not in axes]
            all_scores = np.zeros((*outer, heads, *sides, *sides))
        for place, row in zip(places, output, strict=True):
            result[place] = row
        for (i, query), (j, key) in itertools.product(enumerate(places), repeat=2):
            own = tuple(query[axis] for axis in axes) + tuple(key[axis] for axis in axes)
            for h in range(heads):
                all_scores[(*other, h, *own)] = scores[h, i, j]
    return result, all_scores


def sequences(shape, axes):
    """For each index of the axes without attention the places of its tokens, in row-major order."""
    rank = len(shape) - 1
    others = [axis for axis in range(rank) if axis not in axes]
    for other in itertools.product(*(range(shape[axis]) for axis in others)):
        places = []
        for position in itertools.product(*(range(shape[axis]) for axis in sorted(axes))):
            place = dict(zip((*others, *sorted(axes)), (*other, *position), strict=True))
            places.append(tuple(place[axis] for axis in range(rank)))
        yield other, places


def pairs_of_sequences(mask, shape, axes, heads):
    """The pairs `(H, T, T)` that a mask leaves visible, by the indices without attention.

    The mask broadcasts to `(B, ..., H, queries..., keys...)`, with axes of queries and keys in the
    order of `axes`; where it has less axes, those before the queries are the first ones. With
    several axes it may also be `(T, T)` or `(B, T, T)` of the flattened tokens.
    """
    mask, pairs = np.asarray(mask), {}
    flattened = mask.ndim < 2 * len(axes)
    lead = mask.ndim - (2 if flattened else 2 * len(axes))
    for other, places in sequences(shape, axes):
        seen = np.zeros((heads, len(places), len(places)), bool)
        for h, i, j in np.ndindex(seen.shape):
            own = (i, j)
            if not flattened:
                own = [places[i][axis] for axis in axes] + [places[j][axis] for axis in axes]
            index = [*(*other, h)[:lead], *own]
            seen[h, i, j] = bool(
                mask[tuple(min(at, side - 1) for at, side in zip(index, mask.shape, strict=True))]
            )
        pairs[other] = seen
    return pairs


def capped(kernels, cap):
    """The three kernels with the norms of their operators cut down to `cap`."""
    query, value, output = (np.asarray(kernel, np.float64) for kernel in kernels)
    matrices = (
        query.reshape(query.shape[0], -1),
        value.reshape(value.shape[0], -1),
        output.reshape(output.shape[0] * output.shape[1], -1),
    )
    norms = [np.linalg.svd(matrix, compute_uv=False)[0] for matrix in matrices]
    return [
        kernel * min(1.0, cap / norm)
        for kernel, norm in zip((query, value, output), norms, strict=True)
    ]
