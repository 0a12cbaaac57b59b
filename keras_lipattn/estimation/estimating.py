"""Search for the fastest change of a function: a lower estimate of its Lipschitz constant."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lipattn._arguments import (
    describe,
    require_norm,
    require_positive,
    require_positive_integer,
)
from keras_lipattn.estimation.derivatives import Derivatives, preserve_losses
from keras_lipattn.estimation.norms import (
    initial_covectors,
    norm_of,
    norming_covector,
    project_to_ball,
    steepest_direction,
)


@dataclasses.dataclass(frozen=True, eq=False)
class LipschitzEstimate:
    """A lower estimate of a Lipschitz constant. It is not a certificate.

    The constant of the function is at least `value`, up to the rounding errors of the dtype in
    which it was computed. It may be larger by any amount.

    Args:
        value: `|J(point) direction| / |direction|`, evaluated at the end of the search.
        norm: Norm of inputs and outputs, `"l2"`, `"token"` or `"linf"`.
        point: The point of this quotient, one example of shape `(...)`.
        direction: The direction of this quotient, shape `(...)`.
        steps: Number of steps of each ascent.
        seed: Seed of the search.

    Example:

    >>> x = np.random.default_rng(0).normal(size=(4, 3))
    >>> estimate = keras_lipattn.estimate_lipschitz(lambda x: 2.0 * x, x)
    >>> round(estimate.value, 4), estimate.point.shape
    (2.0, (3,))
    """

    value: float
    norm: str
    point: np.ndarray
    direction: np.ndarray
    steps: int
    seed: int


def estimate_lipschitz(
    function: Callable,
    x: Any,
    norm: str = "l2",
    *,
    steps: int = 40,
    restarts: int = 4,
    step_size: float = 0.3,
    input_radius: float | None = None,
    radius: float | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> LipschitzEstimate:
    """Estimates the Lipschitz constant of a function from below. This is not a certificate.

    The search looks for a point `x` and a direction `v` with a large quotient `|J(x) v| / |v|`. The
    direction is improved by power iteration (in the 2-norm; by its analog in the other norms), the
    point by ascent along the gradient of `log |J(x) v|`. The returned quotient is evaluated at the
    end, so the Lipschitz constant is at least as large, up to rounding errors. They are negligible
    for float64 inputs to a float64 model. The weights, losses and random state of the function do
    not change.

    Args:
        function: A function, Keras layer or model from a floating tensor `(B, ...)` to a floating
            tensor `(B, ...)`. Examples must be independent of each other. Layers run at inference.
        x: Points to start from, `(B, ...)`.
        norm: Norm of inputs and outputs: `"l2"` (2-norm of all entries), `"token"` (largest
            Euclidean norm of a token, where tokens are all axes but the batch and the last one) or
            `"linf"` (largest absolute entry).
        steps: Number of steps of the ascent from each start, and of the final power iteration.
        restarts: Number of starts. The first is at `x`, the others are random points near it.
        step_size: Largest change of an entry of `x` in the first step, in units of the root mean
            square of `x` (1 if `x` is 0). Later steps are smaller.
        input_radius: If given, tokens keep at most this Euclidean norm, as in `certify`. This must
            hold for the points in `x`.
        radius: If given, each point stays within this distance of the point in `x` from which it
            started, measured in `norm`. The result is then a lower estimate of the local constant
            that `certify(model, center=x, radius=radius)` bounds from above.
        call_kwargs: Further arguments of `function`, such as masks.
        seed: Seed of the search.

    Returns:
        A `LipschitzEstimate`.

    Raises:
        ValueError: If an argument is out of range, if `function` does not return one floating
            tensor with one output per example, or if its values or derivatives are not finite.

    Example:

    >>> layer = keras_lipattn.L2MultiHeadAttention(num_heads=2, key_dim=4)
    >>> x = np.random.default_rng(0).normal(size=(4, 6, 8))
    >>> layer.build(x.shape)
    >>> estimate = keras_lipattn.estimate_lipschitz(layer, x)
    >>> 0.0 < estimate.value <= layer.lipschitz().value
    True

    Reference:
        Boyd, "The power method for l^p norms", 1974 (the iteration for `v`).
    """
    points = _checked(function, x, norm, steps, restarts, step_size, input_radius, seed)
    require_positive("radius", radius)
    arguments = dict(call_kwargs or {})
    if isinstance(function, keras.layers.Layer):
        arguments["training"] = False

    def run(point):
        # The scope discards what a layer writes, such as its random state.
        with keras.StatelessScope():
            return function(point, **arguments)

    with preserve_losses(function):
        return _searched(
            run, points, norm, steps, restarts, step_size, (input_radius, radius), seed
        )


def _searched(run, points, norm, steps, restarts, step_size, radii, seed):
    output = run(ops.convert_to_tensor(points))
    _check_value(output, points)
    derivatives = Derivatives(run, points.dtype.name, output)
    search = _Search(derivatives, points.astype(np.float64), norm, steps, step_size, radii)
    rng = np.random.default_rng(seed)
    for start in range(restarts):
        search.ascend(points.astype(np.float64), start, rng)
    return search.finish(seed)


class _Search:
    """The largest quotient found so far, and the steps that increase it."""

    def __init__(self, derivatives, points, norm, steps, step_size, radii):
        self.derivatives = derivatives
        self.norm = norm
        self.steps = steps
        self.step_size = step_size
        self.input_radius, self.radius = radii
        self.centers = points
        # The best quotient of each example; -1 before the first one.
        self.values = np.full(len(points), -1.0)
        self.points, self.directions = points, np.zeros_like(points)

    def ascend(self, x, start, rng):
        """One ascent in `x`, with a step of power iteration for the direction after each step."""
        scale = np.sqrt(np.mean(np.square(x))) or 1.0
        if self.radius is not None:
            scale = min(scale, self.radius)
        if start:
            x = self.inside(x * rng.uniform(0.3, 1.7) + 0.5 * scale * rng.normal(size=x.shape))
        covector = initial_covectors(self.norm, self.derivatives.output_shape, start, rng)
        v = steepest_direction(self.norm, self.derivatives.vjp(x, covector))
        for step in range(self.steps):
            product = self.derivatives.jvp(x, v)
            self.remember(x, v, product)
            covector = norming_covector(self.norm, product)
            slope = self.derivatives.jvp_gradient(x, covector, v)
            slope = np.nan_to_num(slope, posinf=0.0, neginf=0.0)
            # It has the direction of the gradient of the logarithm. Its length differs between
            # examples.
            axes = tuple(range(1, x.ndim))
            largest = np.abs(slope).max(axis=axes, keepdims=True)
            slope = np.divide(slope, largest, out=np.zeros_like(slope), where=largest > 0.0)
            rate = self.step_size * scale / (1.0 + 5.0 * step / self.steps)
            x = self.inside(x + rate * slope)
            v = self.improved(x, v, covector)

    def finish(self, seed):
        """Improves the directions at the best points, and evaluates the best pair once more."""
        if self.values.max() < 0.0:
            raise ValueError(
                "The derivative of `function` must be finite. Received: a derivative that is NaN "
                "or infinite at all points of the search"
            )
        x, v = self.points.copy(), self.directions.copy()
        for _ in range(self.steps):
            product = self.derivatives.jvp(x, v)
            self.remember(x, v, product)
            v = self.improved(x, v, norming_covector(self.norm, product))
        quotients = self.quotients(
            self.directions, self.derivatives.jvp(self.points, self.directions)
        )
        best = quotients.argmax()
        return LipschitzEstimate(
            value=float(quotients[best]),
            norm=self.norm,
            point=self.points[best],
            direction=self.directions[best],
            steps=self.steps,
            seed=seed,
        )

    def improved(self, x, v, covector):
        """The next direction; `v` where the product with the covector is 0."""
        found = np.nan_to_num(self.derivatives.vjp(x, covector))
        found = steepest_direction(self.norm, found)
        # Rounded to the dtype of the function's input.
        found = found.astype(self.derivatives.dtype).astype(np.float64)
        seen = norm_of(self.norm, found) > 0.0
        return np.where(seen.reshape(-1, *[1] * (x.ndim - 1)), found, v)

    def quotients(self, v, product):
        """`|J v| / |v|` of each example, 0 where `v` is 0 and -1 where `J v` is not finite."""
        sizes, values = norm_of(self.norm, v), norm_of(self.norm, product)
        # Where v is 0, J v is 0 or not finite.
        quotients = values / np.maximum(sizes, 1e-300)
        return np.where(np.isfinite(quotients), quotients, -1.0)

    def remember(self, x, v, product):
        """Keeps each pair that is better than all previous ones."""
        quotients = self.quotients(v, product)
        better = quotients > self.values
        self.values = np.where(better, quotients, self.values)
        better = better.reshape(-1, *[1] * (x.ndim - 1))
        self.points = np.where(better, x, self.points)
        self.directions = np.where(better, v, self.directions)

    def inside(self, x):
        """`x` projected to the admissible points and rounded to the function's dtype."""
        if self.radius is not None:
            x = self.centers + project_to_ball(self.norm, x - self.centers, self.radius)
        if self.input_radius is not None:
            sizes = np.linalg.norm(x, axis=-1, keepdims=True)
            x = x * np.minimum(1.0, self.input_radius / np.maximum(sizes, 1e-300))
        return x.astype(self.derivatives.dtype).astype(np.float64)


def _checked(function, x, norm, steps, restarts, step_size, input_radius, seed):
    """Checks the arguments and returns the points as an array."""
    if not callable(function):
        raise ValueError(f"`function` must be callable. Received: function={function!r}")
    if isinstance(function, keras.layers.Layer) and not function.built:
        raise ValueError(
            "The layer has no weights yet. Build it or call it on data before estimating its "
            f"constant. Received: built={function.built}"
        )
    require_norm("norm", norm)
    require_positive_integer("steps", steps)
    require_positive_integer("restarts", restarts)
    require_positive("input_radius", input_radius)
    if step_size is None:
        raise ValueError(f"`step_size` must be a positive number. Received: step_size={step_size}")
    require_positive("step_size", step_size)
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"`seed` must be an integer of at least 0. Received: seed={seed!r}")
    points = np.asarray(ops.convert_to_numpy(x))
    if points.dtype.name not in ("float16", "float32", "float64"):
        raise ValueError(f"`x` must have a floating dtype. Received: x of dtype {points.dtype}")
    if points.ndim < 2 or not points.size:
        raise ValueError(f"`x` must have shape (batch, ...). Received: x of shape {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("`x` must be finite. Received: x with entries that are NaN or infinite")
    if input_radius is not None:
        largest = float(np.linalg.norm(points.astype(np.float64), axis=-1).max())
        if largest > input_radius * (1.0 + 1e-6):
            raise ValueError(
                "`x` must have tokens of norm at most `input_radius`. "
                f"Received: input_radius={input_radius}, largest norm {largest:g}"
            )
    return points


def _check_value(value, points):
    if not ops.is_tensor(value) or not keras.backend.is_float_dtype(
        keras.backend.standardize_dtype(value.dtype)
    ):
        raise ValueError(f"`function` must return one floating tensor. Received: {describe(value)}")
    if not tuple(value.shape) or value.shape[0] != len(points):
        raise ValueError(
            f"`function` must return one output for each of the {len(points)} examples. "
            f"Received: {describe(value)}"
        )
    if not np.isfinite(ops.convert_to_numpy(value)).all():
        raise ValueError(
            "`function` must be finite at `x`. Received: outputs that are NaN or infinite"
        )
