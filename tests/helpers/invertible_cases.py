"""Invertible layers on which the properties of a bijection are tested."""

# The annotations of TensorFlow and numpy do not cover what is passed and returned here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import dataclasses
import typing

import keras
import numpy as np
import tensorflow as tf

import keras_lipattn as kl

BATCH = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """An invertible layer as a function of the dtype, and the shape of one example."""

    name: str
    layer: typing.Callable[[str], typing.Any]
    shape: tuple[int, ...] = (5, 4)
    padded: bool = False

    def build(self, dtype="float64"):
        """The layer with weights, a mask or `None`, and inputs."""
        keras.utils.set_random_seed(7)
        rng = np.random.default_rng(3)
        layer = self.layer(dtype)
        layer.build((None, *self.shape))
        x = rng.normal(size=(BATCH, *self.shape)).astype(dtype)
        mask = None
        if self.padded:
            mask = np.ones((BATCH, *self.shape[:-1]), bool)
            mask[0, -2:] = False
        return layer, x, mask


def attention(dtype, **options):
    return kl.L2MultiHeadAttention(2, 3, dtype=dtype, bias_initializer="normal", **options)


def dense(dtype, units=4, spectral_norm=None, **options):
    return kl.SpectralDense(
        units, spectral_norm=spectral_norm, dtype=dtype, bias_initializer="normal", **options
    )


def perceptron(dtype):
    """Weights tied as in the gradient of a convex function; its Jacobian is close to its bound."""
    branch = keras.Sequential([dense(dtype, 16, activation="elu"), dense(dtype, 4)])
    branch.build((None, None, 4))
    first, second = branch.layers
    first.kernel.assign(keras.initializers.Orthogonal(seed=1)((4, 16)))
    second.kernel.assign(keras.ops.transpose(first.kernel))
    return branch


CASES = [
    Case("attention", lambda dtype: kl.InvertibleResidual(attention(dtype), dtype=dtype)),
    Case(
        "causal",
        lambda dtype: kl.InvertibleResidual(attention(dtype), use_causal_mask=True, dtype=dtype),
    ),
    Case("padded", lambda dtype: kl.InvertibleResidual(attention(dtype), dtype=dtype), padded=True),
    Case(
        "token norm",
        lambda dtype: kl.InvertibleResidual(attention(dtype), norm="token", dtype=dtype),
    ),
    Case(
        "window and caps",
        lambda dtype: kl.InvertibleResidual(
            attention(dtype, sliding_window=2, spectral_norm=0.5), 0.5, dtype=dtype
        ),
    ),
    Case(
        "image", lambda dtype: kl.InvertibleResidual(attention(dtype), 0.5, dtype=dtype), (2, 2, 4)
    ),
    Case(
        "one axis of an image",
        lambda dtype: kl.InvertibleResidual(attention(dtype, attention_axes=2), 0.5, dtype=dtype),
        (2, 3, 4),
    ),
    Case(
        "vector",
        lambda dtype: kl.InvertibleResidual(dense(dtype, activation="tanh"), dtype=dtype),
        (4,),
    ),
    Case(
        "dense with a cap",
        lambda dtype: kl.InvertibleResidual(dense(dtype, spectral_norm=0.3), 0.5, dtype=dtype),
    ),
    Case(
        "perceptron",
        lambda dtype: kl.InvertibleResidual(perceptron(dtype), dtype=dtype),
        padded=True,
    ),
    Case(
        "mixed branch",
        lambda dtype: kl.InvertibleResidual(
            keras.Sequential(
                [
                    kl.PositionEmbedding(dtype=dtype),
                    kl.CenterNormalization(dtype=dtype),
                    attention(dtype),
                    kl.MaxMin(dtype=dtype),
                    keras.layers.Activation("softplus", dtype=dtype),
                ]
            ),
            dtype=dtype,
        ),
        padded=True,
    ),
    Case(
        "transformer",
        lambda dtype: kl.InvertibleSequential(
            [
                kl.InvertibleResidual(attention(dtype), coefficient=0.5, dtype=dtype),
                kl.InvertibleResidual(perceptron(dtype), coefficient=0.9, dtype=dtype),
            ],
            dtype=dtype,
        ),
        padded=True,
    ),
]
BY_NAME = {case.name: case for case in CASES}


def flat_jacobian(function, x, mask=None):
    """Jacobian of `function(x, mask=mask)` at every example, `(B, n, n)`.

    All rows come from one derivative of as many copies of the batch, since loops cannot be
    vectorized.
    """
    batch, size = len(x), int(np.prod(x.shape[1:]))
    copies = tf.constant(np.repeat(x, size, axis=0))
    masks = None if mask is None else np.repeat(mask, size, axis=0)
    rows = np.tile(np.eye(size, dtype=x.dtype), (batch, 1)).reshape(copies.shape)
    with tf.GradientTape() as tape:
        tape.watch(copies)
        images = function(copies, mask=masks)
    return tape.gradient(images, copies, rows).numpy().reshape(batch, size, size)
