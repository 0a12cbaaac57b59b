"""Errors about what cannot be inverted state what was received."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.invertible_cases import BY_NAME, attention, dense

import keras_lipattn as kl
from keras_lipattn.layers import InversionError


@pytest.fixture(scope="module")
def layer():
    return BY_NAME["attention"].build("float32")


BAD_ARGUMENTS = {
    "coefficient of one": (dict(coefficient=1.0), "coefficient=1.0"),
    "coefficient of zero": (dict(coefficient=0), "coefficient=0"),
    "norm": (dict(norm="linf"), "norm='linf'"),
    "length": (dict(max_sequence_length=0), "max_sequence_length=0"),
    "low precision": (dict(dtype="mixed_bfloat16"), "'bfloat16'"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name):
    options, received = BAD_ARGUMENTS[name]
    with pytest.raises(ValueError, match=f"Received: .*{re.escape(received)}"):
        kl.InvertibleResidual(attention("float32"), **options)


BAD_BRANCHES = {
    "dropout": (lambda: attention("float32", dropout=0.1), "dropout=0.1"),
    "no constant": (lambda: keras.layers.Dense(4), "class Dense"),
    "part without constant": (
        lambda: keras.Sequential([dense("float32"), keras.layers.LayerNormalization()]),
        "class LayerNormalization",
    ),
    "unbounded activation": (lambda: keras.layers.Activation("exponential"), "unbounded slope"),
    "other shape": (lambda: dense("float32", units=3), r"(None, 5, 3) for the input (None, 5, 4)"),
    "other dtype": (lambda: attention("float64"), "compute dtype 'float64'"),
}


@pytest.mark.parametrize("name", BAD_BRANCHES)
def test_branches_without_an_inverse_are_rejected(name):
    branch, received = BAD_BRANCHES[name]
    with pytest.raises(ValueError, match=f"Received: .*{re.escape(received)}"):
        kl.InvertibleResidual(branch()).build((None, 5, 4))


def test_unknown_or_exceeded_lengths_are_rejected(layer):
    with pytest.raises(ValueError, match=r"max_sequence_length.*Received: input_shape"):
        kl.InvertibleResidual(attention("float32")).build((None, None, 4))
    with pytest.raises(ValueError, match="Received: an input of 9 tokens"):
        layer[0](np.zeros((1, 9, 4), "float32"))
    with pytest.raises(ValueError, match="Received: an input of 9 tokens"):
        layer[0].inverse(np.zeros((1, 9, 4), "float32"))
    bounded = kl.InvertibleResidual(attention("float32"), max_sequence_length=7)
    bounded.build((None, None, 4))
    assert bounded(np.ones((1, 7, 4), "float32")).shape == (1, 7, 4)


def test_methods_before_build_say_so():
    layer = kl.InvertibleResidual(attention("float32"))
    for method in (layer.inverse, layer.log_det_jacobian):
        with pytest.raises(ValueError, match="Received: built=False"):
            method(np.zeros((1, 5, 4), "float32"))
    with pytest.raises(ValueError, match="Received: built=False"):
        layer.lipschitz()


@pytest.mark.parametrize(
    "options,received",
    [
        (dict(acceleration="newton"), "acceleration='newton'"),
        (dict(tolerance=0.0), "tolerance=0.0"),
        (dict(max_steps=0), "max_steps=0"),
    ],
)
def test_bad_options_of_the_inverse_are_named(layer, options, received):
    with pytest.raises(ValueError, match=f"Received: {re.escape(received)}"):
        layer[0].inverse(layer[1], **options)


@pytest.mark.parametrize(
    "options,received",
    [
        (dict(method="trace"), "method='trace'"),
        (dict(num_terms=0), "num_terms=0"),
        (dict(num_probes=-1), "num_probes=-1"),
        (dict(tolerance=-1.0), "tolerance=-1.0"),
    ],
)
def test_bad_options_of_the_log_determinant_are_named(layer, options, received):
    with pytest.raises(ValueError, match=f"Received: {re.escape(received)}"):
        layer[0].log_det_jacobian(layer[1], **options)


def test_failures_raise_or_give_nan(layer):
    block, x, _ = layer
    y = block(x)
    with pytest.raises(InversionError, match=r"2 of 2 .*Received: .*max_steps=1,.*residual"):
        block.inverse(y, max_steps=1)
    with pytest.raises(InversionError, match=r"1 of 2 examples: look for NaN"):
        block.inverse(np.where(np.arange(2)[:, None, None] == 1, np.nan, y))
    # A graph cannot raise: its solution is NaN instead.
    found = tf.function(block.inverse, autograph=False)(y, max_steps=1)
    assert not found.converged.numpy().any()
    assert np.isnan(found.solution.numpy()).all()
    half = tf.function(block.inverse, autograph=False)(tf.where([[[True]], [[False]]], y, np.nan))
    assert half.converged.numpy().tolist() == [True, False]
    np.testing.assert_allclose(half.solution[0], x[0], rtol=0, atol=1e-5)
    assert np.isnan(half.solution[1].numpy()).all()


def test_nan_weights_have_no_certificate():
    block, x, _ = BY_NAME["attention"].build("float32")
    block.branch.query_kernel.assign(np.full(block.branch.query_kernel.shape, np.nan))
    for bound in (block.lipschitz(), block.inverse_lipschitz()):
        assert bound.value == np.inf
        assert "NaN" in bound.reason
    assert np.isnan(np.asarray(block(x))).all()


def test_inverse_has_no_certificate_in_a_norm_without_contraction():
    block, _, _ = BY_NAME["attention"].build()
    bound = block.inverse_lipschitz(norm="linf")
    assert bound.value == np.inf or bound.value > 1.0
    if bound.value == np.inf:
        assert "contract in the norm 'l2'" in bound.reason


def test_sequences_reject_layers_without_an_inverse():
    with pytest.raises(ValueError, match=r"Received: layers=\[\]"):
        kl.InvertibleSequential([])
    with pytest.raises(ValueError, match=r"Received: layer .* of class Residual"):
        kl.InvertibleSequential([kl.Residual()])
    blocks = [kl.InvertibleResidual(attention("float32"), norm=norm) for norm in ("l2", "token")]
    with pytest.raises(ValueError, match=r"Received: .'l2', 'token'."):
        kl.InvertibleSequential(blocks)
    with pytest.raises(ValueError, match="compute dtype 'float32'"):
        kl.InvertibleSequential(blocks[:1], dtype="float64")
