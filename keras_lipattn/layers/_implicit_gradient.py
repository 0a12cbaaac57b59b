"""Derivatives through an inverse by the implicit function theorem."""

from keras import ops

from keras_lipattn.layers._vector_jacobian import vector_jacobian


def with_implicit_gradient(branch, target, solution, solve):
    """One more step from a solution of `x + branch(x) = target`, with the equation's derivatives.

    The iteration that found the solution is not differentiated. From the equation,
    `dx = (I + J)^{-1} (d target - d branch)` where `J` is the Jacobian of the branch at the
    solution and `d branch` its change by anything else than `x`, so a gradient `g` turns into
    `w = (I + J^T)^{-1} g`, the solution of `w = g - J^T w`: another contraction.

    Args:
        branch: Function of a tensor `(B, ...)`.
        target: Tensor `(B, ...)`.
        solution: Tensor `(B, ...)`.
        solve: Function `(step, start)` that returns the fixed point of `step`.

    Returns:
        The tensor `target - branch(solution)`, nearer to the true solution by the contraction of
        the branch. It has first derivatives only.
    """
    x = ops.stop_gradient(solution)
    # Depends on the target and on the weights, and on `x` only by value.
    image = target - branch(x)

    @ops.custom_gradient
    def turned(image):
        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream

            def step(w):
                return upstream - vector_jacobian(branch, x, w, differentiable=False)

            return solve(step, upstream)

        return ops.multiply(image, 1.0), gradient

    return turned(image)
