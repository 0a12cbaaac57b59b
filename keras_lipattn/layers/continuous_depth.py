"""A Transformer of continuous depth: the flow of an ordinary differential equation."""

import itertools
import math

import keras
from keras import ops

from keras_lipattn._arguments import require_positive_integer
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.layers._branch import Branch
from keras_lipattn.layers._runge_kutta import TABLEAUS, exp, make_step, rounded
from keras_lipattn.linalg.exact import SAFETY


@keras.saving.register_keras_serializable(package="keras_lipattn")
class ContinuousDepth(keras.layers.Layer):
    """The flow `x(0) -> x(time)` of `dx/dt = branch(x) - decay * x`, by a fixed number of steps.

    The flow is the limit of deep residual networks with shared weights. If the branch has the
    Lipschitz constant `L`, the solution is unique. By Gronwall's inequality, the flow has the
    constant `exp((L - decay) * time)` and its inverse `exp((L + decay) * time)`. `lipschitz`
    certifies the discrete steps, whose constant is at most that of the flow. If `decay` is at least
    `L`, it is at most 1 at any depth.

    The branch always runs in inference mode, so its caps hold and the layer is the same function in
    training. Gradients flow through the steps and the caps. The state has at least float32
    precision. Padded tokens (marked by the Keras mask of the input) do not affect other tokens, and
    only the decay changes them.

    Args:
        branch: `L2MultiHeadAttention`, `SpectralDense`, `CenterNormalization`, `MaxMin`,
            `PositionEmbedding`, `keras.layers.Activation`, or a `keras.Sequential` of these, such
            as attention and a perceptron. Its output has the shape of its input. With a list of
            branches, weights vary with depth: the branches are placed at equal distances from time
            0 to `time`, and their outputs are interpolated linearly in between.
        time: End time; negative to run the flow backward.
        steps: Number of steps of equal size. The size does not depend on the input, since the
            certificate would not cover that. With a list of `n` branches, the method reaches its
            order only for multiples of `n - 1`.
        method: `"euler"` (order 1, a residual network), `"midpoint"` (order 2) or `"rk4"`
            (order 4), with 1, 2 and 4 evaluations of the branch per step.
        decay: Rate at which tokens shrink, at least 0. This term is solved exactly.
        use_causal_mask: Whether attention in the branch is causal.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input and output shape: `(batch, ..., features)`.

    Raises:
        ValueError: If an argument is out of range, a part of the branch has no known constant, has
            dropout or another compute dtype, or the branch changes the shape.

    Example:

    >>> branch = L2MultiHeadAttention(num_heads=4, key_dim=16, lipschitz_bound=1.0)
    >>> block = ContinuousDepth(branch, time=3.0, steps=6, decay=1.0)
    >>> x = keras.random.normal((2, 10, 64))
    >>> y = block(x)
    >>> block.lipschitz().value <= 1.0
    True

    Reference:
        Vuckovic, Baratin, Tachet des Combes, "On the regularity of attention", 2021 (infinitely
        deep Transformers); docs/theory.md, Section 11 (the constants).
    """

    def __init__(
        self,
        branch,
        time=1.0,
        steps=4,
        method="rk4",
        decay=0.0,
        use_causal_mask=False,
        **kwargs,
    ):
        if not (math.isfinite(time) and time != 0.0):
            raise ValueError(f"`time` must be finite and not 0. Received: time={time}")
        if not 0.0 <= decay < math.inf:
            raise ValueError(f"`decay` must be finite and at least 0. Received: decay={decay}")
        if method not in TABLEAUS:
            raise ValueError(
                f"`method` must be one of {sorted(TABLEAUS)}. Received: method={method!r}"
            )
        require_positive_integer("steps", steps)
        if isinstance(branch, list | tuple) and not branch:
            raise ValueError(f"`branch` must not be an empty list. Received: branch={branch}")
        super().__init__(**kwargs)
        self.supports_masking = True
        self.branch = list(branch) if isinstance(branch, list | tuple) else branch
        self.time = time
        self.steps = steps
        self.method = method
        self.decay = decay
        self.use_causal_mask = use_causal_mask

    def build(self, input_shape):
        if len(input_shape) < 2 or input_shape[-1] is None:
            raise ValueError(
                "The input must have a batch axis and a static last axis. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        self._knots = [
            Branch(branch, self.use_causal_mask, self.compute_dtype) for branch in self._branches
        ]
        for branch in self._branches:
            if not branch.built:
                branch.build(input_shape)
            output_shape = branch.compute_output_shape(input_shape)
            if tuple(output_shape) != tuple(input_shape):
                raise ValueError(
                    "`branch` must return the shape of its input. "
                    f"Received: {tuple(output_shape)} for the input {tuple(input_shape)}"
                )

    @property
    def _branches(self):
        return self.branch if isinstance(self.branch, list) else [self.branch]

    def call(self, inputs, mask=None):
        return self._integrate(inputs, mask, reverse=False)

    def reverse(self, outputs, mask=None):
        """Run the flow backward, from `time` to 0.

        This inverts `call` up to the discretization error of the method.

        Args:
            outputs: Tensor `(B, ..., D)`.
            mask: Boolean `(B, ...)`, false where a token is padding; the Keras mask of `outputs`
                by default.

        Returns:
            Tensor `(B, ..., D)`.

        Raises:
            ValueError: If the layer is not built.
        """
        self._require_built()
        mask = getattr(outputs, "_keras_mask", None) if mask is None else mask
        outputs = ops.convert_to_tensor(outputs, dtype=self.compute_dtype)
        return self._integrate(outputs, mask, reverse=True)

    def _integrate(self, x, mask, reverse):
        mask = None if mask is None else ops.cast(mask, "bool")
        branches = [knot.freeze() for knot in self._knots]
        dtype = self._state_dtype

        def field(weights):
            def slope(state):
                x = ops.cast(state, self.compute_dtype)
                total = 0.0
                for knot, weight in weights.items():
                    part = ops.cast(branches[knot](x, mask), dtype)
                    total = total + (part if weight == 1.0 else weight * part)
                return total

            return slope

        step, times = self._steps(reverse)
        x = ops.cast(x, dtype)
        for weights in times:
            x = step(x, [field(each) for each in weights])
        return ops.cast(x, self.compute_dtype)

    @property
    def _state_dtype(self):
        # In low precision, rounding would swallow small steps.
        return "float64" if self.compute_dtype == "float64" else "float32"

    def _steps(self, reverse):
        """The `Step`, and the weights of the branches at each stage, for every time it is taken."""
        size = (-self.time if reverse else self.time) / self.steps
        step = make_step(self.method, size, self.decay, self._state_dtype)
        times = []
        for index in range(self.steps):
            fractions = [(index + node) / self.steps for node in step.nodes]
            times.append([self._weights(1.0 - each if reverse else each) for each in fractions])
        return step, times

    def _weights(self, fraction):
        """Interpolation weights of the branches, by index, at this fraction of the time."""
        position = min(max(fraction, 0.0), 1.0) * (len(self._branches) - 1)
        first = math.floor(position)
        weights = {first: first + 1.0 - position, first + 1: position - first}
        return {
            knot: rounded(weight, self._state_dtype)
            for knot, weight in weights.items()
            if weight > 0.0
        }

    def lipschitz(self, sequence_length=None, norm="l2", mask="full") -> LipschitzBound:
        """Certified Lipschitz constant of `call`.

        Args:
            sequence_length: Largest number of tokens; by default the length for which the branch
                was built.
            norm: `"l2"` (2-norm of all entries), `"token"` (largest 2-norm of a token) or `"linf"`
                (largest absolute entry).
            mask: Ignored; `use_causal_mask` determines the mask.

        Returns:
            A `LipschitzBound` of kind `"certified"`, `inf` with the reason when a branch has no
            constant.

        Raises:
            ValueError: If the layer is not built, or `norm` is unknown.
        """
        return self._steps_constant(sequence_length, norm, reverse=False)

    def reverse_lipschitz(self, sequence_length=None, norm="l2") -> LipschitzBound:
        """Certified Lipschitz constant of `reverse`.

        Args:
            sequence_length: See `lipschitz`.
            norm: See `lipschitz`.

        Returns:
            A `LipschitzBound`.

        Raises:
            ValueError: If the layer is not built, or `norm` is unknown.
        """
        return self._steps_constant(sequence_length, norm, reverse=True)

    def flow_lipschitz(self, sequence_length=None, norm="l2", *, reverse=False) -> LipschitzBound:
        """Certified Lipschitz constant of the exact flow, by Gronwall's inequality.

        Args:
            sequence_length: See `lipschitz`.
            norm: See `lipschitz`.
            reverse: Whether to bound the inverse of the flow.

        Returns:
            A `LipschitzBound`.

        Raises:
            ValueError: If the layer is not built, or `norm` is unknown.
        """
        bounds = self._branch_bounds(sequence_length, norm)
        values = [bound.value for bound in bounds]
        # Means over the intervals between branches: the constants are interpolated linearly.
        means = [(a + b) / 2.0 for a, b in itertools.pairwise(values)] or values
        shrinkage = self.decay * (-self.time if reverse else self.time)
        exponent = abs(self.time) * sum(means) / len(means) - shrinkage
        return _bound(exp(exponent), bounds, norm, "Gronwall's inequality")

    def _steps_constant(self, sequence_length, norm, reverse):
        bounds = self._branch_bounds(sequence_length, norm)
        step, times = self._steps(reverse)
        value = 1.0
        for weights in times:
            value *= step.constant(
                [
                    sum(weight * bounds[knot].value for knot, weight in each.items())
                    for each in weights
                ]
            )
        return _bound(value, bounds, norm, f"{self.steps} steps of {self.method}, Theorem 11.2")

    def _branch_bounds(self, sequence_length, norm):
        self._require_built()
        return [knot.lipschitz(norm, sequence_length) for knot in self._knots]

    def _require_built(self):
        if not self.built:
            raise ValueError(
                "The layer has no weights yet: build it, or call it on data, first. "
                f"Received: built={self.built}"
            )

    def compute_mask(self, inputs, previous_mask=None):
        return previous_mask

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "branch": keras.saving.serialize_keras_object(self.branch),
            "time": self.time,
            "steps": self.steps,
            "method": self.method,
            "decay": self.decay,
            "use_causal_mask": self.use_causal_mask,
        }

    @classmethod
    def from_config(cls, config):
        branch = keras.saving.deserialize_keras_object(config["branch"])
        return cls(**{**config, "branch": branch})


def _bound(value, bounds, norm, theorem):
    """The `LipschitzBound` for a constant `value` that was derived from those of the branches."""
    reason = "; ".join(dict.fromkeys(bound.reason for bound in bounds if not bound.is_finite))
    # The value is NaN if it is a product of zero and infinity.
    value = math.inf if reason or math.isnan(value) else SAFETY * value
    if not reason and math.isinf(value):
        reason = "the bound is larger than the largest float64"
    parts = ", ".join(dict.fromkeys(bound.theorem for bound in bounds))
    return LipschitzBound(
        value=value,
        norm=norm,
        kind="certified",
        theorem=f"{theorem} (branch: {parts})",
        reason=reason,
    )
