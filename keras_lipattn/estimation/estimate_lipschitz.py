"""Attacks the Lipschitz constant of a function: a lower estimate of it."""

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lipattn.estimation._derivatives import Derivatives
from keras_lipattn.estimation._losses import losses_kept
from keras_lipattn.estimation._norms import against, along, covectors, norm_of, within
from keras_lipattn.estimation.lipschitz_estimate import LipschitzEstimate
from keras_lipattn.layers._arguments import (
    describe,
    require_norm,
    require_positive,
    require_positive_integer,
)


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
    """Searches for the fastest change of a function: a lower estimate, not a certificate.

    Looks for a point `x` and a direction `v` with `|J(x) v| / |v|` large. For `v` it alternates
    between `v` and `J^T` of the covector that attains `|J v|` (power iteration in the 2-norm); for
    `x` it climbs the gradient of `log |J(x) v|`. What is returned was evaluated at the end, so the
    Lipschitz constant is at least that, up to rounding: float64 inputs to a float64 model
    make that negligible. Nothing about the function is changed: not its weights, losses nor random
    state.

    Args:
        function: From a floating tensor `(B, ...)` to one `(B, ...)`, examples being independent;
            a function, Keras layer or model. Layers run at inference.
        x: Points to begin from, `(B, ...)`.
        norm: `"l2"` (2-norm of all entries), `"token"` (largest Euclidean norm of a token, where
            tokens are all axes but the batch and the last one) or `"linf"` (largest absolute
            entry), of inputs and outputs alike.
        steps: Steps of the ascent from each start, and of the iteration for `v` at its end.
        restarts: Starts; the first at `x`, the others near it at random.
        step_size: Largest change of an entry of `x` in the first step, in units of the root mean
            square of `x` (1 if `x` is 0). Steps get smaller.
        input_radius: If given, points stay where tokens have at most this Euclidean norm, as in
            `certify`. The points in `x` must.
        radius: If given, each point stays within this distance, in the norm `norm`, of the point in
            `x` that it began from: a lower estimate of a local constant, as
            `certify(center=x, radius=radius)` bounds it.
        call_kwargs: Further arguments of `function`, such as masks.
        seed: Seed of the search.

    Returns:
        A `LipschitzEstimate`.

    Raises:
        ValueError: If an argument is out of range, `function` does not return one floating tensor
            of as many examples, or its values or derivatives are not finite.

    Example:

    >>> layer = keras_lipattn.L2MultiHeadAttention(num_heads=2, key_dim=4)
    >>> x = np.random.default_rng(0).normal(size=(4, 6, 8))
    >>> layer.build(x.shape)
    >>> estimate_lipschitz(layer, x).value <= layer.lipschitz().value
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
        # Whatever a layer would write, such as its random state, is dropped with the scope.
        with keras.StatelessScope():
            return function(point, **arguments)

    with losses_kept(function):
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
        search.climb(points.astype(np.float64), start, rng)
    return search.finish(seed)


class _Search:
    """The largest quotient found so far, and how to find larger ones."""

    def __init__(self, derivatives, points, norm, steps, step_size, radii):
        self.derivatives = derivatives
        self.norm = norm
        self.steps = steps
        self.step_size = step_size
        self.input_radius, self.radius = radii
        self.centres = points
        # The best of each example, for batches that share masks; -1 before there is any.
        self.values = np.full(len(points), -1.0)
        self.points, self.directions = points, np.zeros_like(points)

    def climb(self, x, start, rng):
        """One ascent in `x` with the direction kept close to the best one."""
        scale = np.sqrt(np.mean(np.square(x))) or 1.0
        if self.radius is not None:
            scale = min(scale, self.radius)
        if start:
            x = self.inside(x * rng.uniform(0.3, 1.7) + 0.5 * scale * rng.normal(size=x.shape))
        covector = covectors(self.norm, self.derivatives.output_shape, start, rng)
        v = against(self.norm, self.derivatives.pull(x, covector))
        for step in range(self.steps):
            product = self.derivatives.push(x, v)
            self.remember(x, v, product)
            covector = along(self.norm, product)
            slope = np.nan_to_num(self.derivatives.slope(x, covector, v), posinf=0.0, neginf=0.0)
            # The gradient of the logarithm has this direction; examples differ in its length.
            axes = tuple(range(1, x.ndim))
            largest = np.abs(slope).max(axis=axes, keepdims=True)
            slope = np.divide(slope, largest, out=np.zeros_like(slope), where=largest > 0.0)
            rate = self.step_size * scale / (1.0 + 5.0 * step / self.steps)
            x = self.inside(x + rate * slope)
            v = self.improved(x, v, covector)

    def finish(self, seed):
        """Turns the directions at the best points, and evaluates the best pair once more."""
        if self.values.max() < 0.0:
            raise ValueError(
                "The derivative of `function` must be finite at some of the points tried. "
                "Received: none where it is"
            )
        x, v = self.points.copy(), self.directions.copy()
        for _ in range(self.steps):
            product = self.derivatives.push(x, v)
            self.remember(x, v, product)
            v = self.improved(x, v, along(self.norm, product))
        quotients = self.quotients(
            self.directions, self.derivatives.push(self.points, self.directions)
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
        """The next direction; the one there was where the covector sees nothing."""
        found = against(self.norm, np.nan_to_num(self.derivatives.pull(x, covector)))
        # As the function gets it: rounded to its dtype.
        found = found.astype(self.derivatives.dtype).astype(np.float64)
        seen = norm_of(self.norm, found) > 0.0
        return np.where(seen.reshape(-1, *[1] * (x.ndim - 1)), found, v)

    def quotients(self, v, product):
        """`|J v| / |v|` of each example, 0 where `v` is 0 and -1 where it is not finite."""
        sizes, values = norm_of(self.norm, v), norm_of(self.norm, product)
        # Where v is 0 the image is 0 as well, or not finite.
        quotients = values / np.maximum(sizes, 1e-300)
        return np.where(np.isfinite(quotients), quotients, -1.0)

    def remember(self, x, v, product):
        """Keeps the pairs that are better than any before."""
        quotients = self.quotients(v, product)
        better = quotients > self.values
        self.values = np.where(better, quotients, self.values)
        better = better.reshape(-1, *[1] * (x.ndim - 1))
        self.points = np.where(better, x, self.points)
        self.directions = np.where(better, v, self.directions)

    def inside(self, x):
        """`x` where it may be, as the function gets it: rounded to its dtype."""
        if self.radius is not None:
            x = self.centres + within(self.norm, x - self.centres, self.radius)
        if self.input_radius is not None:
            sizes = np.linalg.norm(x, axis=-1, keepdims=True)
            x = x * np.minimum(1.0, self.input_radius / np.maximum(sizes, 1e-300))
        return x.astype(self.derivatives.dtype).astype(np.float64)


def _checked(function, x, norm, steps, restarts, step_size, input_radius, seed):
    """The points as an array, if the arguments are in range."""
    if not callable(function):
        raise ValueError(f"`function` must be callable. Received: function={function!r}")
    if isinstance(function, keras.layers.Layer) and not function.built:
        raise ValueError(
            "The layer has no weights yet: build it, or call it on data, before estimating its "
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
        raise ValueError(f"`x` must be floating numbers. Received: x of dtype {points.dtype}")
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
        raise ValueError("`function` must be finite at `x`. Received: outputs NaN or infinite")
