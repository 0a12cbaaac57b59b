"""Theorem 7.7 of docs/theory.md: attention whose queries, keys and values are different tensors.

A head is `z -> sum_j P_ij z_j` with probabilities `P_ij` along a row, the softmax of logits that
depend on a query `x_i` and a key `y_j`. Masks may be any, as long as every query sees a key; a
row that averages its tokens in any fixed way is covered as well.
"""

import math
import typing

import numpy as np
import numpy.typing as npt

from keras_lipattn.linalg import SAFETY, operator_norm


class CrossConstants(typing.NamedTuple):
    """What a head's output moves at most, per unit of change of each of its inputs.

    The numbers hold for one query `i`, with changes of keys and values measured by
    `sqrt(sum_j P_ij |change_j|^2)`: that is at most the token norm of the change, and over all
    queries at most `sqrt(n_queries)` times its 2-norm.

    Args:
        query: of the queries.
        key: of the keys.
        value: of the values.
        shared: of one tensor that is both keys and values.
    """

    query: typing.Any
    key: typing.Any
    value: typing.Any
    shared: typing.Any


@np.errstate(over="ignore", invalid="ignore")
def cross_attention_constants(
    query_kernel: npt.ArrayLike,
    key_kernel: npt.ArrayLike,
    *,
    query_radius: float,
    key_radius: float,
    value_radius: float,
    scale: float | None = None,
    query_center: npt.ArrayLike | None = None,
    query_bias: npt.ArrayLike | None = None,
) -> CrossConstants:
    """Theorem 7.7: logits `scale (x_i W_q + b_q) . (y_j W_k)`, tokens in balls.

    Biases of keys and values play no role, neither do the centers of their balls.

    Args:
        query_kernel: shape `(H, D, k)`.
        key_kernel: shape `(H, E, k)`.
        query_radius: radius of the ball that holds every query.
        key_radius: the same for keys.
        value_radius: the same for values.
        scale: factor of the logits, `1 / sqrt(k)` by default.
        query_center: shape `(D,)`, center of the ball of the queries, the origin by default.
        query_bias: shape `(H, k)`.

    Returns:
        `CrossConstants` of arrays `(H,)`; `inf` where a radius that matters is not finite.
    """
    query, key = np.asarray(query_kernel, np.float64), np.asarray(key_kernel, np.float64)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    offset = np.zeros((len(query), query.shape[-1]))
    if query_center is not None:
        offset = offset + np.asarray(query_center, np.float64) @ query
    if query_bias is not None:
        offset = offset + np.asarray(query_bias, np.float64)
    gain = SAFETY * np.asarray(operator_norm(scale * key @ np.swapaxes(query, -1, -2)))
    pull = np.linalg.norm(scale * (key @ offset[..., None])[..., 0], axis=-1)
    # Largest derivative of a logit in its key.
    slope = gain * query_radius + pull
    # The spread of the values along any direction is at most their radius.
    lever = slope * value_radius
    parts = (gain * key_radius * value_radius, lever, np.ones_like(gain), np.hypot(1.0, lever))
    return CrossConstants(*(np.where(np.isnan(part), np.inf, SAFETY * part) for part in parts))


def additive_attention_constants(scale: npt.ArrayLike, *, value_radius: float) -> CrossConstants:
    """The same for logits `sum_d scale_d tanh(x_id + y_jd)`, in which only values need a ball.

    Args:
        scale: shape `(D,)`.
        value_radius: radius of the ball that holds every value.

    Returns:
        `CrossConstants` of floats.
    """
    lever = SAFETY * float(np.linalg.norm(np.asarray(scale, np.float64))) * value_radius
    # The derivative of a logit in its query is half of `scale`, up to half of its size.
    return CrossConstants(0.5 * lever, lever, 1.0, 1.0 + lever)
