"""From an ordinary model to the same architecture of Lipschitz layers."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import keras
from keras.src.ops.numpy import Add

from keras_lipattn._arguments import require_norm, require_positive
from keras_lipattn.certification import Certificate, certify
from keras_lipattn.certification.keras_models import (
    call_specs,
    function_of,
    names_kept,
    sibling_names,
)
from keras_lipattn.certification.traced_model import TracedModel
from keras_lipattn.conversion.calls import Calls
from keras_lipattn.conversion.conversion_report import (
    LipschitzConversion,
    described,
    kept_with_large_rows,
)
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
    identity,
    merged,
    probabilities,
    replacement,
)
from keras_lipattn.conversion.slots import all_paths, exchange, inner_layers, is_plain_graph

_KEEPS_MASK = ", which passes on the mask that `x + y` loses: later layers leave the padding out"
_LOSS_KEEPS_MASK = ", which passes on the mask: the loss leaves the padding out"
_ONE_TOKEN = (
    "One of {} tokens goes on, as by `x[:, 0]`. It learns little of the others, which reach it "
    "through weighted means: pool all tokens by `Flatten` or `GlobalAveragePooling1D` instead."
)
_LENGTHENED = (
    "Radii are in units of the vectors of the embedding, which training may lengthen: "
    "`embeddings_constraint=keras.constraints.MaxNorm(1.0, axis=1)` limits their length to 1."
)
_ENDS_IN_SOFTMAX = "It ends in a softmax (`{}`), and the losses of this package take logits: {}."
_NO_SOFTMAX = "`logits=True` found no softmax or sigmoid at the end."
_NOT_COMPILED = (
    "It is not compiled: the loss of the original may take probabilities, and it returns logits."
)


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
    logits: bool = False,
    inputs: Any = None,
    **certify_options: Any,
) -> LipschitzConversion:
    """Copies a model with Lipschitz layers in place of those without a (small) constant.

    The new model has the inputs, outputs, names and masks of the original, and a constant of about
    1 where everything could be replaced, before and after training. **It is another function: train
    it.** `convert_attention(model, to="bounded")` is the function that keeps what a trained model
    computes. The original does not change. If it is compiled, so is the new model, with a new
    optimizer, unless `logits=True` left out a softmax or sigmoid that its loss expects.

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
    change, such as an embedding of positions, stays a sum. The activation of the last layer stays
    unless `logits=True` leaves it out. Embeddings, poolings, dropout and everything else of
    constant 1 or less stay too.

    Kernels, biases and embeddings of the original are the first weights of the new layers.
    Attention starts with orthogonal kernels.

    Layers are found wherever Keras finds them: in graphs, nested models, and attributes, lists and
    dictionaries of custom layers and subclassed models. A layer that is used twice stays one layer.
    The code of a custom layer is not changed: a sum `x + y` in it has the constant 2 if both
    branches have 1. Normalizations after it become scales that make up for this, but then radii
    after training are smaller than with a `Residual`. The report lists such sums in `kept`. For
    each, create a `keras.layers.Add()` in `__init__`, and write `self.add([x, y])`.

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
        logits: Whether to leave out a softmax or sigmoid at the end: a layer, an operation of a
            graph, or the `activation` of the last layer. The losses of this package take logits.
            The new model is then not compiled.
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
    >>> classes = keras.layers.Dense(3, "softmax", name="head")(keras.layers.Flatten()(x))
    >>> model = keras.Model(tokens, classes)
    >>> conversion = keras_lipattn.make_lipschitz(model, logits=True)
    >>> conversion.certificate.total <= 1.0 + 1e-6, conversion.kept
    (True, {})
    >>> conversion.replaced["head"]
    'Dense -> OrthogonalDense, without its softmax'
    >>> sorted(set(conversion.replaced.values()))[:2]
    ['Add -> Residual', 'Dense -> OrthogonalDense, MaxMin']
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
    operations = _operations_of_graphs(model)
    kept = _kept_by_user(keep, [*layers, *operations])
    calls = Calls(traced.trace)
    if logits:
        stay = {id(_called((layers | operations)[path])) for path in kept}
        calls.without_activation = {
            id(call.operation): name
            for call in calls.ends()
            if (name := probabilities(call))
            and id(call.operation) not in stay
            and calls.only_ends(call.operation)
        }
    with names_kept():
        new_operations = {}
        for path, operation in operations.items():
            if path in kept:
                continue
            if id(operation) in calls.without_activation:
                new_operations[path] = identity(operation, calls)
            elif type(operation) is Add and (new := merged(operation, calls, choices)):
                new_operations[path] = new
        calls.exchanged = {id(operations[path]) for path in new_operations}
        news, reasons = _replacements(layers, kept, calls, choices)
        substitutes = {id(operations[path]): new for path, new in new_operations.items()}
        copy = copy_model(model, arguments, substitutes)
        added = {id(new) for new in new_operations.values()}
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
    olds = {path: (layers | operations)[path] for path in (*new_operations, *news)}
    without = {
        path: calls.without_activation[id(_called(old))]
        for path, old in olds.items()
        if id(_called(old)) in calls.without_activation
    }
    if not without:
        compile_alike(copy, model)
    certificate = certify(copy, norm, sequence_length, inputs=inputs, **certify_options)
    replaced = {}
    for path, new in (new_operations | news).items():
        replaced[path] = f"{type(olds[path]).__name__} -> {described(new)}"
        if path in without and not isinstance(new, keras.layers.Identity):
            replaced[path] += f", without its {without[path]}"
        if path in new_operations and calls.loses_mask(olds[path]):
            replaced[path] += _LOSS_KEEPS_MASK if path in without else _KEEPS_MASK
    known = {id(news.get(path, slot)): path for path, slot in slots.items()}
    known |= {id(new): path for path, new in new_operations.items()}
    in_copy = {
        path: known[id(layer)] for path, layer in all_paths(copy, _opens) if id(layer) in known
    }
    adds = {
        path
        for path, one in (layers | operations).items()
        if type(one) in (Add, keras.layers.Add) and calls.of(one) and path not in replaced
    }
    return LipschitzConversion(
        model=copy,
        replaced=replaced,
        kept=kept_with_large_rows(kept | reasons, replaced, certificate, in_copy, adds),
        certificate=certificate,
        advice=(
            *_advice(copy, calls, certificate),
            *_advice_on_logits(
                logits, calls, {id(_called(olds[path])) for path in without}, model.compiled
            ),
        ),
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


def _advice_on_logits(
    logits: bool, calls: Calls, without: Collection[int], compiled: bool
) -> Iterator[str]:
    """What to know about a softmax at the end; `without` are the `id`s of those left out."""
    ends = {call.path: call for call in calls.ends() if id(call.operation) not in without}
    left = [path for path, call in ends.items() if probabilities(call) == "softmax"]
    for path in left:
        remedy = "build the model without it" if logits else "pass `logits=True` to leave it out"
        yield _ENDS_IN_SOFTMAX.format(path, remedy)
    if logits and not without and not left:
        yield _NO_SOFTMAX
    if without and compiled:
        yield _NOT_COMPILED


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


def _called(layer: Any) -> Any:
    """The layer or operation whose call is traced: for `TimeDistributed`, the layer inside."""
    return layer.layer if type(layer) is keras.layers.TimeDistributed else layer


def _operations_of_graphs(model: keras.Model, prefix: str = "") -> dict[str, Any]:
    """Maps paths to the operations in graphs that are copied call by call, each once."""
    found: dict[str, Any] = {}
    if not is_plain_graph(model):
        return found
    names = sibling_names(model)
    function = function_of(model)
    assert function is not None
    for operation in function._operations:
        if isinstance(operation, keras.Model):
            found |= _operations_of_graphs(operation, f"{prefix}{names[id(operation)]}/")
        elif not isinstance(operation, keras.layers.Layer):
            found[prefix + operation.name] = operation
    return found


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
