"""Theorems 4.2, 4.3, 7.7, 7.9 and the projection: attention on tokens in a ball.

Biases of the scores are free, so the attention weights of a row are any distribution. Tokens,
weights and directions climb together from random and structured starts.
"""

import numpy as np

from keras_lipattn.bounds.bounded_products import (
    product_terms,
)
from keras_lipattn.bounds.bounded_tokens import (
    combined,
    distance_terms,
    projection_constant,
)
from keras_lipattn.bounds.column_sums import column_masses, log_measure_mass
from keras_lipattn.bounds.key_weights import biases_by_lag
from tools.soundness.statements import Statement, climb


def _ball(points: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Points `(count, ..., d)` projected onto balls of these radii, `(count,)`."""
    radius = radius.reshape(-1, *[1] * (points.ndim - 1))
    size = np.linalg.norm(points, axis=-1, keepdims=True)
    return points * np.minimum(1.0, radius / np.maximum(size, 1e-300))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-300)


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _radii(rng, count):
    return np.exp(rng.uniform(np.log(0.05), np.log(2.5), count))


def _tokens(rng, radius, n, d):
    """Random tokens in balls; half of them at the edge, a quarter on a line."""
    count = len(radius)
    tokens = rng.normal(size=(count, n, d))
    line = rng.random(count) < 0.25
    tokens[line, :, 1:] = 0.0
    edge = rng.random(count) < 0.5
    scale = np.where(edge, 10.0, rng.random(count)) * radius
    return _ball(tokens * scale[:, None, None], radius)


def _logits(rng, count, *shape):
    """Logits, of which some are so low that the keys are hidden."""
    logits = rng.normal(size=(count, *shape)) * rng.choice(
        [0.1, 1.0, 5.0], (count, *[1] * len(shape))
    )
    hidden = rng.random(logits.shape) < 0.2
    hidden[..., 0] = False
    return np.where(hidden, -1e4, logits)


def _sizes(rng):
    return int(rng.integers(2, 8)), int(rng.integers(1, 4))


# Rows in the token norm -----------------------------------------------------------------------


def _covariance(weights, values, keys, u):
    """`sum_j P_j (u.(v_j - mean)) k_j`, `(count, d)`, and the first factor, `(count, n)`."""
    mean = np.einsum("cn,cnd->cd", weights, values)
    side = np.einsum("cnd,cd->cn", values - mean[:, None], u)
    return np.einsum("cn,cn,cnd->cd", weights, side, keys), side


def _size(vectors):
    return np.linalg.norm(vectors, axis=-1)


def distance_joint(rng, count):
    """One tensor; the token in the first place is the query."""
    radius, (n, d) = _radii(rng, count), _sizes(rng)

    def value(tokens, logits, u):
        tokens, u = _ball(tokens, radius), _unit(u)
        weights = _softmax(logits)
        away = tokens - tokens[:, :1]
        pulled, side = _covariance(weights, tokens, tokens, u)
        rows = weights[..., None] * (u[:, None] - 2.0 * side[..., None] * away)
        rows[:, 0] += 2.0 * pulled
        return _size(rows).sum(axis=1)

    start = _tokens(rng, radius, n, d), _logits(rng, count, n), rng.normal(size=(count, d))
    return climb(rng, start, value) / combined(distance_terms(radius, np), "token", np)


def _of_pairs(name: str, *, distance: bool):
    """The change of a row by that of its query, keys, values, or keys that are values."""

    def ratios(rng, count):
        radius, (n, d) = _radii(rng, count), _sizes(rng)
        a = rng.normal(size=(count, d, d)) * np.exp(rng.uniform(-2.0, 1.0, (count, 1, 1)))
        fixed = rng.normal(size=(count, d)) * rng.choice([0.0, 1.0], (count, 1))

        def value(query, keys, values, logits, u):
            query, keys, values = (_ball(part, radius) for part in (query, keys, values))
            u, weights = _unit(u), _softmax(logits)
            values = keys if name == "shared" else values
            pulled, side = _covariance(weights, values, keys, u)
            if distance:
                slopes = -2.0 * (keys - query)
                own = 2.0 * pulled
            else:
                slopes = np.einsum("cij,cj->ci", a, query[:, 0])[:, None] + fixed[:, None]
                own = np.einsum("cij,ci->cj", a, pulled)
            if name == "query":
                return _size(own)
            of_keys = side[..., None] * slopes
            of_values = np.broadcast_to(u[:, None], keys.shape)
            parts = {"key": of_keys, "value": of_values, "shared": of_keys + of_values}
            # Changes are measured by the root of the weighted mean of their squares.
            return np.sqrt(np.einsum("cn,cn->c", weights, np.square(parts[name]).sum(axis=-1)))

        start = (
            _tokens(rng, radius, 1, d),
            _tokens(rng, radius, n, d),
            _tokens(rng, radius, n, d),
            _logits(rng, count, n),
            rng.normal(size=(count, d)),
        )
        if distance:
            terms = distance_terms(radius, np)
        else:
            gain, pull = np.linalg.norm(a, 2, axis=(1, 2)), _size(fixed)
            terms = product_terms(gain, pull, radius, np)
        return climb(rng, start, value) / getattr(terms, name)

    return ratios


def distance_entries(rng, count):
    """Rows of the max norm: Theorem 5.3 with the constants of the ball."""
    radius, (n, d) = _radii(rng, count), _sizes(rng)
    b = rng.normal(size=(count, 3, d))
    c = rng.normal(size=(count, d))
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 3)).reshape(3, -1)
    beta = _size(np.einsum("cik,is->csk", b, signs)).max(axis=1)

    def value(tokens, logits):
        tokens, weights = _ball(tokens, radius), _softmax(logits)
        away = tokens - tokens[:, :1]
        pulled, side = _covariance(weights, tokens, tokens, c)
        rows = weights[..., None] * (c[:, None] - 2.0 * side[..., None] * away)
        rows[:, 0] += 2.0 * pulled
        return np.abs(np.einsum("cik,cnk->cni", b, rows)).sum(axis=(1, 2))

    terms = distance_terms(radius, np)
    averages = np.abs(np.einsum("cik,ck->ci", b, c)).sum(axis=1)
    bound = np.minimum(terms.joint * beta * _size(c), averages + terms.scores * beta * _size(c))
    start = _tokens(rng, radius, n, d), _logits(rng, count, n)
    return climb(rng, start, value) / bound


# All rows in the 2-norm -----------------------------------------------------------------------


def _flat(jacobian):
    count, n, d, m, e = jacobian.shape
    return jacobian.reshape(count, n * d, m * e)


def _joint_jacobian(tokens, weights, slopes, own):
    """`(count, N, d, N, d)`; `slopes[c, i, j]` is the derivative of a logit in key `j`.

    `own` maps the covariance of a row to the derivative in its query.
    """
    _, n, d = tokens.shape
    mean = weights @ tokens
    side = tokens[:, None] - mean[:, :, None]
    jacobian = np.einsum("cij,ijde->cidje", weights, np.eye(d) + np.zeros((n, n, d, d)))
    jacobian += np.einsum("cij,cijd,cije->cidje", weights, side, slopes)
    covariance = np.einsum("cij,cijd,cije->cide", weights, side, side)
    places = np.arange(n)
    jacobian[:, places, :, places] += np.moveaxis(own(covariance), 1, 0)
    return jacobian


def _all_rows(*, distance: bool):
    def ratios(rng, count):
        radius, n, d = _radii(rng, count), int(rng.integers(2, 5)), int(rng.integers(1, 3))
        a = rng.normal(size=(count, d, d)) * np.exp(rng.uniform(-2.0, 1.0, (count, 1, 1)))
        if distance:
            terms = distance_terms(radius, np)
        else:
            terms = product_terms(np.linalg.norm(a, 2, axis=(1, 2)), np.zeros(count), radius, np)

        def value(tokens, logits):
            tokens, weights = _ball(tokens, radius), _softmax(logits)
            if distance:
                slopes = -2.0 * (tokens[:, None] - tokens[:, :, None])
                jacobian = _joint_jacobian(tokens, weights, slopes, lambda cov: 2.0 * cov)
            else:
                moved = np.einsum("cij,cnj->cni", a, tokens)
                slopes = np.broadcast_to(moved[:, :, None], (count, n, n, d))
                jacobian = _joint_jacobian(
                    tokens, weights, slopes, lambda cov: np.einsum("cnij,cjk->cnik", cov, a)
                )
            chi = weights.sum(axis=1).max(axis=1)
            return np.linalg.norm(_flat(jacobian), 2, axis=(1, 2)) / combined(
                terms, "l2", np, mass=chi
            )

        start = _tokens(rng, radius, n, d), _logits(rng, count, n, n)
        return climb(rng, start, value, steps=8)

    return ratios


# A normalization before the head ---------------------------------------------------------------
# Tokens `z` become `v = z / sqrt(|z|^2 + 1)`. The derivative of a logit in key j is `G v_i + g`.


def _scores(rng, count, d):
    """`G`, `g`, and their norms `(count, 1)`."""
    matrix = rng.normal(size=(count, d, d)) * np.exp(rng.uniform(-3.0, 2.0, (count, 1, 1)))
    fixed = rng.normal(size=(count, d)) * rng.choice([0.0, 0.3, 3.0], (count, 1))
    return matrix, fixed, np.linalg.norm(matrix, 2, axis=(1, 2))[:, None], _size(fixed)[:, None]


def normalized_joint(rng, count):
    """Theorem 7.9 in the token norm; the token in the first place is the query."""
    n, d = _sizes(rng)
    matrix, fixed, gain, pull = _scores(rng, count, d)

    def value(tokens, logits, u):
        u, weights = _unit(u), _softmax(logits)
        length = np.sqrt(np.square(tokens).sum(axis=-1, keepdims=True) + 1.0)
        v = tokens / length
        pulled, side = _covariance(weights, v, v, u)
        slope = np.einsum("cij,cj->ci", matrix, v[:, 0]) + fixed
        rows = weights[..., None] * (u[:, None] + side[..., None] * slope[:, None])
        rows[:, 0] += np.einsum("cij,ci->cj", matrix, pulled)
        rows -= v * np.einsum("cnd,cnd->cn", v, rows)[..., None]
        return _size(rows / length).sum(axis=1)

    y = np.linspace(0.0, 1.0, 4001)
    bound = gain * np.sqrt(1.0 - y**4) + y + pull * y * np.sqrt(1.0 - y**2)
    start = (
        _tokens(rng, np.full(count, 4.0), n, d),
        _logits(rng, count, n),
        rng.normal(size=(count, d)),
    )
    return climb(rng, start, value) / bound.max(axis=1)


def normalized_rows(rng, count):
    """Theorem 7.9 in the 2-norm."""
    n, d = int(rng.integers(2, 5)), int(rng.integers(1, 3))
    matrix, fixed, gain, pull = _scores(rng, count, d)
    y = np.linspace(0.0, 1.0, 4001)
    keys = (y + (gain + pull) * y * np.sqrt(1.0 - y**2)).max(axis=1)

    def value(tokens, logits):
        weights = _softmax(logits)
        length = np.sqrt(np.square(tokens).sum(axis=-1, keepdims=True) + 1.0)
        v = tokens / length
        slopes = np.einsum("cij,cnj->cni", matrix, v) + fixed[:, None]
        slopes = np.broadcast_to(slopes[:, :, None], (count, n, n, d))
        jacobian = _joint_jacobian(
            v, weights, slopes, lambda cov: np.einsum("cnij,cjk->cnik", cov, matrix)
        )
        inner = (np.eye(d) - v[..., :, None] * v[..., None, :]) / length[..., None]
        jacobian = np.einsum("cidje,cjef->cidjf", jacobian, inner)
        chi = weights.sum(axis=1).max(axis=1)
        size = np.linalg.norm(_flat(jacobian), 2, axis=(1, 2))
        return size / (gain[:, 0] + np.sqrt(chi) * keys)

    start = _tokens(rng, np.full(count, 4.0), n, d), _logits(rng, count, n, n)
    return climb(rng, start, value, steps=8)


# Column sums ----------------------------------------------------------------------------------


def column_sums(rng, count):
    """Column sums of softmax without biases, with biases by position, full, causal and padded."""
    radius, (n, d) = _radii(rng, count), _sizes(rng)
    causal = bool(rng.random() < 0.5)
    table = rng.normal(size=(count, 2 * int(rng.integers(1, n + 2))))
    table *= rng.choice([0.0, 1.0, 20.0], (count, 1))
    # One distance that a head looks at.
    table[::3] -= rng.choice([2.0, 8.0])
    table[::3, int(rng.integers(table.shape[1]))] = 6.0
    has_biases = rng.random() < 0.8
    table *= has_biases
    # Padded tokens are neither keys nor queries.
    places = np.sort(rng.permutation(2 * n)[:n]) if rng.random() < 0.5 else np.arange(n)
    biases = biases_by_lag(table, places[:, None] - places)
    length = int(places[-1]) + 1
    hidden = np.triu(np.full((n, n), -np.inf), 1) if causal else 0.0

    def value(tokens):
        tokens = _ball(tokens, radius)
        squares = np.square(tokens[:, None] - tokens[:, :, None]).sum(axis=-1)
        return _softmax(biases - squares + hidden).sum(axis=1).max(axis=1)

    mass = column_masses(
        4.0 * radius**2,
        length,
        "causal" if causal else "full",
        np,
        relative_bias=table if has_biases else None,
        causal=causal,
        exact=True,
    )
    return climb(rng, (_tokens(rng, radius, n, d),), value) / mass


def column_of_a_measure(rng, count):
    """Weight that one key gets from all queries, for tokens with weights: the bound of Theorem 7.5.

    The key may be a token of no weight. `w` are the weights of the tokens, as queries and as keys.
    """
    radius, (n, d) = _radii(rng, count), (int(rng.integers(2, 30)), int(rng.integers(1, 9)))
    distance = bool(rng.random() < 0.5)

    def value(tokens, key, logits):
        tokens, key, weights = _ball(tokens, radius), _ball(key, radius), _softmax(logits)
        both = np.concatenate([tokens, key], axis=1)
        scores = np.einsum("cid,cjd->cij", tokens, both)
        if distance:
            scores = -np.square(tokens[:, :, None] - both[:, None]).sum(axis=-1)
        kernel = np.exp(scores)
        totals = np.einsum("cij,cj->ci", kernel[:, :, :n], weights)
        return np.einsum("ci,ci->c", weights, kernel[:, :, n] / totals)

    start = (
        _tokens(rng, radius, n, d),
        _tokens(rng, radius, 1, d) * rng.choice([0.01, 1.0], (count, 1, 1)),
        rng.normal(size=(count, n)) * rng.choice([0.01, 1.0, 5.0], (count, 1)),
    )
    found = climb(rng, start, value)
    return found / np.exp(log_measure_mass((2.0 if distance else 1.0) * radius**2, np))


# Projection -----------------------------------------------------------------------------------


def _projected(norm: str):
    def ratios(rng, count):
        d = int(rng.integers(1, 20))
        radius = np.ones(count)
        size = {"token": _size, "linf": lambda x: np.abs(x).max(axis=-1)}[norm]

        def value(x, y):
            # Close pairs measure the derivative, down to the rounding of differences.
            y = x + np.where(np.arange(count) % 4 < 2, 1.0, 1e-5)[:, None] * y
            moved = size(_ball(x, radius) - _ball(y, radius))
            return moved / np.maximum(size(x - y), 1e-9)

        x = rng.normal(size=(count, d)) * rng.choice([0.1, 0.5, 3.0], (count, 1))
        y = rng.normal(size=(count, d))
        # Where one row of the derivative has the largest absolute sum.
        angle = 0.5 * np.arctan(np.sqrt(d - 1.0))
        x[::2] = 1.0001 * np.cos(angle) / np.sqrt(max(d - 1.0, 1.0))
        x[::2, 0] = 1.0001 * np.sin(angle)
        y[::2] = np.where(np.arange(d) == 0, 1.0, -1.0)
        return climb(rng, (x, y), value) / projection_constant(norm, d)

    return ratios


STATEMENTS = [
    Statement("Theorem 4.2, token norm", distance_joint),
    Statement("Theorem 4.2, 2-norm", _all_rows(distance=True)),
    Statement("Theorem 4.2, max norm", distance_entries),
    *(
        Statement(f"Theorem 4.2, {name} alone", _of_pairs(name, distance=True))
        for name in ("query", "key", "value", "shared")
    ),
    Statement("Theorem 7.1 with biases, 2-norm", _all_rows(distance=False)),
    *(
        Statement(f"Theorem 7.7, {name} alone", _of_pairs(name, distance=False))
        for name in ("query", "key", "value", "shared")
    ),
    Statement("Theorem 7.9, token norm", normalized_joint),
    Statement("Theorem 7.9, 2-norm", normalized_rows),
    Statement("Column sums on a ball", column_sums),
    Statement("Column sums of a measure on a ball", column_of_a_measure),
    Statement("Projection, token norm", _projected("token")),
    Statement("Projection, max norm", _projected("linf")),
]
