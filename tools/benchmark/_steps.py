"""Functions to time: a layer's forward pass and its training step, as TensorFlow graphs."""

import contextlib

import numpy as np
import tensorflow as tf

from keras_lipattn import condensed


def tokens(batch, length, features):
    """Standard normal tokens, the same for the same shape."""
    values = np.random.default_rng(0).standard_normal((batch, length, features))
    return tf.constant(values, "float32")


def forward(layer, x, *, self_attention=False, causal=False, fold=False, jit=False):
    """Function without arguments that runs `layer` on `x` at inference.

    Args:
        layer: A Keras layer.
        x: Its input.
        self_attention: Whether the input must be passed twice.
        causal: Whether later tokens are hidden.
        fold: Whether to trace with the layer condensed, as an exported model runs.
        jit: Whether to compile with XLA.
    """
    inputs = (x, x) if self_attention else (x,)
    call = {"use_causal_mask": True} if causal else {}
    if not layer.built:
        layer(*inputs)
    graph = tf.function(
        lambda *inputs: layer(*inputs, training=False, **call), autograph=False, jit_compile=jit
    )
    with condensed(layer) if fold else contextlib.nullcontext():
        concrete = graph.get_concrete_function(*inputs)
    return lambda: concrete(*inputs)


def training_step(layer, x, *, self_attention=False, causal=False, jit=False):
    """Function without arguments that runs `layer` in training and differentiates.

    The loss is the sum of squares of the output. Derivatives are taken with respect to the weights
    and the input, as for a layer in the middle of a model.
    """
    inputs = (x, x) if self_attention else (x,)
    call = {"use_causal_mask": True} if causal else {}
    if not layer.built:
        layer(*inputs)
    weights = [variable.value for variable in layer.trainable_variables]

    @tf.function(autograph=False, jit_compile=jit)
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            inputs = (x, x) if self_attention else (x,)
            loss = tf.reduce_sum(tf.square(layer(*inputs, training=True, **call)))
        return tape.gradient(loss, [x, *weights])

    concrete = step.get_concrete_function(x)
    return lambda: concrete(x)
