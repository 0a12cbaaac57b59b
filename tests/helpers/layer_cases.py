"""One generator of legal cases of attention layers: constructor x call x dtype.

A new option or a new kind of mask is one line here, and every property is tried on it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from helpers import loop_attention

import keras_lipattn as kl
from keras_lipattn.layers._masks import MaskClass

BATCH, LENGTH, FEATURES, HEADS, KEY_DIM = 2, 5, 4, 2, 3
PADDING = -7.0

# Constructor options, and the axes of one example where they are not those of a sequence.
COMMON_OPTIONS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "plain": ({}, (LENGTH,)),
    "one head": ({"num_heads": 1}, (LENGTH,)),
    "value dim": ({"value_dim": 5}, (LENGTH,)),
    "no bias": ({"use_bias": False}, (LENGTH,)),
    "output shape": ({"output_shape": 3}, (LENGTH,)),
    "output shapes": ({"output_shape": (2, 3)}, (LENGTH,)),
    "window": ({"sliding_window": 2}, (LENGTH,)),
    "dropout": ({"dropout": 0.5, "seed": 3}, (LENGTH,)),
    "one token": ({}, (1,)),
    "two axes": ({}, (2, 3)),
    "first axis": ({"attention_axes": 1}, (3, 2)),
    "last axis": ({"attention_axes": (-2,)}, (2, 3)),
    "outer axes": ({"attention_axes": (3, 1)}, (2, 2, 2)),
}
# Those of `L2MultiHeadAttention` alone.
OPTIONS = {
    **COMMON_OPTIONS,
    "relative": ({"max_relative_position": 3}, (LENGTH,)),
    "relative, window": ({"max_relative_position": 1, "sliding_window": 3}, (LENGTH,)),
    "relative, axes": ({"max_relative_position": 9, "attention_axes": (2, 1)}, (2, 3)),
    "ball": ({"token_radius": 0.9}, (LENGTH,)),
    "ball, relative": ({"token_radius": 0.9, "max_relative_position": 2}, (LENGTH,)),
    "ball, axes": ({"token_radius": 2.0, "attention_axes": (1,), "value_dim": 2}, (3, 2)),
}
# Those of `BoundedMultiHeadAttention`, whose radius is 1 by default.
BOUNDED_OPTIONS = {
    **OPTIONS,
    "shared heads": ({"num_heads": 4, "num_key_value_heads": 2}, (LENGTH,)),
    "one shared head": (
        {"num_heads": 3, "num_key_value_heads": 1, "max_relative_position": 2},
        (LENGTH,),
    ),
}

# Ways of capping, all of them at work for the weights of `Case.layer`.
CAPS: dict[str, dict[str, Any]] = {
    "spectral": {"spectral_norm": 0.8},
    "l2": {"lipschitz_bound": 0.5},
    "token": {"lipschitz_bound": 0.5, "lipschitz_norm": "token"},
    "linf": {"lipschitz_bound": 0.5, "lipschitz_norm": "linf"},
    "both": {"spectral_norm": 1.0, "lipschitz_bound": 0.1},
}


def valid_tokens(batch, sides):
    """`(B, ...)`: every example keeps its first token and loses a few of the others."""
    keep = np.random.default_rng(5).random((batch, *sides)) < 0.6
    keep[(slice(None), *(0 for _ in sides))] = True
    return keep


def _pairs(*shape):
    # Half of the pairs, the diagonal not excepted: the layer makes it visible.
    return np.random.default_rng(6).random(shape) < 0.5


# Ways of calling: from the case to the arguments of the call. `implicit` is padding that Keras
# carries along.
CALLS: dict[str, Callable[["Case"], dict[str, Any]]] = {
    "no mask": lambda case: {},
    "causal": lambda case: {"use_causal_mask": True},
    "query mask": lambda case: {"query_mask": valid_tokens(BATCH, case.sides)},
    "value mask": lambda case: {"value_mask": valid_tokens(BATCH, case.sides)},
    "key mask": lambda case: {"key_mask": valid_tokens(BATCH, case.sides)},
    "implicit": lambda case: {"implicit": valid_tokens(BATCH, case.sides)},
    "pairs": lambda case: {"attention_mask": _pairs(case.tokens, case.tokens)},
    "pairs per example": lambda case: {
        "attention_mask": _pairs(BATCH, case.tokens, case.tokens),
    },
    "pairs per head": lambda case: {"attention_mask": _pairs(*case.score_shape)},
    "keys": lambda case: {"attention_mask": _pairs(1, case.tokens)},
    "keys per example": lambda case: {
        "attention_mask": _pairs(BATCH, 1, case.tokens).astype("int32"),
    },
    "nothing visible": lambda case: {
        "attention_mask": np.zeros((case.tokens, case.tokens), bool),
    },
    "everything": lambda case: {
        "use_causal_mask": True,
        "attention_mask": _pairs(1, case.tokens, case.tokens),
        "query_mask": valid_tokens(BATCH, case.sides),
        "implicit": valid_tokens(BATCH, case.sides[::-1]).reshape(BATCH, *case.sides),
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer and a way of calling it.

    Attributes:
        options: Name in `BOUNDED_OPTIONS`.
        call: Name in `CALLS`.
        cap: Name in `CAPS`, or `None`.
        dtype: A dtype policy.
        kind: The class of the layer.
    """

    options: str = "plain"
    call: str = "no mask"
    cap: str | None = None
    dtype: str = "float64"
    kind: Any = kl.L2MultiHeadAttention

    def __str__(self):
        parts = (self.options, self.call, self.cap and f"cap {self.cap}", self.dtype)
        return ", ".join(part for part in parts if part)

    @property
    def constructor(self):
        """Arguments of the layer."""
        common = {"num_heads": HEADS, "key_dim": KEY_DIM, "dtype": self.dtype}
        options = BOUNDED_OPTIONS[self.options][0]
        return {**common, **options, **(CAPS[self.cap] if self.cap else {})}

    @property
    def sides(self):
        """Axes of an example without the features."""
        return BOUNDED_OPTIONS[self.options][1]

    @property
    def axes(self):
        """Axes over which attention goes, in the order in which they are given."""
        chosen = self.constructor.get("attention_axes", range(1, len(self.sides) + 1))
        chosen = (chosen,) if isinstance(chosen, int) else chosen
        return tuple(axis % (len(self.sides) + 2) for axis in chosen)

    @property
    def tokens(self):
        """Number of tokens that attend to each other."""
        return int(np.prod([(BATCH, *self.sides)[axis] for axis in self.axes]))

    @property
    def score_shape(self):
        """Shape of the scores: batch, axes without attention, heads, queries, keys."""
        shape = (BATCH, *self.sides)
        others = [side for axis, side in enumerate(shape) if axis not in self.axes]
        tokens = [shape[axis] for axis in self.axes]
        return (*others, self.constructor["num_heads"], *tokens, *tokens)

    def mask_shapes(self):
        """All legal shapes of a mask of pairs: any side may be 1."""
        full, inner = self.score_shape, 2 * len(self.axes)
        outer = len(full) - inner
        shapes = [(*full[:lead], *full[outer:]) for lead in range(outer + 1)]
        if inner > 2:
            shapes += [(self.tokens,) * 2, (BATCH, *(self.tokens,) * 2)]
        broadcast = [itertools.product(*({1, side} for side in shape)) for shape in shapes]
        return sorted(set(itertools.chain.from_iterable(broadcast)))

    def layer(self, *, scale=0.8, seed=1, **changes):
        """The layer, built, with random weights of size `scale`, the bias included."""
        layer = self.kind(**{**self.constructor, **changes})
        layer.build((BATCH, *self.sides, FEATURES))
        randomize(layer, scale=scale, seed=seed)
        return layer

    def inputs(self, *, offset=0.0, scale=1.0, seed=2):
        """Random inputs `(B, ..., D)`; `offset` moves all of them from the origin."""
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(BATCH, *self.sides, FEATURES)) * scale + offset
        implicit = self.call_arguments().get("implicit")
        if implicit is not None:
            x[~implicit] = PADDING
        return x

    def call_arguments(self):
        """Arguments of the call, with `implicit` for padding that the input carries."""
        return CALLS[self.call](self)

    def run(self, layer, x, **more):
        """Calls the layer in the way of the case."""
        arguments = {**self.call_arguments(), **more}
        if "implicit" in arguments:
            del arguments["implicit"]
            x = keras.layers.Masking(PADDING, dtype=self.dtype)(x)
        return layer(x, **arguments)

    def valid(self):
        """`(B, ...)`, what all token masks together leave, or `None` without any."""
        given = self.call_arguments()
        names = ("query_mask", "value_mask", "key_mask", "implicit")
        masks = [given[name] for name in names if name in given]
        return functools.reduce(np.logical_and, masks) if masks else None

    def loop_arguments(self):
        """The same call for `loop_attention.attend_over_axes`."""
        given = self.call_arguments()
        return {
            "axes": self.axes,
            "valid": self.valid(),
            "attention_mask": given.get("attention_mask"),
            "causal": given.get("use_causal_mask", False),
            "window": self.constructor.get("sliding_window"),
        }

    def with_biases(self, layer):
        """`loop_attention.attend` with the ball and the relative biases of the layer, if any."""
        radius = self.constructor.get("token_radius")
        attend = functools.partial(loop_attention.attend, radius=radius)
        if self.constructor.get("max_relative_position") is None:
            return attend
        table = keras.ops.cast(layer.relative_bias, layer.compute_dtype)
        table = keras.ops.convert_to_numpy(table).astype(np.float64)
        return functools.partial(attend, relative_bias=table)

    def run_copies(self, layer, x, example=0):
        """Calls the layer on copies `(n, ..., D)` of one example, with its masks."""
        given, count = {}, len(x)
        valid = self.valid()
        if valid is not None:
            given["query_mask"] = np.repeat(valid[example : example + 1], count, axis=0)
        pairs = self.call_arguments().get("attention_mask")
        if pairs is not None:
            per_example = pairs.ndim == 3 or pairs.ndim > 2 * len(self.axes)
            own = per_example and len(pairs) > 1
            given["attention_mask"] = (
                np.repeat(pairs[example : example + 1], count, axis=0) if own else pairs
            )
        causal = self.call_arguments().get("use_causal_mask", False)
        return layer(x, use_causal_mask=causal, **given)

    def visible(self):
        """Visible pairs `(T, T)` as the certificate wants them: a name, or an array."""
        given = self.call_arguments()
        pairs = given.get("attention_mask")
        if pairs is None:
            return "causal" if given.get("use_causal_mask") else "full"
        shape, heads = (BATCH, *self.sides, FEATURES), self.constructor["num_heads"]
        pairs = loop_attention.pairs_of_sequences(pairs, shape, self.axes, heads)
        pairs = np.concatenate(list(pairs.values()))
        return np.tril(pairs) if given.get("use_causal_mask") else pairs


def randomize(layer, *, scale=0.8, seed=1):
    """Gives every trainable weight of a layer random numbers of size `scale`."""
    rng = np.random.default_rng(seed)
    for weight in layer.trainable_variables:
        weight.assign(rng.normal(size=weight.shape) * scale)


def kernels(layer):
    """Kernels and bias of an attention layer in float64, rounded to the compute dtype."""
    cast = [
        keras.ops.convert_to_numpy(keras.ops.cast(weight.value, layer.compute_dtype))
        for weight in layer.trainable_variables
        if weight.name != "relative_bias"
    ]
    weights = [weight.astype(np.float64) for weight in cast]
    return weights[:3], (weights[3] if layer.use_bias else None)


def cases(
    *,
    options=tuple(OPTIONS),
    calls=tuple(CALLS),
    caps=(None,),
    dtypes=("float64",),
    kind=kl.L2MultiHeadAttention,
):
    """The product of what is asked for, as a list of `Case`."""
    return [
        Case(option, call, cap, dtype, kind)
        for option in options
        for call in calls
        for cap in caps
        for dtype in dtypes
    ]


def running_matrices(layer, mask="full"):
    """The two matrices that inference multiplies with, in the compute dtype."""
    weights = layer._in_compute_dtype(layer.effective_weights(MaskClass(mask)))
    return weights.projection, weights.output
