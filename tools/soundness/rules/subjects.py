"""A random model around one case, from a seed and an index."""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from tools.soundness.rules import calls
from tools.soundness.rules.calls import Style, Target, draw
from tools.soundness.rules.cases import ABSENT, RuleCase, all_cases, schedule

# Number of attacked examples, and size of the batch that tests the independence of examples.
POINTS, BATCH = 6, 3
# Factor of the second input of a gate, so that the value of the other factor determines the slope.
STEEP = 100.0


class Illegal(Exception):
    """Keras does not take this combination of arguments."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A certified tensor: a floating input, or the output of an embedding.

    Args:
        name: of the input of the model.
        shape: of one example.
        embedding: the layer whose output is certified, `None` for an input.
        steep: whether it is the second input of a gate, which is attacked near 0.
    """

    name: str
    shape: tuple[int, ...]
    embedding: Any = None
    steep: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class RuleSubject:
    """A model around one case with what is needed to certify and attack it.

    Args:
        text: what it is, for reports.
        case: name of the case.
        model: the model, float64 where TensorFlow can.
        options: arguments of `certify`, without the norm.
        sources: the certified tensors.
        points: values of the sources, `(POINTS, size)`, side by side.
        fixed: values of integer and boolean inputs by name, `(POINTS, ...)`.
        masked: whether a mask is computed from the values of the input: zero tokens stay zero.
        tolerance: relative, of the dtype.
        shortens: whether shorter sequences are covered.
    """

    text: str
    case: str
    model: keras.Model
    options: dict[str, Any]
    sources: tuple[Source, ...]
    points: np.ndarray
    fixed: dict[str, np.ndarray]
    masked: bool
    tolerance: float
    shortens: bool

    def run(
        self,
        points: Any,
        examples: np.ndarray,
        *,
        model: Any = None,
        length: int | None = None,
        training: bool | None = False,
    ) -> list:
        """Outputs of the model, or of another one with the same inputs.

        Args:
            points: values of the sources, `(n, size)`; may be a tensor that is differentiated.
            examples: which of the fixed values belong to each, `(n,)`.
            model: the model to run.
            length: length of all sequences if it is not that of the sources.
            training: passed to the model; `None` leaves it to what its graph recorded.
        """
        model = self.model if model is None else model
        feeds, values, start = {}, {}, 0
        for source in self.sources:
            shape = source.shape if length is None else (length, *source.shape[1:])
            size = int(np.prod(shape))
            part = ops.reshape(points[:, start : start + size], (-1, *shape))
            start += size
            if source.embedding is not None:
                values[id(source.embedding)] = part
            else:
                feeds[source.name] = part
        for name, array in self.fixed.items():
            feeds[name] = ops.convert_to_tensor(array[examples][:, :length])
        if len(feeds) == 1:
            given: Any = next(iter(feeds.values()))
        elif isinstance(model.input, dict):
            given = feeds
        else:
            given = [feeds[tensor.name] for tensor in model.inputs]
        with _embedded(self, values):
            return keras.tree.flatten(model(given, training=training))


def rule_subject(seed: int, index: int) -> RuleSubject:
    """Subject number `index` of this seed; the cases take turns.

    Raises:
        Illegal: if Keras does not take the arguments that were drawn.
    """
    before, floats = keras.config.dtype_policy(), keras.config.floatx()
    with warnings.catch_warnings():
        # Layers that do not support masks warn when they get one.
        warnings.simplefilter("ignore")
        try:
            return _Builder(seed, index).subject()
        finally:
            keras.config.set_floatx(floats)
            keras.config.set_dtype_policy(before)


def plain_model(case: RuleCase) -> keras.Model:
    """The case in a Functional model, with the first choice of every argument."""
    before, floats = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx(case.dtype)
    keras.config.set_dtype_policy(case.dtype)
    try:
        shape = case.shapes[0]
        several = isinstance(shape[0], tuple)
        shapes = list(shape) if several else [shape] * (1 if case.alike else len(case.tensors))
        dtype = "int32" if case.integers else case.dtype
        inputs = [keras.Input(one, dtype=dtype) for one in shapes]
        firsts = [
            {name: choices[0] for name, choices in options.items() if choices[0] is not ABSENT}
            for options in (case.config, case.arguments)
        ]
        style = Style(positional=1, training=ABSENT, backwards=False)
        target = Target(case, firsts[0], firsts[1], style)
        tensors = inputs * (len(case.tensors) if case.alike else 1)
        return keras.Model(inputs, target(tensors, {}))
    finally:
        keras.config.set_floatx(floats)
        keras.config.set_dtype_policy(before)


class _Builder:
    def __init__(self, seed: int, index: int):
        positions = schedule()
        self.rng = np.random.default_rng((seed, index))
        self.case = all_cases()[positions[index % len(positions)]]
        self.notes: list[str] = []
        self.inputs: dict[str, Any] = {}
        self.sources: list[Source] = []
        self.options: dict[str, Any] = {}
        self.masked = False
        self.probe: Any = None
        keras.utils.set_random_seed(int(self.rng.integers(2**31)))
        keras.config.set_floatx(self.case.dtype)
        keras.config.set_dtype_policy(self.case.dtype)

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, options):
        return options[self.rng.integers(len(options))]

    def subject(self) -> RuleSubject:
        try:
            model, shapes = self.build()
        except _KERAS_ERRORS as error:
            raise Illegal(f"{'; '.join(self.notes)}: {first_line(error)}") from error
        randomize(model, self.rng)
        points = self.points()
        fixed = self.fixed_values(shapes)
        self.zero_tokens(points, fixed)
        subject = RuleSubject(
            text="; ".join(self.notes),
            case=self.case.name,
            model=model,
            options=self.options,
            sources=tuple(self.sources),
            points=points,
            fixed=fixed,
            masked=self.masked,
            tolerance=1e-6 if self.case.dtype == "float64" else 1e-3,
            shortens="sequence_length" in self.options,
        )
        if self.probe is not None:
            self.shift(subject)
        return subject

    def shift(self, subject: RuleSubject) -> None:
        """Shifts the factor of a gate to 0 at one example, so that its radius matters."""
        linear = keras.Model(subject.model.input, self.probe.output)
        try:
            (value,) = subject.run(subject.points[:1], np.arange(1), model=linear)
        except Exception as error:
            raise Illegal(f"{subject.text}: {first_line(error)}") from error
        value = np.asarray(value).reshape(-1, self.probe.units)
        if not len(value):
            raise Illegal(f"{subject.text}: it has no entries")
        self.probe.bias.assign_sub(value[self.rng.integers(len(value))])

    # The model --------------------------------------------------------------------------------

    def build(self) -> tuple[keras.Model, dict[str, tuple]]:
        case, rng = self.case, self.rng
        style = Style(
            positional=int(rng.integers(0, 7)),
            training=self.pick([ABSENT] * 6 + [False, False, None, True]),
            backwards=self.chance(0.3),
        )
        self.target = Target(case, draw(rng, case.config), draw(rng, case.arguments), style)
        self.notes.append(str(self.target))
        shape = self.pick(case.shapes)
        count = len(case.tensors)
        shapes = list(shape) if isinstance(shape[0], tuple) else [shape] * count
        self.route = self.pick(self.routes(shapes))
        self.notes.append(f"shapes {shapes}, {self.route}")
        if self.route == "time_distributed":
            shapes = [(2, *one) for one in shapes]
        first = {one[0] for one in shapes}
        self.length = None
        if len(first) == 1 and len(shapes[0]) > 1 and not case.integers and self.chance(0.15):
            self.length = shapes[0][0]
            self.options["sequence_length"] = self.length
            self.notes.append(f"length unknown, sequence_length={self.length}")
        if self.chance(0.35):
            self.options["input_radius"] = float(rng.choice([0.5, 1.0, 3.0]))
            self.notes.append(f"input_radius={self.options['input_radius']}")
        self.mask = self.pick(self.mask_ways(shapes))
        if self.mask != "none":
            self.notes.append(f"mask: {self.mask}")
        tensors = self.tensors(shapes)
        alike = all(tensor is tensors[0] for tensor in tensors)
        # If one tensor is passed several times, inner models take one input for it.
        once = alike and (case.alike or self.chance(0.7))
        outputs = self.routed(tensors[:1] if once else tensors)
        outputs = self.consumed(outputs, tensors)
        return self.top(outputs)

    def routes(self, shapes) -> list[str]:
        case = self.case
        routes = ["functional"] * 3 + ["nested", "nested", "subclassed", "custom"]
        routes += ["custom_in_custom", "nested_dict"]
        if len(case.tensors) == 1 and case.is_layer:
            routes += ["custom_build"]
        if case.masks:
            routes += ["custom_mask", "subclassed_mask"]
        if case.integers:
            return [route for route in routes if route != "nested_dict"]
        routes += ["shared", "nested_twice"]
        if len(case.tensors) == 1:
            routes += ["time_distributed"]
            if case.is_layer and not self.target.arguments:
                routes += ["sequential", "sequential"]
            if not case.is_layer:
                routes += ["lambda"]
        return routes

    def mask_ways(self, shapes) -> list[str]:
        case, route = self.case, self.route
        if case.integers or self.case.target is layers.Masking or len(shapes[0]) != 2:
            return ["given"] if case.masks and route in ("functional", "nested") else ["none"]
        ways = ["none"] * (1 if case.masks else 4)
        ways += ["Masking", "set_keras_mask", "Embedding"]
        if route in ("nested", "sequential", "nested_twice"):
            ways += ["mask argument of the model"]
        if case.masks and route in ("functional", "nested", "shared"):
            ways += ["given", "given", "constant", "from integers"]
        return ways

    def source(self, shape, *, steep=False, name="x") -> Any:
        name = f"{name}{len(self.inputs)}"
        sizes = shape
        if self.length is not None and not steep:
            sizes = (None, *shape[1:])
        tensor = keras.Input(sizes, name=name, dtype=self.case.dtype)
        self.inputs[name] = tensor
        self.sources.append(Source(name, tuple(shape), steep=steep))
        return tensor

    def boolean(self, shape) -> Any:
        name = f"visible{len(self.inputs)}"
        sizes = (None,) if self.length is not None else shape[:1]
        self.inputs[name] = keras.Input(sizes, name=name, dtype="bool")
        return self.inputs[name]

    def integer(self, shape, name="ids") -> Any:
        name = f"{name}{len(self.inputs)}"
        sizes = (None,) if self.length is not None else shape[:1]
        self.inputs[name] = keras.Input(sizes, name=name, dtype="int32")
        return self.inputs[name]

    def tensors(self, shapes) -> list[Any]:
        case = self.case
        if case.integers:
            tensor = self.integer(shapes[0])
            shape = (*shapes[0], self.target.config["output_dim"])
            self.sources.append(Source(tensor.name, shape, embedding=self.target.layer))
            return [tensor]
        tensors = []
        # Query, value and key are one tensor.
        same = case.alike or self.chance(0.8 if "query" in case.tensors else 0.3)
        for position, shape in enumerate(shapes):
            relation = "input" if not tensors else self.pick(["same", "affine", "input"])
            if tensors and (relation == "same" or same) and shape == shapes[0]:
                tensors.append(tensors[0])
                continue
            if relation == "affine" and shape == shapes[0]:
                tensors.append(layers.Dense(shape[-1])(self.start))
                self.notes.append(f"tensor {position}: Dense of the first")
                continue
            tensor = self.masked_source(shape) if not tensors else self.source(shape)
            if not tensors:
                self.start = tensor
            tensors.append(self.bounded(tensor))
        return tensors

    def masked_source(self, shape) -> Any:
        if self.mask == "Embedding":
            ids = self.integer(shape)
            embedding = layers.Embedding(shape[0] + 1, shape[1], mask_zero=True)
            self.sources.append(Source(ids.name, shape, embedding=embedding))
            return embedding(ids)
        tensor = self.source(shape)
        if self.mask == "Masking":
            self.masked = True
            self.options["assume_fixed_mask"] = True
            return layers.Masking()(tensor)
        if self.mask == "set_keras_mask":
            return calls.SetMask()(tensor, self.boolean(shape))
        return tensor

    def bounded(self, x) -> Any:
        """The tensor, or a tensor of known range computed from it."""
        kinds = ["none"] * 5 + list(_BOUNDING)
        if self.mask in ("Masking", "set_keras_mask", "Embedding"):
            # Its masks have another shape.
            kinds.remove("softmax")
        kind = self.pick(kinds)
        if kind == "none":
            return x
        self.notes.append(f"after {kind}")
        return _BOUNDING[kind](x)

    # Ways of calling ----------------------------------------------------------------------------

    def masks(self, tensors) -> dict[str, Any]:
        """Masks that are passed to the call."""
        shape = tensors[0].shape[1:]
        if self.mask not in ("given", "constant", "from integers"):
            return {}
        chosen = [name for name in self.case.masks if self.chance(0.7)] or [self.case.masks[0]]
        self.notes.append(f"masks {chosen}")
        masks = {}
        for name in chosen:
            if self.mask == "constant":
                length = self.length or shape[0]
                masks[name] = np.arange(length)[None] % 2 == 0
            elif self.mask == "from integers":
                masks[name] = ops.not_equal(self.integer(shape), 0)
            else:
                masks[name] = self.boolean(shape)
        return masks

    def routed(self, tensors) -> list[Any]:
        target, route = self.target, self.route
        masks = self.masks(tensors)
        if route == "functional":
            return _flat(target(tensors, masks))
        if route == "shared":
            other = [0.5 * tensor for tensor in tensors]
            return [*_flat(target(tensors, masks)), *_flat(target(other, masks))]
        if route == "lambda":
            return _flat(layers.Lambda(lambda x: target([x], {}))(tensors[0]))
        if route == "time_distributed":
            plain = target.case.is_layer and not target.arguments and not target.case.listed
            inner = target.layer if plain else calls.CustomWithShape(target)
            return _flat(layers.TimeDistributed(inner)(tensors[0]))
        if route == "sequential":
            size = tensors[0].shape[1:]
            begin = [keras.Input(size)] if self.chance(0.5) else []
            inner = keras.Sequential([*begin, target.layer])
            return _flat(inner(tensors[0], **self.model_arguments(tensors)))
        if route == "nested_dict":
            return self.nested_dict(tensors)
        if route in ("nested", "nested_twice"):
            return self.nested(tensors, masks)
        holder = {
            "custom": calls.Custom,
            "custom_build": calls.CustomWithBuild,
            "custom_in_custom": calls.CustomInCustom,
            "custom_mask": calls.CustomWithMask,
            "subclassed": calls.SubclassedModel,
            "subclassed_mask": calls.SubclassedWithMask,
        }[route](target)
        return _flat(holder(*tensors))

    def model_arguments(self, tensors) -> dict[str, Any]:
        arguments = {}
        if self.mask == "mask argument of the model":
            visible = self.boolean(tensors[0].shape[1:])
            arguments["mask"] = [visible] + [None] * (len(tensors) - 1)
            if len(tensors) == 1:
                arguments["mask"] = visible
        if self.chance(0.2):
            arguments["training"] = self.pick([False, False, True])
            self.notes.append(f"the model is called with training={arguments['training']}")
        return arguments

    def nested(self, tensors, masks) -> list[Any]:
        names = list(masks)
        given = [*tensors, *(masks[name] for name in names if _is_symbolic(masks[name]))]
        symbols = [keras.Input(batch_shape=one.shape, dtype=one.dtype) for one in given]
        inside = dict(masks)
        inside.update(
            zip(
                [name for name in names if _is_symbolic(masks[name])],
                symbols[len(tensors) :],
                strict=True,
            )
        )
        outputs = self.target(symbols[: len(tensors)], inside)
        inner = keras.Model(symbols if len(symbols) > 1 else symbols[0], outputs)
        arguments = self.model_arguments(tensors) if len(given) == len(tensors) else {}
        called = given if len(given) > 1 else given[0]
        first = _flat(inner(inputs=called) if self.chance(0.2) else inner(called, **arguments))
        if self.route == "nested":
            return first
        if len(given) == 1 and first[0].shape == given[0].shape and len(first) == 1:
            self.notes.append("inner(inner(x))")
            return _flat(inner(first[0], **arguments))
        self.notes.append("[inner(x), inner(x / 2)]")
        halved = [0.5 * one if one.dtype != "bool" else one for one in given]
        return [*first, *_flat(inner(halved if len(halved) > 1 else halved[0]))]

    def nested_dict(self, tensors) -> list[Any]:
        """An inner model whose inputs are matched by name."""
        extra = 0.01 * tensors[0]
        given = [*tensors, extra]
        order = self.rng.permutation(len(given))
        names = [f"k{number}" for number in order]
        symbols = [
            keras.Input(batch_shape=one.shape, dtype=one.dtype, name=f"k{number}_{self.pick('ab')}")
            if self.chance(0.0)
            else keras.Input(batch_shape=one.shape, dtype=one.dtype, name=name)
            for number, (one, name) in enumerate(zip(given, names, strict=True))
        ]
        outputs = [*_flat(self.target(symbols[: len(tensors)], {})), 0.5 * symbols[-1]]
        keys = [f"a{number}" for number in self.rng.permutation(len(given))]
        way = self.pick(["by key", "by name", "list of names"])
        self.notes.append(f"dict input, {way}")
        if way == "by key":
            inner = keras.Model(dict(zip(keys, symbols, strict=True)), outputs)
            called = dict(zip(keys, given, strict=True))
        elif way == "by name":
            inner = keras.Model(dict(zip(names, symbols, strict=True)), outputs)
            called = dict(zip(names, given, strict=True))
        else:
            inner = keras.Model(symbols, outputs)
            called = dict(zip(names, given, strict=True))
        if self.chance(0.5):
            called = dict(reversed(called.items()))
        return _flat(inner(called))[:-1]

    # Layers after the call ------------------------------------------------------------------------

    def consumed(self, outputs, tensors) -> list[Any]:
        if not outputs:
            raise ValueError("no output")
        outputs = [
            ops.cast(one, self.case.dtype) if "float" not in str(one.dtype) else one
            for one in outputs
        ]
        if any(str(one.dtype) != self.case.dtype for one in outputs):
            outputs = [ops.cast(one, self.case.dtype) for one in outputs]
        y = outputs[0]
        rank = len(y.shape)
        known = None not in y.shape[1:] and y.shape[0] is None
        kinds = ["none"] * 3 + ["all"]
        if rank > 1:
            kinds += ["square", "product", "gate_self", "exp", "affine", "softmax"]
            if known:
                kinds += ["gate"] * 4 + ["gate_dense"] * 3
                if y.shape[1:] == tensors[0].shape[1:]:
                    kinds += ["add"]
        if rank == 3 and y.shape[-1] is not None:
            kinds += ["attention"] * 3 + ["matmul"]
        kind = self.pick(kinds)
        if kind == "all":
            return outputs
        if kind != "none":
            self.notes.append(f"into {kind}")
        if kind == "gate_dense":
            # The range of a linear map depends on radius and center.
            linear = layers.Dense(2)
            y = linear(y)
            self.probe = linear if self.chance(0.7) else None
        if kind in ("gate", "gate_dense"):
            z = self.source(tuple(y.shape[1:]), steep=True, name="z")
            steep = ops.tanh(STEEP * z)
            return [layers.Multiply()([y, steep]) if self.chance(0.5) else y * steep]
        if kind == "add":
            return [layers.Add()([y, tensors[0]])]
        return [_CONSUMERS[kind](y)]

    def top(self, outputs) -> tuple[keras.Model, dict[str, tuple]]:
        inputs = self.inputs
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in inputs.items()}
        structure: Any = list(inputs.values())
        outputs = outputs if len(outputs) > 1 else outputs[0]
        if len(structure) == 1:
            structure = structure[0]
        elif self.chance(0.3):
            structure = dict(inputs)
            self.notes.append("dict inputs")
        model = keras.Model(structure, outputs)
        sizes = [tensor.shape for tensor in _flat(outputs)]
        known = [int(np.prod([size or 8 for size in shape[1:]])) for shape in sizes]
        if sum(known) > 400:
            raise ValueError("too large to attack")
        if len(inputs) == 1 and self.sources[0].embedding is None and self.chance(0.1):
            self.notes.append("inside a subclassed model")
            self.probe = None
            outer = calls.Outer(model)
            size = [1, *(size or self.length for size in shapes[self.sources[0].name])]
            outer(np.zeros(size, self.case.dtype))
            return outer, shapes
        return model, shapes

    # Values -------------------------------------------------------------------------------------

    def points(self) -> np.ndarray:
        """Random and structured values of the sources, concatenated."""
        parts = []
        for source in self.sources:
            if source.steep:
                values = self.rng.normal(size=(POINTS, *source.shape)) * 1e-4
                values[: POINTS // 2] = 0.0
                parts.append(values)
                continue
            values = self.rng.normal(size=(POINTS, *source.shape))
            values[1] *= 10.0 ** self.rng.uniform(-2.0, 1.0)
            values[2] = structured(self.rng, source.shape)
            values[3] = structured(self.rng, source.shape)
            values[4] = 1e-3 * values[4] + self.rng.normal()
            parts.append(values)
        return np.concatenate([part.reshape(POINTS, -1) for part in parts], axis=1)

    def fixed_values(self, shapes) -> dict[str, np.ndarray]:
        fixed = {}
        for name, shape in shapes.items():
            sizes = [int(size or self.length or 1) for size in shape]
            if name.startswith("ids"):
                fixed[name] = self.rng.integers(0, 3, size=(POINTS, *sizes)).astype("int32")
                fixed[name][0] = 1
                if self.chance(0.3):
                    fixed[name][1] = 0
            elif name.startswith("visible"):
                fixed[name] = self.rng.random((POINTS, *sizes)) < 0.6
                fixed[name][0] = True
                if self.chance(0.3):
                    fixed[name][1] = False
        return fixed

    def zero_tokens(self, points, fixed) -> None:
        """Sets some tokens to zero where a mask is computed from the values."""
        if not self.masked:
            return
        source = self.sources[0]
        size = int(np.prod(source.shape))
        values = points[:, :size].reshape(POINTS, *source.shape)
        hidden = self.rng.random((POINTS, source.shape[0])) < 0.4
        hidden[0] = False
        hidden[1] |= self.chance(0.3)
        values[hidden] = 0.0
        points[:, :size] = values.reshape(POINTS, size)


_KERAS_ERRORS = (Exception,)

_BOUNDING: dict[str, Callable] = {
    "LayerNormalization": lambda x: layers.LayerNormalization(epsilon=0.1)(x),
    "tanh": lambda x: layers.Activation("tanh")(x),
    "sigmoid": lambda x: layers.Activation("sigmoid")(x),
    "UnitNormalization": lambda x: layers.UnitNormalization()(x),
    "clip": lambda x: ops.clip(x, -1.0, 2.0),
    "softmax": lambda x: layers.Softmax()(x),
    # Tokens far from the origin: zeros of padding and masks are outside of their ball.
    "0.1 tanh + 5": lambda x: layers.Rescaling(0.1, 5.0)(layers.Activation("tanh")(x)),
    "Dense(tanh)": lambda x: layers.Dense(x.shape[-1], activation="tanh")(x),
}

_CONSUMERS: dict[str, Callable] = {
    "none": lambda y: y,
    "square": lambda y: ops.square(y),
    "product": lambda y: y * layers.Activation("sigmoid")(y),
    "gate_self": lambda y: layers.Multiply()([y, ops.tanh(3.0 * y + 1.0)]),
    "exp": lambda y: ops.exp(y),
    "affine": lambda y: layers.Rescaling(2.0, 1.0)(layers.Dense(2)(y)),
    "softmax": lambda y: layers.Softmax()(y),
    "attention": lambda y: layers.MultiHeadAttention(1, 2)(y, y),
    "matmul": lambda y: ops.matmul(y, ops.swapaxes(y, 1, 2)),
}


def structured(rng, shape) -> np.ndarray:
    """Zeros, one value, one entry, two clusters, one large token, or almost equal entries."""
    kind = rng.integers(7)
    value = np.zeros(shape)
    scale = 10.0 ** rng.uniform(-1.0, 1.5)
    if kind == 1:
        value[:] = scale
    elif kind == 2:
        value.reshape(-1)[rng.integers(value.size)] = scale
    elif kind == 3:
        direction = rng.normal(size=shape[-1:])
        signs = np.where(np.arange(value.size // shape[-1]) % 2, 1.0, -1.0)
        value = (signs[:, None] * direction).reshape(shape)
    elif kind == 4:
        value = np.full(shape, -scale)
        value[..., : max(1, shape[-1] // 2)] = scale
    elif kind == 5:
        value = scale * np.sign(rng.normal(size=shape))
    elif kind == 6:
        value = np.full(shape, -30.0)
        value[..., :2] = 0.0
    # Exact ties have no derivative.
    return value + 1e-5 * max(scale, np.abs(value).max()) * rng.normal(size=shape)


# Weights that are not randomized: bookkeeping of this package, parameters of Normalization.
_KEPT = ("_vector", "running_bound", "penalty_", "seed_generator", "alpha_logit", "normalization/")


def randomize(model: keras.Model, rng) -> None:
    """Assigns random weights, with a random scale for every layer."""
    for variable in model.weights:
        path = f"{variable.path}/"
        if "float" not in str(variable.dtype) or any(name in path for name in _KEPT[:-1]):
            continue
        if variable.path.split("/")[-1] in ("mean", "variance", "count"):
            continue
        value = rng.normal(size=variable.shape) * 10.0 ** rng.uniform(-1.2, 0.4)
        if "variance" in variable.path:
            value = 0.2 + np.square(value)
        elif len(variable.shape) > 1:
            value = value / np.sqrt(variable.shape[0])
        if rng.random() < 0.01 and "kernel" in variable.path and len(variable.shape) > 1:
            # One head or unit gets another order of magnitude.
            value[:, 0] *= 1e-100
        if variable.path.endswith("relative_bias"):
            value = relative_biases(rng, value)
        variable.assign(value)


def relative_biases(rng, value: np.ndarray) -> np.ndarray:
    """As given, or a table `(heads, distances)` by which each head looks at one distance."""
    if rng.random() < 0.5:
        return value
    table = np.full(value.shape, -rng.choice([0.0, 3.0, 12.0]))
    for row in table:
        row[rng.integers(len(row))] = rng.choice([3.0, 8.0, 15.0])
    return table


def _flat(value) -> list[Any]:
    return keras.tree.flatten(value)


def _is_symbolic(value) -> bool:
    return isinstance(value, keras.KerasTensor)


def first_line(error: Exception) -> str:
    """Type and cause of an error, without the lines that Keras adds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Exception encountered")] or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _first(value, *args, **kwargs):
    return value


@contextlib.contextmanager
def _embedded(subject: RuleSubject, values: dict[int, Any]):
    """Makes embeddings return these values, by the `id` of the layer."""
    held = [source.embedding for source in subject.sources if source.embedding is not None]
    for layer in held:
        vars(layer)["call"] = functools.partial(_first, values[id(layer)])
    try:
        yield
    finally:
        for layer in held:
            del vars(layer)["call"]
