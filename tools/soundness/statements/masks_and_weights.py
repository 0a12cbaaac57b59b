"""Theorems 3.C, 3.F and 3.G on the unit head, prices between norms, and activated products.

For each mask or table of weights tokens climb from random and structured starts. The largest
Jacobian norm is compared with the constant, and the largest column of the proof with its bound.
"""

import math

import numpy as np

from keras_lipattn.bounds import mask_cliques, mask_degrees, unit_head_bound
from keras_lipattn.bounds.activated_product import activated_product_constant
from keras_lipattn.bounds.key_weights import SeenByLag, biases_by_lag, weights_by_lag
from keras_lipattn.bounds.layer_constants import conversion_constant
from keras_lipattn.bounds.mild_weights import mild_constants
from keras_lipattn.bounds.unit_head_lemmas import majorant_norm
from tools.soundness.statements import Statement, climb

_SIZES = (2, 3, 5, 7)
_GROUPS = 8


def _patterns(size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    lag = np.subtract.outer(np.arange(size), np.arange(size))
    reach = int(rng.integers(1, size))
    blocks = np.arange(size) // (reach + 1)
    same = blocks[:, None] == blocks
    return {
        "window": abs(lag) <= reach,
        "causal window": (lag >= 0) & (lag <= reach),
        "blocks": same,
        "causal blocks": same & (lag >= 0),
        "prefix": (lag >= 0) | (np.arange(size) <= reach),
        "random": (rng.random((size, size)) < 0.6) | (lag == 0),
    }


def _starts(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Tokens `(count, size, d)`: random, on a line, in clusters, and a center between two."""
    width = int(rng.integers(1, 4))
    y = rng.normal(size=(count, size, width)) * np.exp(rng.normal(0.0, 0.5, size=(count, 1, 1)))
    reach = math.sqrt(1.5 + math.log(size))
    sides = np.where(np.arange(size) % 2, 1.0, -1.0) * (np.arange(size) != rng.integers(size))
    y[: count // 3] = 0.1 * y[: count // 3]
    y[: count // 3, :, 0] += reach * sides
    return y


def _attention(y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    squares = np.square(y[:, :, None] - y[:, None]).sum(axis=-1)
    with np.errstate(divide="ignore"):
        scores = np.log(weights) - squares
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return scores / scores.sum(axis=-1, keepdims=True)


def _jacobian_norms(y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """2-norms of the Jacobians of the unit head at tokens `(count, N, d)`."""
    count, size, width = y.shape
    p = _attention(y, weights)
    away = y[:, None] - np.einsum("nij,njd->nid", p, y)[:, :, None]
    gaps = y[:, None] - y[:, :, None]
    # The derivative of row i in token j, and of all scores in token i.
    blocks = p[..., None, None] * (np.eye(width) - 2.0 * away[..., :, None] * gaps[..., None, :])
    own = 2.0 * np.einsum("nij,nija,nijb->niab", p, away, away)
    index = np.arange(size)
    blocks[:, index, index] = p[:, index, index, None, None] * np.eye(width) + own
    jac = blocks.transpose(0, 1, 3, 2, 4).reshape(count, size * width, size * width)
    return np.linalg.norm(jac, 2, axis=(1, 2))


def _climbed(rng, count: int, weights: np.ndarray) -> np.ndarray:
    return climb(
        rng, (_starts(rng, count, len(weights)),), lambda y: _jacobian_norms(y, weights), 12
    )


def _causal(rng: np.random.Generator, count: int) -> np.ndarray:
    parts = []
    for size in _SIZES:
        found = _climbed(rng, count // len(_SIZES) + 1, np.tri(size))
        parts.append(found / unit_head_bound(size, "causal").value)
    return np.concatenate(parts)


def _cliques(rng: np.random.Generator, count: int) -> np.ndarray:
    parts = []
    size = int(rng.choice(_SIZES))
    patterns = _patterns(size, rng)
    for mask in patterns.values():
        n_keys, n_queries = mask_degrees(mask)
        structure = dict(n_keys=n_keys, n_queries=n_queries, cliques=mask_cliques(mask))
        bound = unit_head_bound(size, "any", **structure).value
        parts.append(_climbed(rng, count // len(patterns) + 1, mask.astype(float)) / bound)
    return np.concatenate(parts)


def _table(rng: np.random.Generator, size: int) -> np.ndarray:
    """Biases `(1, 2 R)` by relative position, from mild to extreme."""
    reach = int(rng.integers(1, size))
    return rng.normal(size=(1, 2 * reach)) * rng.choice([0.1, 0.5, 1.0, 3.0])


def _sides(table: np.ndarray, size: int, causal: bool) -> tuple[SeenByLag, SeenByLag]:
    reach = table.shape[1] // 2
    before = SeenByLag(table[:, reach:], size - 1)
    if causal:
        return before, SeenByLag(table[:, :0], 0)
    return before, SeenByLag(table[:, reach - 1 :: -1], size - 1)


def _mild(rng: np.random.Generator, count: int) -> np.ndarray:
    parts = []
    for _ in range(_GROUPS):
        size = int(rng.choice(_SIZES))
        table = _table(rng, size)
        name = str(rng.choice(["full", "causal", "window", "causal window", "prefix"]))
        masks = {"full": np.ones((size, size)), "causal": np.tri(size), **_patterns(size, rng)}
        mask = masks[name].astype(float)
        structure = {"mask": name}
        if name not in ("full", "causal"):
            n_keys, n_queries = mask_degrees(mask)
            degrees = dict(n_keys=n_keys, n_queries=n_queries)
            structure = {"mask": "any", **degrees, "cliques": mask_cliques(mask)}
        sides = _sides(table, size, name.startswith("causal"))
        keys = weights_by_lag(*sides, size, np)
        bound = mild_constants(*sides, size, np.exp(keys.log_keys), structure)[0]
        lag = np.subtract.outer(np.arange(size), np.arange(size))
        weights = mask * np.exp(biases_by_lag(table, lag)[0])
        parts.append(_climbed(rng, count // _GROUPS + 1, weights) / bound)
    return np.concatenate(parts)


def _columns(rng: np.random.Generator, count: int) -> np.ndarray:
    """Columns of the proofs of 3.F and 3.G for masks with one clique, against their bounds."""
    parts = []
    for _ in range(_GROUPS):
        size = int(rng.choice((3, 6, 12)))
        ordered, beta = bool(rng.integers(2)), float(rng.uniform(0.05, 1.0))
        mask = np.tri(size) if ordered else np.ones((size, size))
        biases = rng.normal(size=(size, size)) * rng.choice([0.0, 0.3, 1.0])
        weights = mask * np.exp(biases - np.diag(biases)[:, None])
        np.fill_diagonal(weights, 1.0)
        others = weights * (1.0 - np.eye(size))
        least, most = weights[mask > 0].min(), weights.max()
        kappa = float(np.exp(rng.uniform(0.0, 2.0)))
        limit = float(majorant_norm(1.0, 1.0 / beta))
        if ordered:
            limit *= most * math.sqrt(kappa * (size - 1.0))
        else:
            limit *= math.sqrt(np.square(others).sum(axis=0).max())

        def largest(y, v, others=others, ordered=ordered, least=least, kappa=kappa, beta=beta):
            v = v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-300)
            gaps = y[:, None] - y[:, :, None]
            kernel = np.exp(-np.square(gaps).sum(axis=-1))
            along = np.square(np.einsum("nijd,nd->nij", gaps, v))
            mass = (others * kernel).sum(axis=-1) / least
            z = np.sqrt(1.0 / (1.0 + mass))
            if ordered:
                z = np.minimum(1.0, kappa / (mass + np.sqrt(mass**2 + kappa)))
            terms = others * kernel * (1.0 + along / beta)
            return np.einsum("ni,nij->nj", z, terms).max(axis=1)

        y = _starts(rng, count // _GROUPS + 1, size)
        v = rng.normal(size=(len(y), y.shape[-1]))
        parts.append(climb(rng, (y, v), largest) / limit)
    return np.concatenate(parts)


def _norms(y: np.ndarray) -> dict[str, np.ndarray]:
    tokens = np.linalg.norm(y, axis=-1)
    return {
        "l2": np.linalg.norm(tokens, axis=-1),
        "token": tokens.max(axis=-1),
        "linf": np.abs(y).max(axis=(-2, -1)),
    }


def _prices(rng: np.random.Generator, count: int) -> np.ndarray:
    tokens, width = int(rng.integers(1, 7)), int(rng.integers(1, 5))
    y = rng.normal(size=(count // 9 + 1, tokens, width))
    # Near ties of all entries, where the prices are attained.
    y = np.where(rng.random((len(y), 1, 1)) < 0.5, np.sign(y), y)
    norms = _norms(y)
    return np.concatenate(
        [
            norms[target]
            / (norms[source] * conversion_constant(source, target, tokens=tokens, width=width))
            for source in norms
            for target in norms
        ]
    )


def _perceptrons(rng: np.random.Generator, count: int) -> np.ndarray:
    parts = []
    for _ in range(max(count // 40, 1)):
        rows, hidden, columns = rng.integers(1, [5, 9, 5])
        sizes = np.exp(rng.choice([0.0, 1.0]) * rng.normal(size=hidden))
        before = rng.normal(size=(rows, hidden)) * sizes
        after = rng.normal(size=(hidden, columns))
        low, high = np.sort(rng.normal(size=2)) if rng.random() < 0.5 else (0.0, 1.0)
        # The norm is convex in each slope, so the largest one is at the ends.
        slopes = rng.choice([low, high], size=(20, hidden))
        for norm in ("l2", "linf"):
            bound = activated_product_constant(before, after, (float(low), float(high)), norm)

            def values(slopes, before=before, after=after, norm=norm):
                products = (before * slopes[:, None]) @ after
                if norm == "linf":
                    return np.abs(products).sum(axis=1).max(axis=1)
                return np.linalg.norm(products, 2, axis=(1, 2))

            climbed, best = slopes.copy(), values(slopes)
            for entry in range(hidden):
                flipped = climbed.copy()
                flipped[:, entry] = low + high - flipped[:, entry]
                found = values(flipped)
                climbed = np.where((found > best)[:, None], flipped, climbed)
                best = np.maximum(best, found)
            parts.append(best / bound)
    return np.concatenate(parts)


STATEMENTS = [
    Statement("Theorem 3.C, causal masks", _causal),
    Statement("Theorem 3.G, windows, blocks, prefixes, random masks", _cliques),
    Statement("Theorem 3.F, biases by relative position", _mild),
    Statement("columns of Theorems 3.F and 3.G", _columns),
    Statement("prices between norms", _prices),
    Statement("linear, elementwise, linear (section 8)", _perceptrons),
]
