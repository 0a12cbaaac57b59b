"""The two scalars every bound of L2 attention is made of."""

import math
import typing

from scipy.special import lambertw


def phi_inv(n: float) -> float:
    """Inverse of `phi(x) = x exp(x + 1)`: the largest trace of a row's covariance.

    Args:
        n: number of *other* tokens a query can see, `>= 0`.

    Returns:
        `Phi = W0(n / e)`, a float.

    Raises:
        ValueError: if `n` is negative or NaN.

    Reference: Kim, Papamakarios and Mnih, "The Lipschitz constant of self-attention",
        ICML 2021, Theorem 3.2; Lemma 3.1 of docs/theory.md.
    """
    return _principal_lambert(n, 1.0)


def s_star(n: float) -> float:
    """The row mass at which a diagonal block of the Jacobian is largest.

    Args:
        n: number of *other* tokens a query can see, `>= 0`.

    Returns:
        `S* = W0(n exp(-3/2))`, a float. The largest norm of a diagonal block is `1 + 2 S*`,
        the exact constant of the token norm is `1 + 4 S*`.

    Raises:
        ValueError: if `n` is negative or NaN.

    Reference: Lemma 3.1 and Theorem 4 of docs/theory.md.
    """
    return _principal_lambert(n, 1.5)


def log_lambert(x: typing.Any, xp: typing.Any) -> typing.Any:
    """Upper bound of `W0(exp(x))`, above it by roundings only; differentiable.

    Args:
        x: array of any shape.
        xp: array namespace, `numpy` or `keras.ops`.

    Returns:
        Array of the same shape, positive: what is below `W0(exp(-60))` becomes that.
    """
    # W0 is monotone, and exponentials of less vanish in float32.
    x = xp.maximum(x, -60.0)
    # w = log(1 + exp(x)) is above, as w exp(w) >= exp(w) - 1.
    w = xp.maximum(x, 0.0) + xp.log1p(xp.exp(-xp.abs(x)))
    # Newton's method for w + log(w) = x, from below after one step.
    for _ in range(4):
        w = w / (1.0 + w) * (1.0 + x - xp.log(w))
    # One for w exp(w) = exp(x): it is convex, so the step ends above.
    return w / (1.0 + w) * w + xp.exp(x - w) / (1.0 + w)


def _principal_lambert(n: float, exponent: float) -> float:
    n = float(n)
    if not n >= 0.0:
        raise ValueError(f"`n` must be a number of tokens, at least 0. Received: n={n}")
    return float(lambertw(n * math.exp(-exponent)).real)
