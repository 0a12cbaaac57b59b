"""Base of the layers whose Lipschitz constant can be watched, penalized, capped and condensed."""

import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lipattn._arguments import require_norm
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.layers._backend import (
    freezes_variables,
    require_created_in_scope,
    variables_have_values,
)
from keras_lipattn.layers._norms import (
    CACHE_ALLOWANCE,
    ConvergedNorms,
    ExactNorms,
    GramNorms,
    NormLayout,
    Norms,
    RecordedNorms,
    RunningNorms,
    WarmNorms,
    WeightCache,
    ignore_floating_point_errors,
)
from keras_lipattn.layers._precision import cap_factor, cap_margin, cast_to_compute_dtype
from keras_lipattn.layers._weights import EffectiveWeights, HostWeights, matrix_shape
from keras_lipattn.linalg.power import cold_vector


@dataclass(frozen=True)
class Tracking:
    """What a monitor asks a layer to compute in its training step.

    Attributes:
        norm: Norm of the running bound: `"l2"`, `"token"` or `"linf"`.
        sequence_length: Number of tokens the bound is for; `None` for the layer's own.
        penalize: Whether `call` adds the penalty to the losses.

    Example:

    >>> layer = keras_lipattn.L2MultiHeadAttention(2, 4)
    >>> layer.tracking = keras_lipattn.layers.Tracking(norm="token", penalize=True)
    >>> layer.tracking.sequence_length is None
    True
    """

    norm: str = "l2"
    sequence_length: int | None = None
    penalize: bool = False


class LipschitzLayer(keras.layers.Layer):
    """A layer with a proven Lipschitz constant.

    A subclass creates its kernels in `build` with `add_kernel`, calls `add_running_state` at the
    end of `build`, and implements three methods. Each takes the array namespace `xp`, `numpy` on
    the host or `keras.ops` in a graph, so that one formula serves training, inference and the
    certificate:

    - `fold(kernels, factors, xp)`: the kernels times the factors of `spectral_norm`, folded to what
      the call multiplies with. Returns a `NamedTuple` of arrays with the fields `projection` (or
      `None`) and `output`. The output of the layer, less its biases, is linear in `output`.
    - `matrices(weights, norm, xp)`: dictionary of the matrices whose operator norms the bound in
      `norm` needs.
    - `bound(weights, norms, norm, tokens, mask, xp)`: the Lipschitz constant of the layer with the
      folded `weights`, given the dictionary of these norms.

    The base class does the rest: running vectors, the cache of norms, caps, the penalty,
    condensing, `graph_bound`, and the certificate, unless `certified` gives a tighter one.

    Every layer creates its running vectors, `running_bound`, `penalty_coefficient` and
    `penalty_log_target` in `build`, whatever its options, so that one checkpoint layout serves all.

    Example:

    >>> class Halved(keras_lipattn.layers.LipschitzLayer):
    ...     def call(self, inputs):
    ...         return 0.5 * inputs
    ...
    ...     def lipschitz(self, sequence_length=None, norm="l2", mask="full"):
    ...         return keras_lipattn.LipschitzBound(
    ...             value=0.5, norm=norm, kind="certified", theorem="a multiple"
    ...         )
    >>> inputs = keras.Input((4,))
    >>> round(keras_lipattn.certify(keras.Model(inputs, Halved()(inputs))).total, 6)
    0.5
    """

    spectral_norm: float | None = None
    lipschitz_bound: float | None = None
    lipschitz_norm = "l2"
    max_sequence_length: int | None = None

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._kernels = {}
        self._operator_shapes = {}
        # Annotated, so that Keras does not take them for weights of the layer.
        self._tracking: Any = None
        self._cache: Any = None
        self._condensed: Any = None

    # What a subclass provides ---------------------------------------------------------------

    def fold(self, kernels, factors, xp) -> Any:
        """The kernels times their factors, folded: a `NamedTuple` with `projection` and `output`.

        Args:
            kernels: The arrays of `add_kernel`, in the order of their creation.
            factors: A factor for each of them, at most 1.
            xp: Array namespace, `numpy` or `keras.ops`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `fold`.")

    def matrices(self, weights, norm, xp) -> dict[str, Any]:
        """The matrices whose operator norms `bound` needs in `norm`, by name.

        Args:
            weights: The result of `fold`.
            norm: `"l2"`, `"token"` or `"linf"`.
            xp: Array namespace, `numpy` or `keras.ops`.

        Returns:
            Dictionary of matrices `(m, n)`, batches `(H, m, n)` of matrices, `ScaledMatrix` or
            `MatrixProduct`. A kernel may be asked for by its own name, less `_kernel`: its norm is
            that before caps.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `matrices`.")

    def bound(self, weights, norms, norm, tokens, mask, xp) -> Any:
        """Lipschitz constant of the layer with the folded weights, without `lipschitz_bound`.

        Args:
            weights: The result of `fold`.
            norms: Operator norms of `matrices`, by name.
            norm: `"l2"`, `"token"` or `"linf"`.
            tokens: Largest number of tokens, or `None` if unknown.
            mask: `MaskClass` of the call; `None` for a layer without masks.
            xp: Array namespace, `numpy` or `keras.ops`.

        Returns:
            A scalar of the namespace, or `math.inf` where there is no constant.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `bound`.")

    def score_biases(self, xp) -> Any:
        """Biases of the scores that no cap changes, as a call uses them, or `None`."""
        return None

    def lipschitz(self, sequence_length=None, norm="l2", mask: Any = "full") -> LipschitzBound:
        """Certified Lipschitz constant at inference, for the weights now loaded."""
        raise NotImplementedError(f"{type(self).__name__} must implement `lipschitz`.")

    # Building -------------------------------------------------------------------------------

    def add_kernel(self, name, shape, operator_shape=None, **kwargs):
        """Creates a weight that `fold` receives and that `spectral_norm` caps.

        Args:
            name: Name of the weight.
            shape: Its shape.
            operator_shape: Shape `(rows, columns)` of the matrix it stands for; `shape` by default.
            **kwargs: Arguments of `add_weight`.
        """
        kernel = self.add_weight(name=name, shape=shape, **kwargs)
        # By name: Keras may build a layer twice, in a trace and outside.
        self._kernels[name] = kernel
        self._operator_shapes[name.removesuffix("_kernel")] = tuple(operator_shape or shape)
        return kernel

    def add_running_state(self):
        """Creates running vectors and penalty weights; to be called at the end of `build`."""
        self._vectors = {}
        warm = {}
        for name, shape in self._norm_shapes().items():
            self._vectors[name] = self.add_weight(
                name=f"{name}_vector",
                shape=shape[:-2] + shape[-1:],
                initializer=self._vector_initializer(name, warm),
                **_RUNNING,
            )
        self.running_bound = self.add_weight(
            name="running_bound", shape=(), initializer="zeros", **_RUNNING
        )
        self.penalty_coefficient = self.add_weight(
            name="penalty_coefficient", shape=(), initializer="zeros", **_RUNNING
        )
        self.penalty_log_target = self.add_weight(
            name="penalty_log_target", shape=(), initializer="zeros", **_RUNNING
        )
        shapes = self._cap_shapes()
        if shapes:
            self._layout = NormLayout(shapes)
            kernels = [kernel.shape for kernel in self.kernels]
            self._cache = WeightCache(kernels, (self._layout.size,), self._norm_dtype)

    def _norm_shapes(self):
        """Shapes of all matrices whose norms some bound needs, by name."""
        shapes = dict(self._operator_shapes)
        for norm in ("l2", "token", "linf"):
            shapes.update(self._matrix_shapes(norm))
        return shapes

    def _cap_shapes(self):
        """Shapes of the matrices whose norms the caps need, by name; empty without caps."""
        shapes = dict(self._operator_shapes) if self.spectral_norm is not None else {}
        if self.lipschitz_bound is not None:
            shapes.update(self._matrix_shapes(self.lipschitz_norm))
        return shapes

    def _matrix_shapes(self, norm):
        with ignore_floating_point_errors():
            weights = self.fold(
                [np.zeros(kernel.shape, np.float32) for kernel in self.kernels],
                [1.0] * len(self._kernels),
                np,
            )
            matrices = self.matrices(weights, norm, np)
        return {name: tuple(matrix.shape) for name, matrix in matrices.items()}

    def _vector_initializer(self, name, warm):
        def initialize(shape, dtype=None):
            if not variables_have_values():
                # A layer built while a step is traced: its kernels get their values later.
                return ops.convert_to_tensor(cold_vector(shape), dtype=dtype)
            # Runs when the variable gets its value: the kernels, created before, have theirs. The
            # first to run works for all, in `warm`.
            if not warm:
                warm.update(self._warm_vectors())
            return ops.convert_to_tensor(warm[name], dtype=dtype)

        return initialize

    # Watching -------------------------------------------------------------------------------

    @property
    def tracking(self):
        """`Tracking` asked for by a monitor, or `None`; a traced step keeps what it saw."""
        return self._tracking

    @tracking.setter
    def tracking(self, value):
        if not (value is None or isinstance(value, Tracking)):
            raise ValueError(f"`tracking` must be a `Tracking` or `None`. Received: {value}")
        self._tracking = value

    def warm_up(self):
        """Brings the running vectors up to the weights now loaded, on the host.

        Raises:
            ValueError: If the layer is not built.
        """
        self._require_built("warming up its running vectors")
        for name, vector in self._warm_vectors().items():
            self._vectors[name].assign(vector)

    def _warm_vectors(self):
        norms = WarmNorms()
        with ignore_floating_point_errors():
            kernels = self.host_kernels()
            norms.measure(lambda: self._operators(kernels, np))
            weights = self._fold(kernels, norms, np)
            for norm in ("l2", "token", "linf"):
                norms.measure(lambda norm=norm: self.matrices(weights, norm, np))
        return norms.vectors

    def _tracked_length(self, mask):
        """Number of tokens of the running bound."""
        return self._tracking.sequence_length

    def _record(self, bound):
        """Stores the running bound and adds the penalty, at the end of a tracked training call."""
        # Without a constant there is nothing that a penalty could lower.
        penalize = self._tracking.penalize and not (isinstance(bound, float) and math.isinf(bound))
        bound = ops.convert_to_tensor(bound)
        self.running_bound.assign(ops.cast(ops.stop_gradient(bound), self.running_bound.dtype))
        if penalize:
            # log(0) would make the gradient of a layer that is switched off a NaN.
            log_bound = ops.log(ops.maximum(bound, 1e-30))
            target = ops.cast(self.penalty_log_target, log_bound.dtype)
            coefficient = ops.cast(self.penalty_coefficient, log_bound.dtype)
            penalty = coefficient * ops.relu(log_bound - target)
            # The dtype of compiled losses, whatever the policy: TensorFlow adds no others to them.
            self.add_loss(ops.cast(penalty, keras.config.floatx()))

    # Effective weights ----------------------------------------------------------------------

    def effective_weights(self, mask=None, training=False) -> EffectiveWeights:
        """The matrices that a call runs with, in the norm dtype.

        Args:
            mask: `MaskClass` of the call.
            training: Whether caps use running norms; the running bound is recorded then.
        """
        if self._condensed is not None:
            return self._condensed.tensors(mask)
        kernels = self._graph_kernels()
        norms = self._norms_for(kernels, training)
        weights = self._fold(kernels, norms, ops)
        factor = self._layer_factor(weights, norms, mask, ops)
        if training and self._tracking is not None:
            norm, tokens = self._tracking.norm, self._tracked_length(mask)
            self._record(self._bound(weights, norms, norm, tokens, mask, ops) * factor)
        if isinstance(norms, RunningNorms):
            norms.commit()
        output = weights.output if self.lipschitz_bound is None else weights.output * factor
        return EffectiveWeights(
            weights.projection,
            ops.reshape(output, matrix_shape(output)),
            self.score_biases(ops),
        )

    def host_weights(self):
        """`HostWeights` of the weights now loaded; those of the graph if condensed."""
        return self._condensed or HostWeights(self)

    def graph_bound(self, *, norm="l2", sequence_length=None, mask="full"):
        """The bound as a differentiable tensor of the graph, or as a float when condensed.

        An upper bound at inference for the weights the graph runs with: operator norms come from
        Gram iteration. `lipschitz` takes the same arguments and is tighter.
        """
        if self._condensed is not None:
            return self.lipschitz(sequence_length, norm, mask).value
        mask, tokens = self.mask_and_length(sequence_length, norm, mask)
        kernels = self._graph_kernels()
        norms = self._norms_for(kernels, training=False)
        weights = self._fold(kernels, norms, ops)
        bound = self._bound(weights, GramNorms(), norm, tokens, mask, ops)
        return bound * self._layer_factor(weights, norms, mask, ops)

    def mask_and_length(self, sequence_length, norm, mask) -> tuple[Any, int | None]:
        """`MaskClass` and number of tokens that the arguments of `lipschitz` stand for."""
        self._require_built("asking for its Lipschitz constant")
        require_norm("norm", norm)
        return None, sequence_length

    def _fold(self, kernels, norms, xp):
        return self.fold(kernels, self._cap_factors(kernels, norms, xp), xp)

    def _bound(self, weights, norms, norm, tokens, mask, xp):
        found = norms.measure(lambda: self.matrices(weights, norm, xp))
        return self.bound(weights, found, norm, tokens, mask, xp)

    def _operators(self, kernels, xp):
        """The kernels as matrices, by name."""
        shapes = self._operator_shapes.items()
        return {
            name: xp.reshape(kernel, shape)
            for (name, shape), kernel in zip(shapes, kernels, strict=True)
        }

    def _cap_factors(self, kernels, norms, xp):
        """The factors of `spectral_norm`, one for each kernel."""
        if self.spectral_norm is None:
            return [1.0] * len(kernels)
        found = norms.measure(lambda: self._operators(kernels, xp))
        return [
            self._cap_factor(found[name], self.spectral_norm, shape, xp)
            for name, shape in self._operator_shapes.items()
        ]

    def _layer_factor(self, weights, norms, mask, xp):
        """The factor of `lipschitz_bound`."""
        if self.lipschitz_bound is None:
            return 1.0
        norm = self.lipschitz_norm
        bound = self._bound(weights, norms, norm, self.max_sequence_length, mask, xp)
        if norm == "linf":
            # Sums in the norm dtype may be low by a roundoff for every term. On the host too: both
            # must come to the same factor.
            dtype = keras.backend.result_type(self._norm_dtype, self._norm_dtype)
            bound = bound * (1.0 + 2.0 * self._num_summands() * float(np.finfo(dtype).eps))
        return self._cap_factor(bound, self.lipschitz_bound, matrix_shape(weights.output), xp)

    def _num_summands(self):
        """Upper bound of the roundings that the max-norm bound accumulates in sums."""
        return sum(sum(shape) for shape in self._operator_shapes.values())

    def _cap_factor(self, norm, cap, shape, xp):
        """The factor that keeps a matrix of this shape under its cap after it is rounded."""
        return cap_factor(norm, cap, xp, margin=cap_margin(self.compute_dtype, shape))

    # Remembered norms -----------------------------------------------------------------------

    @property
    def has_caps(self):
        """Whether a cap is set, so that training and inference run with different weights."""
        return self._cache is not None

    def caps_are_exact(self):
        """Whether inference runs with the weights that the host computes, up to roundings.

        Otherwise the norms of its caps are not known on the host, since no inference has run with
        the weights now loaded, or are looser bounds, on backends other than TensorFlow.
        """
        if self._condensed is not None or self._cache is None:
            return True
        remembered = self._cache.remembered(self._graph_kernels())
        if remembered is None:
            return False
        wanted = self._exact_norms()
        return bool(np.allclose(remembered, wanted, rtol=CACHE_ALLOWANCE - 1.0, atol=0.0))

    def condense(self):
        """Remembers the exact norms of the weights now loaded, so that inference is fast.

        Without it the first inference after a weight changed computes them. On TensorFlow they
        are as good as exact, and remembered. On other backends every call computes upper bounds
        that exceed the norms by about one part in a thousand. Once a weight changes, the remembered
        norms are not used any more. Does nothing for a layer without caps.

        Raises:
            ValueError: If the layer is not built.
        """
        self._require_built("condensing it")
        if self._cache is not None:
            self._cache.fill(self._graph_kernels(), self._exact_norms())

    def _exact_norms(self):
        """The contents of the cache for the weights now loaded, computed on the host."""
        with ignore_floating_point_errors():
            return self._norms_of_caps(ExactNorms(), self.host_kernels(), np) * CACHE_ALLOWANCE

    def _norms_of_caps(self, norms, kernels, xp):
        """The norms that the caps need, in one vector."""
        found = {}
        if self.spectral_norm is not None:
            found.update(norms.measure(lambda: self._operators(kernels, xp)))
        if self.lipschitz_bound is not None:
            weights = self._fold(kernels, norms, xp)
            found.update(norms.measure(lambda: self.matrices(weights, self.lipschitz_norm, xp)))
        return self._layout.flatten(found, xp)

    def _norms_for(self, kernels, training) -> Any:
        """The source of norms of a call."""
        if training:
            require_created_in_scope(None, self.variables, f"Layer {self.path!r}")
            return RunningNorms(self._vectors)
        if self._cache is None:
            return Norms()
        if freezes_variables():
            import tensorflow as tf

            # The weights become constants, so their norms may, and no variable can be written.
            with tf.init_scope():
                norms = self._exact_norms()
            flat = ops.convert_to_tensor(norms, self._norm_dtype)
        else:
            flat = self._cache.select(
                kernels,
                lambda *kernels: self._norms_of_caps(GramNorms(), kernels, ops),
                lambda *kernels: (
                    self._norms_of_caps(ConvergedNorms(), kernels, ops) * CACHE_ALLOWANCE
                ),
            )
        return RecordedNorms(flat, self._layout)

    # Condensed ------------------------------------------------------------------------------

    @property
    def is_condensed(self):
        """Whether the layer runs with constants, inside of `condensed`."""
        return self._condensed is not None

    @property
    def condensed_variables(self):
        """The variables a condensed layer reads in place of its kernels."""
        return [] if self._condensed is None else self._condensed.variables

    def enter_condensed(self):
        """Replaces the kernels by constants until `leave_condensed`; see `condensed`."""
        self._require_built("condensing it")
        if self._condensed is not None:
            raise ValueError(
                f"A layer is condensed by one context at a time. Received: layer {self.path!r}, "
                "which is inside `condensed` already"
            )
        self._condensed = HostWeights(self)
        self._condensed.materialize()

    def leave_condensed(self):
        """Undoes `enter_condensed`."""
        self._condensed = None

    def _require_built(self, before):
        if not self.built:
            raise ValueError(
                f"The layer has no weights yet: build it, or call it on data, before {before}. "
                f"Received: built={self.built}"
            )

    # Kernels in the two precisions ----------------------------------------------------------

    @property
    def kernels(self):
        """The weights made by `add_kernel`, in the order of their creation."""
        return list(self._kernels.values())

    @property
    def _norm_dtype(self):
        """Norms, scores and softmax are never computed in less than float32."""
        return "float64" if self.compute_dtype == "float64" else "float32"

    def _graph_kernels(self):
        """The kernels, cast to the compute dtype, then to the norm dtype."""
        return [
            ops.cast(ops.cast(kernel, self.compute_dtype), self._norm_dtype)
            for kernel in self.kernels
        ]

    def host_kernels(self):
        """The kernels in float64 numpy, rounded to the compute dtype, without caps."""
        return [cast_to_compute_dtype(kernel, self.compute_dtype) for kernel in self.kernels]

    def _rounded(self, matrix, xp):
        """A matrix made from kernels, rounded to the compute dtype where that is a low one."""
        if self.compute_dtype == self._norm_dtype:
            return matrix
        if xp is np:
            return cast_to_compute_dtype(matrix, self.compute_dtype)
        return ops.cast(ops.cast(matrix, self.compute_dtype), matrix.dtype)


# Power steps depend on weights alone, hence are the same on every replica: each assigns its own. An
# aggregation would let replicas wait for each other in the middle of `call`, where the losses that
# they add to one layer get mixed up.
_RUNNING = dict(dtype="float32", trainable=False, autocast=False, aggregation="none")
