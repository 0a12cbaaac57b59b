"""Attention whose tokens lie in a ball: Theorem 4.2, and 7.1, 7.4, 7.7 for a layer that projects.

The constants depend neither on the length nor, in the token norm, on masks and biases of the
scores. Formulas take the array namespace `xp` (`numpy` on the host, `keras.ops` in a graph), so
that one line serves caps, penalties and certificates. Arrays of one number for each head have shape
`(H,)`.

`tensors` is the number of tensors that attention is called on: 1 for self-attention, 2 where keys
and values are another tensor than the queries, 3 where all may differ.
"""

import math
import typing

import numpy as np

from keras_lipattn.bounds.column_sums import column_masses, log_measure_mass
from keras_lipattn.bounds.compact import combine_heads, dot_product_layer_constant
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.bounds.multihead import (
    PRODUCT_ROUNDING,
    Norms,
    bound_linf,
    certified_layer_bound,
    safe_sqrt,
)
from keras_lipattn.linalg import SAFETY, operator_norm
from keras_lipattn.linalg.power import MatrixProduct

BALL = "Theorem 4.2"
# Where `2 rho s + sqrt(1 + 4 s^2 (4 rho^2 - 1))` is largest at `s = rho`: from this `rho^2` on.
_EDGE = (7.0 - math.sqrt(13.0)) / 24.0


class BallTerms(typing.NamedTuple):
    """Largest change of a head per unit of change of its inputs, for one query.

    Changes of keys and values are measured by `sqrt(sum_j P_ij |change_j|^2)`.

    Args:
        query: of the query.
        key: of the keys.
        value: of the values.
        shared: of one tensor that is both keys and values.
        joint: of one tensor that is queries, keys and values, in the token norm.
        scores: the part that goes through the scores, largest changes of all keys.
    """

    query: typing.Any
    key: typing.Any
    value: typing.Any
    shared: typing.Any
    joint: typing.Any
    scores: typing.Any


def distance_terms(radius: typing.Any, xp: typing.Any) -> BallTerms:
    """Theorem 4.2: `softmax_j(-|y_i - y_j|^2 + b_ij) y` for tokens in a ball about the origin.

    Args:
        radius: `rho`, shape `(H,)`.
        xp: array namespace.
    """
    square = radius * radius
    # Larger balls have larger constants: those from rho = 1/2 on hold below as well.
    q = xp.maximum(square, 0.25)
    t = 2.0 * q / (2.0 * q - 1.0 + xp.sqrt(xp.square(2.0 * q - 1.0) + 12.0 * xp.square(q)))
    shared = xp.sqrt(_squares(q, t))
    small = xp.minimum(square, _EDGE)
    inner = xp.sqrt(1.0 + small / (1.0 - 4.0 * small))
    edge = 2.0 * square + xp.sqrt(1.0 + 4.0 * square * (4.0 * square - 1.0))
    joint = xp.minimum(xp.where(square < _EDGE, inner, edge), _joint(q, xp))
    ones = xp.ones_like(square)
    return BallTerms(2.0 * square, 4.0 * square, ones, shared, joint, 5.0 * square)


def _squares(q, t):
    """`sum_j P_ij |a_ij|^2` of Theorem 4.2 at most, for `rho^2 = q` and `S = 1 - t^2`."""
    return 1.0 + 4.0 * q * (1.0 - t * t) * (2.0 * q * (1.0 + t) - 1.0)


def _joint(q, xp: typing.Any):
    """Largest `2 q sqrt(1 - t^2) + sqrt(_squares(q, t))` for `t` in [0, 1], from above.

    For all positive `a` and `b` it is at most `q ((1 - t^2) / a + a) + (_squares(q, t) / b + b) /
    2`. That is a polynomial of degree three, whose largest value is known. The best `a` and `b`
    are found by iteration.
    """
    t = 0.3 * xp.ones_like(q)
    bound = None
    for _ in range(3):
        a, b = xp.sqrt(1.0 - t * t), xp.sqrt(_squares(q, t))
        slope = 4.0 * q * q / b
        start = q / a + slope - 2.0 * q / b
        t = xp.minimum(slope / (start + xp.sqrt(start * start + 3.0 * slope * slope)), 1.0)
        bound = q * ((1.0 - t * t) / a + a) + 0.5 * (_squares(q, t) / b + b)
    return bound


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


def combined(
    terms: BallTerms, norm: str, xp: typing.Any, *, mass: typing.Any = 1.0, tensors: int = 1
) -> typing.Any:
    """Constants of heads with respect to all their inputs side by side, shape `(H,)`.

    Args:
        terms: the terms of the heads.
        norm: `"l2"` or `"token"`.
        xp: array namespace.
        mass: `chi`, an upper bound of the column sums of the attention matrix, for `"l2"`.
        tensors: see the module.
    """
    if norm == "token":
        if tensors == 1:
            return terms.joint
        return terms.query + (terms.shared if tensors == 2 else terms.key + terms.value)
    root = xp.sqrt(mass)
    if tensors == 2:
        return xp.sqrt(xp.square(terms.query) + xp.square(root * terms.shared))
    return terms.query + root * (terms.shared if tensors == 1 else terms.key + terms.value)


def in_entries(terms: BallTerms, widths: tuple[int, int, int], xp: typing.Any) -> BallTerms:
    """The terms for inputs whose entries change by at most 1: `|x| <= sqrt(D) max |x|`.

    Args:
        terms: the terms of the heads.
        widths: features of queries, keys and values.
        xp: array namespace.
    """
    query, key, value = (math.sqrt(width) for width in widths)
    return BallTerms(
        query * terms.query,
        key * terms.key,
        value * terms.value,
        max(key, value) * terms.shared,
        query * terms.joint,
        query * terms.scores,
    )


# Attention by distance ------------------------------------------------------------------------


def distance_constants(
    radius: typing.Any,
    norm: str,
    xp: typing.Any,
    *,
    tokens: int | None,
    mask: str,
    n_queries: int | None = None,
    relative_bias: typing.Any = None,
    causal: bool = False,
    tensors: int = 1,
    exact: bool = False,
) -> tuple[typing.Any, typing.Any]:
    """Constants of heads on balls, and their score parts for Theorem 5.3, each of shape `(H,)`.

    Args:
        radius: `rho` of Theorem 4.2, shape `(H,)`.
        norm: `"l2"`, `"token"` or `"linf"` (the row constants of Theorem 5.3).
        xp: array namespace.
        tokens: largest number of queries, `None` if unknown.
        mask: `"full"`, `"causal"` or `"any"`.
        n_queries: for `mask="any"`, the largest number of queries that see a key.
        relative_bias: see `column_masses`.
        causal: see `column_masses`.
        tensors: see the module.
        exact: see `column_masses`.
    """
    terms = distance_terms(radius, xp)
    if norm != "l2":
        return combined(terms, "token", xp, tensors=tensors), terms.scores
    square = xp.square(radius)
    mass = column_masses(
        4.0 * square,
        tokens,
        mask,
        xp,
        relative_bias=relative_bias,
        causal=causal,
        tensors=tensors,
        n_queries=n_queries,
        exact=exact,
    )
    if mask == "full" and tensors == 1 and relative_bias is None:
        # Tokens of equal weight are their own keys.
        mass = xp.minimum(mass, xp.exp(log_measure_mass(2.0 * square, xp)))
    return combined(terms, "l2", xp, mass=mass, tensors=tensors), terms.scores


def distance_layer_bound(
    b: typing.Any,
    c: typing.Any,
    constants: typing.Any,
    scores: typing.Any,
    *,
    norm: str,
    scale: typing.Any,
    norms: Norms,
    xp: typing.Any,
) -> typing.Any:
    """Theorems 5.1 to 5.3 with a constant for each head, for use in a graph.

    Args:
        b: shape `(H, D, k)`.
        c: shape `(H, k, O)`.
        constants: of the heads, shape `(H,)`.
        scores: the score parts of Theorem 5.3, shape `(H,)`.
        norm: `"l2"`, `"token"` or `"linf"`.
        scale: scaling of the heads, shape `(H,)`.
        norms: those of `layer_matrices`, and `"head_query"` for `"l2"` too.
        xp: array namespace.

    Returns:
        A scalar of the namespace.
    """
    if norm == "linf":
        rows, parts = xp.expand_dims(constants, 1), xp.expand_dims(scores, 1)
        return bound_linf(b, c, rows, parts, norms, xp)
    heads = xp.square(scale * constants * norms["head_query"])
    inner = safe_sqrt(xp.sum(heads), xp)
    if norm == "l2":
        inner = xp.minimum(inner, xp.max(constants) * norms["concatenated_query"])
    return norms["stacked_output"] * inner


# Dot products ---------------------------------------------------------------------------------


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


def terms_by_input(terms: BallTerms, separate_key: bool) -> dict[str, typing.Any]:
    """The terms of query, value and key, by name; without `separate_key` the value is the key."""
    if not separate_key:
        return {"query": terms.query, "value": terms.shared}
    return {"query": terms.query, "value": terms.value, "key": terms.key}


def projection_constant(norm: str, width: int) -> float:
    """Constant of the projection of tokens onto a ball about the origin, exact in every norm."""
    return 1.0 if norm != "linf" else SAFETY * 0.5 * (1.0 + math.sqrt(width))


def _frobenius(kernels, xp):
    return safe_sqrt(xp.sum(xp.square(kernels), axis=(1, 2)), xp)


def _unbounded(norm: str, reason: str) -> LipschitzBound:
    return LipschitzBound(value=math.inf, norm=norm, kind="certified", theorem="", reason=reason)
