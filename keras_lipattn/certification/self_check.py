"""Attempts to refute a certificate before it is returned.

The traced calls run on a few batches: random inputs, inputs of the largest allowed norm, inputs
near 0 where normalizations are steepest, and steps in directions of fast change. Three checks
follow: the outputs of the calls equal those of the model, changes of the outputs are at most the
constant times the changes of the inputs, and all tensors are within their ranges.
"""

import contextlib
import math
import warnings
from typing import Any

import keras
import numpy as np
from keras import KerasTensor, ops
from keras.src import backend

from keras_lipattn.certification.certificate import Certificate
from keras_lipattn.certification.classifier_head import without_activation
from keras_lipattn.certification.keras_models import interpolates, names_kept
from keras_lipattn.certification.propagation import Propagation
from keras_lipattn.certification.tensor_state import TensorState
from keras_lipattn.certification.trace import TracedCall
from keras_lipattn.certification.traced_model import TracedModel
from keras_lipattn.layers._autodiff import vector_jacobian

# Allowed rounding error of a quotient or an entry, in units of the rounding of the dtype. A network
# of a hundred layers, each with sums of a thousand terms, has a smaller error.
_ROUNDINGS = 2000.0
# Keras rounds some constants of float64 models to float32, such as the slope of a leaky ReLU.
_SLACK = 1e-5
# Sizes of the first examples of a batch, and of the steps to the others.
_SCALES, _STEPS = (1.0, 0.0, 10.0, 1e-2), (1.0, 1e-1, 1e-2, 1e-3)
# With more weights than this, 5 forward passes instead of 14.
_LARGE = 5_000_000


class CertificateRefuted(RuntimeError):
    """A measurement contradicts a certificate: a rule is wrong.

    If it is a rule of this package, please report it.

    Example:

    >>> from keras_lipattn.certification import CertificateRefuted
    >>> class Doubled(keras.layers.Layer):
    ...     def call(self, x):
    ...         return 2.0 * x
    >>> @keras_lipattn.register_rule(Doubled)
    ... def wrong(layer, call):
    ...     return 1.0
    >>> inputs = keras.Input((4,))
    >>> try:
    ...     certificate = keras_lipattn.certify(keras.Model(inputs, Doubled()(inputs)), check=True)
    ... except CertificateRefuted:
    ...     print("the rule is wrong")
    the rule is wrong
    """


def check_certificate(
    traced: TracedModel, propagation: Propagation, certificate: Certificate, *, seed: int = 0
) -> None:
    """Tries to refute a certificate.

    Args:
        traced: the model.
        propagation: the propagation that the certificate was made from.
        certificate: the certificate. It is not checked if it is not finite, or if the sizes of the
            inputs are not known.
        seed: seed of the inputs.

    Raises:
        CertificateRefuted: if the certificate is refuted.
    """
    if not certificate.is_finite or any(None in tensor.shape for tensor in traced.trace.inputs):
        return
    check = _Check(traced, propagation, certificate, seed)
    try:
        with names_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check.run()
    except _CannotRun as error:
        warnings.warn(
            f"The certificate of {traced.model.name!r} could not be checked: {error}", stacklevel=3
        )


class _CannotRun(Exception):
    """The traced calls cannot be run on numbers; the message says why."""


class _Check:
    """One attempt to refute a certificate."""

    def __init__(self, traced, propagation, certificate, seed):
        self._traced = traced
        self._trace = traced.trace
        self._propagation = propagation
        self._certificate = certificate
        self._seed = seed
        self._rng = np.random.default_rng(seed)
        self._needed = sorted(propagation.needed)
        self._sources = self._find_sources()
        # Interpolation rounds pixels to float32 in the middle of a float64 model.
        single = any(interpolates(call.operation) for call in self._trace.calls)
        single = single or backend.standardize_dtype(self._trace.outputs[0].dtype) != "float64"
        low = any(call.compute_dtype in ("float16", "bfloat16") for call in self._trace.calls)
        self._rounding = 2e-2 if low else 1.2e-7 if single else 1e-13

    def run(self) -> None:
        self._compare_with_model()
        # Near tokens that are zero, a mask that is assumed to be fixed would change.
        fixed_masks = bool(self._certificate.threat_model.assumed_masks)
        large = self._traced.model.count_params() > _LARGE
        for scale in _SCALES[:2] if large else _SCALES:
            if scale == 0.0 and fixed_masks:
                continue
            inputs = self._inputs()
            first = self._random_sources(inputs, scale)
            batch = self._steps_from(first)
            outputs = self._compare_changes(inputs, batch)
            if scale == _SCALES[0]:
                self._compare_examples(inputs, batch, outputs)
        if not large:
            self._ascend()

    # Inputs -----------------------------------------------------------------------------------

    def _find_sources(self) -> list[KerasTensor]:
        """The certified tensors: inputs, and outputs of embeddings."""
        fixed = self._propagation.looked_up_inputs
        sources = [
            tensor
            for tensor in self._trace.inputs
            if not self._state(tensor).is_fixed
            and self._state(tensor).integer_input not in fixed
            and backend.is_float_dtype(backend.standardize_dtype(tensor.dtype))
        ]
        for index in self._needed:
            call = self._trace.calls[index]
            if index in self._propagation.resets:
                sources += call.outputs
        return sources

    def _state(self, tensor: KerasTensor) -> TensorState:
        return self._propagation.state_of(tensor)

    def _inputs(self) -> list[Any]:
        """Values of all inputs; those of certified inputs are replaced later."""
        tables = [
            int(call.operation.input_dim)
            for call in self._trace.calls
            if isinstance(call.operation, keras.layers.Embedding)
        ]
        values = []
        for tensor in self._trace.inputs:
            dtype = keras.backend.standardize_dtype(tensor.dtype)
            if dtype == "bool":
                value = self._rng.random(tensor.shape) < 0.8
                # At least one token is visible.
                value[..., :1] = True
            elif dtype == "string":
                value = np.full(tensor.shape, "a", dtype=object)
            elif backend.is_float_dtype(dtype):
                value = self._rng.normal(size=tensor.shape)
            else:
                value = self._rng.integers(0, min(tables, default=2), size=tensor.shape)
            values.append(ops.convert_to_tensor(value, dtype=dtype))
        return values

    def _random_sources(self, inputs, scale: float) -> list[np.ndarray]:
        """One example of each certified tensor."""
        values = []
        for tensor in self._sources:
            value = scale * self._rng.normal(size=tensor.shape[1:])
            if scale == 1.0 and value.ndim > 1:
                # All tokens but one are equal, so that differences within them are small.
                value[:-1] = value[:1]
            values.append(self._inside(tensor, value))
        return values

    def _steps_from(self, first: list[np.ndarray]) -> list[np.ndarray]:
        """A batch of each certified tensor: an example, and others at some distances from it."""
        batches = []
        for tensor, value in zip(self._sources, first, strict=True):
            size = float(np.sqrt(np.mean(np.square(value)))) or 1.0
            examples = [value]
            for k in range(tensor.shape[0] - 1):
                step = self._rng.normal(size=value.shape)
                if k % 2:
                    # Only one token changes.
                    kept = step.reshape(-1, step.shape[-1] if step.ndim else 1)[:1].copy()
                    step = np.zeros_like(step)
                    step.reshape(-1, kept.shape[-1])[:1] = kept
                examples.append(value + _STEPS[k % len(_STEPS)] * size * step)
            batches.append(np.stack([self._inside(tensor, example) for example in examples]))
        return batches

    def _inside(self, tensor: KerasTensor, value: np.ndarray) -> np.ndarray:
        """The value, scaled into the inputs that the certificate covers."""
        radius = self._certificate.threat_model.input_radius
        if math.isfinite(radius):
            sizes = np.linalg.norm(value, axis=-1, keepdims=True) if value.ndim else np.abs(value)
            value = value * np.minimum(1.0, radius * (1.0 - 1e-6) / np.maximum(sizes, 1e-300))
        return value.astype(_numpy_dtype(tensor))

    # Runs -------------------------------------------------------------------------------------

    def _run(self, inputs, sources, *, logits: bool = True) -> dict[int, Any]:
        """Values of all tensors that the outputs depend on.

        Args:
            inputs: values of the inputs.
            sources: values of the certified tensors, or `None` to compute them from the inputs.
            logits: whether to leave out the last activation, as in the certificate.
        """
        values = {id(t): v for t, v in zip(self._trace.inputs, inputs, strict=True)}
        given = {}
        if sources is not None:
            given = {
                id(t): ops.convert_to_tensor(v) for t, v in zip(self._sources, sources, strict=True)
            }
        values.update(given)
        for index in self._needed:
            call = self._trace.calls[index]
            if all(id(tensor) in given for tensor in call.outputs):
                continue
            drop = logits and index == self._traced.logit_call
            for tensor, value in zip(call.outputs, self._outputs(call, values, drop), strict=True):
                if sources is not None and self._is_assumed_fixed(call, tensor):
                    value = ops.repeat(value[:1], value.shape[0], axis=0)
                values[id(tensor)] = value
        return values

    def _is_assumed_fixed(self, call: TracedCall, tensor: KerasTensor) -> bool:
        """Whether it is a mask computed from a certified input and assumed to be fixed."""
        fixed = self._propagation.states.get(id(tensor))
        moved = any(not self._state(one).is_fixed for one in call.tensors)
        return fixed is not None and fixed.is_fixed and moved

    def _outputs(self, call: TracedCall, values, drop: bool) -> list[Any]:
        def fill(leaf):
            if not isinstance(leaf, KerasTensor):
                return leaf
            value = self._value(leaf, values)
            mask = call.masks.get(id(leaf))
            if mask is not None:
                # A copy, so that other calls do not see the mask.
                value = ops.copy(value)
                backend.set_keras_mask(value, self._value(mask, values))
            return _as_given(call, leaf, value)

        try:
            args, kwargs = (
                keras.tree.map_structure(fill, part) for part in (call.args, call.kwargs)
            )
            scope = backend.AutocastScope(call.compute_dtype)
            leaving_out = without_activation(call.operation) if drop else contextlib.nullcontext()
            with keras.StatelessScope(collect_losses=True), scope, leaving_out:
                return keras.tree.flatten(call.operation.call(*args, **kwargs))
        except CertificateRefuted:
            raise
        except Exception as error:
            raise _CannotRun(f"{call.path!r} failed on numbers ({type(error).__name__})") from error

    def _value(self, tensor: KerasTensor, values) -> Any:
        while id(tensor) in self._trace.aliases and id(tensor) not in values:
            tensor = self._trace.aliases[id(tensor)]
        if id(tensor) not in values and id(tensor) in self._trace.constants:
            constant = self._trace.constants[id(tensor)]
            return ops.convert_to_tensor(np.broadcast_to(constant, tensor.shape))
        return values[id(tensor)]

    def _arrays(self, values) -> list[np.ndarray]:
        return [
            np.asarray(ops.convert_to_numpy(ops.cast(self._value(t, values), "float64")))
            for t in self._trace.outputs
        ]

    # Comparisons ------------------------------------------------------------------------------

    def _compare_with_model(self) -> None:
        """Checks that the traced calls return the outputs of the model."""
        inputs = self._inputs()
        found = self._arrays(self._run(inputs, None, logits=False))
        arguments = keras.tree.pack_sequence_as(self._traced.arguments, inputs)
        with keras.StatelessScope(collect_losses=True):
            expected = self._traced.model(*arguments, **self._traced.call_options)
        expected = keras.tree.flatten(expected)
        for one, other in zip(found, expected, strict=True):
            other = np.asarray(ops.convert_to_numpy(ops.cast(other, "float64")))
            # An average over a sequence that is all padding is NaN, in the model as in the calls.
            alike = np.isnan(one) & np.isnan(other)
            size = 1.0 + float(np.abs(other).max(initial=0.0, where=~alike))
            gap = float(np.abs(one - other).max(initial=0.0, where=~alike))
            # Caps differ slightly between eager and traced runs.
            if not gap <= (_ROUNDINGS * self._rounding + 1e-3) * size:
                self._refute(
                    f"the outputs of the traced calls differ from those of the model by {gap:.3g}"
                )

    def _compare_changes(self, inputs, sources) -> list[np.ndarray]:
        """Checks that changes of the outputs are at most what the constant allows."""
        # The certificate holds for fixed masks and integers: all examples get the same ones.
        inputs = [ops.convert_to_tensor(_repeat_first(ops.convert_to_numpy(v))) for v in inputs]
        values = self._run(inputs, sources)
        self._compare_ranges(values)
        outputs = self._arrays(values)
        for other in range(1, self._trace.batch):
            self._compare_pair(sources, outputs, 0, other)
        return outputs

    def _compare_pair(self, sources, outputs, one: int, other: int) -> None:
        norm = self._certificate.norm
        moved = _norm(norm, [np.subtract(x[other], x[one], dtype=np.float64) for x in sources])
        if not moved > 0.0:
            return
        gaps = [y[other] - y[one] for y in outputs]
        if not all(np.isfinite(gap).all() for gap in gaps):
            return
        found = _norm(norm, gaps)
        size = _norm(norm, [np.maximum(np.abs(y[other]), np.abs(y[one])) for y in outputs])
        reach = _norm(norm, [np.abs(x[one]).astype(np.float64) for x in sources])
        # Rounding errors of the inputs grow like changes of the inputs.
        noise = _ROUNDINGS * self._rounding * (size + self._certificate.total * reach)
        if found > self._certificate.total * moved * (1.0 + _SLACK) + noise:
            self._refute(
                f"a change of the input by {moved:.6g} changes the output by {found:.6g}, which is "
                f"{found / moved:.6g} times as much; certified is {self._certificate.total:.6g}"
            )

    def _compare_ranges(self, values) -> None:
        """Checks that every tensor is within its range."""
        for index in self._needed:
            for tensor in self._trace.calls[index].outputs:
                state = self._propagation.states.get(id(tensor))
                if state is None or state.is_fixed or not backend.is_float_dtype(state.dtype):
                    continue
                if math.isinf(state.range.largest):
                    continue
                value = np.asarray(ops.convert_to_numpy(ops.cast(values[id(tensor)], "float64")))
                self._compare_range(self._trace.calls[index].path, state, value)

    def _compare_range(self, path: str, state: TensorState, value: np.ndarray) -> None:
        if not np.isfinite(value).all():
            return
        token_range = state.range
        tokens = value.reshape(-1, value.shape[-1]) if state.shape else value.reshape(-1, 1)
        slack = (_ROUNDINGS * self._rounding + 1e-6) * (1.0 + token_range.largest)
        largest = float(np.abs(tokens).max(initial=0.0))
        if largest > token_range.largest + slack:
            self._refute(
                f"the output of {path!r} has an entry of size {largest:.6g}, above the largest one "
                f"in its certified range, {token_range.largest:.6g}"
            )
        if not token_range.bounded:
            return
        center = 0.0 if token_range.center is None else token_range.center
        farthest = float(np.linalg.norm(tokens - center, axis=1).max(initial=0.0))
        slack *= math.sqrt(tokens.shape[1])
        if farthest > token_range.radius + slack:
            self._refute(
                f"the output of {path!r} has a token at distance {farthest:.6g} from the center of "
                f"its certified range, a ball of radius {token_range.radius:.6g}"
            )

    def _compare_examples(self, inputs, sources, outputs) -> None:
        """Checks that the output of the first example does not depend on the others."""
        if self._trace.batch < 2 or not self._sources:
            return
        changed = [np.concatenate([x[:1], -x[1:][::-1]]) for x in sources]
        inputs = [ops.convert_to_tensor(_repeat_first(ops.convert_to_numpy(v))) for v in inputs]
        alone = self._arrays(self._run(inputs, changed))
        for one, other in zip(outputs, alone, strict=True):
            gap = float(np.abs(one[0] - other[0]).max(initial=0.0))
            size = 1.0 + float(np.abs(one[0]).max(initial=0.0))
            if np.isfinite(gap) and gap > (_ROUNDINGS * self._rounding + 1e-3) * size:
                self._refute(f"the output of an example changes by {gap:.3g} with another example")

    def _ascend(self) -> None:
        """Checks steps along the gradient of a random combination of the outputs."""
        if len(self._sources) != 1 or self._trace.batch < 2:
            return
        inputs = [
            ops.convert_to_tensor(_repeat_first(ops.convert_to_numpy(value)))
            for value in self._inputs()
        ]

        def function(source):
            values = self._run(inputs, [source])
            return ops.concatenate(
                [
                    ops.reshape(ops.cast(self._value(t, values), source.dtype), (t.shape[0], -1))
                    for t in self._trace.outputs
                ],
                axis=-1,
            )

        (first,) = self._random_sources(inputs, 10.0)
        source = np.repeat(first[None], self._trace.batch, axis=0)
        size = float(np.sqrt(np.mean(np.square(first)))) or 1.0
        try:
            start = ops.convert_to_tensor(source)
            covector = ops.convert_to_tensor(
                self._rng.normal(size=function(start).shape).astype(source.dtype)
            )
            gradient = ops.convert_to_numpy(vector_jacobian(function, start, covector))
        except _CannotRun:
            raise
        except Exception as error:
            raise _CannotRun(f"it has no derivative ({type(error).__name__})") from error
        flat = gradient.reshape(len(gradient), -1).astype(np.float64)
        if not np.isfinite(flat).all():
            return
        direction = np.sign(flat) if self._certificate.norm == "linf" else flat
        length = np.linalg.norm(direction, axis=1, keepdims=True)
        length = np.where(length > 0.0, length, 1.0) / math.sqrt(max(flat.shape[1], 1))
        step = (1e-2 * size * direction / length).reshape(source.shape)
        batch = np.concatenate([source[:1], (source + step)[1:]])
        batch = np.stack([self._inside(self._sources[0], one) for one in batch])
        self._compare_changes(inputs, [batch])

    def _refute(self, text: str) -> None:
        certificate = self._certificate
        raise CertificateRefuted(
            f"The certificate of {certificate.model!r} is wrong: {text}. The constant must not be "
            "used. This is an error in a rule: one of your own, or one of keras_lipattn. Please "
            f"report the latter with the model, norm={certificate.norm!r} and seed={self._seed}; "
            "`certify(model, ..., check=True)` reproduces it."
        )


def _repeat_first(value: np.ndarray) -> np.ndarray:
    return np.repeat(value[:1], len(value), axis=0)


def _numpy_dtype(tensor: KerasTensor) -> Any:
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return np.float32 if dtype in ("float16", "bfloat16") else np.dtype(dtype)


def _as_given(call: TracedCall, leaf: KerasTensor, value: Any) -> Any:
    """The value in the dtype of the argument: the trace leaves out copies in other dtypes."""
    wanted = keras.backend.standardize_dtype(leaf.dtype)
    if keras.backend.standardize_dtype(value.dtype) == wanted or wanted == "string":
        return value
    mask = backend.get_keras_mask(value)
    value = ops.cast(value, wanted)
    if mask is not None:
        backend.set_keras_mask(value, mask)
    return value


def _norm(norm: str, arrays: list[np.ndarray]) -> float:
    """Norm of several tensors of one example, taken as one tensor."""
    if norm == "l2":
        return math.sqrt(math.fsum(float(np.sum(np.square(a))) for a in arrays))
    if norm == "linf":
        return max(float(np.abs(a).max(initial=0.0)) for a in arrays)
    sizes = [np.linalg.norm(np.atleast_1d(a), axis=-1) for a in arrays]
    return max(float(np.max(size, initial=0.0)) for size in sizes)
