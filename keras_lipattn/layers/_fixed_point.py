"""Fixed points of contractions by iteration, and derivatives through them."""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_lipattn.layers._autodiff import vector_jacobian
from keras_lipattn.layers._backend import has_value
from keras_lipattn.layers.inversion import InversionError

# Number of differences that the extrapolation remembers.
MEMORY = {"anderson": 5, "plain": 0}
# Relative Tikhonov term of the least-squares problem of the extrapolation: about the rounding error
# of an inner product of unit vectors. It also makes the problem solvable before the memory is full.
_RIDGE = {"float32": 1e-6, "float64": 1e-14}


class FixedPoint(NamedTuple):
    """Result of the iteration for each example.

    Attributes:
        solution: Tensor `(B, ...)`.
        residual: Norm of `step(solution) - solution`, `(B,)`.
        steps: Number of evaluations of the map, `(B,)`, int32.
        converged: Whether the residual is within the tolerance, `(B,)`.
    """

    solution: Any
    residual: Any
    steps: Any
    converged: Any


def solve_fixed_point(step, start, *, contraction, norm, tolerance, max_steps, acceleration):
    """Solve `x = step(x)` for a map that shrinks distances at least by the factor `contraction`.

    The plain iteration is `x <- step(x)`. With Anderson acceleration, the next point is
    extrapolated from the last steps. It is accepted only if its residual is at most `contraction`
    times the last one, the guarantee of a plain step. Otherwise the memory is cleared and a plain
    step is taken. Two evaluations therefore reduce the residual at least as much as one plain step
    is guaranteed to, and the iteration converges for every contraction, up to rounding.

    Args:
        step: Function of a tensor `(B, ...)` that treats each example separately.
        start: Tensor `(B, ...)`.
        contraction: Lipschitz constant of `step` in the norm `norm`, a float below 1.
        norm: Function from `(B, ...)` to norms `(B,)`.
        tolerance: An example has converged when its residual is at most `tolerance` times the
            larger of the norms of the start and of the iterate.
        max_steps: Largest number of evaluations of `step`.
        acceleration: `"plain"` or `"anderson"`.

    Returns:
        A `FixedPoint`. It is not differentiable.

    Reference:
        Walker, Ni, "Anderson acceleration for fixed-point iterations", 2011.
    """
    memory = MEMORY[acceleration]
    start = ops.stop_gradient(start)
    shape = ops.shape(start)
    start_size = norm(start)

    def flat(tensor):
        return ops.reshape(tensor, (shape[0], -1))

    def is_active(count, done, *_):
        return ops.logical_and(count < max_steps, ops.logical_not(ops.all(done)))

    def body(count, done, converged, steps, x, residual, size, candidate, plain, history):
        image = ops.stop_gradient(step(ops.reshape(candidate, shape)))
        new_residual = flat(image) - candidate
        new_size = norm(ops.reshape(new_residual, shape))
        small = tolerance * ops.maximum(start_size, norm(ops.reshape(candidate, shape)))
        # The guarantee of a plain step may fail by a rounding error: there is no better point.
        accepted = ops.logical_or(plain, new_size <= contraction * size)
        accepted = ops.logical_and(accepted, ops.logical_not(done))
        if memory:
            # The first residual has no predecessor to compare with.
            keep = ops.logical_and(accepted, count > 0)
            history = _remember(history, (candidate - x, new_residual - residual), keep)
        x = ops.where(accepted[:, None], candidate, x)
        residual = ops.where(accepted[:, None], new_residual, residual)
        size = ops.where(accepted, new_size, size)
        steps = ops.where(done, steps, steps + 1)
        converged = ops.logical_or(converged, ops.logical_and(accepted, new_size <= small))
        # An iterate with NaN or infinite entries never recovers.
        broken = ops.logical_and(plain, ops.logical_not(ops.isfinite(new_size)))
        done = ops.logical_or(done, ops.logical_or(converged, broken))
        candidate = x + residual
        if memory:
            candidate = candidate - _extrapolation(history, residual)
            plain = ops.logical_not(accepted)
        return count + 1, done, converged, steps, x, residual, size, candidate, plain, history

    no = ops.zeros_like(start_size, dtype="bool")
    x = flat(start)
    history = ()
    if memory:
        history = (ops.repeat(ops.zeros_like(x)[:, None], memory, axis=1),) * 2
    state = (
        ops.zeros((), "int32"),
        no,
        no,
        ops.zeros_like(start_size, dtype="int32"),
        x,
        ops.zeros_like(x),
        ops.full_like(start_size, float("inf")),
        x,
        ops.logical_not(no),
        history,
    )
    _, _, converged, steps, x, _, size, *_ = ops.while_loop(is_active, body, state)
    solution = ops.stop_gradient(ops.reshape(x, shape))
    return FixedPoint(solution, size, steps, converged)


def checked_solution(found, name, limits):
    """The solution of a `FixedPoint`, with NaN in the examples that did not converge.

    Args:
        found: A `FixedPoint`.
        name: Name of the solution in the error.
        limits: Arguments of the iteration, as text.

    Raises:
        InversionError: If an example did not converge and its values are known, which they are not
            while a graph is traced.
    """
    if has_value(found.converged):
        _require_convergence(found, name, limits)
    rows = ops.reshape(found.converged, (-1,) + (1,) * (len(found.solution.shape) - 1))
    return ops.where(rows, found.solution, ops.cast(np.nan, found.solution.dtype))


def _require_convergence(found, name, limits):
    converged = ops.convert_to_numpy(found.converged)
    if converged.all():
        return
    residual = ops.convert_to_numpy(found.residual)
    if np.isfinite(residual).all():
        advice = 'pass `acceleration="anderson"`, allow a larger `tolerance`, or compute in float64'
    else:
        advice = "look for NaN or infinite entries in the input and in the weights"
    raise InversionError(
        f"{name} did not reach its tolerance for {int((~converged).sum())} of {len(converged)} "
        f"examples: {advice}. Received: {limits}, largest residual {residual.max():.3g} "
        f"after {int(ops.convert_to_numpy(found.steps).max())} steps"
    )


def with_implicit_gradient(branch, target, solution, solve):
    """Refine a solution of `x + branch(x) = target` by one step that has the right derivatives.

    The iteration that found the solution is not differentiated. The equation gives
    `dx = (I + J)^{-1} (d target - d branch)`, where `J` is the Jacobian of the branch at the
    solution and `d branch` is the change of the branch due to its weights. A gradient `g` is
    therefore mapped to `w = (I + J^T)^{-1} g`, the fixed point of the contraction
    `w -> g - J^T w`.

    Args:
        branch: Function of a tensor `(B, ...)`.
        target: Tensor `(B, ...)`.
        solution: Tensor `(B, ...)`.
        solve: Function `(step, start)` that returns the fixed point of `step`.

    Returns:
        The tensor `target - branch(solution)`, whose error is smaller than that of `solution` by
        the Lipschitz constant of the branch. It has first derivatives only.
    """
    x = ops.stop_gradient(solution)
    # A function of the target and of the weights; `x` is a constant in it.
    image = target - branch(x)

    @ops.custom_gradient
    def with_gradient(image):
        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream

            def step(w):
                return upstream - vector_jacobian(branch, x, w, differentiable=False)

            return solve(step, upstream)

        return ops.multiply(image, 1.0), gradient

    return with_gradient(image)


def example_norm(name, *, dual=False):
    """The norm `name` as a function from `(B, ..., D)` to `(B,)`.

    Args:
        name: `"l2"` (2-norm of all entries) or `"token"` (largest 2-norm of a token).
        dual: Whether to return the dual norm. The transpose of a linear map has the same constant
            in the dual norm as the map has in the norm.
    """
    over_tokens = ops.sum if dual else ops.max

    def norm(tensor):
        if name == "l2":
            return _length(tensor, tuple(range(1, len(tensor.shape))))
        tokens = _length(tensor, -1)
        axes = tuple(range(1, len(tokens.shape)))
        return over_tokens(tokens, axis=axes) if axes else tokens

    return norm


def _length(tensor, axis):
    return ops.sqrt(ops.sum(ops.square(tensor), axis=axis))


def _remember(history, newest, keep):
    """Append the newest differences `(B, n)`, or clear the history where `keep` `(B,)` is false.

    Args:
        history: Differences of iterates and of their residuals, `(B, memory, n)` each. Rows of
            zeros are empty.
        newest: The two differences to append.
        keep: Boolean `(B,)`.
    """
    keep = keep[:, None, None]
    pairs = zip(history, newest, strict=True)
    extended = [ops.concatenate([old[:, 1:], new[:, None]], axis=1) for old, new in pairs]
    return tuple(ops.where(keep, array, ops.zeros_like(array)) for array in extended)


def _extrapolation(history, residual):
    """Correction `(B, n)` of a plain step, exact if the map is affine on the history."""
    moved, changed = history
    length = ops.sqrt(ops.sum(ops.square(changed), axis=-1, keepdims=True))
    # Differences shrink as the iteration converges: with unit length, all have the same weight.
    length = ops.where(length > 0, length, ops.ones_like(length))
    moved, changed = moved / length, changed / length
    gram = ops.matmul(changed, ops.swapaxes(changed, 1, 2))
    right = ops.matmul(changed, residual[..., None])
    weights = _solve_positive(gram, right)
    return ops.sum(weights * (moved + changed), axis=1)


def _solve_positive(matrix, right):
    """`(matrix + ridge)^{-1} right` for a positive semidefinite `(B, m, m)` with unit diagonal.

    Elimination without pivoting is stable for such a matrix. It is written out because not every
    backend can compile a decomposition.
    """
    size = matrix.shape[-1]
    ridge = _RIDGE[keras.backend.standardize_dtype(matrix.dtype)]
    unit = np.eye(size, dtype=keras.backend.standardize_dtype(matrix.dtype))
    system = ops.concatenate([matrix + ridge * unit, right], axis=-1)
    for index in range(size):
        pivot = system[:, index : index + 1]
        # Rounding may leave almost nothing of a row that depends on earlier rows.
        row = pivot / ops.maximum(pivot[..., index : index + 1], ridge)
        # Clear the column in the other rows, and write `row` into its own.
        system = system - (system[:, :, index : index + 1] - unit[:, index : index + 1]) * row
    return system[..., size:]
