"""From an ordinary model to the same architecture of Lipschitz layers."""

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import keras
from keras.src.ops.numpy import Add

from keras_lipattn._arguments import require_norm, require_positive
from keras_lipattn._text import number
from keras_lipattn.certification import Certificate, certify
from keras_lipattn.certification.keras_models import (
    call_specs,
    function_of,
    names_kept,
    sibling_names,
)
from keras_lipattn.certification.traced_model import TracedModel
from keras_lipattn.conversion.calls import Calls
from keras_lipattn.conversion.copying import (
    call_symbolically,
    compile_alike,
    convert_classes,
    copy_model,
    copy_state,
)
from keras_lipattn.conversion.replacements import (
    ATTENTION,
    DENSE,
    Choices,
    Kept,
    merged,
    replacement,
)
from keras_lipattn.conversion.slots import all_paths, exchange, inner_layers, is_plain_graph

# Constants above 1 by more than roundings are worth a line.
_LARGE = 1.0 + 1e-3
_SUM_IN_CODE = (
    "a sum in the code of a layer; write it as `keras.layers.Add()([x, y])`, or put a "
    "normalization after it"
)
_KEEPS_MASK = ", which passes on the mask that `x + y` loses: later layers leave the padding out"
_ONE_TOKEN = (
    "One of {} tokens goes on, as by `x[:, 0]`. It learns little of the others, which reach it "
    "through weighted means: pool all tokens by `Flatten` or `GlobalAveragePooling1D` instead."
)


_LENGTHENED = (
    "Radii are in units of the vectors of the embedding, which training may lengthen: "
    "`embeddings_constraint=keras.constraints.MaxNorm(1.0, axis=1)` limits their length to 1."
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
            reasons. Layers of constant 1 or less, such as `Dropout`, are not listed.
        certificate: The certificate of the new model with its first weights.
        advice: Lines on what may keep the new model from learning.

    Example:

    >>> dense = keras.layers.Dense(4, activation="gelu", name="dense")
    >>> model = keras.Sequential([keras.Input((8,)), dense, keras.layers.Dense(3)])
    >>> result = keras_lipattn.make_lipschitz(model)
    >>> result.replaced["dense"]
    'Dense -> OrthogonalDense, MaxMin'
    >>> result.kept, result.certificate.total <= 1.0 + 1e-6
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
        return "\n".join([*lines, "The new model must be trained."])


def make_lipschitz(
    model: keras.Model,
    *,
    dense: str = "orthogonal",
    attention: str = "l2",
    lipschitz_bound: float | None = 1.0,
    norm: str = "l2",
    branch_weight: float = 0.25,
    token_radius: float = 1.0,
    sequence_length: int | None = None,
    keep: Collection[str] = (),
    inputs: Any = None,
    **certify_options: Any,
) -> LipschitzConversion:
    """Copies a model with Lipschitz layers in place of those without a (small) constant.

    The new model has the inputs, outputs, names and masks of the original, and a constant of about
    1 where everything could be replaced, before and after training. **It is another function: train
    it.** `convert_attention(model, to="bounded")` is the function that keeps what a trained model
    computes. The original does not change. If it is compiled, so is the new model, with a new
    optimizer.

    - `Dense`, and `EinsumDense` and convolutions that are dense layers on the last axis:
      `OrthogonalDense`.
    - `Conv1D` and `Conv2D` whose kernels are squares as large as their strides (patches):
      `SpaceToDepth`, then `OrthogonalDense`. Other `Conv2D` without groups and dilation:
      `SpectralConv2D`.
    - ReLU, GELU, SiLU and similar activations: `MaxMin`, or ReLU for an odd number of units.
    - `MultiHeadAttention` on one tensor: `L2MultiHeadAttention` with a cap. On several tensors:
      `BoundedMultiHeadAttention` with a cap.
    - `Add` layers, and sums of two tensors in a graph: `Residual`, a convex combination with a
      learned weight. `Add` of more tensors: `Average`.
    - Layer, batch, group, RMS and unit normalization: `Identity`. After a sum of `n` tensors in the
      code of a layer: `Rescaling(1 / n)`.
    - `MaxPooling` whose windows overlap, with `padding="same"`: windows as large as the strides.

    Normalizations have large constants, `1 / sqrt(epsilon)` for `LayerNormalization`. Convex
    combinations keep tokens from growing without them. A sum of tensors of which one does not
    change, such as an embedding of positions, stays a sum. The activation of the last layer stays,
    and so do embeddings, poolings, dropout and everything else of constant 1 or less.

    Kernels, biases and embeddings of the original are the first weights of the new layers.
    Attention starts with orthogonal kernels.

    Layers are found wherever Keras finds them: in graphs, nested models, and attributes, lists and
    dictionaries of custom layers and subclassed models. A layer that is used twice stays one layer.
    The code of a custom layer is not changed: a sum `x + y` in it has the constant 2 if both
    branches have 1. Write it as `keras.layers.Add()([x, y])`, or put a normalization after it.

    Keras passes the mask of `Embedding(mask_zero=True)` from layer to layer and loses it at a sum
    `x + y` of a graph. `Residual` keeps it, so that later layers leave the padding out. The report
    names the sums where this changes.

    Args:
        model: A built model that Keras can save. It is called on symbolic tensors, as by `certify`.
        dense: `"orthogonal"` for `OrthogonalDense`, whose gradients keep their length, or
            `"spectral"` for `SpectralDense` with the cap 1, which is cheaper to train.
        attention: `"l2"`, `"cosine"` or `"bounded"`, for attention on one tensor:
            `L2MultiHeadAttention`, `ScaledCosineAttention` or `BoundedMultiHeadAttention`.
        lipschitz_bound: Cap of the constant of each attention layer; `None` for no cap.
        norm: Norm of the caps and of the certificate. Orthogonal kernels have the constant 1 in the
            norms `"l2"` and `"token"`.
        branch_weight: First weight of each branch, strictly between 0 and 1. Where neither tensor
            is computed from the other one, both have the weight 1/2.
        token_radius: Radius of the ball of `BoundedMultiHeadAttention`.
        sequence_length: Largest number of tokens, for models with an axis of unknown size.
        keep: Names or paths of layers that stay as they are, with the layers inside.
        inputs: For subclassed models, the inputs of a call, see `certify`.
        **certify_options: Further arguments of `certify`, such as `assume_fixed_mask=True`.

    Returns:
        A `LipschitzConversion`: the new model, what was replaced, what was kept and why, and the
        certificate. Layers and models that create others in their own code get a class derived
        from theirs, which saves and loads the new ones.

    Raises:
        ValueError: If an argument is out of range, `model` is not a built model, cannot be traced
            or copied, or cannot be called with its new layers.

    Example:

    >>> tokens = x = keras.Input((6, 8))
    >>> for _ in range(2):
    ...     y = keras.layers.LayerNormalization()(x)
    ...     x = keras.layers.Add()([x, keras.layers.MultiHeadAttention(2, 4)(y, y)])
    ...     x = keras.layers.Add()([x, keras.layers.Dense(8, activation="gelu")(x)])
    >>> logits = keras.layers.Dense(3)(keras.layers.Flatten()(x))
    >>> result = keras_lipattn.make_lipschitz(keras.Model(tokens, logits))
    >>> result.certificate.total <= 1.0 + 1e-6, result.kept
    (True, {})
    >>> sorted(set(result.replaced.values()))[:2]
    ['Add -> Residual', 'Dense -> OrthogonalDense']
    """
    choices = _choices(
        dense, attention, lipschitz_bound, norm, branch_weight, token_radius, sequence_length
    )
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(f"`model` must be a built `keras.Model`. Received: model={model!r}")
    traced = TracedModel(model, inputs, sequence_length)
    if traced.failure:
        raise ValueError(
            "The model cannot be called on symbolic tensors, so its layers cannot be replaced: "
            f"{traced.failure} Received: model {model.name!r}"
        )
    arguments = _with_dtypes(call_specs(model, inputs)[0], traced.arguments)
    layers = inner_layers(model, _opens)
    sums = _sums_of_graphs(model)
    kept = _kept_by_user(keep, [*layers, *sums])
    calls = Calls(traced.trace)
    with names_kept():
        new_sums = {}
        for path, operation in sums.items():
            # An inner model may be unused.
            if path not in kept and calls.of(operation):
                new_sums[path] = merged(operation, calls, choices)
        new_sums = {path: new for path, new in new_sums.items() if new is not None}
        calls.exchanged = {id(sums[path]) for path in new_sums}
        news, reasons = _replacements(layers, kept, calls, choices)
        substitutes = {id(sums[path]): new for path, new in new_sums.items()}
        copy = copy_model(model, arguments, substitutes)
        added = {id(new) for new in new_sums.values()}
        olds, others = model._flatten_layers(), copy._flatten_layers()
        pairs = zip(olds, [one for one in others if id(one) not in added], strict=True)
        copies = {
            path: layer
            for path, layer in inner_layers(copy, _opens).items()
            if id(layer) not in added
        }
        # The names that Keras generates differ in the copy. The order is the same.
        slots = dict(zip(layers, copies.values(), strict=True))
        exchange(copy, {id(slots[path]): new for path, new in news.items()})
        convert_classes(copy, [*news.values()], [layers[path] for path in news])
        try:
            call_symbolically(copy, arguments)
        except ValueError as error:
            raise ValueError(
                "The code of the model does not work with the new layers. Pass the layers that it "
                f"needs in `keep`. {error}"
            ) from error
    gone = {id(inner) for path in news for inner in slots[path]._flatten_layers()}
    for old, new in list(pairs):
        if id(new) not in gone:
            copy_state(old, new)
    compile_alike(copy, model)
    certificate = certify(copy, norm, sequence_length, inputs=inputs, **certify_options)
    replaced = {}
    for path, new in new_sums.items():
        note = _KEEPS_MASK if calls.loses_mask(sums[path]) else ""
        replaced[path] = f"Add -> {_described(new)}{note}"
    for path, new in news.items():
        replaced[path] = f"{type(layers[path]).__name__} -> {_described(new)}"
    known = {id(news.get(path, slot)): path for path, slot in slots.items()}
    known |= {id(new): path for path, new in new_sums.items()}
    in_copy = {
        path: known[id(layer)] for path, layer in all_paths(copy, _opens) if id(layer) in known
    }
    known = {id(layer): path for path, layer in layers.items()}
    in_model = {path: known[id(layer)] for path, layer in all_paths(model, _opens)}
    averaged = {_first_path(path, in_model) for path in calls.averaged}
    return LipschitzConversion(
        model=copy,
        replaced=replaced,
        kept=_with_large_rows(kept | reasons, {*replaced, *averaged}, certificate, in_copy),
        certificate=certificate,
        advice=tuple(_advice(copy, calls, certificate)),
    )


def _advice(copy: keras.Model, calls: Calls, certificate: Certificate) -> Iterator[str]:
    for tokens in calls.picked_tokens():
        yield _ONE_TOKEN.format("many" if tokens is None else tokens)
    looked_up = any(
        name.startswith("output of Embedding") for name in certificate.threat_model.inputs
    )
    if looked_up and any(
        isinstance(layer, keras.layers.Embedding) and layer.embeddings_constraint is None
        for layer in copy._flatten_layers()
    ):
        yield _LENGTHENED


def _choices(
    dense, attention, lipschitz_bound, norm, branch_weight, token_radius, sequence_length
) -> Choices:
    for name, value, known in (("dense", dense, DENSE), ("attention", attention, ATTENTION)):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {sorted(known)}. Received: {name}={value!r}")
    require_positive("lipschitz_bound", lipschitz_bound)
    require_norm("norm", norm)
    require_positive("token_radius", token_radius, optional=False)
    if not 0.0 < branch_weight < 1.0:
        raise ValueError(
            "`branch_weight` must be strictly between 0 and 1. "
            f"Received: branch_weight={branch_weight}"
        )
    return Choices(
        dense=dense,
        attention=attention,
        lipschitz_bound=lipschitz_bound,
        norm=norm,
        branch_weight=branch_weight,
        token_radius=token_radius,
        sequence_length=sequence_length,
    )


def _opens(layer: Any) -> bool:
    """Whether to replace layers inside of a layer, unless Keras or this package wrote its code."""
    return (
        type(layer) is keras.Sequential
        or is_plain_graph(layer)
        or not type(layer).__module__.startswith(("keras.", "keras_lipattn."))
    )


def _sums_of_graphs(model: keras.Model, prefix: str = "") -> dict[str, Any]:
    """Maps paths to the sums in graphs that are copied call by call, each once."""
    found: dict[str, Any] = {}
    if not is_plain_graph(model):
        return found
    names = sibling_names(model)
    function = function_of(model)
    assert function is not None
    for operation in function._operations:
        if isinstance(operation, keras.Model):
            found |= _sums_of_graphs(operation, f"{prefix}{names[id(operation)]}/")
        elif type(operation) is Add:
            found[prefix + operation.name] = operation
    return {path: one for path, one in found.items() if one is not None}


def _kept_by_user(keep: Collection[str], paths: list[str]) -> dict[str, str]:
    """The paths that `keep` names, and those inside, with the reason."""
    names = [keep] if isinstance(keep, str) else list(keep)
    kept = {}
    for name in names:
        chosen = [path for path in paths if path == name or path.split("/")[-1] == name]
        if not chosen:
            raise ValueError(f"`keep` names no layer of the model. Received: {name!r}")
        inside = [path for path in paths if any(path.startswith(f"{one}/") for one in chosen)]
        kept |= dict.fromkeys([*chosen, *inside], "it is named in `keep`")
    return kept


def _replacements(
    layers: dict[str, Any], kept: Mapping[str, str], calls: Calls, choices: Choices
) -> tuple[dict[str, Any], dict[str, str]]:
    """Maps paths to the new layers, and to the reasons of those that stay."""
    news, reasons = {}, {}
    for path, old in layers.items():
        if path in kept:
            continue
        try:
            new = replacement(old, calls, choices)
        except Kept as reason:
            reasons[path] = str(reason)
        except ValueError as error:
            raise ValueError(
                f"Layer {path!r} cannot be replaced: {error} If it needs the number of tokens, "
                "pass `sequence_length`; or name the layer in `keep`."
            ) from error
        else:
            if new is not None:
                news[path] = new
    return news, reasons


def _with_dtypes(arguments: tuple, known: tuple) -> tuple:
    """The arguments of a call with the dtypes found by the trace, integers for embeddings."""
    return keras.tree.map_structure(
        lambda one, other: keras.KerasTensor(one.shape, other.dtype), arguments, known
    )


def _described(new: Any) -> str:
    layers = new.layers if isinstance(new, keras.Sequential) else [new]
    names = []
    for layer in layers:
        scale = f"({layer.scale:.3g})" if isinstance(layer, keras.layers.Rescaling) else ""
        names.append(type(layer).__name__ + scale)
    return ", ".join(names)


def _with_large_rows(
    reasons: Mapping[str, str],
    changed: Collection[str],
    certificate: Certificate,
    firsts: Mapping[str, str],
) -> dict[str, str]:
    """What was kept: layers with a reason, with their constants, and others with a large one.

    Args:
        reasons: Maps paths to the reasons why layers were kept.
        changed: Paths of what was replaced.
        certificate: The certificate of the new model.
        firsts: Maps paths in the new model, whose generated names differ, to those of `reasons`.
    """
    kept = dict(reasons)
    for row in certificate.rows:
        path = _first_path(re.sub(r":call\d+$", "", row.path), firsts)
        large = not row.is_finite or row.constant > _LARGE
        if not large or row.explained_by or _inside(path, changed):
            continue
        place = next((one for one in reasons if path == one or path.startswith(f"{one}/")), None)
        constant = f"constant {number(row.constant)}"
        if place is None:
            in_code = row.layer == "Add" and path not in firsts.values()
            why = _SUM_IN_CODE if in_code else row.theorem if row.is_finite else row.reason
            kept[path] = f"{row.layer}, {constant}: {why}"
        elif constant not in kept[place]:
            kept[place] += f"; {constant}"
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
