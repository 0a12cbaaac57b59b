"""A residual layer that is invertible by construction."""

import dataclasses
import math

import keras
import numpy as np
from keras import ops

from keras_lipattn._arguments import require_positive_integer
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.layers._backend import has_value
from keras_lipattn.layers._branch import Branch
from keras_lipattn.layers._precision import CAP_MARGIN
from keras_lipattn.layers._fixed_point import solve_fixed_point
from keras_lipattn.layers._implicit_gradient import with_implicit_gradient
from keras_lipattn.layers._log_determinant import (
    exact_log_determinant,
    rademacher,
    roulette_log_determinant,
    series_log_determinant,
    terms_for,
    truncation_error,
)
from keras_lipattn.layers._tensor_norms import example_norm
from keras_lipattn.layers.inversion import Inversion
from keras_lipattn.layers.inversion_error import InversionError
from keras_lipattn.layers.log_determinant import LogDeterminant
from keras_lipattn.linalg.exact import SAFETY

# Converged is a residual of so many rounding errors, relative to the size of the example.
TOLERANCE_IN_ROUNDINGS = 4.0
# A smaller bound counts as this one, so that a branch of zeros has finite values and derivatives.
SMALLEST_BOUND = 1e-6
# Number of steps the extrapolation remembers.
MEMORY = {"anderson": 5, "plain": 0}
# Terms of the series that a random number of terms has at least.
SURE_TERMS = 4


@keras.saving.register_keras_serializable(package="keras_lipattn")
class InvertibleResidual(keras.layers.Layer):
    """`x + coefficient * branch(x) / bound`: a bijection, since the second term is a contraction.

    `bound` is an upper bound of the branch's Lipschitz constant for the weights that run, evaluated
    in the graph by matrix products (Gram iteration), in training as well as at inference: the
    layer is invertible at every step of its training, and the same function in both modes. The
    gradient flows through the bound.

    The branch always runs as at inference, so caps in it hold. Padded tokens (those the Keras mask
    of the input calls so) pass through unchanged, and nobody sees them.

    Args:
        branch: `L2MultiHeadAttention`, `SpectralDense`, `CenterNormalization`, `MaxMin`,
            `PositionEmbedding`, `keras.layers.Activation`, a `keras.Sequential` of these, or any
            layer with the methods `graph_bound` and `lipschitz`. Its output has the shape of its
            input. Caps in it are not needed, and cost a norm at every evaluation.
        coefficient: Lipschitz constant of the second term, in (0, 1). The inverse has at most the
            constant `1 / (1 - coefficient)`.
        norm: Norm of the contraction: `"l2"` (2-norm of all entries) or `"token"` (largest 2-norm
            of a token).
        use_causal_mask: Whether attention in the branch is causal.
        max_sequence_length: Number of tokens the bound is for; the product of all axes between
            batch and features seen in `build` by default. A longer input is an error, or NaN where
            its length is not known before running.
        seed: Seed of the random log-determinants.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input and output shape: `(batch, ..., features)`.

    Raises:
        ValueError: If an argument is out of range, the branch has a part without a known constant
            or with dropout, or changes the shape, the length is not known, or the layer or a part
            computes in less than float32, where an inverse has no digits.

    Example:

    >>> block = InvertibleResidual(L2MultiHeadAttention(num_heads=4, key_dim=16), coefficient=0.9)
    >>> x = keras.random.normal((2, 10, 64))
    >>> y = block(x)
    >>> found = block.inverse(y)
    >>> float(keras.ops.max(keras.ops.abs(found.solution - x))) < 1e-5
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
                "An inverse has no digits in less than float32: pass `dtype='float32'` to the "
                f"layer and to its branch. Received: compute dtype {self.compute_dtype!r}"
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
        """A Lipschitz constant of the inverse in the norm `norm`, whatever the weights."""
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
                    "The bound grows with the number of tokens: pass `max_sequence_length`, or an "
                    f"input of static length. Received: input_shape={tuple(input_shape)}"
                )
            # Frozen: the layer must stay one function when a batch is padded further.
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
        output = inputs + self._contraction()(inputs, _valid(mask))
        return self._refuse_long(output)

    def inverse(
        self, outputs, mask=None, *, acceleration="anderson", tolerance=None, max_steps=None
    ):
        """Solves `layer(x) = outputs`.

        Iterates `x <- outputs - (layer(x) - x)`, a contraction, with Anderson's extrapolation.
        A point it proposes is taken only if it gains what a plain step is sure to gain.

        Args:
            outputs: Tensor `(B, ..., D)`.
            mask: Boolean `(B, ...)`, false where a token is padding; the Keras mask of `outputs`
                by default.
            acceleration: `"anderson"` or `"plain"`.
            tolerance: Largest residual, relative to the norm of the example; 4 rounding errors of
                the dtype by default.
            max_steps: Largest number of evaluations of the branch. By default what is sure to be
                enough.

        Returns:
            An `Inversion`. The derivatives of its `solution` are those of the implicit function, of
            first order only; they are found by a second iteration, with `J^T`.

        Raises:
            InversionError: If an example does not reach the tolerance. In a graph nothing can be
                raised: there its solution is NaN and its `converged` false.
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
            # Each plain step is sure to gain the factor `coefficient`, and costs two evaluations
            # at most. A first residual may be larger than the solution, by a bias.
            max_steps = 20 + 2 * math.ceil(math.log(1e-3 * tolerance) / math.log(self.coefficient))
        require_positive_integer("max_steps", max_steps)
        target, mask = self._prepare(outputs, mask)
        held = self._contraction()

        def contraction(x):
            return held(x, mask)

        def solve(step, start, dual):
            return solve_fixed_point(
                step,
                start,
                contraction=self.coefficient,
                norm=example_norm(self.norm, dual=dual),
                tolerance=tolerance,
                max_steps=max_steps,
                memory=MEMORY[acceleration],
            )

        def checked(found, what):
            limits = f"tolerance={tolerance:.3g}, max_steps={max_steps}"
            _require_convergence(found, f"{what} of layer {self.path!r}", limits)
            return _nan_where_not(found.converged, found.solution)

        def solve_transposed(step, start):
            return checked(solve(step, start, dual=True), "The derivative of the inverse")

        found = solve(lambda x: target - contraction(x), target, dual=False)
        solution = checked(found, "The inverse")
        solution = with_implicit_gradient(contraction, target, solution, solve_transposed)
        return Inversion(
            solution=self._refuse_long(solution),
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
            method: `"exact"` forms the Jacobian, of `(tokens * D)**2` entries an example.
                `"series"` keeps the first terms of the power series in the contraction's Jacobian
                `J`: with exact traces, or with random probes. `"roulette"` keeps a random number
                of terms, weighted so that the estimate is unbiased, with random probes. The
                derivative of the last two takes the memory of one product with `J`, whatever the
                number of terms (as long as the loop itself is not recorded: inside `tf.function`,
                where `fit` is, it is not).
            num_terms: For `"series"` the number of terms, by default the fewest that `tolerance`
                allows. For `"roulette"` the number of terms that are always kept, 4 by default.
            num_probes: Number of random probes an example. `"series"` has exact traces by default,
                which cost `tokens * D` probes; `"roulette"` one probe.
            tolerance: Largest truncation error that `"series"` chooses its number of terms for.

        Returns:
            A `LogDeterminant`: the values, and a certified bound of the truncation error.

        Raises:
            ValueError: If an argument is out of range, or the number of tokens is not static where
                `tokens * D` of something are needed.
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
                "All traces need an input of static length: pass `num_probes`, or give the input "
                f"its length. Received: inputs of shape {tuple(x.shape)}, method={method!r}"
            )
        contraction = self._contraction()

        def branch(copies):
            valid = None if mask is None else ops.concatenate([mask] * copies, axis=0)
            return lambda tensor: contraction(tensor, valid)

        size = self._free_entries(x, mask)
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
                sure_terms=num_terms or SURE_TERMS,
                # Above the square of the contraction, as a finite variance wants.
                continuation=self.coefficient,
                uniform=keras.random.uniform(
                    (probes.shape[0],), dtype=x.dtype, seed=self._seed_generator
                ),
            )
        return LogDeterminant(self._refuse_long(value, x), error)

    def lipschitz(self, sequence_length=None, norm="l2", mask="full") -> LipschitzBound:
        """Certified Lipschitz constant, `1 + coefficient` at most in the layer's own norm.

        Args:
            sequence_length: Ignored: the layer is for at most `max_sequence_length` tokens.
            norm: `"l2"`, `"token"` or `"linf"` (largest absolute entry).
            mask: Ignored: the layer knows its mask.

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
            A `LipschitzBound` of kind `"certified"`; `inf` with the reason when the second term is
            no contraction in this norm.

        Raises:
            ValueError: If the layer is not built, or `norm` is unknown.
        """
        part = self._contraction_constant(norm)
        value, reason = math.inf, part.reason
        if part.value < 1.0:
            value = SAFETY / (1.0 - part.value)
        elif not reason:
            reason = f"the branch contracts in the norm {self.norm!r}, not surely in this one"
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
        """A tensor for a method other than `call`, and its mask."""
        if not self.built:
            raise ValueError(
                "The layer has no weights yet: build it, or call it on data, first. "
                f"Received: built={self.built}"
            )
        mask = _valid(getattr(tensor, "_keras_mask", None) if mask is None else mask)
        tensor = ops.convert_to_tensor(tensor, dtype=self.compute_dtype)
        self._check_length(tensor.shape)
        return tensor, mask

    def _contraction(self):
        """The second term as a function of a tensor and a mask, all weights evaluated once."""
        scale, branch = self._scale(), self._branch.freeze()
        return lambda x, valid: scale * branch(x, valid)

    def _scale(self):
        bound = self._branch.graph_bound(self.norm, self.max_sequence_length)
        bound = ops.maximum(ops.cast(bound, self.compute_dtype), SMALLEST_BOUND)
        return self.coefficient * (1.0 - CAP_MARGIN) / bound

    def _contraction_constant(self, norm):
        """Certified constant of the second term, a `LipschitzBound`."""
        if not self.built:
            raise ValueError(
                "The layer has no weights yet: build it, or call it on data, before asking for its "
                f"Lipschitz constant. Received: built={self.built}"
            )
        branch = self._branch.lipschitz(norm, self.max_sequence_length)
        if not branch.is_finite:
            return branch
        scale = float(ops.convert_to_numpy(self._scale()))
        return dataclasses.replace(branch, value=scale * branch.value)

    def _probes(self, x, count):
        return rademacher((count, *ops.shape(x)), x.dtype, self._seed_generator)

    def _free_entries(self, x, mask):
        """Number of entries of each example that the branch may change, `(B,)`."""
        shape = ops.shape(x)
        if mask is None:
            return ops.full((shape[0],), math.prod(shape[1:]), dtype=x.dtype)
        axes = tuple(range(1, len(mask.shape)))
        return shape[-1] * ops.sum(ops.cast(mask, x.dtype), axis=axes)

    def _check_length(self, shape):
        tokens, longest = _tokens(shape), self.max_sequence_length
        if tokens is not None and longest is not None and tokens > longest:
            raise ValueError(
                f"The layer is invertible for at most {self.max_sequence_length} tokens "
                "(`max_sequence_length`, or the length it was built with). "
                f"Received: an input of {tokens} tokens"
            )

    def _refuse_long(self, result, tensor=None):
        """NaN in place of what was computed from a tensor that turned out too long."""
        tensor = result if tensor is None else tensor
        if _tokens(tensor.shape) is not None:
            return result
        tokens = math.prod(ops.shape(tensor)[1:-1])
        fits = ops.less_equal(tokens, self.max_sequence_length)
        return ops.where(fits, result, ops.cast(np.nan, result.dtype))


def _tokens(shape):
    """Number of tokens of a static shape, `None` if unknown."""
    sides = shape[1:-1]
    return None if any(side is None for side in sides) else math.prod(sides)


def _valid(mask):
    return None if mask is None else ops.cast(mask, "bool")


def _nan_where_not(converged, solution):
    rows = ops.reshape(converged, (-1,) + (1,) * (len(solution.shape) - 1))
    return ops.where(rows, solution, ops.cast(np.nan, solution.dtype))


def _require_convergence(found, what, limits):
    """Raises unless every example converged; a graph under construction cannot tell."""
    if not has_value(found.converged):
        return
    converged = ops.convert_to_numpy(found.converged)
    if converged.all():
        return
    residual = ops.convert_to_numpy(found.residual)
    if np.isfinite(residual).all():
        advice = "allow a larger `tolerance`, or compute in float64"
    else:
        advice = "look for NaN or infinite entries in the input and in the weights"
    raise InversionError(
        f"{what} did not reach its tolerance for {int((~converged).sum())} of {len(converged)} "
        f"examples: {advice}. Received: {limits}, largest residual {residual.max():.3g} "
        f"after {int(ops.convert_to_numpy(found.steps).max())} steps"
    )
