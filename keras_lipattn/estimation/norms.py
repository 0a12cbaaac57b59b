"""The three norms of a batch of tensors, and the vectors that attain them.

`norming_covector(y)` has dual norm 1 and `<norming_covector(y), y> = |y|`. `steepest_direction(w)`
has norm 1 and the largest `<w, v>` among such `v`. Alternating between them,
`v = steepest_direction(J^T norming_covector(J v))`, never decreases `|J v|`; in the 2-norm this is
power iteration.
"""

import numpy as np


def norm_of(norm: str, y: np.ndarray) -> np.ndarray:
    """Norm of each example, shape `(B,)`."""
    if norm == "linf":
        return np.abs(_flat(y)).max(axis=1)
    if norm == "token":
        return np.linalg.norm(_tokens(y), axis=2).max(axis=1)
    return np.linalg.norm(_flat(y), axis=1)


def norming_covector(norm: str, y: np.ndarray) -> np.ndarray:
    """Covector of dual norm 1 whose product with `y` is the norm of `y`; 0 where `y` is 0."""
    if norm == "l2":
        return _unit(_flat(y)).reshape(y.shape)
    if norm == "linf":
        flat = _flat(y)
        largest = np.abs(flat).argmax(axis=1)[:, None]
        return _picked(np.sign(flat), largest).reshape(y.shape)
    tokens = _tokens(y)
    largest = np.linalg.norm(tokens, axis=2).argmax(axis=1)[:, None, None]
    return _picked(_unit(tokens), largest).reshape(y.shape)


def steepest_direction(norm: str, w: np.ndarray) -> np.ndarray:
    """Direction of norm 1 that maximizes the product with the covector `w`; 0 where `w` is 0."""
    if norm == "l2":
        return _unit(_flat(w)).reshape(w.shape)
    if norm == "linf":
        return np.sign(w)
    return _unit(_tokens(w)).reshape(w.shape)


def project_to_ball(norm: str, x: np.ndarray, radius: float) -> np.ndarray:
    """Each example moved into the ball of this radius around 0."""
    if norm == "linf":
        return np.clip(x, -radius, radius)
    parts = _flat(x) if norm == "l2" else _tokens(x)
    sizes = np.linalg.norm(parts, axis=-1, keepdims=True)
    return (parts * np.minimum(1.0, radius / np.maximum(sizes, 1e-300))).reshape(x.shape)


def initial_covectors(norm: str, shape: tuple[int, ...], start: int, rng) -> np.ndarray:
    """Covectors for the `start`-th ascent; `"linf"` and `"token"` cycle through entries, tokens."""
    y = rng.normal(size=shape)
    if norm == "linf":
        flat = _flat(y)
        index = np.full((shape[0], 1), start % flat.shape[1])
        return _picked(np.sign(flat), index).reshape(shape)
    if norm == "token":
        tokens = _tokens(y)
        index = np.full((shape[0], 1, 1), start % tokens.shape[1])
        return _picked(_unit(tokens), index).reshape(shape)
    return norming_covector(norm, y)


def _picked(values, index):
    """`values` at one index of axis 1, and 0 elsewhere."""
    kept = np.zeros_like(values)
    np.put_along_axis(kept, index, np.take_along_axis(values, index, axis=1), axis=1)
    return kept


def _flat(y):
    return y.reshape(len(y), -1)


def _tokens(y):
    """`(B, tokens, features)`; a tensor without an axis of tokens counts as one token."""
    return y.reshape(len(y), -1, y.shape[-1] if y.ndim > 1 else 1)


def _unit(y):
    sizes = np.linalg.norm(y, axis=-1, keepdims=True)
    return np.divide(y, sizes, out=np.zeros_like(y), where=sizes > 0.0)
