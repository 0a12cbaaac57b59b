"""The layers and operations that have a rule, with their legal arguments.

A new rule needs a case here, or the suite fails.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers, ops
from keras.src.activations.activations import Mish
from keras.src.ops.numpy import Abs

import keras_lipattn
from keras_lipattn.layers import SelfAttention
from keras_lipattn.layers.lipschitz_layer import LipschitzLayer

# An argument that is not passed.
ABSENT = object()


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """An argument that is created for each model, such as an inner layer.

    Args:
        text: Python that makes it, for reports.
        make: makes it.
    """

    text: str
    make: Callable[[], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class RuleCase:
    """A layer class or operation and the legal ways to configure and call it.

    Args:
        target: the layer class, or the name of the class of the operation.
        make: the layer class, or a function of tensors.
        tensors: names of the call arguments that take tensors.
        listed: whether all tensors go into the first of these arguments as a list.
        shapes: choices of the shapes of the tensors, without the batch axis. One shape for
            several tensors means that all of them have it.
        config: constructor arguments, each with its choices.
        arguments: further call arguments, each with its choices.
        masks: call arguments that take one boolean for each token.
        alike: whether all tensors must be the same one.
        integers: size of the vocabulary if the tensor holds integers, else 0.
        dtype: float32 for operations that TensorFlow does not have in float64.
    """

    target: type | str
    make: Callable
    tensors: tuple[str, ...]
    shapes: tuple[tuple, ...]
    listed: bool = False
    config: dict[str, Sequence] = dataclasses.field(default_factory=dict)
    arguments: dict[str, Sequence] = dataclasses.field(default_factory=dict)
    masks: tuple[str, ...] = ()
    integers: int = 0
    alike: bool = False
    dtype: str = "float64"

    @property
    def is_layer(self) -> bool:
        return isinstance(self.target, type)

    @property
    def name(self) -> str:
        return self.target.__name__ if isinstance(self.target, type) else f"ops:{self.target}"


def _layer(
    cls, *shapes, call=None, listed: Any = False, tensors=None, masks: Any = (), **config
) -> RuleCase:
    options = {
        key: config.pop(key) for key in ("integers", "alike", "dtype", "make") if key in config
    }
    make = options.pop("make", cls)
    if tensors is None:
        tensors = (next(iter(list(inspect.signature(make.call).parameters)[1:])),)
    return RuleCase(
        target=cls,
        make=make,
        tensors=tensors,
        listed=listed,
        shapes=shapes,
        config=config,
        arguments=call or {},
        masks=masks,
        **options,
    )


def _operation(
    target,
    function,
    *shapes,
    tensors: Any = ("x",),
    listed: Any = False,
    single: Any = False,
    **arguments,
) -> RuleCase:
    return RuleCase(
        target=target,
        make=function,
        tensors=tensors,
        listed=listed,
        shapes=shapes,
        arguments=arguments,
        dtype="float32" if single else "float64",
    )


FLAT, TOKENS, GRID, VIDEO = (4,), (3, 4), (4, 3, 2), (2, 2, 3, 2)
ANY = (FLAT, TOKENS, GRID)
FLAG = (True, False)

ACTIVATIONS = (
    "celu elu gelu glu hard_shrink hard_sigmoid hard_silu hard_tanh leaky_relu linear "
    "log_sigmoid log_softmax mish relu relu6 selu sigmoid silu soft_shrink softmax softplus "
    "softsign sparse_plus sparse_sigmoid sparsemax squareplus tanh tanh_shrink threshold "
    "exponential"
).split()
_SAME_WIDTH = [name for name in ACTIVATIONS if name not in ("glu", "threshold")]
_IN_LAYERS = [
    ABSENT,
    ABSENT,
    "relu",
    "tanh",
    "sigmoid",
    "hard_sigmoid",
    "softplus",
    "gelu",
    "softmax",
    "sparse_sigmoid",
    Made("LeakyReLU(1.5)", lambda: layers.LeakyReLU(1.5)),
]


@functools.cache
def all_cases() -> tuple[RuleCase, ...]:
    """Every case, in a fixed order."""
    return (
        *_activation_layers(),
        *_linear_layers(),
        *_merging_layers(),
        *_convolution_layers(),
        *_normalization_layers(),
        *_pooling_layers(),
        *_reshaping_layers(),
        *_attention_layers(),
        *_other_layers(),
        *_image_layers(),
        *_augmentation_layers(),
        *_own_layers(),
        *_activation_operations(),
        *_arithmetic_operations(),
        *_linear_operations(),
        *_shape_operations(),
        *_other_operations(),
        *_window_operations(),
        *_copying_operations(),
        *_image_operations(),
        *_product_operations(),
    )


@functools.cache
def schedule() -> tuple[int, ...]:
    """Positions of the cases in the order in which they take turns.

    Calls with masks have more ways to go wrong, so they come three times as often.
    """
    cases = all_cases()
    masked = [position for position, case in enumerate(cases) if case.masks]
    return (*range(len(cases)), *masked, *masked)


# Layers ----------------------------------------------------------------------------------------


def _activation_layers():
    return [
        _layer(layers.Activation, *ANY, activation=_SAME_WIDTH),
        _layer(
            layers.ReLU,
            *ANY,
            max_value=[ABSENT, 2.0],
            negative_slope=[0.0, 0.2, 1.5],
            threshold=[0.0, 0.5],
        ),
        _layer(layers.LeakyReLU, *ANY, negative_slope=[0.3, 1.7, 0.0]),
        _layer(layers.PReLU, TOKENS, GRID, shared_axes=[ABSENT, [1]]),
        _layer(layers.ELU, *ANY, alpha=[0.5, 1.0, 2.5]),
        _layer(layers.Softmax, TOKENS, axis=[-1, 1, (1, 2)]),
        _layer(layers.Softmax, FLAT),
        _layer(
            layers.Softmax,
            TOKENS,
            axis=[-1, 1, (1, 2)],
            call={"mask": [np.array([[[True, False, True, True]] * 3])]},
        ),
        # A mask of the shape of the scores.
        _layer(layers.Softmax, (4,), axis=[-1], masks=("mask",)),
    ]


def _linear_layers():
    return [
        _layer(layers.Dense, *ANY, units=[1, 3, 4], activation=_IN_LAYERS, use_bias=FLAG),
        _layer(layers.Dense, FLAT, TOKENS, units=[3], lora_rank=[2]),
        *(
            _layer(
                layers.EinsumDense,
                shape,
                equation=[equation],
                output_shape=[output],
                bias_axes=[ABSENT, axes],
                activation=_IN_LAYERS,
            )
            for shape, equation, output, axes in (
                (TOKENS, "abc,cd->abd", (3, 5), "d"),
                (TOKENS, "abc,cde->abde", (3, 2, 5), "de"),
                (TOKENS, "abc,cde->aebd", (5, 3, 2), "e"),
                (TOKENS, "abc,bd->adc", (5, 4), "d"),
                (TOKENS, "abc,bd->adc", (5, 4), "c"),
                (TOKENS, "abc,bcd->abd", (3, 5), "b"),
                (TOKENS, "abc,bcd->ad", (5,), "d"),
                (GRID, "...x,xy->...y", 5, "y"),
            )
        ),
        _layer(
            layers.TimeDistributed,
            TOKENS,
            GRID,
            layer=[
                Made("Dense(2)", lambda: layers.Dense(2)),
                Made("LayerNormalization()", lambda: layers.LayerNormalization()),
                Made("Activation('sigmoid')", lambda: layers.Activation("sigmoid")),
                Made("Dropout(0.5)", lambda: layers.Dropout(0.5)),
                Made("BatchNormalization()", lambda: layers.BatchNormalization()),
            ],
        ),
        _layer(
            layers.TimeDistributed,
            (2, 3, 4),
            masks=("mask",),
            layer=[
                Made("GlobalAveragePooling1D()", lambda: layers.GlobalAveragePooling1D()),
                Made("Flatten()", lambda: layers.Flatten()),
                Made("Conv1D(2, 2)", lambda: layers.Conv1D(2, 2)),
                Made("Permute((2, 1))", lambda: layers.Permute((2, 1))),
            ],
        ),
        _layer(
            layers.SpectralNormalization,
            TOKENS,
            layer=[Made("Dense(3)", lambda: layers.Dense(3))],
        ),
    ]


def _merging_layers():
    merging = functools.partial(_layer, tensors=("inputs",) * 2, listed=True)
    return [
        *(
            merging(cls, *ANY, ((3, 4), (1, 4)), ((3, 4), (4,)))
            for cls in (layers.Add, layers.Subtract, layers.Average, layers.Multiply)
        ),
        *(merging(cls, *ANY, ((3, 4), (1, 4))) for cls in (layers.Maximum, layers.Minimum)),
        _layer(layers.Add, TOKENS, tensors=("inputs",) * 3, listed=True),
        _layer(layers.Multiply, TOKENS, tensors=("inputs",) * 3, listed=True),
        merging(layers.Concatenate, TOKENS, GRID, axis=[-1, 1, 2, -2, 0]),
        merging(layers.Concatenate, ((3, 4), (3, 2)), axis=[-1, 2]),
        merging(layers.Dot, FLAT, axes=[1, -1], normalize=FLAG),
        merging(layers.Dot, TOKENS, axes=[1, 2, (2, 2), (1, 1)], normalize=FLAG),
        merging(keras_lipattn.Residual, *ANY, alpha=[ABSENT, 0.3, 1.0]),
        merging(keras_lipattn.Residual, TOKENS, alpha=[0.3], trainable_alpha=[True]),
    ]


def _convolution_layers():
    common: dict[str, Any] = dict(use_bias=FLAG, activation=_IN_LAYERS)
    padding = dict(padding=["valid", "same"])
    rates = dict(strides=[1, 2], dilation_rate=[1, 2])
    line, plane, space = (7, 2), (5, 4, 2), (3, 3, 3, 2)
    return [
        _layer(
            layers.Conv1D,
            line,
            filters=[3],
            kernel_size=[1, 2, 3],
            strides=[1, 2, 3],
            padding=["valid", "same", "causal"],
            **common,
        ),
        _layer(
            layers.Conv1D,
            line,
            filters=[2, 4],
            groups=[1, 2],
            kernel_size=[2, 3],
            dilation_rate=[1, 2],
            padding=["valid", "same", "causal"],
            **common,
        ),
        _layer(
            layers.Conv2D,
            plane,
            filters=[3],
            kernel_size=[1, 2, (3, 2)],
            strides=[1, 2, (2, 1)],
            **padding,
            **common,
        ),
        _layer(
            layers.Conv2D,
            (4, 4, 2),
            filters=[4],
            kernel_size=[2],
            strides=[1, 2],
            groups=[1, 2],
            **padding,
            **common,
        ),
        _layer(layers.Conv3D, space, filters=[2], kernel_size=[2], strides=[1, 2], **padding),
        _layer(
            layers.DepthwiseConv1D,
            line,
            kernel_size=[2, 3],
            depth_multiplier=[1, 2],
            strides=[1, 2],
            **padding,
            **common,
        ),
        _layer(
            layers.DepthwiseConv2D,
            plane,
            kernel_size=[2, 3],
            depth_multiplier=[1, 2],
            strides=[1, 2],
            **padding,
            **common,
        ),
        _layer(
            layers.SeparableConv1D,
            line,
            filters=[3],
            kernel_size=[2],
            strides=[1, 2],
            **padding,
            **common,
        ),
        _layer(
            layers.SeparableConv2D,
            plane,
            filters=[3],
            kernel_size=[2, 3],
            strides=[1, 2],
            **padding,
            **common,
        ),
        _layer(
            layers.Conv1DTranspose,
            (4, 2),
            filters=[3],
            kernel_size=[2, 3],
            **rates,
            **padding,
            **common,
        ),
        _layer(
            layers.Conv2DTranspose,
            (3, 2, 2),
            filters=[2],
            kernel_size=[2, 3],
            strides=[1, 2, (1, 2)],
            **padding,
            **common,
        ),
        _layer(
            layers.Conv3DTranspose,
            (2, 2, 2, 1),
            filters=[2],
            kernel_size=[2],
            strides=[1, 2],
            **padding,
        ),
    ]


def _normalization_layers():
    epsilon = [1e-3, 0.1, 1.0]
    return [
        _layer(
            layers.LayerNormalization,
            *ANY,
            axis=[-1, 1, ABSENT],
            epsilon=epsilon,
            center=FLAG,
            scale=FLAG,
        ),
        _layer(layers.LayerNormalization, TOKENS, axis=[(1, 2)], epsilon=epsilon),
        _layer(layers.RMSNormalization, *ANY, axis=[-1, 1], epsilon=[1e-6, 0.1, 1.0]),
        _layer(
            layers.GroupNormalization,
            (3, 6),
            (2, 2, 6),
            groups=[1, 2, 3, 6, -1],
            epsilon=epsilon,
            center=FLAG,
            scale=FLAG,
        ),
        _layer(
            layers.BatchNormalization,
            *ANY,
            axis=[-1, 1],
            center=FLAG,
            scale=FLAG,
            masks=(),
        ),
        _layer(layers.BatchNormalization, TOKENS, masks=("mask",)),
        _layer(layers.UnitNormalization, *ANY, axis=[-1, 1]),
        _layer(layers.UnitNormalization, TOKENS, axis=[(1, 2)]),
        _layer(
            layers.Normalization,
            (3, 2),
            (2,),
            mean=[[1.0, 2.0]],
            variance=[[0.25, 4.0]],
            invert=FLAG,
        ),
        _layer(
            layers.Normalization, (2, 3), axis=[1, None], mean=[0.5], variance=[0.25], invert=FLAG
        ),
        _layer(layers.Rescaling, *ANY, scale=[0.5, -2.0, 1 / 255], offset=[0.0, 1.0, -0.5]),
        _layer(layers.Rescaling, (3, 2), scale=[[0.5, 2.0]], offset=[0.0, [1.0, -1.0]]),
        _layer(keras_lipattn.CenterNormalization, *ANY, center=FLAG, scale=FLAG),
        _layer(keras_lipattn.TokenProjection, *ANY, radius=[0.2, 1.0, 20.0]),
    ]


def _pooling_layers():
    line, plane, space = (7, 2), (4, 5, 2), (3, 2, 2, 2)
    padding = ["valid", "same"]
    formats: list[Any] = [ABSENT, ABSENT, "channels_first"]
    windows = dict(pool_size=[2, 3], strides=[ABSENT, 1, 2], padding=padding)
    cubes: Any = dict(pool_size=[2], strides=[ABSENT, 1], padding=padding, dtype="float32")
    cases = [
        _layer(layers.AveragePooling1D, line, **windows, data_format=formats[:2]),
        _layer(layers.MaxPooling1D, line, **windows, data_format=formats[:2]),
        _layer(layers.AveragePooling2D, plane, (4, 4, 2), **windows),
        _layer(layers.MaxPooling2D, plane, (4, 4, 2), **windows),
        _layer(layers.AveragePooling3D, space, **cubes),
        _layer(layers.MaxPooling3D, space, **cubes),
    ]
    for kind in ("Average", "Max"):
        for shape, rank, sizes in ((line, 1, [3, 2]), (plane, 2, [2, (3, 2)]), (space, 3, [2])):
            cls = getattr(layers, f"Adaptive{kind}Pooling{rank}D")
            single: Any = dict(dtype="float32") if rank == 3 else {}
            cases.append(_layer(cls, shape, output_size=sizes, data_format=formats, **single))
            cls = getattr(layers, f"Global{kind}Pooling{rank}D")
            masked = kind == "Average" and rank == 1
            cases.append(
                _layer(
                    cls,
                    shape,
                    keepdims=FLAG,
                    data_format=formats[:2] if masked else formats,
                    masks=("mask",) if masked else (),
                )
            )
    return cases


def _reshaping_layers():
    grids: list[Any] = [ABSENT, "channels_first"]
    return [
        _layer(layers.Flatten, *ANY, data_format=[ABSENT, "channels_first"]),
        _layer(
            layers.Reshape,
            TOKENS,
            target_shape=[(6, 2), (2, 6), (4, 3), (12,), (-1, 2), (-1,), (3, 2, 2), (1, 3, 4)],
        ),
        _layer(layers.Permute, TOKENS, dims=[(2, 1), (1, 2)]),
        _layer(layers.Permute, GRID, dims=[(2, 1, 3), (3, 1, 2), (1, 3, 2)]),
        _layer(layers.RepeatVector, FLAT, n=[1, 3]),
        _layer(layers.UpSampling1D, TOKENS, size=[2, 3]),
        _layer(
            layers.UpSampling2D,
            (2, 3, 2),
            size=[2, (1, 3)],
            data_format=grids,
            interpolation=["nearest", "nearest", "bilinear"],
        ),
        _layer(layers.UpSampling3D, (2, 2, 2, 1), size=[2, (1, 2, 1)], data_format=grids),
        _layer(layers.Cropping1D, (4, 2), cropping=[1, (0, 2)]),
        _layer(layers.Cropping2D, (4, 4, 4), cropping=[1, ((0, 1), (2, 0))], data_format=grids),
        _layer(layers.Cropping3D, (3, 3, 3, 3), cropping=[1, ((0, 1), (1, 0), (0, 0))]),
        _layer(layers.ZeroPadding1D, TOKENS, padding=[1, (0, 2)]),
        _layer(layers.ZeroPadding2D, GRID, padding=[1, ((0, 1), (2, 0))], data_format=grids),
        _layer(layers.ZeroPadding3D, VIDEO, padding=[1, ((0, 1), (1, 0), (0, 0))]),
    ]


_CAUSAL = np.tri(3, dtype=bool)
_BAND = np.tri(3, k=1, dtype=bool)[None]
_BLIND = np.array([[True, False, True], [False, False, False], [True, True, True]])
ATTENTION_MASKS = [ABSENT, ABSENT, _CAUSAL, _BAND, _BLIND[None]]


def _attention_layers():
    token_masks = ("query_mask", "value_mask", "key_mask")
    flags: dict[str, Any] = dict(use_causal_mask=[ABSENT, ABSENT, True])
    return [
        _layer(
            layers.MultiHeadAttention,
            TOKENS,
            tensors=tensors,
            masks=masks,
            num_heads=[1, 2],
            key_dim=[2, 3],
            value_dim=[ABSENT, 2],
            dropout=[0.0, 0.0, 0.3],
            use_bias=FLAG,
            output_shape=[ABSENT, 5],
            sliding_window=[ABSENT, ABSENT, ABSENT, 1, 2],
            call={**flags, "attention_mask": ATTENTION_MASKS},
        )
        for tensors, masks in (
            (("query", "value"), ()),
            (("query", "value"), token_masks[:2]),
            (("query", "value", "key"), token_masks),
        )
    ] + [
        _layer(
            layers.MultiHeadAttention,
            (2, 3, 4),
            tensors=("query", "value"),
            num_heads=[1, 2],
            key_dim=[2],
            attention_axes=[(2,), (1,), (1, 2), ABSENT],
            dropout=[0.0, 0.3],
        ),
        _layer(
            layers.GroupQueryAttention,
            TOKENS,
            tensors=("query", "value"),
            masks=token_masks[:2],
            head_dim=[2],
            num_query_heads=[2, 4],
            num_key_value_heads=[1, 2],
            use_bias=FLAG,
            dropout=[0.0, 0.3],
            call={**flags, "attention_mask": ATTENTION_MASKS},
        ),
        *(
            _layer(
                cls,
                TOKENS,
                tensors=("inputs",) * count,
                listed=True,
                use_scale=FLAG,
                call=flags,
                **more,
            )
            for cls, more in (
                (layers.Attention, dict(score_mode=["dot", "concat"])),
                (layers.AdditiveAttention, {}),
            )
            for count in (2, 3)
        ),
        *(
            _layer(
                cls,
                TOKENS,
                tensors=tensors,
                masks=masks,
                num_heads=[1, 2],
                key_dim=[2, 3],
                value_dim=[ABSENT, 2],
                use_bias=FLAG,
                call={**flags, "attention_mask": ATTENTION_MASKS[:4]},
                alike=True,
                **more,
            )
            for cls, more in (
                (
                    keras_lipattn.L2MultiHeadAttention,
                    dict(
                        output_shape=[ABSENT, 5],
                        dropout=[0.0, 0.3],
                        sliding_window=[ABSENT, ABSENT, 1, 2],
                        max_relative_position=[ABSENT, ABSENT, 1],
                        spectral_norm=[ABSENT, ABSENT, 0.5],
                        lipschitz_bound=[ABSENT, ABSENT, 0.5],
                        lipschitz_norm=["l2", "token", "linf"],
                    ),
                ),
                (
                    keras_lipattn.ScaledCosineAttention,
                    dict(temperature=[1.0, 4.0], lipschitz_bound=[ABSENT, ABSENT, 0.5]),
                ),
                (
                    SelfAttention,
                    dict(
                        make=PositionAttention,
                        lipschitz_bound=[ABSENT, ABSENT, 0.5],
                        spectral_norm=[ABSENT, 1.0],
                    ),
                ),
            )
            for tensors, masks in (
                (("query",), ("query_mask",)),
                (("query", "value"), token_masks[:2]),
            )
        ),
        _layer(
            keras_lipattn.L2MultiHeadAttention,
            (2, 3, 4),
            num_heads=[2],
            key_dim=[2],
            attention_axes=[(2,), (1,), (1, 2), ABSENT],
        ),
        *_bounded_attention_layers(flags),
    ]


def _bounded_attention_layers(flags):
    token_masks = ("query_mask", "value_mask", "key_mask")
    pair, triple = ("query", "value"), ("query", "value", "key")
    both = dict(
        num_heads=[2, 4],
        key_dim=[2, 3],
        value_dim=[ABSENT, 2],
        token_radius=[0.4, 1.0, 3.0],
        use_bias=FLAG,
        output_shape=[ABSENT, ABSENT, 5],
        dropout=[0.0, 0.0, 0.3],
        sliding_window=[ABSENT, ABSENT, 1, 2],
        max_relative_position=[ABSENT, 1, 2],
        lipschitz_bound=[ABSENT, ABSENT, 0.5],
        lipschitz_norm=["l2", "token", "linf"],
    )
    shared = {
        keras_lipattn.BoundedMultiHeadAttention: dict(num_key_value_heads=[ABSENT, 1, 2]),
        keras_lipattn.L2MultiHeadAttention: dict(spectral_norm=[ABSENT, ABSENT, 0.5]),
    }
    lengths = {
        keras_lipattn.BoundedMultiHeadAttention: [((3, 4), (2, 5)), ((4, 3), (4, 2), (4, 3))],
        keras_lipattn.L2MultiHeadAttention: [((3, 4), (2, 4)), ((2, 3), (4, 3), (4, 3))],
    }
    masked = {**flags, "attention_mask": ATTENTION_MASKS}
    return [
        *(
            _layer(cls, TOKENS, tensors=tensors, masks=masks, call=masked, **both, **more)
            for cls, more in shared.items()
            for tensors, masks in (
                (("query",), ("query_mask",)),
                (pair, token_masks[:2]),
                (triple, token_masks),
            )
        ),
        *(
            _layer(cls, shapes, tensors=(pair, triple)[index], call=flags, **both, **shared[cls])
            for cls, given in lengths.items()
            for index, shapes in enumerate(given)
        ),
        *(
            _layer(
                cls,
                (2, 3, 4),
                tensors=pair,
                num_heads=[2],
                key_dim=[2],
                token_radius=[0.7],
                attention_axes=[(2,), (1,), (1, 2), ABSENT],
            )
            for cls in shared
        ),
    ]


def _other_layers():
    rate = dict(rate=[0.5])
    return [
        _layer(layers.Embedding, (3,), input_dim=[6], output_dim=[4], mask_zero=FLAG, integers=6),
        _layer(
            layers.ReversibleEmbedding,
            (3,),
            input_dim=[6],
            output_dim=[4],
            mask_zero=FLAG,
            integers=6,
        ),
        _layer(
            layers.ReversibleEmbedding,
            TOKENS,
            input_dim=[6],
            output_dim=[4],
            tie_weights=FLAG,
            logit_soft_cap=[ABSENT, 1.0],
            call={"reverse": [True]},
        ),
        _layer(layers.Masking, TOKENS, GRID, mask_value=[0.0, 1.0]),
        *(
            _layer(cls, *ANY, **rate)
            for cls in (layers.Dropout, layers.AlphaDropout, layers.GaussianDropout)
        ),
        _layer(layers.GaussianNoise, *ANY, stddev=[0.5]),
        _layer(layers.SpatialDropout1D, TOKENS, **rate),
        _layer(layers.SpatialDropout2D, GRID, **rate),
        _layer(layers.SpatialDropout3D, VIDEO, **rate),
        _layer(layers.ActivityRegularization, *ANY, l2=[0.1]),
        _layer(layers.Identity, *ANY),
        *(
            _layer(cls, TOKENS, units=[2], return_sequences=FLAG, masks=("mask",))
            for cls in (layers.SimpleRNN, layers.LSTM, layers.GRU)
        ),
        _layer(layers.RNN, TOKENS, cell=[Made("GRUCell(2)", lambda: layers.GRUCell(2))]),
        _layer(layers.Bidirectional, TOKENS, layer=[Made("LSTM(2)", lambda: layers.LSTM(2))]),
        _layer(layers.ConvLSTM1D, (2, 3, 2), filters=[2], kernel_size=[2]),
        _layer(layers.ConvLSTM2D, (2, 3, 3, 2), filters=[2], kernel_size=[2]),
        _layer(layers.ConvLSTM3D, (2, 2, 2, 2, 1), filters=[2], kernel_size=[2]),
    ]


def _image_layers():
    image = (4, 4, 3)
    sizes = dict(height=[2, 3], width=[2, 4])
    return [
        _layer(layers.RandomFlip, image),
        _layer(layers.RandomRotation, image, factor=[0.2]),
        _layer(layers.RandomZoom, image, height_factor=[0.2]),
        _layer(layers.RandomTranslation, image, height_factor=[0.2], width_factor=[0.2]),
        _layer(layers.RandomContrast, image, factor=[0.2]),
        _layer(layers.RandomBrightness, image, factor=[0.2]),
        _layer(layers.RandomCrop, image, **sizes),
        _layer(layers.CenterCrop, image, **sizes),
        _layer(
            layers.Resizing,
            image,
            height=[2, 3, 6],
            width=[2, 5],
            interpolation=["bilinear", "nearest"],
        ),
    ]


def _augmentation_layers():
    """Layers that change images only in training, by name: Keras versions differ in them."""
    image = (4, 4, 3)
    factor = dict(factor=[0.2])
    config: dict[str, dict] = {
        "AugMix": {},
        "CutMix": {},
        "MaxNumBoundingBoxes": dict(max_number=[2]),
        "MixUp": {},
        "RandAugment": {},
        "RandomColorDegeneration": factor,
        "RandomColorJitter": dict(brightness_factor=[0.2], hue_factor=[ABSENT, 0.2]),
        "RandomElasticTransform": {},
        "RandomErasing": {},
        "RandomGaussianBlur": dict(kernel_size=[3, 5]),
        "RandomGrayscale": factor,
        "RandomHue": factor,
        "RandomInvert": {},
        "RandomPerspective": {},
        "RandomPosterization": dict(factor=[4]),
        "RandomSaturation": factor,
        "RandomSharpness": factor,
        "RandomShear": dict(x_factor=[0.2], y_factor=[0.0, 0.2]),
        "Solarization": dict(threshold_factor=[0.0, 0.5]),
    }
    if hasattr(layers, "Equalization"):
        config["Equalization"] = dict(make=_equalization_of_models())
    return [
        _layer(getattr(layers, name), image, **choices)
        for name, choices in config.items()
        if hasattr(layers, name)
    ]


def _equalization_of_models():
    """A layer `Equalization` that works in a Functional model."""

    class Equalization(layers.Equalization):
        # The one of Keras returns its input itself, which makes a cycle in the graph.
        def compute_output_spec(self, inputs, **kwargs):
            return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    return Equalization


class FoldedAverage(NamedTuple):
    """Projections of `PositionAttention`."""

    projection: Any
    output: Any


class PositionAttention(SelfAttention):
    """A custom kind of attention, with the weights `softmax_j(-|i - j|)`."""

    def add_kernels(self):
        heads, size = self.num_heads, self.value_dim
        self.add_attention_kernel("value_kernel", (self.features, heads * size))
        self.add_attention_kernel("output_kernel", (heads * size, *self.output_token))

    def fold(self, kernels, factors, xp):
        return FoldedAverage(*(k * factor for k, factor in zip(kernels, factors, strict=True)))

    def matrices(self, weights, norm, xp):
        return {"product": xp.matmul(weights.projection, weights.output)}

    def bound(self, weights, norms, norm, tokens, mask, xp):
        if norm == "token":
            return norms["product"]
        if norm == "l2":
            # Rows sum to one, columns to at most the number of tokens.
            return math.inf if tokens is None else math.sqrt(tokens) * norms["product"]
        return xp.max(xp.sum(xp.abs(xp.matmul(weights.projection, weights.output)), axis=0))

    def attend(self, tokens, weights, mask, training, return_scores):
        position = ops.arange(ops.shape(tokens)[1], dtype=tokens.dtype)
        scores = -ops.abs(ops.expand_dims(position, 1) - position)
        pairs = mask.softmax(scores[None, None])
        return ops.matmul(pairs[:, 0], ops.matmul(tokens, weights.projection)), None, pairs


class Halved(LipschitzLayer):
    """A custom layer with a method `lipschitz` and no rule."""

    def call(self, inputs):
        return 0.5 * inputs + 1.0

    def lipschitz(self, sequence_length=None, norm="l2", mask="full", **kwargs):
        return keras_lipattn.LipschitzBound(
            value=0.5, norm=norm, kind="certified", theorem="a multiple"
        )


def _own_layers():
    def attention():
        return keras_lipattn.L2MultiHeadAttention(2, 2)

    def perceptron(activation):
        return lambda: keras.Sequential(
            [
                keras_lipattn.SpectralDense(6, activation=activation),
                keras_lipattn.SpectralDense(4),
            ]
        )

    branches = [
        Made("L2MultiHeadAttention(2, 2)", attention),
        Made("Sequential([SpectralDense(6, 'tanh'), SpectralDense(4)])", perceptron("tanh")),
        Made("Sequential([SpectralDense(6, 'sigmoid'), SpectralDense(4)])", perceptron("sigmoid")),
    ]
    steps = [
        Made("SpectralDense(4, 'sigmoid')", lambda: keras_lipattn.SpectralDense(4, "sigmoid")),
        Made("MaxMin()", lambda: keras_lipattn.MaxMin()),
    ]
    return [
        _layer(LipschitzLayer, *ANY, make=Halved),
        _layer(
            keras_lipattn.SpectralDense,
            *ANY,
            units=[1, 3, 5],
            activation=_IN_LAYERS,
            use_bias=FLAG,
            spectral_norm=[None, 0.5, 1.0, 100.0],
        ),
        _layer(
            keras_lipattn.OrthogonalDense,
            *ANY,
            units=[1, 3, 5],
            activation=_IN_LAYERS,
            use_bias=FLAG,
        ),
        _layer(
            keras_lipattn.NormalizedDense,
            *ANY,
            units=[1, 3, 5],
            activation=_IN_LAYERS,
            use_bias=FLAG,
        ),
        _layer(
            keras_lipattn.SpectralConv2D,
            (4, 3, 2),
            (5, 5, 1),
            filters=[1, 3],
            kernel_size=[1, 2, 3, (3, 2)],
            strides=[1, 2, (1, 2)],
            padding=["valid", "same"],
            activation=_IN_LAYERS,
            spectral_norm=[None, 0.5, 1.0, 100.0],
        ),
        _layer(
            keras_lipattn.OrthogonalConv2D,
            (4, 3, 2),
            (5, 5, 11),
            filters=[1, 3],
            kernel_size=[ABSENT, 1, 3, 5],
            activation=_IN_LAYERS,
            use_bias=FLAG,
        ),
        _layer(keras_lipattn.SpaceToDepth, (4, 3), (4, 2, 1), (2, 2, 3), block_size=[1, 2]),
        _layer(keras_lipattn.NormPooling, (4, 3), (4, 2, 1), pool_size=[ABSENT, None, 1, 2]),
        _layer(keras_lipattn.NormPooling, (4, 6, 1), pool_size=[(2, 3), (4, 1), [1, 2]]),
        _layer(keras_lipattn.HalfAbs, *ANY[:2]),
        _layer(keras_lipattn.MaxMin, *ANY[:2]),
        _layer(keras_lipattn.PositionEmbedding, TOKENS, max_length=[ABSENT, 5]),
        _layer(
            keras_lipattn.InvertibleResidual,
            TOKENS,
            branch=branches,
            coefficient=[0.5, 0.9],
            norm=["l2", "token"],
            masks=("mask",),
        ),
        _layer(
            keras_lipattn.InvertibleSequential,
            TOKENS,
            layers=[
                Made(
                    "[InvertibleResidual(SpectralDense(4)) for _ in range(2)]",
                    lambda: [
                        keras_lipattn.InvertibleResidual(keras_lipattn.SpectralDense(4))
                        for _ in range(2)
                    ],
                )
            ],
            masks=("mask",),
        ),
        _layer(
            keras_lipattn.ContinuousDepth,
            TOKENS,
            branch=[*branches, *steps],
            steps=[1, 2],
            method=["rk4", "euler"],
            decay=[0.0, 0.5],
            masks=("mask",),
        ),
    ]


# Operations ------------------------------------------------------------------------------------


def _activation_operations():
    activations = keras.activations
    plain = {
        "HardSigmoid": ops.hard_sigmoid,
        "HardSilu": ops.hard_silu,
        "HardTanh": ops.hard_tanh,
        "LogSigmoid": ops.log_sigmoid,
        "Mish": lambda x: Mish()(x),
        "Relu": ops.relu,
        "Relu6": ops.relu6,
        "Selu": ops.selu,
        "Sigmoid": ops.sigmoid,
        "Silu": ops.silu,
        "Softplus": ops.softplus,
        "Softsign": ops.softsign,
        "SparsePlus": ops.sparse_plus,
        "SparseSigmoid": ops.sparse_sigmoid,
        "Tanh": ops.tanh,
        "TanhShrink": ops.tanh_shrink,
        "Exp": ops.exp,
    }
    axes = [ABSENT, -1, 1, 0]
    return [
        *(_operation(target, function, *ANY) for target, function in plain.items()),
        _operation(
            "ReLU",
            activations.relu,
            *ANY,
            negative_slope=[0.1, 1.5],
            max_value=[None, 2.0],
            threshold=[0.0, 0.5],
        ),
        _operation("Glu", ops.glu, TOKENS, axis=[ABSENT, -1]),
        _operation("HardShrink", ops.hard_shrink, *ANY, threshold=[ABSENT, 0.1]),
        _operation("Sparsemax", ops.sparsemax, TOKENS, axis=axes[:2]),
        _operation("Threshold", ops.threshold, *ANY, threshold=[0.5], default_value=[0.5, 0.0]),
        _operation("Gelu", ops.gelu, *ANY, approximate=[ABSENT, True, False]),
        _operation("LeakyRelu", ops.leaky_relu, *ANY, negative_slope=[ABSENT, 0.5, 2.0]),
        _operation("Elu", ops.elu, *ANY, alpha=[ABSENT, 0.5, 3.0, -1.0]),
        _operation("Celu", ops.celu, *ANY, alpha=[ABSENT, 0.5, 3.0, -1.0]),
        _operation("SoftShrink", ops.soft_shrink, *ANY, threshold=[ABSENT, 0.1]),
        _operation("Squareplus", ops.squareplus, *ANY, b=[ABSENT, 0, 1, 9]),
        _operation("Softmax", ops.softmax, TOKENS, GRID, axis=[*axes, (1, 2)]),
        _operation("Softmax", ops.softmax, FLAT),
        _operation("LogSoftmax", ops.log_softmax, TOKENS, axis=axes),
    ]


_ROW = np.array([[2.0, -1.0, 0.5, 1.0]])
_COLUMN = np.array([[[2.0], [-1.0], [0.5]]])
# The batch size of the attack.
_BATCH = np.array([1.0, -1.0, 3.0]).reshape(3, 1, 1)
_CONSTANTS = [1.5, -0.5, _ROW, _COLUMN, _ROW[:, None], _BATCH]


def _arithmetic_operations():
    two = dict(
        Add=ops.add,
        Subtract=ops.subtract,
        Multiply=ops.multiply,
        Maximum=ops.maximum,
        Minimum=ops.minimum,
        Fmax=ops.fmax,
        Fmin=ops.fmin,
        Divide=ops.divide,
        TrueDivide=ops.true_divide,
    )
    one = dict(
        Negative=ops.negative,
        Absolute=ops.absolute,
        Abs=lambda x: Abs()(x),
        Fabs=ops.fabs,
        Sin=ops.sin,
        Arctan=ops.arctan,
        Arcsinh=ops.arcsinh,
        Cos=ops.cos,
        Erf=ops.erf,
        Square=ops.square,
    )
    pair = ((3, 4), (1, 4)), ((3, 4), (4,)), ((3, 1), (1, 4)), ((3, 4), (2, 3, 4))
    clips: dict[str, Any] = dict(x_min=[-1.0, 0.5, 1.0, 2.0], x_max=[1.0, 2.0, -1.0])
    return [
        *(_operation(target, function, *ANY) for target, function in one.items()),
        *(
            _operation(target, function, TOKENS, GRID, *pair, tensors=("x1", "x2"))
            for target, function in two.items()
        ),
        *(
            _operation(target, function, TOKENS, (1, 4), tensors=("x1",), x2=_CONSTANTS)
            for target, function in two.items()
        ),
        *(
            _operation(target, function, TOKENS, (3, 1), tensors=("x2",), x1=_CONSTANTS)
            for target, function in two.items()
        ),
        _operation("Add", lambda x: 1.0 + x, *ANY),
        _operation("Subtract", lambda x: 1.0 - x, *ANY),
        _operation("Multiply", lambda x: x * 3.0, *ANY),
        _operation("Multiply", lambda x: x * ops.sigmoid(x), *ANY),
        _operation(
            "Multiply", lambda x: x * ops.arange(0, ops.shape(x)[1], dtype=x.dtype)[:, None], TOKENS
        ),
        _operation("TrueDivide", lambda x: x / 4.0, *ANY),
        _operation("Where", lambda x: ops.where(x > 0, x, 0.1 * x), *ANY),
        _operation("Clip", ops.clip, *ANY, **clips),
        _operation(
            "Where",
            ops.where,
            TOKENS,
            tensors=("x1", "x2"),
            condition=[np.eye(3, 4) > 0, np.ones((1, 1, 4), bool), _BATCH > 0],
        ),
        _operation(
            "Where", ops.where, TOKENS, tensors=("x1",), condition=[np.eye(3, 4) > 0], x2=[2.0]
        ),
    ]


def _einsum(subscripts, x1, x2):
    return ops.einsum(subscripts, x1, x2)


def _linear_operations():
    kernel = np.array([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5], [1.0, 1.0]])
    mixing = np.array([[1.0, 2.0, 0.0], [0.5, -1.0, 1.0]])
    tables = np.stack([kernel, -kernel, 3.0 * kernel])
    axes: list[Any] = [1, -1, 2, (1, 2), None, 0, (0, 1)]
    reductions: dict[str, Any] = dict(axis=axes, keepdims=[ABSENT, True])
    return [
        _operation(
            "Matmul", ops.matmul, TOKENS, (*GRID[1:], 4), tensors=("x1",), x2=[kernel, tables]
        ),
        _operation("Matmul", ops.matmul, FLAT, tensors=("x1",), x2=[kernel, kernel[:, 0]]),
        _operation(
            "Matmul", ops.matmul, TOKENS, tensors=("x2",), x1=[mixing, np.stack([mixing] * 3)]
        ),
        _operation("Matmul", ops.matmul, ((3, 4), (4, 2)), tensors=("x1", "x2")),
        _operation("Matmul", lambda x: x @ kernel, *ANY[:2]),
        _operation(
            "Einsum",
            _einsum,
            TOKENS,
            tensors=("x1",),
            subscripts=["btd,df->btf", "...d,df->...f", "btd,df->bft", "btd,df->bf", "btd,df->tf"],
            x2=[kernel],
        ),
        _operation(
            "Einsum",
            _einsum,
            TOKENS,
            tensors=("x2",),
            subscripts=["st,btd->bsd", "st,btd->bds", "st,btd->bd", "bt,btd->btd"],
            x1=[mixing, np.array([[1.0, -2.0, 0.5]] * 3)],
        ),
        _operation(
            "Einsum",
            _einsum,
            TOKENS,
            tensors=("x1", "x2"),
            subscripts=["btd,bsd->bts", "btd,btd->bt", "btd,csd->bts", "btd,ctd->btc"],
        ),
        *(
            _operation(target, function, TOKENS, GRID, **reductions)
            for target, function in dict(
                Mean=ops.mean,
                Sum=ops.sum,
                Max=ops.max,
                Min=ops.min,
                Amax=ops.amax,
                Amin=ops.amin,
                Logsumexp=ops.logsumexp,
            ).items()
        ),
    ]


def _shape_operations():
    pads = [((0, 0), (1, 0), (0, 2)), ((0, 0), (1, 1), (1, 0)), ((1, 0), (0, 0), (0, 0)), 1]
    slices = {
        "[:, 0]": np.s_[:, 0],
        "[:, 1:, ::2]": np.s_[:, 1:, ::2],
        "[..., 1]": np.s_[..., 1],
        "[:, ::-1]": np.s_[:, ::-1],
        "[:, -1:]": np.s_[:, -1:],
        "[:, None]": np.s_[:, None],
        "[:1]": np.s_[:1],
        "[0]": np.s_[0],
        "[::-1]": np.s_[::-1],
        "[1:]": np.s_[1:],
    }
    lists = dict(tensors=("xs",) * 2, listed=True)
    return [
        _operation(
            "Concatenate", ops.concatenate, TOKENS, GRID, **lists, axis=[1, -1, 2, 0, ABSENT]
        ),
        _operation(
            "Stack", ops.stack, TOKENS, tensors=("x",) * 2, listed=True, axis=[1, -1, 2, 3, 0]
        ),
        _operation(
            "Reshape",
            ops.reshape,
            (4, 6),
            newshape=[
                (-1, 24),
                (-1, 4, 2, 3),
                (-1, 6, 4),
                (-1, 2, 6),
                (-1, 6),
                (2, -1, 6),
                (3, 4, 6),
                (1, -1),
            ],
        ),
        _operation(
            "Reshape", lambda x: ops.reshape(ops.repeat(x, 2, axis=0), (-1, 2, 3, 4)), TOKENS
        ),
        _operation("Reshape", lambda x: ops.reshape(x, (ops.shape(x)[0], -1)), TOKENS),
        _operation(
            "Reshape", lambda x: ops.reshape(ops.tile(x, (2, 1, 1)), (2, -1, 3, 4))[0], TOKENS
        ),
        _operation("Ravel", ops.ravel, TOKENS),
        _operation("Squeeze", ops.squeeze, (1, 4), (3, 1), axis=[1, 2, -1, ABSENT]),
        _operation("ExpandDims", ops.expand_dims, *ANY, axis=[1, -1, 2, 0]),
        _operation("Transpose", ops.transpose, TOKENS, axes=[(0, 2, 1), (1, 0, 2), (2, 1, 0)]),
        _operation("Transpose", ops.transpose, GRID, axes=[(0, 2, 1, 3), (0, 3, 1, 2), ABSENT]),
        _operation("Swapaxes", ops.swapaxes, TOKENS, axis1=[1, -1, 0], axis2=[2, 1]),
        _operation("Moveaxis", ops.moveaxis, GRID, source=[1, -1, 2, 0], destination=[2, 1, 3, -1]),
        _operation(
            "GetItem",
            lambda x, key: x[key.make()],
            TOKENS,
            key=[_Slice(text, value) for text, value in slices.items()],
        ),
        _operation(
            "Slice",
            lambda x, start, size: ops.slice(x, start, size),
            TOKENS,
            start=[(0, 1, 0), (0, 0, 2), (1, 0, 0)],
            size=[(3, 2, 2), (2, 2, 2)],
        ),
        _operation(
            "Split",
            ops.split,
            TOKENS,
            indices_or_sections=[2, [1], [1, 3], 3],
            axis=[-1, 1, 2, 0],
        ),
        _operation("Unstack", ops.unstack, TOKENS, num=[ABSENT, 3, 4], axis=[1, -1, 2, 0]),
        _operation("Flip", ops.flip, TOKENS, axis=[1, -1, (1, 2), 0, ABSENT]),
        _operation("Roll", ops.roll, TOKENS, shift=[1, -2], axis=[1, -1, 0, ABSENT]),
        _operation(
            "Pad",
            ops.pad,
            TOKENS,
            pad_width=pads,
            mode=[ABSENT, "constant", "reflect", "symmetric"],
        ),
        _operation("Pad", ops.pad, TOKENS, pad_width=pads, constant_values=[2.0]),
        _operation("Repeat", ops.repeat, TOKENS, repeats=[2, 3], axis=[1, -1, 2, 0, ABSENT]),
        _operation("Repeat", ops.repeat, TOKENS, repeats=[[1, 2, 1]], axis=[1, 0]),
        _operation(
            "Tile",
            ops.tile,
            TOKENS,
            repeats=[(1, 2, 1), (1, 1, 3), (2, 1, 1), (2, 1, 1, 1), 2, (1, 2, 3)],
        ),
        _operation(
            "BroadcastTo",
            ops.broadcast_to,
            (1, 4),
            shape=[(3, 2, 4), (1, 3, 4), (2, 3, 1, 4)],
        ),
        _operation(
            "Flip", lambda x: ops.reshape(ops.flip(ops.reshape(x, (-1, 4)), 0), (-1, 3, 4)), TOKENS
        ),
    ]


@dataclasses.dataclass(frozen=True)
class _Slice:
    """An index in brackets."""

    text: str
    value: Any

    def make(self):
        return self.value

    def __repr__(self):
        return self.text


def _other_operations():
    attention: dict[str, Any] = dict(
        scale=[ABSENT, 0.5],
        is_causal=[ABSENT, True],
        mask=[ABSENT, np.tri(3, dtype=bool)[None, None]],
    )
    gains = np.array([2.0, -1.0, 0.5, 1.0])
    filled: dict[str, Any] = dict(
        ZerosLike=ops.zeros_like, OnesLike=ops.ones_like, EmptyLike=ops.empty_like
    )
    heads = (3, 2, 2)
    return [
        _operation(
            "DotProductAttention",
            ops.dot_product_attention,
            heads,
            tensors=("query", "key", "value"),
            **attention,
        ),
        _operation(
            "Take", ops.take, TOKENS, indices=[[0, 2], 1, [1, 1, 0]], axis=[1, -1, 0, ABSENT]
        ),
        _operation(
            "LayerNorm",
            ops.layer_normalization,
            TOKENS,
            gamma=[ABSENT, gains],
            beta=[ABSENT, gains],
            epsilon=[1e-3, 0.1],
        ),
        _operation(
            "LayerNorm", ops.layer_normalization, TOKENS, axis=[ABSENT, 1, (1, 2), 0], epsilon=[0.1]
        ),
        _operation(
            "RMSNorm",
            ops.rms_normalization,
            TOKENS,
            scale=[ABSENT, gains],
            epsilon=[1e-3, 0.1],
        ),
        _operation("RMSNorm", ops.rms_normalization, TOKENS, axis=[1, (1, 2), 0], epsilon=[0.1]),
        _operation(
            "Normalize",
            ops.normalize,
            TOKENS,
            axis=[ABSENT, -1, 1, 0],
            order=[ABSENT, 2, 1],
            epsilon=[ABSENT, 1e-3, 0.1],
        ),
        *(
            _operation(target, lambda x, f=function: x + f(x), *ANY)
            for target, function in filled.items()
        ),
        *(
            _operation(target, lambda x, f=function: x * f(x), *ANY)
            for target, function in filled.items()
            if target != "EmptyLike"
        ),
        _operation(
            "FullLike",
            lambda x, fill_value: x * ops.full_like(x, fill_value),
            *ANY,
            fill_value=[2.0, _ROW[0, 0]],
        ),
        _operation("Copy", ops.copy, *ANY),
        _operation("ConvertToTensor", ops.convert_to_tensor, *ANY),
        _operation("StopGradient", ops.stop_gradient, *ANY, tensors=("variable",)),
        _operation("StopGradient", lambda x: x + ops.stop_gradient(x), *ANY),
        _operation("Array", ops.array, *ANY),
        _operation("View", ops.view, *ANY, dtype=[ABSENT, "float64", "float16", "int32"]),
        _operation("Cast", ops.cast, *ANY, dtype=["float64", "int32", "bool"]),
        _operation("SaturateCast", ops.saturate_cast, *ANY, dtype=["float64", "int32"]),
    ]


def _window_operations():
    kernel = np.array([[[1.0, -1.0], [0.5, 2.0]], [[0.0, 1.0], [1.0, 1.0]]])
    windows: dict[str, Any] = dict(pool_size=[2], strides=[ABSENT, 1, 2], padding=[ABSENT, "same"])
    return [
        _operation("Sort", ops.sort, TOKENS, axis=[ABSENT, 1, 0]),
        _operation("TopK", lambda x, k: ops.top_k(x, k)[0], TOKENS, k=[1, 2]),
        _operation("Cumsum", ops.cumsum, TOKENS, axis=[1, -1, 0]),
        _operation("Diff", ops.diff, TOKENS, tensors=("a",), axis=[ABSENT, 1, 0], n=[ABSENT, 1, 2]),
        _operation("Norm", ops.norm, TOKENS, axis=[-1, 1, ABSENT], ord=[ABSENT, 1]),
        _operation("Std", ops.std, TOKENS, axis=[-1, 1, ABSENT, 0], keepdims=[ABSENT, True]),
        _operation("Var", ops.var, TOKENS, axis=[-1, 1, ABSENT, 0], keepdims=[ABSENT, True]),
        _operation(
            "Conv",
            ops.conv,
            (5, 2),
            tensors=("inputs",),
            kernel=[kernel],
            strides=[1, 2],
            padding=["valid", "same"],
        ),
        _operation("AveragePool", ops.average_pool, (5, 2), tensors=("inputs",), **windows),
        _operation("MaxPool", ops.max_pool, (5, 2), tensors=("inputs",), **windows),
        _operation(
            "ExtractPatches",
            ops.image.extract_patches,
            (4, 4, 2),
            tensors=("images",),
            size=[2, (2, 1)],
            strides=[ABSENT, 1, 2],
            padding=["valid", "same"],
        ),
        _operation(
            "Einsum",
            lambda subscripts, x: ops.einsum(subscripts, x),
            TOKENS,
            tensors=("x",),
            subscripts=["btd->bdt", "btd->bd", "btd->b", "btd->td", "b...d->bd..."],
        ),
    ]


def _copying_operations():
    """Operations whose outputs are entries of their input, or zeros."""
    rows = np.array([[[0, 2, 1, 0]]])
    columns = np.array([[[3, 0, 0, 1, 2]] * 3])
    cases = [
        _operation(
            "ArraySplit",
            ops.array_split,
            TOKENS,
            indices_or_sections=[2, 3, 4],
            axis=[-1, 1, 2, 0, ABSENT],
        ),
        _operation("Hsplit", ops.hsplit, TOKENS, GRID, indices_or_sections=[[1], [1, 2]]),
        _operation("Hsplit", ops.hsplit, FLAT, indices_or_sections=[2, [1, 3]]),
        _operation("Vsplit", ops.vsplit, TOKENS, FLAT, indices_or_sections=[[1], [1, 2]]),
        _operation("Dsplit", ops.dsplit, TOKENS, indices_or_sections=[2, [1, 3]]),
        _operation("Dsplit", ops.dsplit, GRID, indices_or_sections=[[1], [2]]),
        _operation("TakeAlongAxis", ops.take_along_axis, TOKENS, indices=[rows], axis=[1, 0]),
        _operation("TakeAlongAxis", ops.take_along_axis, TOKENS, indices=[columns], axis=[2, -1]),
        _operation(
            "TakeAlongAxis",
            ops.take_along_axis,
            FLAT,
            indices=[np.array([[1, 1, 0]]), np.array([0, 1])],
            axis=[1, -1, ABSENT],
        ),
        *(
            _operation(target, function, *ANY, k=[ABSENT, 1, -1])
            for target, function in dict(Tril=ops.tril, Triu=ops.triu).items()
        ),
        _operation(
            "Diagonal", ops.diagonal, TOKENS, GRID, offset=[ABSENT, 1, -1], axis1=[1, 0], axis2=[2]
        ),
        _operation("Diagonal", ops.diagonal, GRID, axis1=[1, -1], axis2=[2], offset=[ABSENT, 1]),
        _operation(
            "Rot90",
            ops.rot90,
            TOKENS,
            (3, 3, 2),
            tensors=("array",),
            k=[ABSENT, 2, 3],
            axes=[(1, 2), (2, 1), (0, 1), ABSENT],
        ),
    ]
    formats = [ABSENT, "channels_first"]
    if hasattr(ops, "depth_to_space"):
        cases += [
            _operation(
                "DepthToSpace", ops.depth_to_space, (2, 2, 4), block_size=[2], data_format=[ABSENT]
            ),
            _operation(
                "DepthToSpace",
                ops.depth_to_space,
                (4, 2, 3),
                block_size=[2],
                data_format=formats[1:],
            ),
            _operation(
                "SpaceToDepth", ops.space_to_depth, (4, 2, 4), block_size=[2], data_format=formats
            ),
        ]
    if hasattr(ops, "unfold"):
        cases.append(
            _operation(
                "Unfold",
                ops.unfold,
                (2, 4, 3),
                kernel_size=[2, (2, 1)],
                dilation=[ABSENT, (1, 2)],
                padding=[ABSENT, 1],
                stride=[ABSENT, 2],
            )
        )
    return cases


def _image_operations():
    image = (3, 4, 3)
    formats = [ABSENT, ABSENT, "channels_first"]
    images: dict[str, Any] = dict(tensors=("images",), data_format=formats)
    edges = "top left bottom right".split()
    return [
        _operation(
            "Resize",
            ops.image.resize,
            image,
            size=[(2, 3), (6, 4), (1, 1)],
            interpolation=[ABSENT, "nearest", "bicubic"],
            **images,
        ),
        # TensorFlow has gradients of these only in float32.
        _operation(
            "Resize",
            ops.image.resize,
            image,
            size=[(2, 3), (6, 4), (1, 1)],
            interpolation=[ABSENT, "bicubic", "lanczos3", "lanczos5"],
            antialias=[True],
            single=True,
            **images,
        ),
        _operation(
            "Resize",
            ops.image.resize,
            image,
            (4, 2, 1),
            size=[(2, 3), (4, 2)],
            interpolation=["bilinear", "nearest"],
            crop_to_aspect_ratio=[ABSENT, True],
            **images,
        ),
        _operation(
            "Resize",
            ops.image.resize,
            image,
            (4, 2, 1),
            size=[(2, 3), (4, 2)],
            pad_to_aspect_ratio=[True],
            fill_value=[0.0, 2.0],
            **images,
        ),
        _operation("RGBToGrayscale", ops.image.rgb_to_grayscale, (3, 4, 3), (2, 2, 3), **images),
        _operation(
            "PadImages",
            ops.image.pad_images,
            image,
            **{f"{edge}_padding": [0, 1] for edge in edges},
            **images,
        ),
        _operation(
            "PadImages",
            ops.image.pad_images,
            image,
            top_padding=[0, 1],
            left_padding=[1],
            target_height=[5],
            target_width=[6],
            **images,
        ),
        _operation(
            "CropImages",
            ops.image.crop_images,
            image,
            **{f"{edge}_cropping": [0, 1] for edge in edges},
            **images,
        ),
        _operation(
            "CropImages",
            ops.image.crop_images,
            image,
            top_cropping=[0, 1],
            left_cropping=[1],
            target_height=[2],
            target_width=[2],
            **images,
        ),
    ]


def _product_operations():
    """Products with constants along one axis, and moments."""
    kernel = np.array([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5], [1.0, 1.0]])
    line = np.array([[[1.0, -1.0], [0.5, 2.0]], [[0.0, 1.0], [1.0, 1.0]]])
    plane = np.stack([line, -2.0 * line, line[::-1]])
    points = np.array([[[1.0, -1.0, 0.5], [0.5, 0.0, 2.0], [1.0, 1.0, 0.0], [0.0, 3.0, 1.0]]])
    strides: dict[str, Any] = dict(strides=[ABSENT, 1, 2], padding=["valid", "same"])
    dilations: dict[str, Any] = dict(dilation_rate=[ABSENT, 1, 2], padding=["valid", "same"])
    images: Any = ("inputs",)
    reductions: dict[str, Any] = dict(
        axes=[[1], [-1], [1, 2], [0], [0, 1]], keepdims=[ABSENT, True]
    )
    return [
        _operation("Dot", ops.dot, FLAT, TOKENS, (2, 3, 4), tensors=("x1",), x2=[kernel]),
        _operation("Dot", ops.dot, FLAT, TOKENS, tensors=("x1",), x2=[kernel[:, 0], 2.0]),
        _operation("Dot", ops.dot, TOKENS, tensors=("x2",), x1=[kernel.T[:, :3], 0.5]),
        _operation(
            "Tensordot",
            ops.tensordot,
            FLAT,
            TOKENS,
            (2, 3, 4),
            tensors=("x1",),
            x2=[kernel],
            axes=[1, [[-1], [0]], [-1, 0]],
        ),
        _operation(
            "Tensordot",
            ops.tensordot,
            TOKENS,
            tensors=("x1",),
            x2=[kernel, kernel[:3]],
            axes=[1, [[2], [0]], [[1], [0]]],
        ),
        _operation(
            "Tensordot",
            ops.tensordot,
            TOKENS,
            tensors=("x1",),
            x2=[np.stack([kernel, -kernel, 2.0 * kernel])],
            axes=[ABSENT, 2, [[1, 2], [0, 1]]],
        ),
        *(
            _operation(
                "DepthwiseConv",
                ops.depthwise_conv,
                shape,
                tensors=images,
                kernel=[values],
                **options,
            )
            for shape, values in (((5, 2), line), ((4, 4, 2), plane))
            for options in (strides, dilations)
        ),
        *(
            _operation(
                "SeparableConv",
                ops.separable_conv,
                shape,
                tensors=images,
                depthwise_kernel=[values],
                pointwise_kernel=[points if values is line else points[None]],
                **options,
            )
            for shape, values in (((5, 2), line), ((4, 4, 2), plane))
            for options in (strides, dilations)
        ),
        *(
            _operation(
                "ConvTranspose",
                ops.conv_transpose,
                shape,
                tensors=images,
                kernel=[values],
                **options,
            )
            for shape, values in (((4, 2), line), ((3, 2, 2), plane))
            for options in (strides, dilations)
        ),
        _operation("Moments", ops.moments, TOKENS, GRID, **reductions),
        _operation("Moments", lambda x, axes: ops.moments(x, axes)[1], TOKENS, axes=[[1], [-1]]),
    ]
