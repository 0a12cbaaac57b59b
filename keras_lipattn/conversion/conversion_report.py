"""What `make_lipschitz` returns: the new model, and a report of what it replaced and kept."""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import keras

from keras_lipattn._text import number
from keras_lipattn.certification import Certificate

# Constants above 1 by more than roundings are worth a line.
_LARGE = 1.0 + 1e-3
_SUMS_IN_CODE = (
    "{} in its code, constant {} each: create a `keras.layers.Add()` for each in `__init__` and "
    "call it, as `self.add([x, y])`. It becomes a `Residual`, with larger radii after training"
)


@dataclasses.dataclass(frozen=True, eq=False)
class LipschitzConversion:
    """The Lipschitz version of a model, and what was replaced in it.

    Args:
        model: The new model, with new weights in part: it must be trained.
        replaced: Maps the paths of the replaced layers, such as `"encoder/attention"`, to what was
            replaced by what, such as `"Dense -> OrthogonalDense, MaxMin"`. The new layers have the
            same paths.
        kept: Maps the paths of layers that stayed, and have or may get a constant above 1, to the
            reasons. Layers of constant 1 or less, such as `Dropout`, are not listed. A layer with
            sums `x + y` in its own code has one entry for all of them, with the remedy; sums in the
            code of the model itself are listed under its name.
        certificate: The certificate of the new model with its first weights.
        advice: Lines on what may keep the new model from learning.

    Example:

    >>> hidden = keras.layers.Dense(4, activation="gelu", name="hidden")
    >>> model = keras.Sequential([keras.Input((8,)), hidden, keras.layers.Dense(3)])
    >>> conversion = keras_lipattn.make_lipschitz(model)
    >>> conversion.replaced["hidden"]
    'Dense -> OrthogonalDense, MaxMin'
    >>> conversion.kept, keras_lipattn.certify(conversion.model).total <= 1.0 + 1e-6
    ({}, True)
    """

    model: keras.Model
    replaced: Mapping[str, str]
    kept: Mapping[str, str]
    certificate: Certificate
    advice: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.model.name}: {len(self.replaced)} replaced, {len(self.kept)} kept"]
        width = max((len(path) for path in (*self.replaced, *self.kept)), default=0)
        for title, entries in (("replaced:", self.replaced), ("kept:", self.kept)):
            if entries:
                lines.append(title)
                lines += [f"  {path.ljust(width)}  {text}" for path, text in entries.items()]
        total = self.certificate.total
        bound = f"<= {number(total)}" if math.isfinite(total) else "no bound"
        lines.append(f"Lipschitz constant before training ({self.certificate.norm}): {bound}")
        lines += [f"  {reason}" for reason in self.certificate.reasons]
        lines += self.advice
        lines.append(
            "The new model, `conversion.model`, must be trained. `certify(conversion.model)` "
            "certifies it afterwards."
        )
        return "\n".join(lines)


def described(new: Any) -> str:
    """Classes of a new layer, or of the layers in a row that take the place of one."""
    layers = new.layers if isinstance(new, keras.Sequential) else [new]
    if isinstance(new, keras.layers.Rescaling):
        return f"Rescaling({new.scale:.3g}), which makes up for sums in code, see `kept`"
    return ", ".join(type(layer).__name__ for layer in layers)


def kept_with_large_rows(
    reasons: Mapping[str, str],
    changed: Collection[str],
    certificate: Certificate,
    firsts: Mapping[str, str],
    adds: Collection[str],
) -> dict[str, str]:
    """What was kept: layers with a reason, with their constants, and others with a large one.

    Args:
        reasons: Maps paths to the reasons why layers were kept.
        changed: Paths of what was replaced.
        certificate: The certificate of the new model.
        firsts: Maps paths in the new model, whose generated names differ, to those of `reasons`.
        adds: Paths of the sums that stayed and are layers, or operations of graphs.
    """
    kept = dict(reasons)
    sums: dict[str, list[float]] = {}
    for row in certificate.rows:
        path = _first_path(re.sub(r":call\d+$", "", row.path), firsts)
        large = not row.is_finite or row.constant > _LARGE
        # It may have the name of an `Add` layer that was replaced, or is not called.
        in_code = row.layer == "Add" and path not in adds
        if not large or row.explained_by or (_inside(path, changed) and not in_code):
            continue
        place = next((one for one in reasons if path == one or path.startswith(f"{one}/")), None)
        constant = f"constant {number(row.constant)}"
        if place is not None:
            if constant not in kept[place]:
                kept[place] += f"; {constant}"
        elif in_code:
            sums.setdefault(path.rpartition("/")[0] or certificate.model, []).append(row.constant)
        else:
            kept[path] = f"{row.layer}, {constant}: {row.theorem if row.is_finite else row.reason}"
    for path, constants in sums.items():
        one = len(constants) == 1
        count = "1 sum `x + y` runs" if one else f"{len(constants)} sums `x + y` run"
        kept[path] = _SUMS_IN_CODE.format(count, number(max(constants)))
    return kept


def _inside(path: str, paths: Collection[str]) -> bool:
    return any(path == one or path.startswith(f"{one}/") for one in paths)


def _first_path(path: str, firsts: Mapping[str, str]) -> str:
    """The first path, in the original model, of a layer or of an operation inside one."""
    above, rest = path, ""
    while above and above not in firsts:
        above, _, last = above.rpartition("/")
        rest = f"/{last}{rest}"
    return f"{firsts[above]}{rest}" if above else path
