"""Jacobians of layers by automatic differentiation, and ascent on their norms."""

import numpy as np
import tensorflow as tf
from helpers import bounds_cases


def jacobian(run, x):
    """Jacobian of a layer at one example.

    Args:
        run: from a batch `(n, ..., D)` of copies of the example to its outputs.
        x: the example, `(..., D)`.

    Returns:
        `(tokens, outputs, tokens, features)`, the axes of tokens flattened.
    """
    one = np.asarray(run(tf.constant(x[None])))[0]
    # One copy of the example for every entry of the output: one backward pass gives all rows.
    copies = tf.constant(np.repeat(x[None], one.size, axis=0))
    with tf.GradientTape() as tape:
        tape.watch(copies)
        entries = tf.reshape(run(copies), (one.size, one.size))
        total = tf.reduce_sum(tf.linalg.diag_part(entries))
    rows = np.asarray(tape.gradient(total, copies), np.float64)
    outputs = one.shape[-1] if one.ndim == x.ndim else one.size // (x.size // x.shape[-1])
    return rows.reshape(-1, outputs, x.size // x.shape[-1], x.shape[-1])


def norms(jac):
    """The three norms of a Jacobian; that of `"token"` from below."""
    return {norm: bounds_cases.attained(jac, norm)[0] for norm in ("l2", "token", "linf")}


def ascend(run, x, norm, *, steps=12, rate=0.3):
    """Gradient ascent on the norm of the Jacobian; the largest norm on the way."""
    best, h = 0.0, 1e-5
    for step in range(steps):
        value, covector, direction = bounds_cases.attained(jacobian(run, x), norm)
        best = max(best, value)
        # With the pair (u, v) that attains the norm held fixed, the gradient of <u, J v>.
        push = h * direction.reshape(x.shape)
        ends = tf.constant(np.stack([x + push, x - push]))
        with tf.GradientTape() as tape:
            tape.watch(ends)
            outputs = run(ends)
            total = tf.reduce_sum(outputs * covector.reshape(outputs.shape[1:]))
        pulled = np.asarray(tape.gradient(total, ends))
        gradient = pulled[0] - pulled[1]
        size = np.abs(gradient).max()
        if size == 0.0:
            break
        x = x + rate / (1.0 + 3.0 * step / steps) * gradient / size
    return best
