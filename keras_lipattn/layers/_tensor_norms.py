"""Norms of each example of a batch, and their duals."""

from keras import ops


def example_norm(name, *, dual=False):
    """The norm `name` as a function from `(B, ..., D)` to `(B,)`.

    Args:
        name: `"l2"` (2-norm of all entries) or `"token"` (largest 2-norm of a token).
        dual: Whether the dual norm is wanted, in which the transpose of a map contracts like the
            map itself.
    """
    if name == "l2":
        return _l2
    return _sum_of_tokens if dual else _largest_token


def _l2(tensor):
    return _root(tensor, tuple(range(1, len(tensor.shape))))


def _largest_token(tensor):
    return _over_tokens(ops.max, tensor)


def _sum_of_tokens(tensor):
    return _over_tokens(ops.sum, tensor)


def _over_tokens(reduce, tensor):
    tokens = _root(tensor, -1)
    axes = tuple(range(1, len(tokens.shape)))
    return reduce(tokens, axis=axes) if axes else tokens


def _root(tensor, axis):
    return ops.sqrt(ops.sum(ops.square(tensor), axis=axis))
