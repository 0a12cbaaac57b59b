"""Lower estimates of a model and of its watched layers, beside their certified bounds."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lipattn.callbacks._watched_layers import WatchedLayer
from keras_lipattn.estimation import estimate_lipschitz
from keras_lipattn.estimation.derivatives import preserve_losses
from keras_lipattn.layers import L2MultiHeadAttention, condensed
from keras_lipattn.layers._arguments import describe
from keras_lipattn.layers.lipschitz_layer import LipschitzLayer

# Enough to see how a bound and what is there drift apart; `estimate_lipschitz` climbs higher.
STEPS = 8

_Calls = list[tuple[LipschitzLayer, Any, dict[str, Any]]]


def check_sample(sample: Any, model: keras.Model | None = None) -> None:
    """Raises a `ValueError` unless `sample` is a batch of inputs, which `model` takes if given."""
    leaves = keras.tree.flatten(sample)
    if not leaves or not all(np.ndim(leaf) and np.shape(leaf)[0] for leaf in leaves):
        raise ValueError(
            "`lower` must be a batch of inputs of the model, with at least one example. "
            f"Received: {[describe(leaf) for leaf in leaves]}"
        )
    if model is not None:
        try:
            _calls(model, [], sample)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`lower` must be a batch of inputs that the model takes: {error} "
                f"Received: {[describe(leaf) for leaf in leaves]}"
            ) from error


def lower_estimates(
    model: keras.Model, watched: Sequence[WatchedLayer], sample: Any, norm: str
) -> dict[str, float]:
    """What attacks from some inputs find, a lower estimate for each certified bound.

    Runs on the host, on plain tensors: under a distribution strategy it needs no other replica.

    Args:
        model: A built model.
        watched: Its `WatchedLayer`s.
        sample: A batch of inputs of the model, in the structure of its call.
        norm: Norm of the bounds.

    Returns:
        From `"total"` and the keys of the layers to floats, 0 where nothing could be measured: an
        output that is not one floating tensor, inputs that are integers, a layer that did not run.
    """
    values = dict.fromkeys(["total", *(entry.key for entry in watched)], 0.0)
    keys = {id(entry.layer): entry.key for entry in watched}
    layers = [entry.layer for entry in watched]
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if layer._condensed is None:
                # Caps as constants: the search differentiates the layer, not their norms.
                stack.enter_context(condensed(layer))
        for layer, x, kwargs in _calls(model, layers, sample):
            key = keys[id(layer)]
            values[key] = max(values[key], _estimate(layer, x, norm, kwargs))
        if len(keras.tree.flatten(sample)) == 1:
            values["total"] = _estimate(model, keras.tree.flatten(sample)[0], norm, {})
    return values


def _estimate(function: Any, x: Any, norm: str, kwargs: dict[str, Any]) -> float:
    x = ops.convert_to_numpy(ops.convert_to_tensor(x))
    if x.dtype.kind not in "fV":
        return 0.0
    try:
        found = estimate_lipschitz(
            function,
            # bfloat16 has kind "V" in numpy.
            x if x.dtype.kind == "f" else x.astype(np.float32),
            norm,
            steps=STEPS,
            restarts=1,
            call_kwargs=kwargs,
        )
    except ValueError:
        # Outputs or derivatives that are not finite, or not one tensor: nothing was measured.
        return 0.0
    return found.value if math.isfinite(found.value) else 0.0


def _calls(model: keras.Model, layers: Sequence[LipschitzLayer], sample: Any) -> _Calls:
    """How the model calls its layers on the sample: layer, input and further arguments."""
    calls: _Calls = []
    with _recorded(layers, calls), preserve_losses(model), keras.StatelessScope():
        model(keras.tree.map_structure(ops.convert_to_tensor, sample), training=False)
    return calls


@contextlib.contextmanager
def _recorded(layers: Sequence[LipschitzLayer], calls: _Calls) -> Iterator[None]:
    def record(layer, call):
        def recording(x, *args, **kwargs):
            if not args:
                given = {k: v for k, v in kwargs.items() if v is not None and k != "training"}
                mask = getattr(x, "_keras_mask", None)
                if mask is not None and isinstance(layer, L2MultiHeadAttention):
                    # It travels with the tensor, which the search replaces.
                    given.setdefault("query_mask", mask)
                calls.append((layer, x, given))
            return call(x, *args, **kwargs)

        return recording

    attributes: list[dict[str, Any]] = [layer.__dict__ for layer in layers]
    for layer, own in zip(layers, attributes, strict=True):
        # Past the attribute tracking of Keras, which must not see it.
        own["call"] = record(layer, layer.call)
    try:
        yield
    finally:
        for own in attributes:
            del own["call"]
