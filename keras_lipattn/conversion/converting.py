"""Replacement of dot-product attention in a trained model by attention with a constant."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_lipattn._arguments import require_positive
from keras_lipattn._seen_calls import specs_of
from keras_lipattn.certification.keras_models import call_specs, function_of, names_kept
from keras_lipattn.conversion.copying import (
    call_symbolically,
    compile_alike,
    convert_classes,
    copy_model,
    copy_state,
)
from keras_lipattn.conversion.slots import attention_slots, exchange
from keras_lipattn.conversion.tied_weights import matching_value, tied_query
from keras_lipattn.layers import BoundedMultiHeadAttention, L2MultiHeadAttention

# Factor of the largest token of the calibration: others may be a little larger.
MARGIN = 1.1
# A radius beyond any token, whose square is still a number in float32.
_NO_BALL = 1e15


@dataclasses.dataclass(frozen=True, eq=False)
class Conversion:
    """A model whose attention was replaced, and the difference of its outputs from the original's.

    Args:
        model: The new model.
        replaced: Paths of the layers that were replaced, such as `"encoder/attention"`, in the
            order in which Keras lists layers.
        kept: Maps the paths of the attention layers that were not replaced to the reasons.
        relative_error: `|new(x) - old(x)| / |old(x)|` at inference, in the 2-norm over all entries
            of all outputs on the given batch; `None` without a batch. It is a measurement on this
            batch, not a bound.
        radii: Maps the paths of layers with bounded tokens to the radii of their balls.
        touching: Maps the same paths to the share of tokens of the given batch that are on or
            outside the ball, for which alone the new layer differs from the old one; empty without
            a batch.

    Example:

    >>> inputs = keras.Input((6, 8))
    >>> attention = keras.layers.MultiHeadAttention(2, 4, name="attention")
    >>> model = keras.Model(inputs, attention(inputs, inputs))
    >>> x = np.random.default_rng(0).normal(size=(16, 6, 8)).astype("float32")
    >>> conversion = keras_lipattn.convert_attention(model, x, to="bounded", calibration=x)
    >>> conversion.replaced, conversion.relative_error < 1e-5, conversion.touching
    (('attention',), True, {'attention': 0.0})
    """

    model: keras.Model
    replaced: tuple[str, ...]
    kept: Mapping[str, str]
    relative_error: float | None
    radii: Mapping[str, float] = dataclasses.field(default_factory=dict)
    touching: Mapping[str, float] = dataclasses.field(default_factory=dict)


def convert_attention(
    model: keras.Model,
    x: Any = None,
    *,
    to: str = "l2",
    calibration: Any = None,
    margin: float = MARGIN,
) -> Conversion:
    """Copies a model with other attention in place of every `keras.layers.MultiHeadAttention`.

    **To bounded tokens**, `to="bounded"`: `BoundedMultiHeadAttention` with equal weights. The
    radius of its ball is that of the largest token that the layer gets on the batch `calibration`,
    times `margin`. As long as tokens stay inside the ball the outputs are the same, up to rounding.
    The certificate is finite for all inputs, and it is proportional to about the square of the
    radius: penalties, caps and fine-tuning bring it down from there. Cross-attention is converted
    too. Queries that see no key, and padded ones, are the exceptions: the fused path of Keras
    averages over all keys there, and the new layer returns the output bias, or zero.

    **To distances**, `to="l2"`: `L2MultiHeadAttention`, which needs no ball. What follows is about
    this conversion. Dot-product attention has no Lipschitz constant. L2 attention has one, but it
    cannot represent the same functions, since one kernel projects both queries and keys. The
    weights of the copy approximate the original. They are a start for fine-tuning, on data or on
    the outputs of the original. Before that the outputs may differ considerably; `relative_error`
    measures this.

    - The query kernel approximates the positive part of the symmetric part of `W_Q W_K^T`. The term
      `-|y_j|^2` is added to the scores, so tokens far from the origin get less weight. The query
      and key biases are dropped.
    - The value kernel is a least-squares solution for `W_V W_O` of each head. The part of `W_V`
      outside the range of the query kernel is lost.
    - The output kernel is copied. The value bias is added to the output bias, which is exact except
      for dropout in training.
    - Every token attends to itself, and the outputs of padded tokens are zero.

    Attention is found wherever Keras finds layers: in the graph of a model, in nested models, and
    in attributes, lists and dictionaries of custom layers and subclassed models. A layer that is
    used in two places stays one layer. All other layers, names, masks and states are copied bit for
    bit. If the original is compiled, the copy is compiled with a new optimizer.

    An attention layer is not replaced, with the reason in `Conversion.kept`, if the model calls it
    with a value or key other than the query (cross-attention), if the model does not call it at
    inference, if it has a gate, if it is quantized, or if it is an instance of a subclass.

    Args:
        model: A built model. It does not change. The copy is made from its configuration, so it
            must be a model that Keras can save.
        x: A batch of inputs to measure the error on, in the structure that `model` is called on.
            For `to="bounded"` it should be another one than `calibration`.
            Subclassed models with integer inputs need it, unless an earlier `fit` had a
            `LipschitzMonitor`: Keras records the shapes of inputs but not their dtypes.

        to: `"l2"` or `"bounded"`.
        calibration: For `to="bounded"`, a batch of typical inputs, in the structure of `x`.
        margin: For `to="bounded"`, the factor of the largest token.

    Returns:
        A `Conversion` with the new model, the replaced and kept layers and the relative error on
        `x`. Layers and models that create attention in their own code get a class derived from
        theirs and from `Converted`, which saves and loads them.

    Raises:
        ValueError: If an argument is out of range, or `model` is not a built model, cannot be
            created from its configuration, or cannot be called on the known shapes and dtypes of
            its inputs.

    Example:

    >>> inputs = keras.Input((6, 8))
    >>> outputs = keras.layers.MultiHeadAttention(num_heads=2, key_dim=4)(inputs, inputs)
    >>> model = keras.Model(inputs, outputs)
    >>> x = np.random.default_rng(0).normal(size=(16, 6, 8)).astype("float32")
    >>> conversion = keras_lipattn.convert_attention(model, x)
    >>> len(conversion.replaced), conversion.kept
    (1, {})
    >>> conversion.model.compile("adam", "mse")
    >>> history = conversion.model.fit(x, model.predict(x, verbose=0), verbose=0)
    >>> keras_lipattn.certify(conversion.model).is_finite
    True
    >>> bounded = keras_lipattn.convert_attention(model, x[8:], to="bounded", calibration=x[:8])
    >>> bounded.relative_error < 1e-5 or max(bounded.touching.values()) > 0.0
    True
    >>> keras_lipattn.certify(bounded.model).is_finite
    True
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(f"`model` must be a built `keras.Model`. Received: model={model!r}")
    bounded = _is_bounded(to, calibration, margin)
    if x is None and bounded:
        # Shapes and dtypes alone.
        specs = calibration
    else:
        specs = x
    arguments = _arguments(model, specs)
    olds = attention_slots(model)
    with names_kept():
        copy = copy_model(model, arguments)
        pairs = list(zip(model._flatten_layers(), copy._flatten_layers(), strict=True))
        # The names that Keras generates differ in the copy. The order is the same.
        slots = dict(zip(olds, attention_slots(copy).values(), strict=True))
        reasons = _reasons_to_keep(copy, olds, slots, arguments, cross=bounded)
        replacement = _bounded_replacement if bounded else _replacement
        news = {path: replacement(olds[path]) for path in slots if reasons.get(path) == ""}
        exchange(copy, {id(slots[path]): new for path, new in news.items()})
        convert_classes(copy, list(news.values()), [olds[path] for path in news])
        call_symbolically(copy, arguments)
    gone = {id(inner) for path in news for inner in slots[path]._flatten_layers()}
    for old, new in pairs:
        if id(new) not in gone:
            copy_state(old, new)
    radii, touching = {}, {}
    for path, new in news.items():
        if bounded:
            _assign_weights(olds[path], new)
        else:
            _assign_approximation(olds[path], new)
    if bounded:
        largest = {path: size.max() for path, size in _token_sizes(copy, news, calibration).items()}
        for path, new in news.items():
            # A layer that gets zeros alone needs some ball.
            new.token_radius = radii[path] = float(margin * largest[path]) or 1.0
        if x is not None:
            sizes = _token_sizes(copy, news, x)
            touching = {p: float(np.mean(sizes[p] >= radii[p])) for p in news}
    compile_alike(copy, model)
    return Conversion(
        model=copy,
        replaced=tuple(news),
        kept={path: reason for path, reason in reasons.items() if reason},
        relative_error=None if x is None else _relative_error(model, copy, x),
        radii=radii,
        touching=touching,
    )


def _is_bounded(to: str, calibration: Any, margin: float) -> bool:
    """Whether to convert to bounded tokens; the arguments must fit."""
    if to not in ("l2", "bounded"):
        raise ValueError(f'`to` must be "l2" or "bounded". Received: to={to!r}')
    if to == "l2":
        if calibration is not None:
            raise ValueError(
                '`calibration` is for `to="bounded"`: attention by distance needs no ball. '
                f"Received: to={to!r} and a calibration"
            )
        return False
    if calibration is None:
        raise ValueError(
            '`to="bounded"` needs `calibration`, a batch of inputs from which the radii of the '
            "balls are taken. Received: calibration=None"
        )
    require_positive("margin", margin, optional=False)
    if margin < 1.0:
        raise ValueError(f"`margin` must be at least 1. Received: margin={margin}")
    return True


def _arguments(model: keras.Model, x: Any) -> tuple:
    """The positional arguments of a call of `model`, as symbolic tensors."""
    function = function_of(model)
    if function is not None:
        return (keras.tree.map_structure(lambda tensor: tensor, function._inputs_struct),)
    if x is not None:
        return specs_of((keras.tree.map_structure(keras.ops.convert_to_tensor, x),))
    return call_specs(model)[0]


def _reasons_to_keep(
    copy: keras.Model,
    olds: dict[str, Any],
    slots: dict[str, Any],
    arguments: tuple,
    *,
    cross: bool,
) -> dict[str, str]:
    """Reasons not to replace each dot-product attention layer; empty if it can be replaced.

    Args:
        copy: The copy of the model. It is called.
        olds: Attention layers of the model.
        slots: Attention layers of the copy, by the same paths.
        arguments: Arguments of the call.
        cross: Whether cross-attention can be replaced.
    """
    calls: dict[int, list[str]] = {id(layer): [] for layer in slots.values()}
    plain = [layer for layer in slots.values() if type(layer) is keras.layers.MultiHeadAttention]

    class Recording(keras.layers.MultiHeadAttention):
        # Checked before Keras converts arguments, which may turn one tensor into two.
        def __call__(self, query, value, key=None, *args, **kwargs):
            calls[id(self)].append("" if cross else _cross_attention(query, value, key))
            return super().__call__(query, value, key, *args, **kwargs)

    try:
        for layer in plain:
            layer.__class__ = Recording
        call_symbolically(copy, arguments)
    finally:
        for layer in plain:
            layer.__class__ = keras.layers.MultiHeadAttention
    return {
        path: _reason(old, calls[id(slots[path])])
        for path, old in olds.items()
        if isinstance(old, keras.layers.MultiHeadAttention)
    }


def _cross_attention(query: Any, value: Any, key: Any) -> str:
    for name, tensor in (("value", value), ("key", key)):
        if tensor is not None and tensor is not query:
            return (
                f"it is called with a {name} other than the query (cross-attention), which has no "
                "Lipschitz bound"
            )
    return ""


def _reason(layer: Any, calls: list[str]) -> str:
    if type(layer) is not keras.layers.MultiHeadAttention:
        return f"it is an instance of the subclass {type(layer).__name__}, whose code is unknown"
    if layer.get_config()["use_gate"]:
        return "it has a gate, and a product with a gate has no Lipschitz bound"
    if not calls:
        return "the model does not call it at inference, so its keys are unknown"
    for dense in (layer.query_dense, layer.key_dense, layer.value_dense, layer.output_dense):
        if dense.quantization_mode is not None:
            return f"it is quantized: {dense.name!r} has dtype {dense.dtype_policy.name!r}"
    return next((call for call in calls if call), "")


def _replacement(old: keras.layers.MultiHeadAttention) -> L2MultiHeadAttention:
    """L2 attention with the arguments of `old` and new weights."""
    config = old.get_config()
    del config["use_gate"]
    new = L2MultiHeadAttention.from_config(config)
    shapes = old.get_build_config() or {}
    new.build(shapes["shapes_dict"]["query_shape"])
    return new


def _bounded_replacement(old: keras.layers.MultiHeadAttention) -> BoundedMultiHeadAttention:
    """Attention on bounded tokens with the arguments of `old`; its radius is set later."""
    config = old.get_config()
    del config["use_gate"]
    # Keras leaves it out of the configuration.
    config["flash_attention"] = old._flash_attention
    new = BoundedMultiHeadAttention.from_config(config)
    new.build(**old.get_build_config()["shapes_dict"])
    # Nothing is projected before the radius is known.
    new.token_radius = _NO_BALL
    return new


def _assign_weights(old: keras.layers.MultiHeadAttention, new: BoundedMultiHeadAttention) -> None:
    for name in ("query", "key", "value", "output"):
        dense = getattr(old, f"{name}_dense")
        getattr(new, f"{name}_kernel").assign(dense.kernel)
        if old.use_bias:
            getattr(new, f"{name}_bias").assign(dense.bias)


def _token_sizes(model: keras.Model, news: dict[str, Any], x: Any) -> dict[str, np.ndarray]:
    """Norms of the tokens that each of the layers gets as query, value or key."""
    found: dict[int, list[np.ndarray]] = {id(layer): [] for layer in news.values()}

    class Measuring(BoundedMultiHeadAttention):
        def __call__(self, query, value=None, key=None, *args, **kwargs):
            different = {id(one): one for one in (query, value, key) if one is not None}
            for tensor in different.values():
                tokens = keras.ops.convert_to_numpy(tensor).astype(np.float64)
                found[id(self)].append(np.linalg.norm(tokens, axis=-1).ravel())
            return super().__call__(query, value, key, *args, **kwargs)

    try:
        for layer in news.values():
            layer.__class__ = Measuring
        model(x, training=False)
    finally:
        for layer in news.values():
            layer.__class__ = BoundedMultiHeadAttention
    return {path: np.concatenate(found[id(layer)]) for path, layer in news.items()}


def _assign_approximation(old: keras.layers.MultiHeadAttention, new: Any) -> None:
    """Assigns weights to the new layer that approximate the old one."""

    def heads(dense):
        kernel = keras.ops.convert_to_numpy(dense.kernel).astype(np.float64)
        return kernel.transpose(1, 0, 2)

    tied = tied_query(heads(old.query_dense), heads(old.key_dense))
    value = matching_value(tied, heads(old.value_dense))
    new.query_kernel.assign(tied.transpose(1, 0, 2))
    new.value_kernel.assign(value.transpose(1, 0, 2))
    new.output_kernel.assign(old.output_dense.kernel)
    if old.use_bias:
        # The rows of the attention weights sum to one.
        constant = keras.ops.tensordot(old.value_dense.bias, old.output_dense.kernel, 2)
        new.output_bias.assign(old.output_dense.bias + constant)


def _relative_error(old: keras.Model, new: keras.Model, x: Any) -> float:
    before, after = (
        np.concatenate([_entries(leaf) for leaf in keras.tree.flatten(model(x, training=False))])
        for model in (old, new)
    )
    # If all outputs are zero, the error is 0 or a huge number.
    return float(np.linalg.norm(after - before) / max(np.linalg.norm(before), 1e-300))


def _entries(tensor: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(tensor).astype(np.float64).ravel()
