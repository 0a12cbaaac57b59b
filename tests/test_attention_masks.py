"""Masks of pairs: every shape that Keras broadcasts, on every path, with sound caps."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import bounds_cases, jacobians, loop_attention, loop_cosine
from helpers.layer_cases import BATCH, FEATURES, LENGTH, Case, kernels

import keras_lipattn as kl
from keras_lipattn.layers import _block_layout, _distance_attention

KINDS = (kl.L2MultiHeadAttention, kl.ScaledCosineAttention)
AXES = ("plain", "one token", "first axis", "last axis", "two axes", "outer axes")
# Float64 attention loses a few digits to the expansion of the square.
ATOL = 1e-11


def _masks(case, most=30):
    """Masks of about `most` legal shapes, half of it visible, in dtypes that take turns."""
    rng = np.random.default_rng(0)
    dtypes = ("bool", "int32", "float32")
    shapes = case.mask_shapes()
    # Odd: shapes come sorted, and a side of 1 would always meet the same one.
    for index, shape in enumerate(shapes[:: len(shapes) // most | 1]):
        yield (rng.random(shape) < 0.5).astype(dtypes[index % 3])


def _loops(case, layer, x, **call):
    arguments = {"axes": case.axes, **call}
    if case.kind is kl.L2MultiHeadAttention:
        return loop_attention.attend_over_axes(x, *kernels(layer), **arguments)
    attend = loop_cosine.attending(layer.temperature, layer.epsilon)
    weights = loop_cosine.weights(layer)
    return loop_attention.attend_over_axes(x, *weights, **arguments, attend=attend)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", AXES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_legal_shape_gives_what_the_loops_give(kind, options, causal):
    case = Case(options, kind=kind)
    layer, x = case.layer(), case.inputs()
    for mask in _masks(case):
        expected, scores = _loops(case, layer, x, attention_mask=mask, causal=causal)
        call = {"attention_mask": mask, "use_causal_mask": causal}
        np.testing.assert_allclose(layer(x, **call), expected, rtol=0, atol=ATOL)
        found = layer(x, return_attention_scores=True, **call)
        np.testing.assert_allclose(found[0], expected, rtol=0, atol=ATOL)
        np.testing.assert_allclose(found[1], scores, rtol=0, atol=ATOL)


@pytest.mark.parametrize("options", [name for name in AXES if name != "one token"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_means_what_it_means_to_the_standard_layer(kind, options):
    case = Case(options, dtype="float32", kind=kind)
    layer, x = case.layer(scale=0.3), tf.cast(case.inputs(), "float32")
    axes = case.constructor.get("attention_axes")
    standard = keras.layers.MultiHeadAttention(2, 3, attention_axes=axes)
    own = np.eye(case.tokens, dtype=bool)
    for mask in _masks(case):
        if mask.ndim < 2 * len(case.axes):
            # Masks of flattened tokens are unknown to the standard layer.
            continue
        call = {"attention_mask": tf.constant(mask), "return_attention_scores": True}
        _, expected = standard(x, x, **call)
        _, found = layer(x, **call)
        assert found.shape == expected.shape
        shape = (-1, case.tokens, case.tokens)
        seen, there = (np.reshape(scores, shape) > 0.0 for scores in (found, expected))
        np.testing.assert_array_equal(seen & ~own, there & ~own)
        assert seen[:, own].all()


@pytest.mark.parametrize("options", AXES)
def test_shapes_of_scores_are_known_in_advance(options):
    case = Case(options, dtype="float32")
    layer = kl.L2MultiHeadAttention(**case.constructor)
    spec = keras.KerasTensor((None, *case.sides, FEATURES))
    _, scores = layer.compute_output_spec(spec, return_attention_scores=True)
    assert tuple(scores.shape) == (None, *case.score_shape[1:])
    _, scores = layer(keras.Input((*case.sides, FEATURES)), return_attention_scores=True)
    assert tuple(scores.shape) == (None, *case.score_shape[1:])


@pytest.fixture(params=["plain", "blocks", "condensed", "training"])
def path(request, monkeypatch):
    """A function of a layer that returns a way of calling it."""
    if request.param == "blocks":
        monkeypatch.setattr(_distance_attention, "BLOCKWISE_MIN_LENGTH", 1)
        monkeypatch.setattr(_block_layout, "BLOCK_SIZES", (2, 2))

    def through(layer):
        if request.param == "condensed":

            def run(*args, **kwargs):
                with kl.condensed(layer):
                    return layer(*args, **kwargs)

            return run
        return functools.partial(layer, training=request.param == "training")

    return through


@pytest.mark.parametrize("options", ["plain", "relative", "first axis", "two axes"])
def test_every_path_takes_every_shape(options, path):
    case = Case(options)
    layer, x = case.layer(), case.inputs()
    run = path(layer)
    for mask in _masks(case):
        # With the scores as an output attention is made of plain operations.
        expected, _ = layer(x, attention_mask=mask, return_attention_scores=True)
        found = run(x, attention_mask=mask)
        np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize(("length", "blocks"), [(None, False), (LENGTH, False), (LENGTH, True)])
def test_sides_may_be_unknown_in_a_graph(length, blocks, jit_compile, monkeypatch):
    case = Case()
    layer, x = case.layer(), case.inputs()
    if blocks:
        monkeypatch.setattr(_distance_attention, "BLOCKWISE_MIN_LENGTH", 1)
        monkeypatch.setattr(_block_layout, "BLOCK_SIZES", (2, 2))
    for rank in (2, 3, 4):
        signature = [
            tf.TensorSpec((None, length, FEATURES), "float64"),
            tf.TensorSpec([None] * rank, "bool"),
        ]
        graph = tf.function(
            lambda x, mask: layer(x, attention_mask=mask),
            input_signature=signature,
            jit_compile=jit_compile,
        )
        for mask in _masks(case, 6 if jit_compile else 30):
            if mask.ndim == rank:
                mask = mask.astype(bool)
                expected = layer(x, attention_mask=mask)
                np.testing.assert_allclose(graph(x, mask), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("options", ["first axis", "two axes", "outer axes"])
def test_sides_may_be_unknown_with_several_axes(options):
    case = Case(options)
    layer, x = case.layer(), case.inputs()
    for mask in _masks(case, 12):
        graph = tf.function(
            lambda x, mask: layer(x, attention_mask=mask),
            input_signature=[
                tf.TensorSpec((None, *case.sides, FEATURES), "float64"),
                tf.TensorSpec([None] * mask.ndim, mask.dtype),
            ],
        )
        expected = layer(x, attention_mask=mask)
        np.testing.assert_allclose(graph(x, mask), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_keys_give_valid_tokens_what_padding_gives_them(kind):
    case = Case("plain", "query mask", kind=kind)
    layer, x = case.layer(), case.inputs()
    valid = case.call_arguments()["query_mask"]
    # This is how the encoder of keras-hub passes padding.
    found = np.asarray(layer(x, attention_mask=valid[:, None].astype("int32")))
    padded = np.asarray(layer(x, query_mask=valid))
    np.testing.assert_allclose(found[valid], padded[valid], rtol=0, atol=ATOL)


@pytest.mark.parametrize("shape", [(4, 4), (2, 4), (BATCH, LENGTH), (BATCH + 1, 1, LENGTH)])
@pytest.mark.parametrize("kind", KINDS)
def test_other_shapes_are_refused_with_the_legal_ones(kind, shape):
    layer = kind(2, 3)
    x = np.zeros((BATCH, LENGTH, FEATURES), "float32")
    message = r"shape \(5, 5\), \(2, 5, 5\) or \(2, 2, 5, 5\), or 1 in .*Received: .*shape \("
    with pytest.raises(ValueError, match=message):
        layer(x, attention_mask=np.ones(shape, bool))
    with pytest.raises(ValueError, match=message):
        layer(x, attention_mask=np.array(True))


# Caps and certificates ---------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
@pytest.mark.parametrize("options", ["plain", "two axes"])
@pytest.mark.parametrize("kind", KINDS)
def test_caps_hold_for_every_shape(kind, options, norm):
    case = Case(options, kind=kind)
    layer = case.layer(scale=1.5, lipschitz_bound=0.7, lipschitz_norm=norm)
    layer.condense()
    rng = np.random.default_rng(1)
    largest = 0.0
    for mask in _masks(case, 10):
        # Of one example: it is run in a batch of copies.
        mask = mask[:1] if mask.ndim == 3 or mask.ndim > 2 * len(case.axes) else mask
        call = functools.partial(layer, attention_mask=mask)
        x = rng.normal(size=(*case.sides, FEATURES))
        found = jacobians.norms(jacobians.jacobian(call, x))[norm]
        largest = max(largest, found)
        # The cap aims one part in a million below itself.
        assert found <= 0.7
    assert largest > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_mask_that_broadcasts_has_the_cap_of_the_full_one(kind):
    case = Case(kind=kind)
    layer, x = case.layer(lipschitz_bound=0.5), case.inputs()
    layer.condense()
    keys = np.array([[True, False, True, False, False]])
    for mask in (keys, keys.T):
        full = np.broadcast_to(mask, (LENGTH, LENGTH))
        np.testing.assert_array_equal(layer(x, attention_mask=mask), layer(x, attention_mask=full))
        assert layer.lipschitz(mask=mask) == layer.lipschitz(mask=full)
        graph = [float(layer.graph_bound(mask=each)) for each in (mask, full)]
        assert graph[0] == pytest.approx(graph[1])
    # What differs between examples is not known, and cannot change the cap of another.
    both = np.stack([keys.T, ~keys.T])
    first = np.asarray(layer(x, attention_mask=both))[0]
    np.testing.assert_array_equal(layer(x, attention_mask=both[[0, 0]])[0], first)
    assert not np.allclose(layer(x, attention_mask=keys.T)[0], first)


def test_patterns_are_recognized_in_arrays():
    layer = Case().layer()
    windowed = Case(kind=kl.L2MultiHeadAttention).layer(sliding_window=5)
    index = np.arange(24)
    lag = index[:, None] - index
    for array, name in ((lag >= 0, "causal"), (lag <= 0, "causal"), (lag < 99, "full")):
        for mask in (array, array.astype("float32"), np.stack([array, array])):
            for norm in ("l2", "token", "linf"):
                expected = layer.lipschitz(24, norm, name)
                assert layer.lipschitz(norm=norm, mask=mask).value == expected.value
    for causal, name in ((lag < 99, "full"), (lag >= 0, "causal")):
        window = layer.lipschitz(mask=causal & (abs(lag) < 5)).value
        assert window == pytest.approx(windowed.lipschitz(24, mask=name).value)
        assert windowed.lipschitz(mask=causal).value == pytest.approx(window)
        # A window that reaches every token hides nothing.
        assert windowed.lipschitz(5, mask=name).value == layer.lipschitz(5, mask=name).value
        assert window < layer.lipschitz(24, mask=name).value
    block = layer.lipschitz(mask=index[:, None] // 6 == index // 6).value
    assert block == pytest.approx(layer.lipschitz(6).value)


@pytest.mark.parametrize("pattern", ["window", "causal window", "blocks", "prefix", "causal"])
def test_caps_hold_for_masks_with_a_pattern(pattern):
    tokens = 12
    layer = kl.L2MultiHeadAttention(1, 2, use_bias=False, lipschitz_bound=1.0, dtype="float64")
    layer.build((None, tokens, 2))
    layer.query_kernel.assign(2**0.25 * np.eye(2)[:, None])
    layer.value_kernel.assign(np.eye(2)[:, None])
    layer.output_kernel.assign(np.eye(2)[None])
    layer.condense()
    mask = bounds_cases.masks(tokens, np.random.default_rng(0))[pattern]
    loose = layer.lipschitz(mask="any", norm="token").value
    # The cap knows the pattern: it scales down less than that of any mask.
    assert layer.lipschitz(mask=mask, norm="token").value > loose
    call = functools.partial(layer, attention_mask=mask)
    rng = np.random.default_rng(1)
    found = max(
        jacobians.norms(jacobians.jacobian(call, x))["l2"]
        for x in bounds_cases.inputs(tokens, 2, rng)
    )
    assert 0.2 < found <= 1.0


def test_certificates_restrict_stated_masks_to_earlier_tokens():
    layer = kl.L2MultiHeadAttention(1, 2, dtype="float64")
    inputs = keras.Input((24, FEATURES), dtype="float64")
    pairs = keras.Input((24, 24), dtype="bool")
    outputs = layer(inputs, attention_mask=pairs, use_causal_mask=True)
    model = keras.Model([inputs, pairs], outputs)
    lag = np.subtract.outer(np.arange(24), np.arange(24))
    for stated, mask in (
        ("full", "causal"),
        (abs(lag) < 5, (lag >= 0) & (lag < 5)),
        (np.ones((24, 24), bool), "causal"),
    ):
        total = kl.certify(model, mask=stated, inputs=[inputs.name]).total
        assert total == pytest.approx(layer.lipschitz(24, mask=mask).value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["l2", "token"])
def test_a_mask_of_one_entry_says_nothing_of_the_tokens(kind, norm):
    layer = Case(kind=kind).layer()
    one = np.ones((1, 1), bool)
    unknown = layer.lipschitz(norm=norm, mask="any").value
    assert layer.lipschitz(norm=norm, mask=one).value == unknown
    assert float(layer.graph_bound(norm=norm, mask=one)) == pytest.approx(
        float(layer.graph_bound(norm=norm, mask="any"))
    )
    inputs = keras.Input((LENGTH, FEATURES), dtype="float64")
    for mask in (one, one[None], one[None, None]):
        for causal in (False, True):
            outputs = layer(inputs, attention_mask=mask, use_causal_mask=causal)
            assert kl.certify(keras.Model(inputs, outputs), norm=norm).total == pytest.approx(
                unknown
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_certificates_do_not_take_axes_for_flattened_tokens(kind, causal):
    layer = kind(2, 3, dtype="float64")
    inputs = keras.Input((3, 3, FEATURES), dtype="float64")
    mask = np.ones((3, 3, 3, 3), bool)
    model = keras.Model(inputs, layer(inputs, attention_mask=mask, use_causal_mask=causal))
    assert kl.certify(model).total == pytest.approx(layer.lipschitz(mask="any").value)
    # With flattened tokens the degrees are known.
    flat = np.eye(9, dtype=bool)
    narrow = keras.Model(inputs, layer(inputs, attention_mask=flat, use_causal_mask=causal))
    assert kl.certify(narrow).total < kl.certify(model).total
