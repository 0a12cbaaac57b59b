"""Random whole models in the ways that users write them, from a seed and an index.

Where `generate` chains layers, these models nest, share, gate, mask and reshape: transformers,
classifiers of images by patches, encoders with decoders, custom layers and subclassed models.
"""

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

import keras_lipattn
from tools.soundness import blocks
from tools.soundness.rules.subjects import (
    POINTS,
    Illegal,
    RuleSubject,
    Source,
    first_line,
    randomize,
    structured,
)

# Fraction of the models that are also checked by `certify(check=True)`.
CHECKED = 0.3


def whole_subject(seed: int, index: int) -> RuleSubject:
    """Model number `index` of this seed.

    Raises:
        Illegal: if Keras refuses the model, which is an error of the generator.
    """
    before, floats = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        with warnings.catch_warnings():
            # Layers that do not support masks warn when they get one.
            warnings.simplefilter("ignore")
            return _Builder(seed, index).subject()
    finally:
        keras.config.set_floatx(floats)
        keras.config.set_dtype_policy(before)


class _Builder:
    def __init__(self, seed: int, index: int):
        self.rng = np.random.default_rng((seed, index))
        self.notes: list[str] = []
        self.inputs: dict[str, Any] = {}
        self.sources: list[Source] = []
        self.options: dict[str, Any] = {}
        self.masked = False
        # Length of the sequences where the model does not fix it.
        self.length: int | None = None
        # Whether a token may have been added, which unknown sizes do not show.
        self.grown = False
        keras.utils.set_random_seed(int(self.rng.integers(2**31)))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, choices):
        return choices[self.rng.integers(len(choices))]

    def size(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def subject(self) -> RuleSubject:
        family = self.pick(["sequence"] * 6 + ["image"] * 2 + ["subclassed"] * 2 + ["decoder"])
        self.note(family)
        if self.chance(0.35):
            self.options["input_radius"] = self.pick([0.5, 1.0, 3.0])
        if self.chance(CHECKED):
            self.options["check"] = True
        try:
            model = getattr(self, family)()
        except Exception as error:
            raise Illegal(f"{'; '.join(self.notes)}: {first_line(error)}") from error
        randomize(model, self.rng)
        points = self.points()
        self.note(f"options {self.options}")
        return RuleSubject(
            text="; ".join(self.notes),
            case=family,
            model=model,
            options=self.options,
            sources=tuple(self.sources),
            points=points,
            fixed=self.fixed_values(),
            masked=self.masked,
            tolerance=1e-6,
            shortens=self.length is not None,
        )

    # Inputs -------------------------------------------------------------------------------------

    def source(self, shape, name="x"):
        name = f"{name}{len(self.inputs)}"
        open_ended = self.length is not None and len(shape) == 2
        self.inputs[name] = keras.Input((None, *shape[1:]) if open_ended else shape, name=name)
        self.sources.append(Source(name, shape))
        return self.inputs[name]

    def side_input(self, name, dtype):
        """An input with one entry per token that is not certified."""
        name = f"{name}{len(self.inputs)}"
        length = None if self.length is not None else self.tokens
        self.inputs[name] = keras.Input((length,), dtype=dtype, name=name)
        return self.inputs[name]

    def tokens_in(self):
        """The first tensor, `(B, T, d)`, with or without a mask."""
        self.tokens, width = self.size(2, 5), self.size(2, 4)
        if self.chance(0.25):
            self.length = self.options["sequence_length"] = self.tokens
            self.note("length unknown")
        way = self.pick(["none"] * 4 + ["Masking", "Embedding", "set_keras_mask"])
        self.note(f"mask by {way}")
        shape = (self.tokens, width)
        if way == "Embedding":
            ids = self.side_input("ids", "int32")
            embedding = layers.Embedding(9, width, mask_zero=self.chance(0.8))
            self.sources.append(Source(ids.name, shape, embedding=embedding))
            return embedding(ids)
        x = self.source(shape)
        if way == "Masking":
            self.masked = self.options["assume_fixed_mask"] = True
            return layers.Masking()(x)
        if way == "set_keras_mask":
            return blocks.GiveMask()(x, self.side_input("visible", "bool"))
        return x

    # Families -----------------------------------------------------------------------------------

    def sequence(self):
        x = self.tokens_in()
        for _ in range(self.size(1, 3)):
            x = self.block(x)
        return self.model(self.head(x))

    def image(self):
        size, channels = self.pick([4, 6]), self.size(1, 2)
        x = self.source((size, size, channels), "image")
        for _ in range(self.size(0, 2)):
            x = self.preprocessed(x)
        x = self.patches(x)
        if self.chance(0.3):
            x = blocks.ClassToken(self.pick(["tile", "repeat", "broadcast"]))(x)
            self.note("class token")
        if self.chance(0.6):
            x = blocks.Positions(x.shape[1], x.shape[-1])(x)
        self.tokens = x.shape[1]
        for _ in range(self.size(1, 2)):
            x = self.block(x)
        return self.model(self.head(x))

    def preprocessed(self, x):
        ways: list[Callable] = [
            lambda: layers.Rescaling(1.0 / 127.5, offset=-1.0),
            lambda: layers.RandomFlip("horizontal"),
            lambda: layers.RandomRotation(0.1),
            lambda: layers.RandomZoom(0.1),
            lambda: layers.RandomTranslation(0.1, 0.1),
            lambda: layers.RandomContrast(0.2),
            lambda: layers.Resizing(4, 4),
            lambda: layers.Resizing(6, 4, interpolation="nearest"),
            lambda: layers.CenterCrop(4, 4),
            lambda: layers.Normalization(mean=[0.3] * x.shape[-1], variance=[0.5] * x.shape[-1]),
            lambda: layers.ZeroPadding2D(1),
        ]
        layer = self.pick(ways)()
        self.note(type(layer).__name__)
        return layer(x)

    def patches(self, x):
        way = self.pick(["convolution", "reshape", "depthwise"])
        self.note(f"patches by {way}")
        height, width, channels = x.shape[1:]
        if way == "reshape":
            x = layers.Reshape((height // 2, 2, width // 2, 2, channels))(x)
            x = layers.Permute((1, 3, 2, 4, 5))(x)
            x = layers.Reshape((height * width // 4, 4 * channels))(x)
            return layers.Dense(4)(x)
        if way == "depthwise":
            x = layers.DepthwiseConv2D(2, strides=2)(x)
            x = layers.Activation("relu")(blocks.SqueezeExcite(channels)(ops.tanh(x)))
            return layers.Dense(4)(layers.Reshape((-1, channels))(x))
        x = layers.Conv2D(4, 2, strides=2, activation=self.pick([None, "relu"]))(x)
        if self.chance(0.4):
            x = layers.BatchNormalization()(x)
        return layers.Reshape((-1, 4))(x)

    def subclassed(self):
        self.tokens, width = self.size(2, 4), self.size(2, 4)
        made = [self.own_layer(width) for _ in range(self.size(1, 2))]
        self.note(", ".join(type(one).__name__ for one in made))
        same = (blocks.TransformerBlock, blocks.BuiltBlock)
        if isinstance(made[0], same) and self.chance(0.4):
            model = blocks.TwoTowers(made[0])
        else:
            model = blocks.Chain(made, 3)
        self.sources.append(Source("x0", (self.tokens, width)))
        model(np.zeros((1, self.tokens, width)))
        return model

    def decoder(self):
        self.tokens, width = self.size(2, 3), self.size(2, 3)
        memory = self.source((self.size(2, 3), width), "source")
        memory = blocks.TransformerBlock(width, first=self.chance(0.5))(memory)
        memory = layers.LayerNormalization(epsilon=0.1)(memory)
        x = self.source((self.tokens, width), "target")
        if self.chance(0.5):
            x = layers.LayerNormalization(epsilon=0.1)(x)
        return self.model(
            layers.Dense(3)(blocks.Decoder(width, bounded=self.chance(0.5))(x, memory))
        )

    def model(self, outputs):
        inputs: Any = list(self.inputs.values())
        if len(inputs) == 1:
            inputs = inputs[0]
        elif self.chance(0.4):
            self.note("dict inputs")
            inputs = dict(reversed(self.inputs.items()))
        return keras.Model(inputs, outputs)

    def head(self, x):
        way = self.pick(["none", "mean", "masked mean", "max", "dense", "softmax", "flatten"])
        if way == "flatten" and None in x.shape[1:]:
            way = "mean"
        self.note(f"head {way}")
        if way == "none":
            return x
        if way == "dense":
            return layers.Dense(2)(x)
        if way == "flatten":
            return layers.Dense(3)(layers.Flatten()(x))
        if way == "max":
            return layers.Dense(3)(layers.GlobalMaxPooling1D()(x))
        x = blocks.MaskedMean()(x) if way == "masked mean" else layers.GlobalAveragePooling1D()(x)
        return layers.Dense(3, activation="softmax" if way == "softmax" else None)(x)

    # Blocks -------------------------------------------------------------------------------------

    def own_layer(self, width) -> Any:
        makers: list[Callable[[], Any]] = [
            lambda: self.transformer(width),
            lambda: self.transformer(width),
            lambda: blocks.BuiltBlock(),
            lambda: blocks.SqueezeExcite(width),
            lambda: blocks.Repeated(self.inner(width), self.pick(["repeat", "tile", "axis"])),
            lambda: blocks.ClassToken(self.pick(["tile", "repeat", "broadcast"])),
        ]
        if width % 2 == 0:
            makers.append(lambda: blocks.Folded(self.inner(width // 2)))
        if self.chance(0.2):
            # Attention from operations rarely has a finite constant.
            makers += [lambda: blocks.OwnHeads(), lambda: blocks.MaskedScores(width)]
        layer = self.pick(makers)()
        self.grown |= isinstance(layer, blocks.ClassToken)
        if isinstance(layer, blocks.SqueezeExcite) and self.chance(0.7):
            return keras.Sequential([layers.LayerNormalization(epsilon=0.1), layer])
        return layer

    def transformer(self, width):
        options = dict(first=self.chance(0.7), lipschitz=self.chance(0.4), causal=self.chance(0.3))
        return blocks.TransformerBlock(width, **options)

    def inner(self, width):
        """A layer that takes any number of axes."""
        kind = self.pick(["dense", "norm", "built"])
        if kind == "dense":
            return layers.Dense(width, activation="tanh")
        return blocks.BuiltBlock() if kind == "built" else layers.LayerNormalization(epsilon=0.1)

    def block(self, x):
        ways = ["own", "own", "gate", "gate", "nested", "nested twice", "sequential"]
        ways += [
            "named mask",
            "nested dict",
            "mask argument",
            "plain",
            "plain",
            "keras attention",
            "transformer",
        ]
        way = self.pick(ways)
        if x.shape[-1] > 8:
            x = layers.Dense(3)(x)
        y = getattr(self, "block_" + way.replace(" ", "_"))(x)
        unclear = self.grown and None in y.shape[1:]
        if y.shape == x.shape and not unclear and self.chance(0.3):
            self.note("residual")
            return self.pick([layers.Add(), keras_lipattn.Residual(0.5)])([x, y])
        return y

    def block_own(self, x):
        layer = self.own_layer(x.shape[-1])
        self.note(type(layer).__name__)
        return layer(x)

    def block_plain(self, x):
        layer = self.pick(
            [
                layers.Dense(3, activation="gelu"),
                layers.Conv1D(3, 2, padding="causal"),
                layers.LayerNormalization(epsilon=0.1),
                layers.BatchNormalization(),
                layers.SpatialDropout1D(0.2),
                keras_lipattn.SpectralDense(4),
                keras_lipattn.OrthogonalDense(4),
                keras_lipattn.NormalizedDense(4),
                keras_lipattn.HalfAbs() if x.shape[-1] % 2 == 0 else keras_lipattn.SpectralDense(2),
                keras_lipattn.L2MultiHeadAttention(2, 2),
            ]
        )
        self.note(type(layer).__name__)
        return layer(x)

    def block_transformer(self, x):
        options = {
            "attention": self.pick(["l2", "cosine", "bounded"]),
            "lipschitz_bound": self.pick([None, 1.0]),
            "lipschitz_norm": self.pick(["l2", "token"]),
            "max_sequence_length": 12,
        }
        x = keras_lipattn.OrthogonalDense(4)(x)
        if self.chance(0.5):
            self.note(f"TransformerEncoder {options}")
            return keras_lipattn.TransformerEncoder(6, 2, **options)(x)
        cross = options["attention"] == "bounded" and self.chance(0.5)
        self.note(f"TransformerDecoder {options}, cross {cross}")
        block = keras_lipattn.TransformerDecoder(6, 2, **options)
        return block(x, keras_lipattn.OrthogonalDense(3)(x)) if cross else block(x)

    def block_keras_attention(self, x):
        x = layers.LayerNormalization(epsilon=0.1)(x)
        options = {"use_causal_mask": self.chance(0.5)}
        self.note(f"MultiHeadAttention {options}")
        return layers.MultiHeadAttention(2, 2)(x, x, **options)

    def block_gate(self, x):
        bounded = self.chance(0.75)
        if bounded:
            x = self.pick([layers.LayerNormalization(epsilon=0.1), layers.Activation("tanh")])(x)
        activation = self.pick(["sigmoid", "softmax", "tanh", "swish"])
        self.note(f"gate {activation}, bounded {bounded}")
        gate = layers.Dense(x.shape[-1], activation=activation)(x)
        branch = self.pick([lambda z: z, layers.Dense(x.shape[-1]), self.transformer(x.shape[-1])])
        y = branch(x)
        return layers.Multiply()([gate, y]) if self.chance(0.5) else gate * y

    def small_model(self, x, *, name=None):
        """A Functional model from this shape to itself."""
        symbol = keras.Input(x.shape[1:], name=name)
        y = symbol
        for _ in range(self.size(1, 2)):
            y = self.pick([self.block_own, self.block_gate, self.block_plain])(y)
        if y.shape != symbol.shape:
            y = blocks.Positions(16, y.shape[-1])(y) if self.chance(0.2) else y
            y = layers.Dense(x.shape[-1])(y)
        return keras.Model(symbol, y)

    def block_nested(self, x):
        self.note("nested (")
        model = self.small_model(x)
        if self.chance(0.3):
            symbol = keras.Input(x.shape[1:])
            model = keras.Model(symbol, 0.5 * model(symbol))
        self.note(")")
        training = self.pick([None, None, False])
        return model(x) if training is None else model(x, training=training)

    def block_nested_twice(self, x):
        self.note("nested twice (")
        model = self.small_model(x)
        self.note(")")
        if model.output_shape == model.input_shape and self.chance(0.5):
            return model(model(x))
        return layers.Subtract()([model(x), model(ops.tanh(x))])

    def block_sequential(self, x):
        width = x.shape[-1]
        made = [self.own_layer(width)]
        made += [layers.Dropout(0.1), layers.Dense(width, activation="relu")]
        self.note(f"Sequential of {type(made[0]).__name__}")
        if self.chance(0.5):
            made.insert(0, keras.Input(x.shape[1:]))
        return keras.Sequential(made)(x)

    def block_named_mask(self, x):
        self.note("mask by name")
        x = layers.LayerNormalization(epsilon=0.1)(x)
        gate = layers.Dense(x.shape[-1])(x)
        return blocks.NamedMask(lipschitz=self.chance(0.5))(x, gate)

    def block_mask_argument(self, x):
        self.note("mask= of a nested model (")
        attention = self.block_keras_attention if self.chance(0.5) else None
        symbol = keras.Input(x.shape[1:])
        y = attention(symbol) if attention else blocks.MaskedScores(x.shape[-1])(symbol)
        inner = keras.Model(symbol, layers.Dense(x.shape[-1])(y))
        self.note(")")
        if self.grown or x.shape[1] not in (None, self.tokens):
            return inner(x)
        return inner(x, mask=self.side_input("visible", "bool"))

    def block_nested_dict(self, x):
        """An inner model whose inputs are matched by name, in any order."""
        names = ["b", "a"] if self.chance(0.5) else ["a", "b"]
        suffix = f"_{len(self.notes)}"
        symbols = {name: keras.Input(x.shape[1:], name=name + suffix) for name in names}
        first, second = (symbols[name] for name in names)
        before, self.grown = self.grown, False
        first = self.pick([self.block_own, self.block_plain])(first)
        # Where the length is not known, the shapes do not show that a token was added.
        longer, self.grown = self.grown, self.grown or before
        second = layers.Dense(first.shape[-1], activation="tanh")(second)
        if longer or first.shape[1] != second.shape[1]:
            first = layers.GlobalAveragePooling1D(keepdims=True)(first)
        by_key = self.chance(0.5)
        self.note(f"dict {names}, by key {by_key}")
        inner = keras.Model(symbols if by_key else list(symbols.values()), first + second)
        given = {"a": x, "b": 0.1 * x}
        if not by_key:
            given = {name + suffix: value for name, value in given.items()}
        return inner(given)

    # Values -------------------------------------------------------------------------------------

    def points(self) -> np.ndarray:
        parts = []
        for source in self.sources:
            values = self.rng.normal(size=(POINTS, *source.shape))
            values[1] *= 10.0 ** self.rng.uniform(-2.0, 1.0)
            values[2] = structured(self.rng, source.shape)
            values[3] = structured(self.rng, source.shape)
            values[4] = 1e-3 * values[4] + self.rng.normal()
            if self.masked and len(source.shape) == 2:
                hidden = self.rng.random((POINTS, source.shape[0])) < 0.4
                hidden[0] = False
                values[hidden] = 0.0
            parts.append(values.reshape(POINTS, -1))
        return np.concatenate(parts, axis=1)

    def fixed_values(self) -> dict[str, np.ndarray]:
        fixed = {}
        for name, tensor in self.inputs.items():
            shape = (POINTS, *(int(size or self.length or 1) for size in tensor.shape[1:]))
            if tensor.dtype == "int32":
                fixed[name] = self.rng.integers(0, 4, size=shape).astype("int32")
            elif tensor.dtype == "bool":
                fixed[name] = self.rng.random(shape) < 0.6
            else:
                continue
            # One example without padding, and sometimes one of padding only.
            fixed[name][0] = 1
            if self.chance(0.3):
                fixed[name][1] = 0
        return fixed
