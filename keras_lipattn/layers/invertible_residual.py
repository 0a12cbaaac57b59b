"""A residual layer that is invertible by construction."""

import dataclasses
import math

import keras
import numpy as np
from keras import ops

from keras_lipattn._arguments import require_positive_integer
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.layers._branch import Branch
from keras_lipattn.layers._fixed_point import (
    MEMORY,
    checked_solution,
    example_norm,
    solve_fixed_point,
    with_implicit_gradient,
)
from keras_lipattn.layers._log_determinant import (
    exact_log_determinant,
    rademacher,
    roulette_log_determinant,
    series_log_determinant,
    terms_for,
    truncation_error,
    valid_entries,
)
from keras_lipattn.layers._precision import CAP_MARGIN
from keras_lipattn.layers.inversion import Inversion, LogDeterminant
from keras_lipattn.linalg.exact import SAFETY

# Default tolerance of the residual, in rounding errors relative to the norm of the example.
TOLERANCE_IN_ROUNDINGS = 4.0
# Smaller bounds are replaced by this one, so that a branch of zeros has finite derivatives.
MIN_BOUND = 1e-6
# Default number of terms that the random series always computes.
MIN_TERMS = 4


@keras.saving.register_keras_serializable(package="keras_lipattn")
class InvertibleResidual(keras.layers.Layer):
    """The bijection `x + coefficient * branch(x) / bound`, whose second term is a contraction.

    `bound` is an upper bound of the Lipschitz constant of the branch for its current weights. It is
    evaluated in the graph by matrix products (Gram iteration), in training as well as at inference.
    The layer is therefore the same function in both modes and invertible at every training step.
    Gradients flow through the bound.

    The branch always runs in inference mode, so its caps hold. Padded tokens (marked by the Keras
    mask of the input) pass through unchanged and do not affect other tokens.

    Args:
        branch: `L2MultiHeadAttention`, `SpectralDense`, `CenterNormalization`, `MaxMin`,
            `PositionEmbedding`, `keras.layers.Activation`, a `keras.Sequential` of these, or any
            layer with the methods `graph_bound` and `lipschitz`. Its output has the shape of its
            input. Caps in it are not needed and cost one norm per evaluation.
        coefficient: Lipschitz constant of the second term, in (0, 1). The constant of the inverse
            is at most `1 / (1 - coefficient)`.
        norm: Norm of the contraction: `"l2"` (2-norm of all entries) or `"token"` (largest 2-norm
            of a token).
        use_causal_mask: Whether attention in the branch is causal.
        max_sequence_length: Largest number of tokens for which the bound holds; by default the
            product of all axes between batch and features that `build` receives. A longer input is
            an error, or gives NaN if its length is unknown before the layer runs.
        seed: Seed of the random log-determinants.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input and output shape: `(batch, ..., features)`.

    Raises:
        ValueError: If an argument is out of range, a part of the branch has no known constant or
            has dropout, the branch changes the shape, the length is unknown, or the compute dtype
            is lower than float32, in which an inverse has no correct digits.

    Example:

    >>> block = InvertibleResidual(L2MultiHeadAttention(num_heads=4, key_dim=16), coefficient=0.9)
    >>> x = keras.random.normal((2, 10, 64))
    >>> y = block(x)
    >>> inversion = block.inverse(y)
    >>> float(keras.ops.max(keras.ops.abs(inversion.solution - x))) < 1e-5
    True

    Reference:
        Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, "Invertible residual networks", ICML 2019;
        Kim, Papamakarios, Mnih, "The Lipschitz constant of self-attention", ICML 2021, Section 5.2.
    """

    def __init__(
        self,
        branch,
        coefficient=0.9,
        norm="l2",
        use_causal_mask=False,
        max_sequence_length=None,
        seed=None,
        **kwargs,
    ):
        if not 0.0 < coefficient < 1.0:
            raise ValueError(
                f"`coefficient` must be between 0 and 1. Received: coefficient={coefficient}"
            )
        if norm not in ("l2", "token"):
            raise ValueError(f'`norm` must be "l2" or "token". Received: norm={norm!r}')
        require_positive_integer("max_sequence_length", max_sequence_length, optional=True)
        super().__init__(**kwargs)
        if self.compute_dtype not in ("float32", "float64"):
            raise ValueError(
                "An inverse needs at least float32: pass `dtype='float32'` to the layer and to its "
                f"branch. Received: compute dtype {self.compute_dtype!r}"
            )
        self.supports_masking = True
        self.branch = branch
        self.coefficient = coefficient
        self.norm = norm
        self.use_causal_mask = use_causal_mask
        self.max_sequence_length = max_sequence_length
        self.seed = seed
        self._seed_generator = keras.random.SeedGenerator(seed)

    @property
    def inverse_constant(self):
        """Lipschitz constant of the inverse in the norm `norm`, for all weights."""
        return 1.0 / (1.0 - self.coefficient)

    def build(self, input_shape):
        if len(input_shape) < 2 or input_shape[-1] is None:
            raise ValueError(
                "The input must have a batch axis and a static last axis. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        tokens = _tokens(input_shape)
        if self.max_sequence_length is None:
            if tokens is None:
                raise ValueError(
                    "The bound depends on the number of tokens: pass `max_sequence_length`, or an "
                    f"input of static length. Received: input_shape={tuple(input_shape)}"
                )
            # Fixed from now on, so that more padding in a batch does not change the function.
            self.max_sequence_length = tokens
        self._check_length(input_shape)
        self._branch = Branch(self.branch, self.use_causal_mask, self.compute_dtype)
        if not self.branch.built:
            self.branch.build(input_shape)
        output_shape = self.branch.compute_output_shape(input_shape)
        if tuple(output_shape) != tuple(input_shape):
            raise ValueError(
                "`branch` must return the shape of its input. "
                f"Received: {tuple(output_shape)} for the input {tuple(input_shape)}"
            )

    def call(self, inputs, mask=None):
        self._check_length(inputs.shape)
        output = inputs + self._contraction()(inputs, _boolean(mask))
        return self._nan_if_too_long(output)

    def inverse(self, outputs, mask=None, *, acceleration="plain", tolerance=None, max_steps=None):
        """Solve `layer(x) = outputs`.

        Iterates the contraction `x <- outputs - (layer(x) - x)`.

        Args:
            outputs: Tensor `(B, ..., D)`.
            mask: Boolean `(B, ...)`, false where a token is padding; the Keras mask of `outputs`
                by default.
            acceleration: `"plain"`, or `"anderson"` to extrapolate from the last five steps. That
                makes a step slower. It pays off where the plain iteration needs hundreds of steps
                or stalls at rounding errors, which can happen for coefficients from 0.95 on.
            tolerance: Largest residual relative to the norm of the example; 4 rounding errors of
                the dtype by default.
            max_steps: Largest number of evaluations of the branch; by default enough for every
                branch, in real arithmetic.

        Returns:
            An `Inversion`. Its `solution` has first derivatives, by the implicit function theorem.
            They are computed by a second iteration, with `J^T`.

        Raises:
            InversionError: If an example does not reach the tolerance. In a graph, its solution is
                NaN and its `converged` is false instead.
            ValueError: If an argument is out of range, or `outputs` are longer than
                `max_sequence_length`.
        """
        if acceleration not in MEMORY:
            raise ValueError(
                f"`acceleration` must be one of {sorted(MEMORY)}. "
                f"Received: acceleration={acceleration!r}"
            )
        if tolerance is None:
            tolerance = TOLERANCE_IN_ROUNDINGS * float(np.finfo(self.compute_dtype).eps)
        if not tolerance > 0.0:
            raise ValueError(f"`tolerance` must be positive. Received: tolerance={tolerance}")
        if max_steps is None:
            # At most two evaluations reduce the residual by the factor `coefficient`. The factor
            # 1e-3 allows for a bias that makes the first residual larger than the solution.
            max_steps = 20 + 2 * math.ceil(math.log(1e-3 * tolerance) / math.log(self.coefficient))
        require_positive_integer("max_steps", max_steps)
        target, mask = self._prepare(outputs, mask)
        masked_contraction = self._contraction()

        def contraction(x):
            return masked_contraction(x, mask)

        def solve(step, start, name, *, dual):
            found = solve_fixed_point(
                step,
                start,
                contraction=self.coefficient,
                norm=example_norm(self.norm, dual=dual),
                tolerance=tolerance,
                max_steps=max_steps,
                acceleration=acceleration,
            )
            limits = f"tolerance={tolerance:.3g}, max_steps={max_steps}"
            return found, checked_solution(found, f"{name} of layer {self.path!r}", limits)

        def solve_transposed(step, start):
            return solve(step, start, "The derivative of the inverse", dual=True)[1]

        found, solution = solve(
            lambda x: target - contraction(x), target, "The inverse", dual=False
        )
        solution = with_implicit_gradient(contraction, target, solution, solve_transposed)
        return Inversion(
            solution=self._nan_if_too_long(solution),
            residual=found.residual,
            error_bound=self.coefficient * self.inverse_constant * found.residual,
            steps=found.steps,
            converged=found.converged,
        )

    def log_det_jacobian(
        self,
        inputs,
        mask=None,
        *,
        method="exact",
        num_terms=None,
        num_probes=None,
        tolerance=1e-3,
    ):
        """`log |det d layer(x) / d x|` of each example, differentiable in weights and inputs.

        Args:
            inputs: Tensor `(B, ..., D)`.
            mask: Boolean `(B, ...)`, false where a token is padding; the Keras mask of `inputs` by
                default.
            method: `"exact"` forms the Jacobian, with `(tokens * D)**2` entries per example.
                `"series"` sums the first terms of the power series in the Jacobian `J` of the
                contraction, with exact traces or with random probes. `"roulette"` sums a random
                number of terms with random probes, weighted so that the estimate is unbiased. The
                derivative of the last two needs the memory of one product with `J` for any number
                of terms, in `tf.function` and `fit`. Run eagerly, TensorFlow records every term.
            num_terms: For `"series"` the number of terms, by default the fewest that `tolerance`
                allows. For `"roulette"` the number of terms that are always computed, 4 by default.
            num_probes: Number of random probes per example. By default, `"series"` computes exact
                traces, which take `tokens * D` probes, and `"roulette"` takes one probe.
            tolerance: Largest truncation error when `"series"` chooses its number of terms.

        Returns:
            A `LogDeterminant`: the values, and a certified bound of the truncation error.

        Raises:
            ValueError: If an argument is out of range, or the number of tokens is not static and
                `method` needs it.
        """
        require_positive_integer("num_terms", num_terms, optional=True)
        require_positive_integer("num_probes", num_probes, optional=True)
        if not tolerance > 0.0:
            raise ValueError(f"`tolerance` must be positive. Received: tolerance={tolerance}")
        if method not in ("exact", "series", "roulette"):
            raise ValueError(
                f'`method` must be "exact", "series" or "roulette". Received: method={method!r}'
            )
        x, mask = self._prepare(inputs, mask)
        if num_probes is None and method != "roulette" and _tokens(x.shape) is None:
            raise ValueError(
                "Exact traces need an input of static length: pass `num_probes`, or such an input. "
                f"Received: inputs of shape {tuple(x.shape)}, method={method!r}"
            )
        contraction = self._contraction()

        def branch(copies):
            masks = None if mask is None else ops.concatenate([mask] * copies, axis=0)
            return lambda tensor: contraction(tensor, masks)

        size = valid_entries(x, mask)
        error = ops.zeros_like(size)
        if method == "exact":
            value = exact_log_determinant(branch, x)
        elif method == "series":
            if num_terms is None:
                most = self.max_sequence_length * x.shape[-1]
                num_terms = terms_for(most, self.coefficient, tolerance)
            probes = None if num_probes is None else self._probes(x, num_probes)
            value = series_log_determinant(branch, x, num_terms=num_terms, probes=probes)
            error = truncation_error(size, self.coefficient, num_terms)
        else:
            probes = self._probes(x, num_probes or 1)
            value = roulette_log_determinant(
                branch,
                x,
                probes,
                min_terms=num_terms or MIN_TERMS,
                # Larger than the square of the constant, so that the variance is finite.
                continuation=self.coefficient,
                uniform=keras.random.uniform(
                    (probes.shape[0],), dtype=x.dtype, seed=self._seed_generator
                ),
            )
        return LogDeterminant(self._nan_if_too_long(value, x), error)

    def lipschitz(self, sequence_length=None, norm="l2", mask="full") -> LipschitzBound:
        """Certified Lipschitz constant, at most `1 + coefficient` in the norm of the layer.

        Args:
            sequence_length: Ignored; the bound holds for up to `max_sequence_length` tokens.
            norm: `"l2"`, `"token"` or `"linf"` (largest absolute entry).
            mask: Ignored; `use_causal_mask` determines the mask.

        Returns:
            A `LipschitzBound` of kind `"certified"`, `inf` with the reason when weights are not
            finite or the branch has no constant in this norm.

        Raises:
            ValueError: If the layer is not built, or `norm` is unknown.
        """
        part = self._contraction_constant(norm)
        return LipschitzBound(
            value=SAFETY * (1.0 + part.value),
            norm=norm,
            kind="certified",
            theorem=f"1 + constant of the branch ({part.theorem})",
            reason=part.reason,
        )

    def inverse_lipschitz(self, norm="l2") -> LipschitzBound:
        """Certified Lipschitz constant of the inverse, at most `1 / (1 - coefficient)`.

        Args:
            norm: See `lipschitz`.

        Returns:
            A `LipschitzBound` of kind `"certified"`; `inf` with the reason when it is not known
            whether the second term contracts in this norm.

        Raises:
            ValueError: If the layer is not built, or `norm` is unknown.
        """
        part = self._contraction_constant(norm)
        value, reason = math.inf, part.reason
        if part.value < 1.0:
            value = SAFETY / (1.0 - part.value)
        elif not reason:
            reason = f"the branch is known to contract in the norm {self.norm!r} only"
        return LipschitzBound(
            value=value,
            norm=norm,
            kind="certified",
            theorem=f"1 / (1 - constant of the branch) ({part.theorem})",
            reason=reason,
        )

    def compute_mask(self, inputs, previous_mask=None):
        return previous_mask

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "branch": keras.saving.serialize_keras_object(self.branch),
            "coefficient": self.coefficient,
            "norm": self.norm,
            "use_causal_mask": self.use_causal_mask,
            "max_sequence_length": self.max_sequence_length,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        branch = keras.saving.deserialize_keras_object(config["branch"])
        return cls(**{**config, "branch": branch})

    def _prepare(self, tensor, mask):
        """Convert the arguments of a method other than `call`."""
        self._require_built()
        mask = _boolean(getattr(tensor, "_keras_mask", None) if mask is None else mask)
        tensor = ops.convert_to_tensor(tensor, dtype=self.compute_dtype)
        self._check_length(tensor.shape)
        return tensor, mask

    def _contraction(self):
        """The second term as a function of a tensor and a mask, with all norms evaluated once."""
        scale, branch = self._scale(), self._branch.freeze()
        return lambda x, mask: scale * branch(x, mask)

    def _scale(self):
        bound = self._branch.graph_bound(self.norm, self.max_sequence_length)
        bound = ops.maximum(ops.cast(bound, self.compute_dtype), MIN_BOUND)
        return self.coefficient * (1.0 - CAP_MARGIN) / bound

    def _contraction_constant(self, norm):
        """Certified constant of the second term, a `LipschitzBound`."""
        self._require_built()
        branch = self._branch.lipschitz(norm, self.max_sequence_length)
        if not branch.is_finite:
            return branch
        scale = float(ops.convert_to_numpy(self._scale()))
        return dataclasses.replace(branch, value=scale * branch.value)

    def _probes(self, x, count):
        return rademacher((count, *ops.shape(x)), x.dtype, self._seed_generator)

    def _require_built(self):
        if not self.built:
            raise ValueError(
                "The layer has no weights yet: build it, or call it on data, first. "
                f"Received: built={self.built}"
            )

    def _check_length(self, shape):
        tokens = _tokens(shape)
        if None not in (tokens, self.max_sequence_length) and tokens > self.max_sequence_length:
            raise ValueError(
                f"The layer is invertible for at most {self.max_sequence_length} tokens "
                "(`max_sequence_length`, or the length it was built with). "
                f"Received: an input of {tokens} tokens"
            )

    def _nan_if_too_long(self, result, tensor=None):
        """Replace `result` by NaN if `tensor`, `result` by default, has too many tokens."""
        tensor = result if tensor is None else tensor
        if _tokens(tensor.shape) is not None:
            return result
        tokens = math.prod(ops.shape(tensor)[1:-1])
        fits = ops.less_equal(tokens, self.max_sequence_length)
        return ops.where(fits, result, ops.cast(np.nan, result.dtype))


def _tokens(shape):
    """Number of tokens of a static shape, or `None` if it is unknown."""
    sides = shape[1:-1]
    return None if any(side is None for side in sides) else math.prod(sides)


def _boolean(mask):
    return None if mask is None else ops.cast(mask, "bool")
