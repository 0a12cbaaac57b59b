"""What a penalty weighs and what it aims at, as users write it."""

import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_lipattn.callbacks._watched_layers import WatchedLayer

Penalty = float | Callable[[int], Any] | Callable[[int, float], Any] | None
Target = float | dict[str, float]


def check_penalty(penalty: Penalty) -> None:
    """Raises unless `penalty` is `None`, a number that can be a coefficient, or callable."""
    if penalty is None or callable(penalty):
        return
    _require_coefficient(penalty, "`penalty` must be `None`, a number of at least 0, or a callable")


def coefficient_at(penalty: Penalty, epoch: int, current: float) -> float:
    """The coefficient of an epoch.

    Args:
        penalty: A number, `None` for 0, or a callable of the epoch, or of the epoch and the
            current coefficient.
        epoch: Index of the epoch, from 0.
        current: The coefficient now in the weights of the model.

    Returns:
        A float, at least 0.

    Raises:
        ValueError: If the callable returns anything else.
    """
    if not callable(penalty):
        return float(penalty or 0.0)
    schedule: Callable = penalty
    arguments = (epoch, current) if _takes_two(schedule) else (epoch,)
    value = np.asarray(ops.convert_to_numpy(schedule(*arguments)))
    message = f"The schedule `penalty` must return a number of at least 0 for epoch {epoch}"
    return _require_coefficient(value.item() if value.ndim == 0 else value, message)


def check_target(target: Target) -> None:
    """Raises unless `target` is a positive number, or a dictionary of such by name."""
    targets = target if isinstance(target, dict) else {"": target}
    for name, value in targets.items():
        if not (_is_number(value) and math.isfinite(value) and value > 0):
            of_layer = f" of layer {name!r}" if name else ""
            raise ValueError(
                "`target` must be a positive number, or a dictionary from names or paths of layers "
                f"to positive numbers. Received: target={value!r}{of_layer}"
            )


def targets_of(target: Target, watched: Sequence[WatchedLayer]) -> dict[str, float]:
    """The target of each layer that has one, by key; a dictionary leaves other layers free."""
    if not isinstance(target, dict):
        return {layer.key: float(target) for layer in watched}
    known = {name for layer in watched for name in (layer.layer.name, *layer.paths)}
    unknown = [name for name in target if name not in known]
    if unknown:
        raise ValueError(
            f"`target` names what is no watched layer of the model: {unknown}. Those that are: "
            f"{[layer.path for layer in watched]}. Received: target={target}"
        )
    targets = {}
    for layer in watched:
        # A path says more than a name, which several layers may share.
        for name in (*layer.paths, layer.layer.name):
            if name in target:
                targets[layer.key] = float(target[name])
                break
    return targets


def _takes_two(function: Callable) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        # Some functions written in C do not tell.
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in kinds and p.default is p.empty]
    return len(required) == 2


def _require_coefficient(value: Any, message: str) -> float:
    if not (_is_number(value) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{message}. Received: {value!r}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
