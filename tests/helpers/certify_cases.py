"""One generator of layers for every test of certificates: a rule that is new gets one line here."""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops
from keras.src.random.seed_generator import global_seed_generator

import keras_lipattn as kl


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """A layer, or a few of them, between an input and an output.

    Attributes:
        name: Name of the case.
        shape: Shape of one example.
        build: From the input to the output.
        attained: Norms in which the constant of the rule is attained to 1 %.
        points: Inputs to look at besides random ones; numbers fill the whole input.
        spread: Size of the random inputs.
        skip_norms: Norms without a finite constant.
        options: Further arguments of `certify`.
        dtype: Dtype policy; float32 for layers that TensorFlow has in no more.
    """

    name: str
    shape: tuple[int, ...]
    build: Callable
    attained: tuple[str, ...] = ()
    points: tuple = ()
    spread: float = 1.0
    skip_norms: tuple[str, ...] = ()
    options: tuple = ()
    dtype: str = "float64"


ALL = ("l2", "token", "linf")
BOTH = ("l2", "linf")
EUCLID = ("l2", "token")


def _case(name, shape, build, attained=(), **fields):
    return LayerCase(name, shape, build, attained, **fields)


def _layer(make, *args, **kwargs):
    """A case's `build` from a layer class: a fresh layer every time."""
    return lambda x: make(*args, **kwargs)(x)


def layer_cases() -> list[LayerCase]:
    """The layer kinds with a rule, with the arguments that change their constants."""
    return [
        *_dense_cases(),
        *_activation_cases(),
        *_convolution_cases(),
        *_normalization_cases(),
        *_pooling_cases(),
        *_reshaping_cases(),
        *_merging_cases(),
        *_operation_cases(),
        *_image_cases(),
        *_copy_cases(),
        *_sorting_cases(),
        *_convolution_operation_cases(),
        *_product_cases(),
        *_attention_cases(),
        *_own_cases(),
    ]


def _dense_cases():
    return [
        _case("dense", (3, 4), _layer(layers.Dense, 5), ALL),
        _case("dense_flat", (6,), _layer(layers.Dense, 3, use_bias=False), ALL),
        _case("dense_relu", (3, 4), _layer(layers.Dense, 5, activation="relu")),
        _case("einsum_last", (3, 4), _layer(layers.EinsumDense, "abc,cd->abd", (3, 5)), ALL),
        _case("einsum_ellipsis", (2, 3, 4), _layer(layers.EinsumDense, "...x,xy->...y", 5), ALL),
        _case("einsum_heads", (3, 4), _layer(layers.EinsumDense, "abc,cde->abde", (3, 2, 5)), ALL),
        _case(
            "einsum_swapped", (3, 4), _layer(layers.EinsumDense, "abc,cde->aebd", (5, 3, 2)), BOTH
        ),
        _case("einsum_tokens", (3, 4), _layer(layers.EinsumDense, "abc,bd->adc", (5, 4)), BOTH),
        _case("einsum_merge", (3, 2, 4), _layer(layers.EinsumDense, "abcd,cde->abe", (3, 5)), BOTH),
        _case("einsum_shared", (3, 4), _layer(layers.EinsumDense, "abc,bcd->abd", (3, 5)), BOTH),
        _case("dense_lora", (3, 4), _layer(layers.Dense, 5, lora_rank=2), ALL),
        _case("time_distributed", (3, 4), _layer(layers.TimeDistributed, layers.Dense(2)), ALL),
        _case(
            "spectral_normalization",
            (3, 4),
            _layer(layers.SpectralNormalization, layers.Dense(2)),
            ALL,
        ),
    ]


# Where the slope of an activation is largest.
_STEEPEST = {
    "gelu": 1.41421,
    "silu": 2.39936,
    "mish": 1.49068,
    "selu": -1e-6,
    "hard_silu": 2.999999,
    "celu": 1.0,
    "elu": 1.0,
    "relu": 1.0,
    "relu6": 1.0,
    "leaky_relu": 1.0,
    "softplus": 40.0,
    "squareplus": 400.0,
    "log_sigmoid": -40.0,
    "soft_shrink": 2.0,
    "sparse_plus": 2.0,
    "tanh_shrink": 40.0,
}


def _activation_cases():
    names = (
        "celu elu gelu hard_sigmoid hard_silu hard_tanh leaky_relu linear log_sigmoid mish relu "
        "relu6 selu sigmoid silu soft_shrink softplus softsign sparse_plus sparse_sigmoid "
        "squareplus tanh tanh_shrink"
    ).split()
    cases = [
        _case(
            f"activation_{name}",
            (2, 3),
            _layer(layers.Activation, name),
            ALL,
            points=(_STEEPEST.get(name, 0.0),),
            spread=3.0,
        )
        for name in names
    ]
    return [
        *cases,
        _case("softmax", (2, 4), _layer(layers.Softmax), ALL, points=("two_high",), spread=3.0),
        _case("softmax_axis", (3, 4), _layer(layers.Softmax, axis=1), spread=3.0),
        _case("softmax_axes", (3, 4), _layer(layers.Softmax, axis=(1, 2)), spread=3.0),
        _case(
            "log_softmax",
            (2, 4),
            _layer(layers.Activation, "log_softmax"),
            EUCLID,
            points=("one_high",),
            spread=3.0,
        ),
        _case("relu_slope", (2, 3), _layer(layers.ReLU, max_value=2.0, negative_slope=0.2), ALL),
        _case("leaky_steep", (2, 3), _layer(layers.LeakyReLU, 1.7), ALL, points=(-1.0,)),
        _case("elu_steep", (2, 3), _layer(layers.ELU, alpha=2.5), ALL, points=(-1e-6,)),
        _case("prelu", (2, 3), _layer(layers.PReLU), points=(-1.0, 1.0)),
        _case("prelu_shared", (2, 3), _layer(layers.PReLU, shared_axes=[1]), points=(-1.0,)),
        _case("gelu_tanh", (2, 3), lambda x: ops.gelu(x, True), ALL, points=(1.41421,)),
        _case("exponential", (2, 3), _bounded(_layer(layers.Activation, "exponential"))),
        _case(
            "dense_leaky_layer",
            (2, 3),
            _layer(layers.Dense, 4, activation=layers.LeakyReLU(1.5)),
        ),
    ]


def _bounded(build):
    return lambda x: build(layers.Activation("tanh")(x))


def _convolution_cases():
    conv1, conv2 = layers.Conv1D, layers.Conv2D
    same = dict(padding="same")
    return [
        _case("conv1d", (7, 2), _layer(conv1, 3, 3)),
        _case("conv1d_causal", (7, 2), _layer(conv1, 3, 3, padding="causal")),
        _case("conv1d_dilated", (9, 2), _layer(conv1, 3, 3, dilation_rate=2, **same)),
        _case("conv1d_patches", (8, 2), _layer(conv1, 3, 4, strides=4), BOTH),
        _case("conv1d_point", (5, 4), _layer(conv1, 3, 1), ALL),
        _case("conv1d_strided", (9, 2), _layer(conv1, 3, 3, strides=2, **same)),
        _case("conv2d", (5, 5, 2), _layer(conv2, 3, 3, **same)),
        _case("conv2d_patches", (4, 4, 2), _layer(conv2, 6, 2, strides=2), BOTH),
        _case("conv2d_groups", (5, 5, 4), _layer(conv2, 6, 3, groups=2)),
        _case("conv2d_strided", (5, 6, 2), _layer(conv2, 3, (3, 2), strides=(2, 1), **same)),
        _case("conv2d_relu", (4, 4, 2), _layer(conv2, 3, 3, activation="relu")),
        _case("conv2d_wide", (12, 12, 2), _layer(conv2, 2, 3, **same)),
        _case("conv3d", (3, 3, 3, 2), _layer(layers.Conv3D, 2, 2)),
        _case("depthwise1d", (6, 3), _layer(layers.DepthwiseConv1D, 3, depth_multiplier=2)),
        _case("depthwise2d", (4, 4, 3), _layer(layers.DepthwiseConv2D, 3, **same)),
        _case("separable1d", (6, 3), _layer(layers.SeparableConv1D, 4, 3)),
        _case("separable2d", (4, 4, 3), _layer(layers.SeparableConv2D, 4, 3, **same)),
        _case("transposed1d", (4, 3), _layer(layers.Conv1DTranspose, 2, 3, strides=2)),
        _case("transposed1d_same", (4, 3), _layer(layers.Conv1DTranspose, 2, 3, **same)),
        _case("transposed2d", (3, 3, 2), _layer(layers.Conv2DTranspose, 3, 2, strides=2), ALL),
        _case("transposed2d_wide", (3, 3, 2), _layer(layers.Conv2DTranspose, 3, 3, strides=(1, 2))),
        _case("transposed3d", (2, 2, 2, 2), _layer(layers.Conv3DTranspose, 2, 2)),
        _case(
            "conv_then_batch_norm",
            (5, 5, 2),
            lambda x: layers.BatchNormalization()(layers.Conv2D(4, 2, strides=2)(x)),
        ),
    ]


def _normalization_cases():
    norm = layers.LayerNormalization
    return [
        _case("layer_norm", (3, 5), _layer(norm), EUCLID, points=(0.0, 2.0), spread=0.1),
        _case("layer_norm_plain", (4,), _layer(norm, scale=False), EUCLID, points=(1.0,)),
        _case("layer_norm_axis", (3, 5), _layer(norm, axis=1), points=(0.0,)),
        _case("layer_norm_axes", (3, 5), _layer(norm, axis=(1, 2)), points=(0.0,)),
        _case("rms_norm", (3, 5), _layer(layers.RMSNormalization), EUCLID, points=(0.0,)),
        _case("group_norm", (3, 6), _layer(layers.GroupNormalization, 3), points=(0.0,)),
        _case("batch_norm", (3, 4), _layer(layers.BatchNormalization), ALL),
        _case("batch_norm_axis", (3, 4), _layer(layers.BatchNormalization, axis=1), ALL),
        _case("unit_norm", (3, 4), _layer(layers.UnitNormalization), EUCLID, spread=1e-14),
        _case("unit_norm_axis", (3, 4), _layer(layers.UnitNormalization, axis=1), spread=1e-14),
        _case(
            "normalization",
            (3, 2),
            _layer(layers.Normalization, mean=[1.0, 2.0], variance=[0.25, 4.0]),
            ALL,
        ),
        # As many tokens as features: its scales must not be taken for those of the features.
        _case(
            "feature_norm_tokens",
            (3, 3),
            lambda x: layers.Dense(2)(
                layers.Normalization(axis=1, mean=[1.0, 2.0, 3.0], variance=[0.01, 1.0, 100.0])(x)
            ),
        ),
        _case("rescaling", (3, 4), _layer(layers.Rescaling, -0.5, offset=1.0), ALL),
        _case("rescaling_list", (3, 2), _layer(layers.Rescaling, [0.5, 2.0]), ALL),
        _case("center_norm", (3, 5), _layer(kl.CenterNormalization), ALL),
        _case(
            "ops_layer_norm", (3, 4), lambda x: ops.layer_normalization(x), EUCLID, points=(1.0,)
        ),
        _case("ops_rms_norm", (3, 4), lambda x: ops.rms_normalization(x), EUCLID, points=(0.0,)),
        _case(
            "ops_normalize", (3, 4), lambda x: ops.normalize(x, epsilon=1e-3), EUCLID, spread=1e-5
        ),
    ]


def _pooling_cases():
    cases = []
    for pool in (layers.AveragePooling1D, layers.MaxPooling1D):
        average = pool is layers.AveragePooling1D
        linear = ALL if average else BOTH
        name = "average" if average else "max"
        cases += [
            _case(f"{name}_pool1d", (6, 2), _layer(pool, 2), linear),
            _case(f"{name}_pool1d_overlap", (7, 2), _layer(pool, 3, strides=2)),
            _case(f"{name}_pool1d_same", (7, 2), _layer(pool, 3, strides=2, padding="same")),
        ]
    single = dict(dtype="float32")
    return [
        *cases,
        _case("average_pool2d", (4, 4, 2), _layer(layers.AveragePooling2D, 2), ALL),
        _case("average_pool2d_same", (5, 5, 1), _layer(layers.AveragePooling2D, 3, 1, "same")),
        _case("max_pool2d", (4, 4, 2), _layer(layers.MaxPooling2D, 2), BOTH),
        _case("average_pool3d", (2, 2, 2, 2), _layer(layers.AveragePooling3D, 2), ALL, **single),
        _case("max_pool3d", (2, 2, 2, 2), _layer(layers.MaxPooling3D, 2), BOTH, **single),
        _case("global_average1d", (5, 3), _layer(layers.GlobalAveragePooling1D), ALL),
        _case("global_average2d", (3, 3, 2), _layer(layers.GlobalAveragePooling2D), ALL),
        _case("global_average3d", (2, 2, 2, 2), _layer(layers.GlobalAveragePooling3D), ALL),
        _case("global_max1d", (5, 3), _layer(layers.GlobalMaxPooling1D), BOTH),
        _case("global_max2d", (3, 3, 2), _layer(layers.GlobalMaxPooling2D), BOTH),
        _case("global_max3d", (2, 2, 2, 2), _layer(layers.GlobalMaxPooling3D), BOTH),
        _case("adaptive_average1d", (7, 2), _layer(layers.AdaptiveAveragePooling1D, 3)),
        _case("adaptive_average2d", (5, 4, 2), _layer(layers.AdaptiveAveragePooling2D, (2, 3))),
        _case("adaptive_max1d", (7, 2), _layer(layers.AdaptiveMaxPooling1D, 3)),
        _case("adaptive_max2d", (5, 4, 2), _layer(layers.AdaptiveMaxPooling2D, (2, 3))),
    ]


def _reshaping_cases():
    return [
        _case("flatten", (3, 4), _layer(layers.Flatten), ALL),
        _case("reshape_split", (3, 4), _layer(layers.Reshape, (6, 2)), ALL),
        _case("reshape_join", (4, 3), _layer(layers.Reshape, (2, 6)), ALL),
        _case("reshape_across", (4, 3), _layer(layers.Reshape, (3, 4)), BOTH),
        _case("permute", (3, 4), _layer(layers.Permute, (2, 1)), ALL),
        _case("permute_tokens", (2, 3, 4), _layer(layers.Permute, (2, 1, 3)), ALL),
        _case("repeat_vector", (4,), _layer(layers.RepeatVector, 3), ALL),
        _case("up_sampling1d", (3, 2), _layer(layers.UpSampling1D, 3), ALL),
        _case("up_sampling2d", (2, 2, 2), _layer(layers.UpSampling2D, (2, 3)), ALL),
        _case("up_sampling3d", (2, 2, 2, 1), _layer(layers.UpSampling3D, 2), ALL),
        _case("zero_padding1d", (3, 2), _layer(layers.ZeroPadding1D, 1), ALL),
        _case("zero_padding2d", (3, 2, 2), _layer(layers.ZeroPadding2D, 1), ALL),
        _case("zero_padding3d", (2, 2, 2, 1), _layer(layers.ZeroPadding3D, 1), ALL),
        _case("cropping1d", (4, 2), _layer(layers.Cropping1D, 1), ALL),
        _case("cropping2d", (4, 4, 2), _layer(layers.Cropping2D, 1), ALL),
        _case("cropping3d", (3, 3, 3, 1), _layer(layers.Cropping3D, 1), ALL),
        *(
            _case(f"identity_{make.__name__}", (3, 4), _layer(make, *args), ALL)
            for make, args in (
                (layers.Dropout, (0.5,)),
                (layers.AlphaDropout, (0.5,)),
                (layers.GaussianDropout, (0.5,)),
                (layers.GaussianNoise, (0.5,)),
                (layers.SpatialDropout1D, (0.5,)),
                (layers.ActivityRegularization, ()),
                (layers.Identity, ()),
            )
        ),
    ]


def _merging_cases():
    def merged(make, **kwargs):
        return lambda x: make(**kwargs)([layers.Dense(4)(x), layers.Dense(4)(x)])

    return [
        # Two linear branches of one input are one matrix.
        _case("add", (3, 4), merged(layers.Add), ALL),
        _case("subtract", (3, 4), merged(layers.Subtract), ALL),
        _case("average", (3, 4), merged(layers.Average), ALL),
        _case("maximum", (3, 4), merged(layers.Maximum)),
        _case("minimum", (3, 4), merged(layers.Minimum)),
        _case("concatenate", (3, 4), merged(layers.Concatenate), ALL),
        _case("concatenate_tokens", (3, 4), merged(layers.Concatenate, axis=1), ("token", "linf")),
        _case(
            "gate",
            (3, 4),
            lambda x: layers.Multiply()(
                [layers.Dense(4, activation="sigmoid")(x), layers.Dense(4, activation="tanh")(x)]
            ),
        ),
        _case(
            "residual_linear",
            (3, 4),
            lambda x: kl.Residual()([x, layers.Dense(4)(x)]),
            ALL,
        ),
        _case(
            "residual_convex",
            (3, 4),
            lambda x: kl.Residual(0.3)([x, layers.Dense(4)(x)]),
            ALL,
        ),
        _case("dense_dense", (3, 4), lambda x: layers.Dense(4)(layers.Dense(6)(x)), ALL),
        _case(
            "dense_pool_dense",
            (3, 4),
            lambda x: layers.Dense(4)(layers.GlobalAveragePooling1D()(layers.Dense(6)(x))),
            ALL,
        ),
        _case(
            "layer_norm_dense",
            (3, 5),
            lambda x: layers.Dense(4)(layers.LayerNormalization()(x)),
            EUCLID,
            points=(0.0,),
        ),
    ]


def _operation_cases():
    table = np.array([[2.0, -1.0, 0.5, 1.0]])
    mixing = np.array([[1.0, 2.0, 0.0], [0.5, -1.0, 1.0]])
    kernel = np.array([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5], [1.0, 1.0]])
    return [
        _case("ops_add_constant", (3, 4), lambda x: x + table, ALL),
        _case("ops_scale", (3, 4), lambda x: x * table, ALL),
        _case("ops_scale_up", (1, 4), lambda x: x * np.ones((1, 3, 4)), ALL),
        _case("ops_divide", (3, 4), lambda x: x / 4.0, ALL),
        _case("ops_negative", (3, 4), lambda x: x + -(0.5 * x), ALL),
        _case("ops_subtract", (3, 4), lambda x: 2.0 * x - x, ALL),
        _case("ops_matmul", (3, 4), lambda x: ops.matmul(x, kernel), ALL),
        _case("ops_mix_tokens", (3, 4), lambda x: ops.matmul(mixing, x), ALL),
        _case("ops_einsum", (3, 4), lambda x: ops.einsum("btd,df->btf", x, kernel), ALL),
        _case("ops_einsum_first", (3, 4), lambda x: ops.einsum("st,btd->bsd", mixing, x), BOTH),
        _case("ops_mean", (3, 4), lambda x: ops.mean(x, axis=1), ALL),
        _case("ops_mean_last", (3, 4), lambda x: ops.mean(x, axis=-1), BOTH),
        _case("ops_mean_keep", (3, 4), lambda x: ops.mean(x, axis=-1, keepdims=True), ALL),
        _case("ops_sum", (3, 4), lambda x: ops.sum(x, axis=1), ALL),
        _case("ops_sum_all", (3, 4), lambda x: ops.sum(x, axis=(1, 2), keepdims=True), ALL),
        _case("ops_max", (3, 4), lambda x: ops.max(x, axis=1), BOTH),
        _case("ops_max_last", (3, 4), lambda x: ops.max(x, axis=-1), BOTH),
        _case("ops_logsumexp", (3, 4), lambda x: ops.logsumexp(x, axis=-1, keepdims=True)),
        _case("ops_where", (3, 4), lambda x: ops.where(np.eye(3, 4) > 0, x, 2.0 * x)),
        _case("ops_maximum", (3, 4), lambda x: ops.maximum(x, 0.3), ALL),
        _case("ops_clip", (3, 4), lambda x: ops.clip(x, -1.0, 1.0), ALL, points=(0.0,)),
        _case("ops_absolute", (3, 4), lambda x: ops.absolute(x), ALL),
        _case("ops_sin", (3, 4), lambda x: ops.sin(x), ALL, points=(0.0,)),
        _case("ops_cos", (3, 4), lambda x: ops.cos(x), ALL, points=(1.5708,)),
        _case("ops_erf", (3, 4), lambda x: ops.erf(x), ALL, points=(0.0,)),
        _case("silu_by_hand", (3, 4), lambda x: x * ops.sigmoid(x), ALL, points=(2.39936,)),
        _case(
            "silu_scaled", (3, 4), lambda x: ops.sigmoid(-1.702 * x) * x, ALL, points=(-1.40973,)
        ),
        _case(
            "hard_silu_by_hand", (3, 4), lambda x: x * ops.hard_sigmoid(x), ALL, points=(2.999999,)
        ),
        _case(
            "mish_by_hand", (3, 4), lambda x: x * ops.tanh(ops.softplus(x)), ALL, points=(1.49068,)
        ),
        _case("leaky_by_hand", (3, 4), lambda x: ops.where(x > 0, x, 0.2 * x), ALL, points=(1.0,)),
        _case(
            "steep_by_hand",
            (3, 4),
            lambda x: ops.where(ops.less_equal(x, 0.0), -3.0 * x, x * table),
            ALL,
            points=(-1.0,),
        ),
        _case("relu_by_hand", (3, 4), lambda x: ops.where(0.0 < x, x, 0.0), ALL, points=(1.0,)),
        _case("ops_square", (3, 4), lambda x: ops.square(ops.tanh(x))),
        _case("ops_reshape", (3, 4), lambda x: ops.reshape(x, (-1, 12)), ALL),
        _case("ops_transpose", (3, 4), lambda x: ops.transpose(x, (0, 2, 1)), ALL),
        _case("ops_swapaxes", (3, 4), lambda x: ops.swapaxes(x, 1, 2), ALL),
        _case("ops_moveaxis", (2, 3, 4), lambda x: ops.moveaxis(x, 1, 2), ALL),
        _case("ops_squeeze", (1, 4), lambda x: ops.squeeze(x, 1), ALL),
        _case("ops_expand", (3, 4), lambda x: ops.expand_dims(x, 2), ALL),
        _case("ops_first_token", (3, 4), lambda x: x[:, 0], ALL),
        _case("ops_some_entries", (3, 4), lambda x: x[:, 1:, ::2], ALL),
        _case("ops_one_entry", (3, 4), lambda x: x[..., 1], BOTH),
        _case("ops_split", (3, 4), lambda x: ops.concatenate(ops.split(x, 2, axis=-1), axis=1)),
        _case("ops_stack", (3, 4), lambda x: ops.stack([x, 2.0 * x], axis=1), ("token", "linf")),
        _case("ops_concatenate", (3, 4), lambda x: ops.concatenate([x, 2.0 * x], axis=-1), ALL),
        _case("ops_flip", (3, 4), lambda x: ops.flip(x, axis=1), ALL),
        _case("ops_roll", (3, 4), lambda x: ops.roll(x, 1, axis=2), ALL),
        _case("ops_pad", (3, 4), lambda x: ops.pad(x, ((0, 0), (1, 0), (0, 0))), ALL),
        _case(
            "ops_pad_constant",
            (3, 4),
            lambda x: ops.pad(x, ((0, 0), (1, 0), (0, 2)), constant_values=3.0),
            ALL,
        ),
        _case("ops_repeat", (3, 4), lambda x: ops.repeat(x, 3, axis=1), ALL),
        _case("ops_tile", (3, 4), lambda x: ops.tile(x, (1, 1, 2)), ALL),
        _case("ops_stop_gradient_free", (3, 4), lambda x: ops.cast(x, "float64"), ALL),
    ]


def _image_cases():
    def resizing(*size, **options):
        return _layer(layers.Resizing, *size, **options)

    class Patches(layers.Layer):
        def call(self, images):
            patches = ops.image.extract_patches(images, 2)
            return ops.reshape(patches, (-1, 4, 8))

    color = (5, 6, 3)
    return [
        *(
            _case(f"augmentation_{name}", (4, 4, 3), _layer(getattr(layers, name), *args), ALL)
            for name, args in (
                ("RandomBrightness", (0.5,)),
                ("RandomColorDegeneration", (0.5,)),
                ("RandomColorJitter", ()),
                ("RandomContrast", (0.5,)),
                ("RandomCrop", (4, 4)),
                ("RandomErasing", ()),
                ("RandomFlip", ()),
                ("RandomGrayscale", ()),
                ("RandomHue", (0.5,)),
                ("RandomInvert", ()),
                ("RandomPosterization", (4,)),
                ("RandomRotation", (0.5,)),
                ("RandomSaturation", (0.5,)),
                ("RandomSharpness", (0.5,)),
                ("RandomShear", (0.5, 0.5)),
                ("RandomTranslation", (0.5, 0.5)),
                ("RandomZoom", (0.5,)),
            )
        ),
        _case("resizing", color, resizing(3, 4), ALL),
        _case("resizing_up", color, resizing(9, 7), ALL),
        _case("resizing_nearest", color, resizing(7, 4, interpolation="nearest"), ALL),
        _case("resizing_bicubic", color, resizing(7, 4, interpolation="bicubic"), ALL),
        # TensorFlow has their gradients in float32 alone.
        _case(
            "resizing_lanczos",
            color,
            resizing(3, 8, interpolation="lanczos3"),
            ALL,
            dtype="float32",
        ),
        _case("resizing_antialias", color, resizing(2, 4, antialias=True), ALL, dtype="float32"),
        _case("resizing_crop", color, resizing(4, 3, crop_to_aspect_ratio=True), ALL),
        _case("resizing_pad", color, resizing(4, 3, pad_to_aspect_ratio=True, fill_value=2.0), ALL),
        _case("resizing_first", (3, 5, 6), resizing(3, 8, data_format="channels_first"), ALL),
        _case("center_crop", color, _layer(layers.CenterCrop, 2, 3), ALL),
        _case("center_crop_small", color, _layer(layers.CenterCrop, 7, 4), ALL),
        _case(
            "center_crop_first",
            (3, 5, 6),
            _layer(layers.CenterCrop, 2, 3, data_format="channels_first"),
            BOTH,
        ),
        _case(
            "up_sampling_bilinear",
            (3, 2, 2),
            _layer(layers.UpSampling2D, (2, 3), interpolation="bilinear"),
            ALL,
        ),
        _case("ops_resize", color, lambda x: ops.cast(ops.image.resize(x, (3, 8)), x.dtype), ALL),
        _case("ops_grayscale", color, lambda x: ops.image.rgb_to_grayscale(x), ALL),
        _case(
            "ops_grayscale_first",
            (3, 5, 4),
            lambda x: ops.image.rgb_to_grayscale(x, data_format="channels_first"),
            ALL,
        ),
        _case(
            "ops_pad_images",
            color,
            lambda x: ops.image.pad_images(x, 1, 2, target_height=8, target_width=9),
            ALL,
        ),
        _case(
            "ops_crop_images",
            color,
            lambda x: ops.image.crop_images(x, 1, 1, target_height=3, target_width=4),
            ALL,
        ),
        _case("ops_patches", (4, 4, 2), lambda x: ops.image.extract_patches(x, 2), ALL),
        _case(
            "ops_patches_overlap",
            (5, 5, 2),
            lambda x: ops.image.extract_patches(x, 3, strides=1, padding="same"),
            ALL,
        ),
        _case("patches_layer", (4, 4, 2), lambda x: Patches()(x), ALL),
        _case("ops_unfold", (2, 4, 5), lambda x: ops.nn.unfold(x, 2, stride=1), BOTH),
        _case("ops_depth_to_space", (2, 3, 8), lambda x: ops.nn.depth_to_space(x, 2), ALL),
        _case("ops_space_to_depth", (4, 4, 2), lambda x: ops.nn.space_to_depth(x, 2), ALL),
    ]


def _copy_cases():
    along = np.array([[[0, 0, 1, 2], [3, 3, 3, 0], [1, 1, 2, 2]]])
    return [
        _case("ops_take", (3, 4), lambda x: ops.take(x, [0, 2, 2], axis=1), ALL),
        _case("ops_take_last", (3, 4), lambda x: ops.take(x, [0, -1, 3, 3], axis=-1), ALL),
        _case("ops_take_one", (3, 4), lambda x: ops.take(x, 1, axis=-1), ALL),
        _case("ops_take_table", (3, 4), lambda x: ops.take(x, [[0, 1], [1, 2]], axis=2), ALL),
        _case("ops_take_along", (3, 4), lambda x: ops.take_along_axis(x, along, axis=2), ALL),
        _case("ops_tril", (3, 4), lambda x: ops.tril(x, 1), ALL),
        _case("ops_triu", (3, 4), lambda x: ops.triu(x), ALL),
        _case("ops_rot90", (3, 4, 2), lambda x: ops.rot90(x, axes=(1, 2)), ALL),
        _case("ops_diagonal", (3, 4), lambda x: ops.diagonal(x, axis1=1, axis2=2), ALL),
        _case("ops_cumsum", (3, 4), lambda x: ops.cumsum(x, axis=1), ALL),
        _case("ops_cumsum_last", (3, 4), lambda x: ops.cumsum(x, axis=-1), ALL),
        _case("ops_diff", (5, 4), lambda x: ops.diff(x, 2, axis=1), ALL),
        _case("ops_diff_last", (3, 4), lambda x: ops.diff(x), ALL),
        _case(
            "ops_pad_reflect",
            (4, 3),
            lambda x: ops.pad(x, ((0, 0), (2, 1), (1, 1)), mode="reflect"),
            ALL,
        ),
        _case(
            "ops_pad_symmetric",
            (4, 3),
            lambda x: ops.pad(x, ((0, 0), (2, 1), (0, 0)), mode="symmetric"),
            ALL,
        ),
        _case("ops_array_split", (5, 4), lambda x: ops.array_split(x, 2, axis=1)[0], ALL),
        _case("ops_hsplit", (4, 3), lambda x: ops.hsplit(x, 2)[1], ALL),
        _case("ops_unstack_last", (3, 4), lambda x: ops.unstack(x, axis=-1)[1], BOTH),
    ]


def _sorting_cases():
    return [
        _case("ops_sort", (3, 4), lambda x: ops.sort(x), ALL),
        _case("ops_sort_tokens", (3, 4), lambda x: ops.sort(x, axis=1), BOTH),
        _case("ops_norm", (3, 4), lambda x: ops.norm(x, axis=-1, keepdims=True), EUCLID),
        _case("ops_norm_tokens", (3, 4), lambda x: ops.norm(x, axis=1), ("l2",)),
        _case("ops_norm_all", (3, 4), lambda x: ops.norm(x, axis=(1, 2), keepdims=True), ("l2",)),
        _case("ops_norm_flat", (3, 4), lambda x: ops.norm(x, axis=2), ("l2",)),
        _case("ops_std", (3, 4), lambda x: ops.std(x, axis=-1, keepdims=True), EUCLID),
        _case("ops_std_tokens", (3, 4), lambda x: ops.std(x, axis=1), ("l2",)),
        _case("ops_std_all", (3, 4), lambda x: ops.std(x, axis=(1, 2), keepdims=True), ("l2",)),
        _case("ops_var", (3, 4), lambda x: ops.var(ops.tanh(x), axis=-1)),
        _case(
            "ops_moments",
            (3, 4),
            lambda x: ops.concatenate(ops.moments(ops.tanh(x), axes=(1,), keepdims=True), axis=1),
        ),
        _case("ops_einsum_moved", (2, 3, 4), lambda x: ops.einsum("bijd->bjid", x), ALL),
        _case("ops_einsum_swapped", (3, 4), lambda x: ops.einsum("bij->bji", x), ALL),
        _case("ops_einsum_summed", (2, 3, 4), lambda x: ops.einsum("bijd->bjd", x), ALL),
        _case("ops_einsum_last_summed", (2, 3, 4), lambda x: ops.einsum("...d->...", x), BOTH),
    ]


def _convolution_operation_cases():
    rng = np.random.default_rng(0)
    wide, deep = rng.normal(size=(3, 2, 2, 4)), rng.normal(size=(3, 2, 2, 2))
    up = keras.ops.convert_to_tensor(rng.normal(size=(3, 2, 4, 2)))

    class Enlarged(layers.Layer):
        # In a graph Keras mixes up the arguments of this operation.
        def call(self, x):
            return ops.conv_transpose(x, up, strides=2)

    image, mixing = (5, 4, 2), rng.normal(size=(1, 1, 4, 3))
    return [
        _case("ops_conv", image, lambda x: ops.conv(x, wide, padding="same"), ("linf",)),
        _case("ops_conv_strides", image, lambda x: ops.conv(x, wide, strides=2)),
        _case("ops_depthwise", image, lambda x: ops.depthwise_conv(x, deep)),
        _case("ops_separable", image, lambda x: ops.separable_conv(x, deep, mixing)),
        _case(
            "ops_conv_transpose",
            image,
            lambda x: Enlarged()(x),
        ),
        _case("ops_max_pool", image, lambda x: ops.max_pool(x, 2), BOTH),
        _case("ops_max_pool_strides", image, lambda x: ops.max_pool(x, 3, strides=1)),
        _case("ops_average_pool", (4, 4, 2), lambda x: ops.average_pool(x, 2), ALL),
        _case(
            "ops_average_pool_same",
            image,
            lambda x: ops.average_pool(x, (3, 2), strides=1, padding="same"),
        ),
    ]


def _two(join, width=4):
    """`join` of two bounded tensors of the same input."""
    return lambda x: join(
        layers.Dense(width, activation="tanh")(x), layers.Dense(width, activation="sigmoid")(x)
    )


def _pooled_by_attention(x):
    """The pooling of compact convolutional transformers."""
    tokens = layers.LayerNormalization(epsilon=1.0)(x)
    weights = ops.softmax(layers.Dense(1)(tokens), axis=1)
    return ops.squeeze(ops.matmul(ops.transpose(weights, (0, 2, 1)), tokens), -2)


def _attend_by_hand(x):
    tokens = layers.LayerNormalization(epsilon=1.0)(x)
    scores = ops.einsum("bqd,bkd->bqk", layers.Dense(3)(tokens), layers.Dense(3)(tokens))
    return ops.einsum("bqk,bkd->bqd", ops.softmax(scores), layers.Dense(2)(tokens))


def _product_cases():
    def heads(x):
        return ops.reshape(x, (-1, 3, 2, 2))

    return [
        _case("product_matmul", (4, 4), _two(lambda a, b: ops.matmul(a, ops.swapaxes(b, 1, 2)))),
        _case("product_square", (3, 3), _bounded(lambda x: ops.matmul(x, x))),
        _case(
            "product_repeated",
            (3, 4),
            _two(lambda a, b: ops.matmul(ops.expand_dims(a, 1), ops.reshape(b, (-1, 3, 4, 1)))),
        ),
        _case("product_einsum", (3, 4), _two(lambda a, b: ops.einsum("btd,bte->bde", a, b))),
        _case(
            "product_heads",
            (3, 4),
            _two(lambda a, b: ops.einsum("bqhd,bkhd->bhqk", heads(a), heads(b))),
        ),
        _case("product_outer", (4,), _two(lambda a, b: ops.einsum("bd,be->bde", a, b))),
        _case("product_dot", (4,), _two(lambda a, b: layers.Dot(1)([a, b]))),
        _case("product_dot_axes", (3, 4), _two(lambda a, b: layers.Dot((2, 2))([a, b]))),
        _case("product_dot_tokens", (3, 4), _two(lambda a, b: layers.Dot(1)([a, b]))),
        _case("product_with_constant", (3, 4), lambda x: ops.dot(x, np.eye(4, 3) * 2.0), ALL),
        _case("product_tensordot", (3, 4), lambda x: ops.tensordot(x, np.eye(4, 3), axes=1), ALL),
        _case("attention_pooling", (4, 3), _pooled_by_attention),
        _case("attention_by_hand", (3, 4), _attend_by_hand),
    ]


def _attention_cases():
    """Attention on bounded tokens, between tensors of different lengths and widths."""

    def context(x):
        return layers.Dense(5, activation="tanh")(x)[:, :3]

    def fixed(x):
        return ops.zeros_like(x) + np.random.default_rng(3).normal(size=(1, 4, 1))

    return [
        _case("cross_attention", (4, 3), lambda x: _cross(x, context(x))),
        _case(
            "cross_attention_causal", (4, 3), lambda x: _cross(x, context(x), use_causal_mask=True)
        ),
        _case("cross_attention_key", (4, 3), lambda x: _cross(x, context(x), key=_tanh(x)[:, :3])),
        _case("cross_attention_masked", (4, 3), _cross_masked(context)),
        _case("cross_attention_of_constant", (4, 3), lambda x: _cross(_tanh(x), fixed(x))),
        _case("cross_attention_by_constant", (4, 3), lambda x: _cross(fixed(x), _tanh(x))),
        _case(
            "group_query_attention",
            (4, 3),
            lambda x: layers.GroupQueryAttention(2, 4, 2)(_tanh(x), _tanh(x)),
        ),
        _case(
            "group_query_attention_cross",
            (4, 3),
            lambda x: layers.GroupQueryAttention(2, 2, 1)(_tanh(x), 2.0 * _tanh(x)[:, 1:]),
        ),
        _case("attention", (4, 3), _bounded(lambda x: layers.Attention()([x, x]))),
        _case(
            "attention_scaled",
            (4, 3),
            lambda x: layers.Attention(use_scale=True)(
                [_tanh(x), layers.Dense(3, activation="sigmoid")(x)[:, 1:]]
            ),
        ),
        _case(
            "attention_concat",
            (4, 3),
            lambda x: layers.Attention(score_mode="concat", use_scale=True)([x, _tanh(x)]),
        ),
        _case(
            "attention_of_three",
            (4, 3),
            lambda x: layers.Attention()([_tanh(x), layers.Dense(5)(_tanh(x)), _tanh(x)]),
        ),
        _case(
            "attention_causal",
            (4, 3),
            _bounded(lambda x: layers.Attention()([x, x], use_causal_mask=True)),
        ),
        _case("additive_attention", (4, 3), lambda x: layers.AdditiveAttention()([x, _tanh(x)])),
        _case("additive_attention_self", (4, 3), _bounded(lambda x: _additive(x))),
        _case("ops_attention", (4, 2, 3), _bounded(lambda x: ops.dot_product_attention(x, x, x))),
        _case(
            "ops_attention_masked",
            (4, 2, 3),
            lambda x: ops.dot_product_attention(
                _tanh(x), _tanh(2.0 * x), _tanh(x), mask=np.tri(4, k=-1, dtype=bool)[None, None]
            ),
        ),
    ]


def _tanh(x):
    return layers.Activation("tanh")(x)


def _additive(x):
    return layers.AdditiveAttention()([x, x])


def _cross(x, context, **kwargs):
    return layers.MultiHeadAttention(2, 3, 2)(_tanh(x), context, **kwargs)


def _cross_masked(context):
    mask = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 1]], bool)[None]
    return lambda x: _cross(x, context(x), attention_mask=mask)


def _own_cases():
    attention = kl.L2MultiHeadAttention
    return [
        _case("l2_attention", (4, 4), _layer(attention, 2, 2)),
        _case("l2_attention_wide", (3, 4), _layer(attention, 1, 4), spread=2.0),
        _case("l2_attention_causal", (4, 4), lambda x: attention(2, 2)(x, use_causal_mask=True)),
        _case(
            "l2_attention_masked",
            (4, 4),
            lambda x: attention(2, 2)(x, attention_mask=np.tri(4, k=1, dtype=bool)),
        ),
        _case("l2_attention_capped", (4, 4), _layer(attention, 2, 2, lipschitz_bound=1.0)),
        _case("cosine_attention", (4, 4), _layer(kl.ScaledCosineAttention, 2, 2)),
        _case(
            "cosine_attention_causal",
            (4, 4),
            lambda x: kl.ScaledCosineAttention(2, 2)(x, use_causal_mask=True),
        ),
        _case(
            "cosine_attention_capped",
            (4, 4),
            _layer(kl.ScaledCosineAttention, 2, 2, lipschitz_bound=1.0),
        ),
        _case("max_min", (3, 4), _layer(kl.MaxMin), ALL),
        _case("half_abs", (3, 4), _layer(kl.HalfAbs), ALL),
        _case("space_to_depth", (4, 2, 3), _layer(kl.SpaceToDepth, 2), ALL),
        _case("norm_pooling", (4, 2, 3), _layer(kl.NormPooling, 2), ("l2",)),
        _case("norm_pooling_global", (4, 2), _layer(kl.NormPooling), ("l2",)),
        _case("orthogonal_dense", (3, 4), _layer(kl.OrthogonalDense, 5), EUCLID),
        _case("orthogonal_dense_tall", (3, 4), _layer(kl.OrthogonalDense, 2, "tanh"), EUCLID),
        _case("orthogonal_conv", (4, 3, 10), _layer(kl.OrthogonalConv2D, 12)),
        _case("normalized_dense", (3, 4), _layer(kl.NormalizedDense, 5), EUCLID),
        _case("spectral_conv", (6, 5, 2), _layer(kl.SpectralConv2D, 3, 3, padding="same")),
        _case("spectral_conv_strided", (6, 5, 2), _layer(kl.SpectralConv2D, 3, (3, 2), 2)),
        _case("spectral_conv_patches", (6, 4, 2), _layer(kl.SpectralConv2D, 3, 2, 2), ("l2",)),
        _case("position_embedding", (3, 4), _layer(kl.PositionEmbedding), ALL),
        _case("spectral_dense", (3, 4), _layer(kl.SpectralDense, 5), ("l2", "token")),
        _case("spectral_dense_free", (3, 4), _layer(kl.SpectralDense, 5, None, True, None)),
        _case(
            "dot_attention",
            (4, 4),
            lambda x: _attend(layers.LayerNormalization(epsilon=1.0)(x)),
        ),
        _case(
            "dot_attention_causal",
            (4, 4),
            lambda x: _attend(layers.RMSNormalization(epsilon=1.0)(x), use_causal_mask=True),
        ),
        _case(
            "dot_attention_masked",
            (4, 4),
            lambda x: _attend(
                layers.Activation("tanh")(x), attention_mask=np.tri(4, k=1, dtype=bool)[None]
            ),
        ),
        _case(
            "dot_attention_ball",
            (4, 4),
            _attend_alone,
            options=(("input_radius", 2.0),),
            spread=0.5,
        ),
    ]


def _attend(x, **kwargs):
    return layers.MultiHeadAttention(2, 3)(x, x, **kwargs)


def _attend_alone(x):
    return _attend(x)


@contextlib.contextmanager
def default_dtype(policy: str) -> Iterator[None]:
    """Layers made inside have this dtype policy."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def model_of(case: LayerCase, *, dtype: str | None = None, seed: int = 0) -> keras.Model:
    """The case as a model with random weights."""
    with default_dtype(dtype or case.dtype):
        inputs = keras.Input(case.shape, dtype=keras.config.dtype_policy().compute_dtype)
        model = keras.Model(inputs, case.build(inputs))
    randomize(model, seed)
    return model


def randomize(model: keras.Model, seed: int = 0) -> None:
    """Random weights for kernels, scales, biases and moving averages."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if any(name in variable.path for name in _KEPT):
            continue
        value = rng.normal(size=variable.shape)
        if "variance" in variable.path:
            value = 0.2 + np.square(value)
        elif len(variable.shape) > 1:
            value = value / np.sqrt(variable.shape[0])
        variable.assign(value)


# Bookkeeping of this package's layers, and the parameters of the Normalization layer.
_KEPT = ("_vector", "running_bound", "penalty_", "seed_generator", "alpha_logit")


def points_of(case: LayerCase, *, count: int = 4, seed: int = 0) -> np.ndarray:
    """Inputs to measure at, shape `(points, *case.shape)`."""
    rng = np.random.default_rng(seed)
    points = [case.spread * rng.normal(size=case.shape) for _ in range(count)]
    for point in case.points:
        if point == "two_high":
            value = np.full(case.shape, -30.0)
            value[..., :2] = 0.0
        elif point == "one_high":
            value = np.full(case.shape, -30.0)
            value[..., 0] = 0.0
        else:
            value = np.full(case.shape, float(point))
        points.append(value)
    points = np.stack(points)
    if ("input_radius", 2.0) in case.options:
        norms = np.linalg.norm(points, axis=-1, keepdims=True)
        points = points * np.minimum(1.0, 2.0 / norms)
    return points


def array_of(value: Any) -> np.ndarray:
    """A variable or tensor as an array of its own."""
    return np.array(ops.convert_to_numpy(ops.convert_to_tensor(value)))


def snapshot(model):
    """Everything about a model that certifying might touch."""
    inner = model._flatten_layers()
    optimizer = getattr(model, "optimizer", None)
    variables = [*model.variables, *(optimizer.variables if optimizer else [])]
    # Made on first use, out of Python's random state.
    generator = global_seed_generator()
    return {
        "values": [array_of(v).tobytes() for v in variables],
        "variables": [id(v) for v in variables],
        "nodes": [(len(x._inbound_nodes), len(x._outbound_nodes)) for x in inner],
        "losses": [len(x._losses) for x in inner],
        "attributes": [{name: id(value) for name, value in vars(x).items()} for x in inner],
        "functions": [id(getattr(model, f"{name}_function", None)) for name in ("train", "test")],
        "built": [x.built for x in inner],
        "numpy": str(np.random.get_state(legacy=False)),
        "python": random.getstate(),
        "keras": array_of(generator.state).tobytes(),
        "tensorflow": tf.random.get_global_generator().state.numpy().tobytes(),
        "dtype": keras.config.dtype_policy().name,
    }


def jacobians(function: Callable, points: np.ndarray) -> np.ndarray:
    """Jacobians at some points, shape `(points, outputs, inputs)`, examples being independent."""
    count, size = len(points), int(np.prod(points.shape[1:]))
    outputs = int(np.prod(function(tf.constant(points[:1])).shape[1:]))
    repeated = tf.constant(np.repeat(points, outputs, axis=0))
    with tf.GradientTape() as tape:
        tape.watch(repeated)
        value = tf.reshape(function(repeated), (count * outputs, outputs))
        picked = tf.reduce_sum(
            value * np.tile(np.eye(outputs), (count, 1)).astype(value.dtype.name)
        )
    gradient = tape.gradient(picked, repeated, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return np.asarray(gradient, np.float64).reshape(count, outputs, size)


def jacobian_norm(jacobian: np.ndarray, norm: str, widths: tuple[int, int], seed: int = 0) -> float:
    """Operator norm of a Jacobian, a lower bound of it in the token norm.

    Args:
        jacobian: shape `(outputs, inputs)`.
        norm: `"l2"`, `"token"` or `"linf"`.
        widths: last axes of input and output.
        seed: of the search in the token norm.
    """
    if norm == "l2":
        return float(np.linalg.norm(jacobian, 2))
    if norm == "linf":
        return float(np.abs(jacobian).sum(axis=1).max())
    width_in, width_out = widths
    blocks = jacobian.reshape(-1, width_out, jacobian.shape[1] // width_in, width_in)
    rng = np.random.default_rng(seed)
    best = 0.0
    for block in blocks:
        # max_u sum_j |J_j^T u| over unit u: a convex function, climbed from several starts.
        starts = [*np.eye(width_out)[:2], *rng.normal(size=(2, width_out))]
        wide = block.reshape(width_out, -1)
        starts.append(np.linalg.svd(wide, full_matrices=False)[0][:, 0])
        for u in starts:
            u = u / np.linalg.norm(u)
            for _ in range(25):
                pulls = np.einsum("otw,o->tw", block, u)
                sizes = np.linalg.norm(pulls, axis=1, keepdims=True)
                best = max(best, float(sizes.sum()))
                step = np.einsum("otw,tw->o", block, pulls / np.maximum(sizes, 1e-300))
                if np.linalg.norm(step) < 1e-300:
                    break
                u = step / np.linalg.norm(step)
    return best
