"""Attention as it is defined, in float64, and its constants by the theorems of `bounds`."""

import math
from typing import Any

import numpy as np
import scipy.special

from keras_lipattn.bounds.compact import (
    combine_heads,
    dot_product_constants,
    dot_product_layer_constant,
)
from keras_lipattn.bounds.cosine import certified_cosine_bound, fold
from keras_lipattn.bounds.multihead import certified_layer_bound
from keras_lipattn.bounds.unit_head import unit_head_bound
from keras_lipattn.bounds.visible_pairs import Cliques, mask_cliques, mask_degrees
from keras_lipattn.checker.refusal import require
from keras_lipattn.checker.tensor_bounds import Ball, Bounds, log_of
from keras_lipattn.linalg import SAFETY, operator_norm


def as_sequences(x: np.ndarray, axes: list[int]) -> np.ndarray:
    """`(..., D)` as `(sequences, tokens, D)`, for the axes of attention."""
    return _moved(x, axes).reshape(-1, math.prod(x.shape[axis] for axis in axes), x.shape[-1])


def from_sequences(y: np.ndarray, x: np.ndarray, axes: list[int]) -> np.ndarray:
    """The inverse of `as_sequences`, for an output whose last axis may be longer."""
    moved = _moved(x, axes)
    y = y.reshape(*moved.shape[:-1], y.shape[-1])
    others = [axis for axis in range(x.ndim - 1) if axis not in axes]
    return np.moveaxis(y, range(x.ndim - 1), [*others, *axes])


def _moved(x: np.ndarray, axes: list[int]) -> np.ndarray:
    others = [axis for axis in range(x.ndim - 1) if axis not in axes]
    return np.transpose(x, [*others, *axes, x.ndim - 1])


class Visibility:
    """Which keys a query sees, by the parameters of a step.

    Args:
        step: The step.
        diagonal: Whether a token always sees itself.
    """

    def __init__(self, step: Any, diagonal: bool):
        self.causal = bool(step.parameters.get("causal"))
        self.window = step.parameters.get("window")
        require(
            self.window is None or (type(self.window) is int and self.window >= 1),
            f"{step.layer}: its window is {self.window!r}",
        )
        pairs = step.parameters.get("pairs")
        self.pairs = None if pairs is None else np.asarray(pairs, bool)
        require(
            self.pairs is None
            or (self.pairs.ndim == 2 and self.pairs.shape[0] == self.pairs.shape[1]),
            f"{step.layer}: its mask is no square matrix",
        )
        self.diagonal = diagonal

    def matrix(self, tokens: int) -> np.ndarray:
        """Boolean `(tokens, tokens)`."""
        lag = np.subtract.outer(np.arange(tokens), np.arange(tokens))
        visible = np.ones((tokens, tokens), bool)
        if self.pairs is not None:
            require(len(self.pairs) == tokens, "a mask is for another number of tokens")
            visible &= self.pairs
        if self.causal:
            visible &= lag >= 0
        if self.window is not None:
            visible &= np.abs(lag) < self.window
        return visible | (lag == 0) if self.diagonal else visible

    def known(self, tokens: int) -> dict[str, Any]:
        """The arguments of the bounds that say what is visible, for at most `tokens` tokens."""
        mask, pairs = "causal" if self.causal else "full", self.pairs
        if pairs is not None:
            lower = np.tri(len(pairs), dtype=bool)
            pairs = pairs & lower if self.causal else pairs
            if pairs.all() or (pairs == lower).all():
                mask, pairs = "full" if pairs.all() else "causal", None
        if pairs is not None:
            return self._of_pairs(tokens)
        if self.window is None or tokens <= self.window:
            return {"mask": mask}
        reach = self.window - 1
        seen = reach if mask == "causal" else 2 * reach
        cliques = Cliques(math.sqrt(reach), False)
        if mask == "full":
            # A key that many queries see on one side is seen by few on the other side.
            cliques = Cliques(2.0 * math.sqrt(min(reach, 0.5 * (tokens - 1.0))), True)
        return {"mask": "any", "n_keys": seen, "n_queries": seen, "cliques": cliques}

    def _of_pairs(self, tokens: int) -> dict[str, Any]:
        visible = self.matrix(tokens) | np.eye(tokens, dtype=bool)
        lower = np.tri(tokens, dtype=bool)
        if visible.all():
            return {"mask": "full"}
        if (visible == lower).all() or (visible == lower.T).all():
            return {"mask": "causal"}
        keys, queries = mask_degrees(visible)
        cliques = mask_cliques(visible)
        return {"mask": "any", "n_keys": keys, "n_queries": queries, "cliques": cliques}


def softmax(scores: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Softmax over the keys that are visible."""
    return scipy.special.softmax(np.where(visible, scores, -1e30), axis=-1)


def averaged(
    step: Any,
    inputs: list[np.ndarray],
    masks: list[np.ndarray],
    scores_and_values: Any,
    output: np.ndarray,
    bias: np.ndarray | None,
    *,
    diagonal: bool,
) -> np.ndarray:
    """Attention whose scores `(B, H, T, T)` and values `(B, H, T, v)` a function returns."""
    (x,) = inputs
    axes = step.axes(x.ndim)
    tokens = as_sequences(x, axes)
    visible = Visibility(step, diagonal).matrix(tokens.shape[1])[None, None]
    valid = None
    if masks:
        require(
            len(axes) == 1 and x.ndim == 3, f"no independent check of the masks of {step.layer}"
        )
        valid = np.logical_and.reduce(masks)
        tokens = np.where(valid[..., None], tokens, 0.0)
        visible = visible & valid[:, None, None, :]
    scores, values = scores_and_values(tokens)
    mixed = softmax(scores, visible) @ values
    heads = np.swapaxes(mixed, 1, 2).reshape(len(tokens), tokens.shape[1], -1)
    result = heads @ output.reshape(heads.shape[-1], -1)
    result = result if bias is None else result + bias.reshape(-1)
    if valid is not None:
        result = np.where(valid[..., None], result, 0.0)
    return from_sequences(result, x, axes)


def _by_head(kernel: np.ndarray, heads: int) -> np.ndarray:
    """`(D, H*k)` as `(H, D, k)`."""
    return kernel.reshape(len(kernel), heads, -1).transpose(1, 0, 2)


def distance_parts(step: Any) -> tuple[np.ndarray, np.ndarray]:
    """Projection `(H, D, k)` and output `(H, k, O)` of attention by distance."""
    heads = step.integer("heads")
    projection, output = step.array("projection"), step.array("output")
    require(projection.shape[1] == output.shape[0], f"{step.layer}: its kernels do not fit")
    require(output.shape[0] % heads == 0, f"{step.layer}: its kernels do not fit its heads")
    return _by_head(projection, heads), output.reshape(heads, -1, output.shape[1])


def distance_value(step: Any, inputs: list[np.ndarray], masks: list[np.ndarray]) -> np.ndarray:
    """`softmax_j(-|y_i - y_j|^2) y_j`, projected."""
    b, c = distance_parts(step)

    def parts(tokens):
        y = np.einsum("btd,hdk->bhtk", tokens, b)
        gaps = y[:, :, :, None] - y[:, :, None]
        return -np.square(gaps).sum(-1), y

    return averaged(step, inputs, masks, parts, c, step.optional("bias"), diagonal=True)


def distance_constant(step: Any, tokens: int, norm: str) -> float:
    """Theorems 5.1 to 5.3."""
    b, c = distance_parts(step)
    allowances = {
        # They can only make the constant larger.
        name: step.sizes(name, len(b))
        for name in ("product_scale", "query_error", "product_error")
    }
    known = Visibility(step, True).known(tokens)
    return certified_layer_bound(b, c, norm=norm, tokens=tokens, **known, **allowances).value


def distance_is_larger(step: Any, tokens: int, norm: str, other: str) -> bool:
    """Whether the constant in another norm cannot help: it is no smaller (Theorems 5.1, 5.2)."""
    known = Visibility(step, True).known(tokens)
    own, another = (unit_head_bound(tokens, norm=each, **known).value for each in (norm, other))
    if (norm, other) == ("l2", "token"):
        return another >= own
    return (norm, other) == ("token", "l2") and step.integer("heads") == 1 and another >= own


def cosine_parts(step: Any) -> tuple[np.ndarray, ...]:
    """Query, key and value `(H, D, .)`, their joint bias and the output `(H, v, O)`."""
    heads, size = step.integer("heads"), step.integer("key_dim")
    joint, output = _by_head(step.array("projection"), heads), step.array("output")
    require(joint.shape[2] > 2 * size, f"{step.layer}: its projection is too small")
    parts = joint[..., :size], joint[..., size : 2 * size], joint[..., 2 * size :]
    require(output.shape[0] == heads * parts[2].shape[2], f"{step.layer}: its kernels do not fit")
    return (*parts, output.reshape(heads, -1, output.shape[1]))


def cosine_value(step: Any, inputs: list[np.ndarray], masks: list[np.ndarray]) -> np.ndarray:
    """Attention by cosines of queries and keys, with values of length at most 1."""
    query, key, value, output = cosine_parts(step)
    epsilon, temperature = step.positive("epsilon"), step.positive("temperature")
    biases = [step.optional(f"{name}_bias") for name in ("query", "key", "value")]

    def parts(tokens):
        projected = []
        for kernel, bias in zip((query, key, value), biases, strict=True):
            z = np.einsum("btd,hdk->bhtk", tokens, kernel)
            if bias is not None:
                z = z + bias.reshape(len(kernel), 1, -1)
            projected.append(z / np.sqrt(np.square(z).sum(-1, keepdims=True) + epsilon))
        q, k, v = projected
        return temperature * q @ np.swapaxes(k, -1, -2), v

    return averaged(step, inputs, masks, parts, output, step.optional("bias"), diagonal=True)


def cosine_constant(step: Any, tokens: int, norm: str) -> float:
    """Theorem 7.3."""
    query, key, value, output = cosine_parts(step)
    epsilon, temperature = step.positive("epsilon"), step.positive("temperature")
    a, g = fold(query, key, value, temperature=temperature, epsilon=epsilon, xp=np)
    known = Visibility(step, True).known(tokens)
    known = {name: known[name] for name in ("mask", "n_queries") if name in known}
    return certified_cosine_bound(
        a, g, output, norm=norm, temperature=temperature, tokens=tokens, **known
    ).value


def dot_product_parts(step: Any) -> tuple[np.ndarray, ...]:
    """Query, key and value `(H, D, .)` and the output `(H, v, O)`."""
    kernels = [np.moveaxis(step.array(name), 1, 0) for name in ("query", "key", "value")]
    output = step.array("output")
    return (*kernels, output.reshape(*output.shape[:2], -1))


def dot_product_value(step: Any, inputs: list[np.ndarray], masks: list[np.ndarray]) -> np.ndarray:
    """`keras.layers.MultiHeadAttention` on one tensor."""
    require(not masks, f"no independent check of the masks of {step.layer}")
    query, key, value, output = dot_product_parts(step)
    biases = [step.optional(f"{name}_bias") for name in ("query", "key", "value")]

    def parts(tokens):
        q, k, v = (
            np.einsum("btd,hdk->bhtk", tokens, kernel)
            + (0.0 if bias is None else bias.reshape(len(kernel), 1, -1))
            for kernel, bias in zip((query, key, value), biases, strict=True)
        )
        return q @ np.swapaxes(k, -1, -2) / math.sqrt(query.shape[2]), v

    return averaged(step, inputs, masks, parts, output, step.optional("bias"), diagonal=False)


def dot_product_bounds(step: Any, state: Bounds, norm: str) -> Bounds:
    """Theorems 7.1 and 7.4, for tokens in a ball."""
    query, key, value, output = dot_product_parts(step)
    before, tokens = state.ball, step.tokens(state)
    require(math.isfinite(before.radius), f"{step.layer}: its tokens are not bounded")
    seen = Visibility(step, False)
    require(seen.window is None, f"no independent check of the window of {step.layer}")
    mask, pairs = "causal" if seen.causal else "full", seen.pairs
    if pairs is not None:
        visible, lower = seen.matrix(tokens), np.tri(tokens, dtype=bool)
        mask = "full" if visible.all() else "causal" if (visible == lower).all() else "any"
        require(bool(seen.matrix(tokens).any(-1).all()), f"{step.layer}: a query sees no key")
    scale, width = 1.0 / math.sqrt(query.shape[2]), query.shape[1]
    bias = step.optional("query_bias")
    center = np.zeros(width) if before.center is None else before.center
    constants = []
    for head, (q, k) in enumerate(zip(query, key, strict=True)):
        # In a basis of the span of the columns.
        basis, joint = np.linalg.qr(np.concatenate([q, k], axis=1))
        found = dot_product_constants(
            joint[:, : q.shape[1]],
            joint[:, q.shape[1] :],
            radius=before.radius,
            tokens=tokens,
            mask=mask,
            scale=scale,
            center=center @ basis,
            query_bias=None if bias is None else bias[head],
        )
        constants.append(found.l2 if norm == "l2" else found.token)
    # With orthonormal columns Q, the norm of Q R O is that of R O.
    mixed = np.stack([np.linalg.qr(v, mode="r") @ o for v, o in zip(value, output, strict=True)])
    constant = min(
        combine_heads(mixed, constants),
        dot_product_layer_constant(
            query,
            key,
            value,
            output,
            norm="l2" if norm == "l2" else "token",
            axes=before.axes(width),
            tokens=tokens,
            mask=mask,
            scale=scale,
            center=center,
            query_bias=bias,
        ),
    )
    if norm == "linf":
        constant *= SAFETY * math.sqrt(width)
    inner, outer = step.optional("value_bias"), step.optional("bias")
    ball = Ball(0.0) if outer is None else Ball(0.0, outer.reshape(-1))
    for head, size in enumerate(operator_norm(mixed)):
        image = center @ value[head] + (0.0 if inner is None else inner[head])
        ball = ball.plus(Ball(SAFETY * float(size) * before.radius, image @ output[head]))
    shape = (*state.shape[:-1], output.shape[-1])
    return Bounds(state.log + log_of(constant), shape, state.varies, ball)
