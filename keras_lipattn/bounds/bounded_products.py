"""Dot-product attention whose tokens lie in a ball: Theorems 7.1, 7.4 and 7.7.

`keras_lipattn.bounds.bounded_tokens` has what attention by distance shares, and the notation.
"""

import math
import typing

import numpy as np

from keras_lipattn.bounds.bounded_tokens import BallTerms, combined, in_entries, terms_by_input
from keras_lipattn.bounds.column_sums import column_masses
from keras_lipattn.bounds.compact import combine_heads, dot_product_layer_constant
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.bounds.multihead import (
    PRODUCT_ROUNDING,
    Norms,
    certified_layer_bound,
    safe_sqrt,
)
from keras_lipattn.linalg import SAFETY, operator_norm
from keras_lipattn.linalg.power import MatrixProduct


def product_terms(gain: typing.Any, pull: typing.Any, radius: float, xp: typing.Any) -> BallTerms:
    """Theorems 7.1 and 7.7: dot-product attention on tokens in a ball.

    Args:
        gain: norms of `A_h`, shape `(H,)`, see `logit_slopes`.
        pull: what a query at the center of the ball pulls with, shape `(H,)`.
        radius: of the ball.
        xp: array namespace.
    """
    query = gain * (radius * radius)
    key = query + pull * radius
    shared = xp.sqrt(1.0 + key * key)
    return BallTerms(query, key, xp.ones_like(key), shared, query + shared, query + key)


def product_matrices(
    query, key, value, output, *, norm: str, scaling: typing.Any, apart: bool, xp: typing.Any
) -> dict[str, typing.Any]:
    """The matrices whose operator norms `product_layer_bound` needs.

    - `"head_score"`: all `W_Q W_K^T / sqrt(k)`, shape `(H, D, E)`;
    - `"stacked_product"`: `stack(W_V W_O / s_h)`, shape `(H*F, O)`;
    - `"head_value"`: for `"linf"`, all `W_V`, shape `(H, F, v)`;
    - `"concatenated_value"` and `"stacked_output"`: with `apart`, `[W_V]`, shape `(F, H*v)`, and
      `stack(W_O)`, shape `(H*v, O)`.

    Args:
        query: shape `(H, D, k)`.
        key: shape `(H, E, k)`.
        value: shape `(H, F, v)`.
        output: shape `(H, v, O)`.
        norm: `"l2"`, `"token"` or `"linf"`.
        scaling: shape `(H,)`, positive.
        apart: whether `product_layer_bound` gets the terms of the heads for the 2-norm.
        xp: array namespace.
    """
    scale = query.shape[-1] ** -0.5
    scores = {"head_score": MatrixProduct(query * scale, xp.transpose(key, (0, 2, 1)))}
    if norm == "linf":
        return {**scores, "head_value": value}
    scaled = output / xp.reshape(scaling, (-1, 1, 1))
    matrices = {**scores, "stacked_product": MatrixProduct(value, scaled, stacked=True)}
    if not apart:
        return matrices
    flat = xp.reshape(xp.transpose(value, (1, 0, 2)), (value.shape[1], -1))
    stack = xp.reshape(output, (-1, output.shape[-1]))
    return {**matrices, "concatenated_value": flat, "stacked_output": stack}


def product_scaling(query, key, value, output, *, radius: float, xp: typing.Any) -> typing.Any:
    """A scaling of the heads, shape `(H,)`, positive: about `sqrt(|W_V W_O| / constant)`."""
    q, k, v, o = (_frobenius(kernel, xp) for kernel in (query, key, value, output))
    gain = q * k * (radius * radius * query.shape[-1] ** -1.5)
    size = v * o / (1.0 + 2.0 * gain)
    usable = size > 0.0
    scaling = xp.sqrt(xp.where(usable, size, 1.0))
    return scaling if xp is np else xp.stop_gradient(scaling)


def query_pull(key, query_bias, xp: typing.Any, *, epsilon: float = 0.0) -> typing.Any:
    """`|W_K b_Q| / sqrt(k)` of all heads, shape `(H,)`, with an allowance for its rounding.

    Args:
        key: shape `(H, E, k)`.
        query_bias: shape `(H, k)`, or `None`.
        xp: array namespace.
        epsilon: machine epsilon of the dtype in which a graph sums.
    """
    if query_bias is None:
        return xp.zeros_like(key[:, 0, 0])
    scale = key.shape[-1] ** -0.5
    moved = xp.matmul(key * scale, xp.expand_dims(query_bias, -1))[..., 0]
    size = safe_sqrt(xp.sum(xp.square(moved), axis=-1), xp)
    sizes = _frobenius(key, xp) * safe_sqrt(xp.sum(xp.square(query_bias), axis=-1), xp)
    return size + (key.shape[-1] + 4) * (epsilon + PRODUCT_ROUNDING) * scale * sizes


def product_layer_bound(
    output,
    constants,
    *,
    norm: str,
    scaling,
    norms: Norms,
    xp: typing.Any,
    terms: BallTerms | None = None,
    mass: typing.Any = 1.0,
) -> typing.Any:
    """Theorems 7.1 and 7.7 for all heads, for use in a graph; with `terms` also Theorem 7.4.

    Args:
        output: shape `(H, v, O)`.
        constants: of the heads, shape `(H,)`, those of the token norm for `"linf"`.
        norm: `"l2"`, `"token"` or `"linf"`; for the last one times the root of the input's width.
        scaling: the one of `product_matrices`.
        norms: those of `product_matrices`.
        xp: array namespace.
        terms: of the heads, in self-attention for `"l2"`. Averages and scores are then also
            bounded apart: the averages of heads that read different features do not add up.
        mass: see `combined`.

    Returns:
        A scalar of the namespace.
    """
    if norm == "linf":
        columns = safe_sqrt(xp.sum(xp.square(output), axis=1), xp)
        heads = xp.expand_dims(constants * norms["head_value"], 1)
        return xp.max(xp.sum(heads * columns, axis=0))
    sizes = safe_sqrt(xp.sum(xp.square(scaling * constants)), xp)
    together = norms["stacked_product"] * sizes
    if terms is None:
        return together
    roots = xp.sqrt(mass)
    parts = (terms.query, roots * terms.key)
    scores = sum(safe_sqrt(xp.sum(xp.square(part)), xp) for part in parts)
    apart = norms["concatenated_value"] * norms["stacked_output"] * (xp.max(roots) + scores)
    return xp.minimum(together, apart)


class ProductLayer(typing.NamedTuple):
    """Kernels of dot-product attention in float64, with what is known of its tokens.

    Args:
        query: shape `(H, D, k)`.
        key: shape `(H, E, k)`.
        value: shape `(H, F, v)`.
        output: shape `(H, v, O)`.
        radius: of the ball that holds every token.
        query_bias: shape `(H, k)`, or `None`. The center of the ball of the queries, times the
            kernel, counts as a part of it.
        relative_bias: shape `(H, 2 R)`, added to the scores, or `None`.
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    output: np.ndarray
    radius: float
    query_bias: np.ndarray | None = None
    relative_bias: np.ndarray | None = None

    def is_finite(self) -> bool:
        arrays = [array for array in self if array is not None]
        return all(np.isfinite(array).all() for array in arrays)

    def terms(self, norm: str) -> BallTerms:
        """The terms of the heads, rounded up; for `"linf"` those of `in_entries`."""
        scale = self.query.shape[-1] ** -0.5
        scores = np.matmul(self.query * scale, np.swapaxes(self.key, 1, 2))
        rounding = PRODUCT_ROUNDING * scale * _frobenius(self.query, np) * _frobenius(self.key, np)
        gain = SAFETY * np.asarray(operator_norm(scores)) + rounding
        pull = query_pull(self.key, self.query_bias, np)
        terms = product_terms(gain, pull, self.radius, np)
        if norm != "linf":
            return terms
        query, key, value = (kernel.shape[1] for kernel in (self.query, self.key, self.value))
        return in_entries(terms, (query, key, value), np)

    def averages(self) -> np.ndarray:
        """Matrices with the norms of `W_V W_O` of all heads, and with those of their columns."""
        # W_V = Q R with orthonormal columns Q.
        return np.linalg.qr(self.value, mode="r") @ self.output

    def combine(self, constants: np.ndarray, norm: str) -> float:
        """The constant of the layer from those of its heads."""
        averages = self.averages()
        rounding = PRODUCT_ROUNDING * _frobenius(self.value, np) * _frobenius(self.output, np)
        allowance = float(np.sum(rounding * constants))
        if norm == "linf":
            # An output reads a head through one column.
            columns = np.linalg.norm(averages, axis=1)
            return SAFETY * (float((constants @ columns).max()) + allowance)
        # Among the scalings is that of the graph, whose cap the certificate must not exceed.
        scaling = product_scaling(*self[:4], radius=self.radius, xp=np)
        stacked = np.concatenate(list(averages / scaling[:, None, None]))
        of_graph = SAFETY * operator_norm(stacked) * np.linalg.norm(scaling * constants)
        found = min(combine_heads(averages, constants), float(of_graph))
        if len(averages) > 1:
            # Theorem 5.2 for heads that read one number, with its search for a scaling.
            numbers = np.zeros((len(averages), 1, averages.shape[1]))
            numbers[:, 0, 0] = constants
            ones = np.ones(len(averages))
            split = certified_layer_bound(
                numbers, averages, norm="token", tokens=None, head_constants=ones
            )
            found = min(found, split.value)
        return found + allowance


@np.errstate(over="ignore", invalid="ignore")
def certified_product_bound(
    layer: ProductLayer,
    *,
    norm: str,
    tokens: int | None,
    mask: str = "full",
    causal: bool = False,
    n_queries: int | None = None,
    tensors: int = 1,
) -> LipschitzBound:
    """Certified bound of attention on a ball: Theorems 7.1, 7.4 (self-attention alone) and 7.7.

    Args:
        layer: the kernels.
        norm: `"l2"`, `"token"` or `"linf"`.
        tokens: largest number of tokens, `None` if unknown.
        mask: `"full"` (padding included), `"causal"` or `"any"`.
        causal: whether later tokens are known to be hidden.
        n_queries: for `mask="any"`, the largest number of queries that see a key.
        tensors: see the module; the bound is with respect to all of them side by side.

    Returns:
        A `LipschitzBound`.
    """
    if not layer.is_finite():
        return _unbounded(norm, "the kernels hold NaN or infinite entries")
    terms = layer.terms(norm)
    mass = np.ones(len(layer.query))
    if norm == "l2":
        mass = column_masses(
            2.0 * terms.key,
            tokens,
            mask,
            np,
            relative_bias=layer.relative_bias,
            causal=causal,
            tensors=tensors,
            n_queries=n_queries,
            exact=True,
        )
        if not np.isfinite(mass).all():
            return _unbounded(norm, "the number of tokens is not known")
    kind = "l2" if norm == "l2" else "token"
    constants = SAFETY * combined(terms, kind, np, mass=mass, tensors=tensors)
    value, theorem = (
        layer.combine(constants, norm),
        "Theorem 7.1" if tensors == 1 else "Theorem 7.7",
    )
    together = math.inf if tensors > 1 else _together(layer, norm, tokens, mask, causal, n_queries)
    if together < value:
        value, theorem = together, "Theorem 7.4"
    if not math.isfinite(value):
        return _unbounded(norm, "the bound is larger than the largest float64")
    return LipschitzBound(value=value, norm=norm, kind="certified", theorem=theorem)


def _together(layer: ProductLayer, norm, tokens, mask, causal, n_queries) -> float:
    """Theorem 7.4."""
    width = layer.query.shape[1]
    together = dot_product_layer_constant(
        layer.query,
        layer.key,
        layer.value,
        layer.output,
        norm="l2" if norm == "l2" else "token",
        axes=layer.radius * np.eye(width),
        tokens=tokens,
        mask=mask,
        relative_bias=layer.relative_bias,
        causal=causal,
        query_bias=layer.query_bias,
        n_queries=n_queries,
    )
    return together if norm != "linf" else SAFETY * math.sqrt(width) * together


@np.errstate(over="ignore", invalid="ignore")
def certified_cross_bounds(
    layer: ProductLayer, *, norm: str, queries: int | None, separate_key: bool = False
) -> dict[str, LipschitzBound]:
    """Theorem 7.7: certified bounds of attention with respect to each of its inputs.

    Args:
        layer: the kernels.
        norm: `"l2"`, `"token"` or `"linf"`.
        queries: largest number of queries that see a key, `None` if unknown.
        separate_key: whether keys and values are different tensors.

    Returns:
        Dictionary with a `LipschitzBound` for `"query"` and `"value"`, and for `"key"` if it is
        separate. If all inputs change, the output changes by at most the sum of the parts.
    """
    names = ("query", "value", "key")[: 2 + separate_key]
    if not layer.is_finite():
        reason = "the kernels hold NaN or infinite entries"
        return {name: _unbounded(norm, reason) for name in names}
    parts = terms_by_input(layer.terms(norm), separate_key)
    found = {}
    for name in names:
        mass = 1.0
        if norm == "l2" and name != "query":
            if queries is None:
                found[name] = _unbounded(norm, "the number of queries is not known")
                continue
            mass = math.sqrt(queries)
        value = layer.combine(SAFETY * mass * parts[name], norm)
        found[name] = (
            LipschitzBound(value=value, norm=norm, kind="certified", theorem="Theorem 7.7")
            if math.isfinite(value)
            else _unbounded(norm, "the bound is larger than the largest float64")
        )
    return found


def _frobenius(kernels, xp):
    return safe_sqrt(xp.sum(xp.square(kernels), axis=(1, 2)), xp)


def _unbounded(norm: str, reason: str) -> LipschitzBound:
    return LipschitzBound(value=math.inf, norm=norm, kind="certified", theorem="", reason=reason)
