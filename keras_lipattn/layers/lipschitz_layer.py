"""Base of the layers whose Lipschitz constant can be watched, penalized, capped and condensed."""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.layers._as_run import as_run
from keras_lipattn.layers._caps import cap_factor, cap_margin
from keras_lipattn.layers._keras_export import freezes_variables
from keras_lipattn.layers._norm_cache import NormCache
from keras_lipattn.layers._operator_norms import (
    CACHE_ALLOWANCE,
    ExactNorms,
    NormLayout,
    RecordedNorms,
    RunningNorms,
    WarmNorms,
    quiet,
)
from keras_lipattn.layers._strategy_scope import require_created_in_scope
from keras_lipattn.linalg.power import cold_vector


@dataclass(frozen=True)
class Tracking:
    """What a monitor wants a layer to compute in its training step.

    Attributes:
        norm: Norm of the running bound: `"l2"`, `"token"` or `"linf"`.
        sequence_length: Number of tokens the bound is for; `None` for the layer's own.
        penalize: Whether `call` adds the penalty to the losses.
    """

    norm: str = "l2"
    sequence_length: int | None = None
    penalize: bool = False


class LipschitzLayer(keras.layers.Layer):
    """A layer with a proven Lipschitz constant.

    Subclasses give their kernels (`_kernels`), the shapes of the matrices whose operator norms
    their bound needs (`_norm_shapes`), and `_evaluate`, which turns kernels and a source of
    operator norms into effective weights. The base class owns everything around it: running
    vectors, the cache of norms, the penalty, the condensed state.

    Every layer creates its running vectors, `running_bound`, `penalty_coefficient` and
    `penalty_log_target` in `build`, whatever its options, so that one checkpoint layout serves all.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # Wrapped, so that Keras takes neither for weights of the layer.
        self._tracking: Any = None
        self._cache: Any = None
        self._condensed: Any = None

    # What a subclass provides ---------------------------------------------------------------

    def _kernels(self):
        """The raw kernels, in a fixed order."""
        raise NotImplementedError(f"{type(self).__name__} must implement `_kernels`.")

    def _norm_shapes(self):
        """Shapes of the matrices, by name, whose operator norms `_evaluate` may ask for."""
        raise NotImplementedError(f"{type(self).__name__} must implement `_norm_shapes`.")

    def _capped_norms(self):
        """Names of the norms which inference needs to apply the caps; empty without caps."""
        raise NotImplementedError(f"{type(self).__name__} must implement `_capped_norms`.")

    def _request_norms(self, kernels, norms, names, xp):
        """Asks `norms` for the norms in `names`, of the matrices as the caps make them."""
        raise NotImplementedError(f"{type(self).__name__} must implement `_request_norms`.")

    def _condense(self):
        """The constants this layer runs with when condensed, made on the host."""
        raise NotImplementedError(f"{type(self).__name__} must implement `_condense`.")

    def lipschitz(self, sequence_length=None, norm="l2", mask: Any = "full") -> LipschitzBound:
        """Certified Lipschitz constant at inference, for the weights now loaded."""
        raise NotImplementedError(f"{type(self).__name__} must implement `lipschitz`.")

    def graph_bound(self, *, norm="l2", sequence_length=None, mask="full"):
        """The bound as a differentiable tensor of the graph, or as a float when condensed.

        An upper bound at inference for whatever weights the graph runs with: operator norms come
        from Gram iteration. `lipschitz` takes the same arguments and is tighter.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `graph_bound`.")

    def _hold(self, mask):
        """The weights of an inference call with `mask`, to stand in for `_condensed`.

        They are tensors of the graph, evaluated once for many calls, and differentiable.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `_hold`.")

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

    def _add_running_state(self):
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
        if self._capped_norms():
            shapes = {name: self._norm_shapes()[name] for name in self._capped_norms()}
            self._layout = NormLayout(shapes)
            kernels = [kernel.shape for kernel in self._kernels()]
            self._cache = NormCache(kernels, self._layout.size, self._norm_dtype)

    def _vector_initializer(self, name, warm):
        def initialize(shape, dtype=None):
            if not _runs_eagerly():
                # A layer built while a step is traced: its kernels get their values later.
                return ops.convert_to_tensor(cold_vector(shape), dtype=dtype)
            # Runs when the variable gets its value: the kernels, created before, have theirs. The
            # first to run works for all, in `warm`.
            if not warm:
                warm.update(self._warm_vectors())
            return ops.convert_to_tensor(warm[name], dtype=dtype)

        return initialize

    def _warm_vectors(self):
        norms = WarmNorms()
        with quiet():
            self._request_norms(self._host_kernels(), norms, list(self._norm_shapes()), np)
        return norms.vectors

    def warm_up(self):
        """Brings the running vectors up to the weights now loaded, on the host.

        Raises:
            ValueError: If the layer is not built.
        """
        self._require_built("warming up its running vectors")
        for name, vector in self._warm_vectors().items():
            self._vectors[name].assign(vector)

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
        if self._cache is None:
            return
        self._cache.fill(self._graph_kernels(), self._exact_norms())

    def _exact_norms(self):
        """What the cache holds for the weights now loaded when filled from the host."""
        exact = ExactNorms()
        with quiet():
            self._request_norms(self._host_kernels(), exact, self._capped_norms(), np)
            return self._layout.flatten(exact.norms, np) * CACHE_ALLOWANCE

    def _enter_condensed(self):
        self._require_built("condensing it")
        if self._condensed is not None:
            raise ValueError(
                f"A layer is condensed by one context at a time. Received: layer {self.path!r}, "
                "which is inside `condensed` already"
            )
        self._condensed = self._condense()
        self._condensed.materialize()

    def _leave_condensed(self):
        self._condensed = None

    def _require_built(self, before):
        if not self.built:
            raise ValueError(
                f"The layer has no weights yet: build it, or call it on data, before {before}. "
                f"Received: built={self.built}"
            )

    # Kernels and norms in the two precisions -------------------------------------------------

    @property
    def _norm_dtype(self):
        """Norms, scores and softmax are never computed in less than float32."""
        return "float64" if self.compute_dtype == "float64" else "float32"

    def _graph_kernels(self):
        """The kernels as they run: cast to the compute dtype, then held in the norm dtype."""
        return [
            ops.cast(ops.cast(kernel, self.compute_dtype), self._norm_dtype)
            for kernel in self._kernels()
        ]

    def _host_kernels(self):
        """The same in float64 numpy."""
        return [as_run(kernel, self.compute_dtype) for kernel in self._kernels()]

    def _rounded(self, matrix, xp):
        """A matrix made from kernels, as it runs: rounded where the compute dtype is a low one."""
        if self.compute_dtype == self._norm_dtype:
            return matrix
        if xp is np:
            return as_run(matrix, self.compute_dtype)
        return ops.cast(ops.cast(matrix, self.compute_dtype), matrix.dtype)

    def _cap_factor(self, norm, cap, shape, xp):
        """The factor that keeps a matrix of this shape under its cap after it is rounded."""
        return cap_factor(norm, cap, xp, margin=cap_margin(self.compute_dtype, shape))

    def _inference_norms(self, kernels):
        """A source of upper bounds, remembered for these weights or from Gram iteration."""

        def evaluate(norms, kernels):
            self._request_norms(kernels, norms, self._capped_norms(), ops)
            return self._layout.flatten(norms.norms, ops)

        if freezes_variables():
            import tensorflow as tf

            # The weights become constants, so their norms may, and no variable can be written.
            with tf.init_scope():
                norms = self._exact_norms()
            flat = ops.convert_to_tensor(norms, self._norm_dtype)
        else:
            flat = self._cache.select(kernels, evaluate)
        return RecordedNorms(flat, self._layout)

    def _is_settled(self):
        """Whether inference runs with the weights that the host computes, up to roundings.

        Else the norms of its caps are not known on the host, since no inference has run with the
        weights now loaded, or are looser bounds, on backends other than TensorFlow.
        """
        if self._condensed is not None or self._cache is None:
            return True
        remembered = self._cache.remembered(self._graph_kernels())
        if remembered is None:
            return False
        wanted = self._exact_norms()
        return bool(np.allclose(remembered, wanted, rtol=CACHE_ALLOWANCE - 1.0, atol=0.0))

    def _norms_for(self, kernels, training) -> Any:
        """The source of norms for this call, or `None` when nobody needs one."""
        if training:
            require_created_in_scope(None, self.variables, f"Layer {self.path!r}")
        if training and (self._tracking is not None or self._cache is not None):
            return RunningNorms(self._vectors)
        if not training and self._cache is not None:
            return self._inference_norms(kernels)
        return None

    def _record(self, bound, *, penalize=True):
        """Stores the running bound and adds the penalty, at the end of a tracked training call."""
        self.running_bound.assign(ops.cast(ops.stop_gradient(bound), self.running_bound.dtype))
        if self._tracking.penalize and penalize:
            # log(0) would make the gradient of a layer which is switched off a NaN.
            log_bound = ops.log(ops.maximum(bound, 1e-30))
            target = ops.cast(self.penalty_log_target, log_bound.dtype)
            coefficient = ops.cast(self.penalty_coefficient, log_bound.dtype)
            penalty = coefficient * ops.relu(log_bound - target)
            # The dtype of compiled losses, whatever the policy: TensorFlow adds no others to them.
            self.add_loss(ops.cast(penalty, keras.config.floatx()))


def _runs_eagerly():
    """Whether variables have values that the host can read."""
    if keras.backend.backend() != "tensorflow":
        return True
    import tensorflow as tf

    return tf.executing_eagerly()


# Power steps depend on weights alone, hence are the same on every replica: each assigns its own. An
# aggregation would let replicas wait for each other in the middle of `call`, where the losses that
# they add to one layer get mixed up.
_RUNNING = dict(dtype="float32", trainable=False, autocast=False, aggregation="none")
