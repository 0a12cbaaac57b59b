"""The layer computes what its formula says, on every path and in every dtype."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import loop_attention
from helpers.layer_cases import CAPS, LENGTH, OPTIONS, Case, cases, kernels

import keras_lipattn as kl

# Relative to the largest output, or to 1. float64 leaves a few digits to the expansion of the
# square; in bfloat16 and float16 every projection is rounded to 8 and 11 bits, and a weight of
# attention moves by as much as its score does, which is of size ten here.
TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "mixed_bfloat16": 0.15, "mixed_float16": 0.02}


def _numpy(tensor):
    return keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float64"))


def _expected(case, layer, x, scale_of_kernels=None):
    weights, bias = kernels(layer)
    if scale_of_kernels is not None:
        weights = loop_attention.capped(weights, scale_of_kernels)
    x = _numpy(keras.ops.cast(x, layer.compute_dtype))
    return loop_attention.attend_over_axes(
        x, weights, bias, **case.loop_arguments(), attend=case.with_biases(layer)
    )


def _close(found, expected, dtype):
    tolerance = TOLERANCE[dtype] * max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(_numpy(found), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "case",
    [
        *cases(options=("plain",)),
        *cases(
            options=[name for name in OPTIONS if name != "plain"],
            calls=("no mask", "causal", "pairs per head", "everything"),
        ),
    ],
    ids=str,
)
def test_output_and_scores_equal_the_loops(case):
    layer, x = case.layer(), case.inputs()
    expected, scores = _expected(case, layer, x)
    _close(case.run(layer, x), expected, case.dtype)
    both = case.run(layer, x, return_attention_scores=True)
    _close(both[0], expected, case.dtype)
    _close(both[1], scores, case.dtype)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize(
    "case",
    [
        *cases(options=("plain", "window"), dtypes=("float32",)),
        *cases(options=("plain",), dtypes=("mixed_bfloat16", "mixed_float16")),
    ],
    ids=str,
)
def test_lower_precision_stays_close_far_from_the_origin_too(case, offset):
    layer, x = case.layer(), case.inputs(offset=offset)
    expected, _ = _expected(case, layer, x)
    output = case.run(layer, x)
    assert output.dtype == layer.compute_dtype
    _close(output, expected, case.dtype)


@pytest.mark.parametrize("options", ["plain", "value dim", "output shapes"])
def test_capped_kernels_are_scaled_kernels(options):
    case = Case(options, "everything", cap="spectral")
    layer, x = case.layer(), case.inputs()
    layer.condense()
    expected, _ = _expected(case, layer, x, scale_of_kernels=layer.spectral_norm)
    assert expected is not None
    # Caps aim one part in a million below themselves, three kernels and a square in the distance.
    np.testing.assert_allclose(
        case.run(layer, x), expected, rtol=0, atol=2e-5 * max(1.0, np.abs(expected).max())
    )


@pytest.mark.parametrize("cap", ["l2", "token", "linf", "both"])
@pytest.mark.parametrize("call", ["no mask", "causal", "pairs", "everything"])
def test_a_capped_layer_is_a_multiple_of_the_uncapped_one(cap, call):
    case = Case(call=call, cap=cap)
    layer, x = case.layer(use_bias=False), case.inputs()
    free = Case(call=call).layer(use_bias=False, spectral_norm=layer.spectral_norm)
    for one, other in zip(layer.trainable_variables, free.trainable_variables, strict=True):
        one.assign(other.value)
    found, reference = (case.run(each, x) for each in (layer, free))
    ratio = np.vdot(reference, found) / np.vdot(reference, reference)
    np.testing.assert_allclose(found, ratio * reference, atol=1e-12)
    assert 0.0 < ratio <= 1.0


@pytest.mark.parametrize("dtype", ["float64", "float32", "mixed_bfloat16"])
@pytest.mark.parametrize("cap", CAPS)
def test_condensed_gives_what_the_layer_gives(cap, dtype):
    case = Case(call="everything", cap=cap, dtype=dtype)
    layer, x = case.layer(), case.inputs()
    layer.condense()
    exact = _numpy(case.run(layer, x))
    with kl.condensed(layer):
        inside = _numpy(case.run(layer, x))
    # The remembered norms carry an allowance of 1e-6, in a few factors.
    size = max(1.0, np.abs(exact).max())
    atol = {"float64": 2e-5, "float32": 2e-5, "mixed_bfloat16": 0.05}[dtype] * size
    np.testing.assert_allclose(inside, exact, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("case", "jit_compile"),
    [
        *((case, False) for case in cases(options=("plain",), calls=("everything",), caps=CAPS)),
        (Case("two axes", "everything", dtype="float32"), False),
        (Case("plain", "no mask", "both", "float32"), True),
        (Case("plain", "everything", "linf", "float32"), True),
        (Case("outer axes", "everything", dtype="mixed_bfloat16"), True),
    ],
    ids=str,
)
def test_graphs_give_what_eager_calls_give(case, jit_compile):
    layer, x = case.layer(), case.inputs()
    eager = _numpy(case.run(layer, x))
    graph = tf.function(lambda x: case.run(layer, x), jit_compile=jit_compile)
    # A fused graph rounds where the eager calls do not, and the other way round.
    tolerance = TOLERANCE[case.dtype] * max(1.0, np.abs(eager).max())
    np.testing.assert_allclose(_numpy(graph(x)), eager, rtol=0, atol=tolerance)


def test_dropout_acts_in_training_only():
    layer = Case("dropout").layer()
    x = Case().inputs()
    silent = Case().layer()
    np.testing.assert_array_equal(layer(x), silent(x))
    assert not np.allclose(layer(x, training=True), silent(x))


def test_dropout_keeps_the_expectation_and_leaves_the_scores_alone():
    case = Case("dropout")
    layer = case.layer(dropout=0.3)
    x = case.inputs(offset=2.0)[:1]
    many = np.repeat(x, 20_000, axis=0)
    output, scores = layer(many, training=True, return_attention_scores=True)
    mean, spread = np.mean(output, axis=0), np.std(output, axis=0)
    # Five standard errors: the chance that any of 20 entries is off by more is 1e-5.
    assert (np.abs(mean - layer(x)[0]) <= 5.0 * spread / np.sqrt(len(many)) + 1e-12).all()
    assert spread.min() > 0.0
    np.testing.assert_allclose(scores[0].numpy().sum(axis=-1), 1.0)


def test_dropout_repeats_with_its_seed_and_moves_on_with_every_call():
    case = Case("dropout")
    x = case.inputs()
    first, second = case.layer(), case.layer()
    a, b = first(x, training=True), first(x, training=True)
    assert not np.allclose(a, b)
    np.testing.assert_array_equal(second(x, training=True), a)
    assert not np.allclose(case.layer(seed=4)(x, training=True), a)


def test_integers_are_numbers():
    layer = Case().layer()
    x = np.arange(2 * LENGTH * 4).reshape(2, LENGTH, 4) % 3
    np.testing.assert_array_equal(layer(x), layer(x.astype("float64")))


@pytest.mark.parametrize("cap", [None, "both"])
@pytest.mark.parametrize("shape", [(2, 0, 4), (0, 5, 4), (0, 0, 4)])
@pytest.mark.parametrize("call", [{}, {"use_causal_mask": True}])
def test_empty_batches_and_sequences_give_empty_outputs(shape, call, cap):
    layer = Case(cap=cap).layer(output_shape=3)
    output, scores = layer(np.zeros(shape), return_attention_scores=True, **call)
    assert output.shape == (*shape[:2], 3)
    assert scores.shape == (shape[0], 2, shape[1], shape[1])
    masked = layer(np.zeros(shape), query_mask=np.zeros(shape[:2], bool), **call)
    assert masked.shape == (*shape[:2], 3)


def test_a_sequence_of_padding_is_a_sequence_of_zeros():
    layer = Case().layer()
    x = np.full((2, LENGTH, 4), np.nan)
    for call in ({}, {"use_causal_mask": True}):
        output = layer(x, query_mask=np.zeros((2, LENGTH), bool), **call)
        np.testing.assert_array_equal(output, 0.0)


def test_fans_of_the_initializer_are_those_of_the_matrices():
    layer = kl.L2MultiHeadAttention(8, 16, kernel_initializer="orthogonal")
    layer.build((None, 3, 128))
    for kernel in (layer.query_kernel, layer.value_kernel, layer.output_kernel):
        matrix = np.reshape(kernel, (128, 128))
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(128), atol=1e-5)


def test_kernels_start_apart_unless_the_seed_says_otherwise():
    layer = kl.L2MultiHeadAttention(2, 4)
    layer.build((None, 3, 8))
    assert not np.allclose(layer.query_kernel, layer.value_kernel)
