"""Fixed points of contractions by iteration, accelerated and safeguarded."""

from typing import Any, NamedTuple

from keras import ops

from keras_lipattn.layers._anderson import AndersonMemory


class FixedPoint(NamedTuple):
    """What the iteration found, for each example.

    Attributes:
        solution: Tensor `(B, ...)`.
        residual: Norm of `step(solution) - solution`, `(B,)`.
        steps: Number of evaluations of the map, `(B,)`, int32.
        converged: Whether the residual is small enough, `(B,)`.
    """

    solution: Any
    residual: Any
    steps: Any
    converged: Any


def solve_fixed_point(step, start, *, contraction, norm, tolerance, max_steps, memory):
    """Solves `x = step(x)` for a map that shrinks distances at least by the factor `contraction`.

    Anderson's extrapolation proposes the next point. It is accepted only when its residual is at
    most `contraction` times the last one, which is what a plain step is sure to achieve; otherwise
    the memory is emptied and a plain step is taken. So two evaluations always gain what a plain
    step is sure to gain, whatever the map, and the iteration always converges, up to rounding.

    Args:
        step: Function of a tensor `(B, ...)`, example by example.
        start: Tensor `(B, ...)`.
        contraction: Lipschitz constant of `step` in the norm `norm`, a float below 1.
        norm: Function from `(B, ...)` to norms `(B,)`.
        tolerance: Converged is a residual of at most `tolerance` times the larger of the norms of
            the start and of the iterate.
        max_steps: Number of evaluations of `step` at most.
        memory: Number of differences the extrapolation uses; 0 iterates plainly.

    Returns:
        A `FixedPoint`. Derivatives do not pass through it.
    """
    anderson = AndersonMemory(memory)
    start = ops.stop_gradient(start)
    shape = ops.shape(start)
    start_size = norm(start)

    def flat(tensor):
        return ops.reshape(tensor, (shape[0], -1))

    def active(count, done, *_):
        return ops.logical_and(count < max_steps, ops.logical_not(ops.all(done)))

    def body(count, done, converged, steps, x, residual, size, candidate, plain, state):
        tried = ops.stop_gradient(step(ops.reshape(candidate, shape)))
        new_residual = flat(tried) - candidate
        new_size = norm(ops.reshape(new_residual, shape))
        small = tolerance * ops.maximum(start_size, norm(ops.reshape(candidate, shape)))
        accepted = ops.logical_or(plain, new_size <= contraction * size)
        # An example that is done stays as it is.
        accepted = ops.logical_and(accepted, ops.logical_not(done))
        rows = accepted[:, None]
        state = anderson.extend(state, candidate - x, new_residual - residual, accepted)
        # The first residual has nothing to be compared with.
        state = tuple(ops.where(count > 0, array, ops.zeros_like(array)) for array in state)
        x = ops.where(rows, candidate, x)
        residual = ops.where(rows, new_residual, residual)
        size = ops.where(accepted, new_size, size)
        steps = ops.where(done, steps, steps + 1)
        converged = ops.logical_or(converged, ops.logical_and(accepted, new_size <= small))
        # What is not a number will not become one: no reason to go on.
        broken = ops.logical_not(ops.isfinite(new_size))
        done = ops.logical_or(done, ops.logical_or(converged, ops.logical_and(plain, broken)))
        candidate = anderson.next(state, x, residual)
        return (
            count + 1,
            done,
            converged,
            steps,
            x,
            residual,
            size,
            candidate,
            ops.logical_not(accepted),
            state,
        )

    no = ops.zeros_like(start_size, dtype="bool")
    x = flat(start)
    state = (
        ops.zeros((), "int32"),
        no,
        no,
        ops.zeros_like(start_size, dtype="int32"),
        x,
        ops.zeros_like(x),
        # Nothing found yet.
        ops.full_like(start_size, float("inf")),
        x,
        ops.logical_not(no),
        anderson.empty(x),
    )
    _, _, converged, steps, x, _, size, *_ = ops.while_loop(active, body, state)
    solution = ops.stop_gradient(ops.reshape(x, shape))
    return FixedPoint(solution, size, steps, converged)
