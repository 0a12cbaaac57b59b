"""Dot-product attention on bounded tokens: values, masks, other tensors, decoding, saving."""

# The annotations of TensorFlow and numpy do not cover what is passed and returned here.
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportArgumentType=false

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import loop_attention, loop_cosine, loop_product
from helpers.layer_cases import BOUNDED_OPTIONS, CAPS, FEATURES, HEADS, LENGTH, Case, cases

import keras_lipattn as kl
from keras_lipattn.layers import Tracking
from keras_lipattn.layers._fused_attention import plain_attention

KIND = kl.BoundedMultiHeadAttention
ONE_CAP = [cap for cap in CAPS if cap != "both"]
# Relative to the largest output, or to 1: roundings of three projections and of the weights.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "mixed_bfloat16": 0.1, "mixed_float16": 0.02}


def _case(*args, **fields):
    return Case(*args, **fields, kind=KIND)


def _numpy(tensor):
    return keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float64"))


def _expected(case, layer, x):
    kernels, biases = loop_cosine.weights(layer)
    table = None if layer.relative_bias is None else _numpy(layer.relative_bias)
    attend = loop_product.attending(layer.token_radius, table)
    x = _numpy(keras.ops.cast(x, layer.compute_dtype))
    arguments = case.loop_arguments()
    return loop_attention.attend_over_axes(x, kernels, biases, **arguments, attend=attend)


def _close(found, expected, dtype):
    tolerance = TOLERANCE[dtype] * max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(_numpy(found), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "case",
    [
        *cases(options=("plain", "shared heads"), kind=KIND),
        *cases(
            options=[name for name in BOUNDED_OPTIONS if name != "plain"],
            calls=("causal", "everything"),
            kind=KIND,
        ),
        *cases(
            options=("plain",),
            calls=("everything",),
            dtypes=("float32", "mixed_bfloat16", "mixed_float16"),
            kind=KIND,
        ),
    ],
    ids=str,
)
def test_output_and_scores_equal_the_loops(case):
    layer, x = case.layer(), case.inputs()
    expected, scores = _expected(case, layer, x)
    assert case.run(layer, x).dtype == layer.compute_dtype
    _close(case.run(layer, x), expected, case.dtype)
    both = case.run(layer, x, return_attention_scores=True)
    _close(both[0], expected, case.dtype)
    _close(both[1], scores, case.dtype)


# The standard layer -------------------------------------------------------------------------------


def copied(options, query, value, key=None):
    """A standard layer with random weights, and a bounded one with the same and a large ball."""
    standard = keras.layers.MultiHeadAttention(**options, dtype="float64")
    standard(query, value, key)
    bounded = KIND(**options, token_radius=1e3, dtype="float64")
    bounded(query, value, key)
    rng = np.random.default_rng(3)
    for name in ("query", "key", "value", "output"):
        dense = getattr(standard, f"_{name}_dense")
        for part in ("kernel", "bias"):
            given = rng.normal(size=getattr(dense, part).shape)
            getattr(dense, part).assign(given)
            getattr(bounded, f"{name}_{part}").assign(given)
    return standard, bounded


RNG = np.random.default_rng(0)
# Query, value and key: features and lengths of their own.
TENSORS = {
    "value": [(2, 5, 4), (2, 7, 4)],
    "value of other features": [(2, 5, 4), (2, 3, 6)],
    "value and key": [(2, 5, 4), (2, 7, 6), (2, 7, 3)],
    "key": [(2, 5, 4), (2, 5, 4), (2, 5, 4)],
    "axes": [(2, 3, 5, 4), (2, 3, 2, 4)],
}
CROSS_CALLS = {
    "no mask": lambda t, s: {},
    "causal": lambda t, s: {"use_causal_mask": True},
    "value mask": lambda t, s: {"value_mask": np.arange(s)[None] < np.array([[2], [s]])},
    "key mask": lambda t, s: {"key_mask": np.arange(s)[None] < np.array([[2], [s]])},
    "pairs": lambda t, s: {"attention_mask": RNG.random((t, s)) < 0.5},
    "pairs per example": lambda t, s: {"attention_mask": RNG.random((2, t, s)) < 0.5},
    "keys per example": lambda t, s: {"attention_mask": RNG.random((2, 1, s)) < 0.7},
    "everything": lambda t, s: {
        "use_causal_mask": True,
        "value_mask": np.arange(s)[None] < np.array([[2], [s]]),
        "attention_mask": RNG.random((2, t, s)) < 0.8,
    },
}


@pytest.mark.parametrize(
    ("tensors", "call"),
    # The masks are those of one axis of tokens.
    [(t, call) for t in TENSORS for call in CROSS_CALLS if t != "axes" or call == "no mask"],
)
@pytest.mark.parametrize("more", [{}, {"value_dim": 5, "output_shape": (2, 3)}], ids=str)
def test_other_tensors_give_what_the_standard_layer_gives(tensors, call, more):
    shapes = TENSORS[tensors]
    given = [np.random.default_rng(i).normal(size=shape) for i, shape in enumerate(shapes)]
    options = {"num_heads": 2, "key_dim": 3, **more}
    if tensors == "axes":
        options["attention_axes"] = (2,)
    standard, bounded = copied(options, *given)
    arguments = CROSS_CALLS[call](shapes[0][1], shapes[1][1])
    found = _numpy(bounded(*given, **arguments))
    # Its path that returns scores gives zero weights where no key is seen, as ours does everywhere.
    expected, scores = standard(*given, **arguments, return_attention_scores=True)
    # Keras rounds the factor of its scores to float32.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    _, weights = bounded(*given, **arguments, return_attention_scores=True)
    np.testing.assert_allclose(weights, scores, rtol=0, atol=1e-6)
    symbolic = bounded(*(keras.Input(one[1:], dtype="float64") for one in shapes))
    assert symbolic.shape[1:] == found.shape[1:]


def test_rows_without_keys_are_the_output_bias():
    layer = _case().layer()
    x = _case().inputs()
    visible = np.ones((LENGTH, LENGTH), bool)
    visible[2] = False
    output, scores = layer(x, attention_mask=visible, return_attention_scores=True)
    np.testing.assert_array_equal(_numpy(scores)[:, :, 2], 0.0)
    np.testing.assert_allclose(
        _numpy(output)[:, 2], _numpy(layer.output_bias)[None] + 0.0 * x[:, 2]
    )
    other = layer(x, x[:, :3], value_mask=np.array([[False] * 3, [True] * 3]))
    np.testing.assert_allclose(_numpy(other)[0], _numpy(layer.output_bias)[None] + 0.0 * x[0])


@pytest.mark.parametrize("kind", [KIND, kl.L2MultiHeadAttention])
def test_no_nan_in_padding_reaches_an_output_or_a_gradient(kind):
    layer = kind(2, 3, token_radius=1.0, dtype="float64")
    x, memory = np.ones((2, 4, 5)), np.random.default_rng(0).normal(size=(2, 3, 5))
    expected = layer(x, memory[:, :2])
    memory[:, 2] = np.nan
    masks = {"value_mask": np.array([[True, True, False]] * 2)}
    memory = tf.constant(memory)
    with tf.GradientTape() as tape:
        tape.watch(memory)
        found = layer(x, memory, **masks)
        loss = tf.reduce_sum(found**2)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    gradients = tape.gradient(loss, [*layer.trainable_variables, memory])
    assert all(np.isfinite(_numpy(gradient)).all() for gradient in gradients)
    np.testing.assert_array_equal(_numpy(gradients[-1])[:, 2], 0.0)


def test_tensors_that_do_not_fit_are_refused():
    layer = KIND(2, 3)
    x = np.ones((2, 4, 5), "float32")
    layer(x, x[:, :2])
    for value, key in (
        (x[..., :3], None),
        (x, x[:, :3]),
        (x[:1], None),
        (x[0], None),
    ):
        with pytest.raises(ValueError, match="Received: "):
            layer(x, value, key)
    with pytest.raises(ValueError, match=r"`value_mask` must have the shape of `value`"):
        layer(x, x[:, :2], value_mask=np.ones((2, 4), bool))
    with pytest.raises(ValueError, match=r"one kernel projects|One kernel projects"):
        kl.L2MultiHeadAttention(2, 3, token_radius=1.0)(x, x[..., :3])


@pytest.mark.parametrize("options", ["plain", "relative", "shared heads"])
@pytest.mark.parametrize("call", ["no mask", "causal", "pairs", "everything"])
@pytest.mark.parametrize("cross", [False, True])
def test_gradients_in_training_are_those_of_the_plain_operations(options, call, cross):
    case = _case(options, call)
    layer, x = case.layer(), tf.constant(case.inputs())
    arguments = {k: v for k, v in case.call_arguments().items() if k != "implicit"}

    def gradients():
        with tf.GradientTape() as tape:
            tape.watch(x)
            given = (2.0 * x[:, ::-1],) if cross else ()
            loss = tf.reduce_sum(tf.sin(layer(x, *given, training=True, **arguments)))
        return tape.gradient(loss, [x, *layer.trainable_variables])

    written = gradients()
    with plain_attention():
        plain = gradients()
    for one, other in zip(written, plain, strict=True):
        np.testing.assert_allclose(_numpy(one), _numpy(other), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_radius": 0.0}, "`token_radius` must be a positive number"),
        ({"token_radius": None}, "`token_radius` must be a positive number"),
        ({"num_key_value_heads": 3}, "must be a multiple of `num_key_value_heads`"),
        ({"use_gate": True}, "Received: use_gate=True"),
        ({"max_relative_position": 0}, "must be a positive integer"),
        ({"spectral_norm": 1.0, "lipschitz_bound": 2.0}, "give one. Received"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KIND(4, 3, **options)


# A layer like the others --------------------------------------------------------------------------


def test_call_arguments_are_those_of_the_standard_layer():
    ours, standard = (
        list(inspect.signature(layer.call).parameters)
        for layer in (KIND, keras.layers.MultiHeadAttention)
    )
    assert ours == [*standard, "token_weights"]


@pytest.mark.parametrize("cap", ONE_CAP)
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("options", ["relative", "shared heads"])
def test_caps_hold_and_condensing_changes_nothing(cap, dtype, options):
    case = _case(options, cap=cap, dtype=dtype)
    layer, x = case.layer(scale=1.5), case.inputs()
    loose, tight = case.run(layer, x), 0.0
    layer.condense()
    remembered = case.run(layer, x)
    with kl.condensed(layer) as variables:
        assert len(variables) == 2
        constants = case.run(layer, x)
        if layer.lipschitz_bound is not None:
            tight = layer.lipschitz(norm=layer.lipschitz_norm).value
            assert tight <= layer.lipschitz_bound
    slack = 1e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(_numpy(loose), _numpy(constants), rtol=0, atol=slack)
    np.testing.assert_allclose(_numpy(remembered), _numpy(constants), rtol=0, atol=slack)
    if layer.spectral_norm is not None:
        weights = layer.host_weights().exact
        for kernel in (weights.query, weights.key, weights.value, weights.output):
            for head in kernel:
                assert np.linalg.norm(head, 2) <= layer.spectral_norm
    else:
        # The cap does not shrink by much more than it must.
        assert tight >= 0.4 * CAPS[cap]["lipschitz_bound"]


@pytest.mark.parametrize("kind", [KIND, kl.L2MultiHeadAttention])
@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
def test_the_running_bound_is_close_to_the_certificate(kind, norm):
    case = Case("ball, relative", kind=kind)
    layer = case.layer()
    layer.warm_up()
    layer.tracking = Tracking(norm=norm, penalize=True)
    layer.penalty_coefficient.assign(1.0)
    layer(case.inputs(), training=True)
    running, certified = float(layer.running_bound), layer.lipschitz(norm=norm).value
    assert certified <= running * 1.01
    assert running <= 2.0 * certified
    assert float(layer.graph_bound(norm=norm)) >= certified
    assert len(layer.losses) == 1 and float(layer.losses[0]) > 0.0


@pytest.mark.parametrize("kind", [KIND, kl.L2MultiHeadAttention])
@pytest.mark.parametrize("norm", ["token", "linf"])
def test_a_capped_layer_knows_no_length(kind, norm):
    layer = kind(
        4,
        3,
        token_radius=0.8,
        max_relative_position=8,
        lipschitz_bound=0.7,
        lipschitz_norm=norm,
        dtype="float64",
    )
    layer.build((None, None, 6))
    assert layer.max_sequence_length is None
    values = set()
    for size in (0.0, 50.0):
        signs = np.sign(np.random.default_rng(0).normal(size=layer.relative_bias.shape))
        layer.relative_bias.assign(size * signs)
        values |= {
            layer.lipschitz(tokens, norm, mask).value
            for tokens in (64, 1024, 16384, None)
            for mask in ("full", "causal", "any")
        }
    assert len(values) == 1 and 0.3 < values.pop() <= 0.7


@pytest.mark.parametrize("kind", [KIND, kl.L2MultiHeadAttention])
@pytest.mark.parametrize("tensors", ["value", "value and key"])
@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
def test_caps_hold_for_other_tensors(kind, tensors, norm):
    shapes = [(*shape[:2], 4) for shape in TENSORS[tensors]]
    layer = kind(2, 3, token_radius=1.2, lipschitz_bound=0.4, lipschitz_norm=norm, dtype="float64")
    given = [np.random.default_rng(i).normal(size=shape) for i, shape in enumerate(shapes)]
    layer(*given)
    parts = layer.cross_lipschitz(norm=norm, separate_key=len(shapes) == 3)
    inputs = [keras.Input(shape[1:], dtype="float64") for shape in shapes]
    total = kl.certify(keras.Model(inputs, layer(*inputs)), norm=norm, check=True).total
    assert total <= 0.4
    assert max(part.value for part in parts.values()) <= 0.4
    assert total >= 0.2


@pytest.mark.parametrize("condensed", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 3},
        {"num_key_value_heads": 1, "value_dim": 3},
        {"max_relative_position": 3, "lipschitz_bound": 0.3, "lipschitz_norm": "token"},
        {"output_shape": (3, 2), "use_bias": False},
    ],
    ids=str,
)
def test_decoding_equals_the_full_pass(options, condensed):
    layer = KIND(2, 4, token_radius=2.0, **options)
    x = np.random.default_rng(0).normal(size=(2, 12, 6)).astype("float32")
    layer(x)
    if layer.relative_bias is not None:
        layer.relative_bias.assign(np.random.default_rng(1).normal(size=layer.relative_bias.shape))
    layer.condense()
    expected = layer(x, use_causal_mask=True)

    def decode_all():
        step = tf.function(layer.decode)
        output, cache = step(x[:, :5], layer.init_cache(2, 12), 0)
        outputs = [output]
        for position in range(5, 12):
            output, cache = step(x[:, position : position + 1], cache, tf.constant(position))
            outputs.append(output)
        return tf.concat(outputs, axis=1)

    if condensed:
        with kl.condensed(layer):
            found = decode_all()
    else:
        found = decode_all()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cap", [None, *ONE_CAP])
def test_models_reload_bit_for_bit(tmp_path, cap):
    layer = _case("one shared head", cap=cap, dtype="float32").layer()
    inputs = keras.Input((LENGTH, FEATURES)), keras.Input((3, FEATURES))
    model = keras.Model(inputs, layer(*inputs))
    x = np.random.default_rng(0).normal(size=(2, LENGTH, FEATURES)).astype("float32")
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    given = [x, x[:, :3]]
    np.testing.assert_array_equal(again(given), model(given))
    assert again.layers[-1].get_config() == layer.get_config()
    arguments = set(inspect.signature(KIND.__init__).parameters)
    assert arguments - {"self", "kwargs"} <= set(layer.get_config())


@pytest.mark.parametrize("cap", [None, "token"])
def test_a_model_of_an_encoder_and_a_decoder_trains(cap):
    caps = CAPS[cap] if cap else {}
    inputs = keras.Input((None, 6)), keras.Input((None, 6))
    memory = KIND(HEADS, 3, token_radius=1.0, dropout=0.1, **caps)(inputs[1])
    own = KIND(HEADS, 3, token_radius=1.0, **caps)(inputs[0], use_causal_mask=True)
    cross = KIND(HEADS, 3, token_radius=1.0, **caps)(own, memory)
    model = keras.Model(inputs, keras.layers.Dense(3)(cross))
    model.compile("adam", "mse")
    monitor = kl.LipschitzMonitor(norm="token", penalty=0.1, target=0.5)
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(8, 5, 6)), rng.normal(size=(8, 7, 6))]
    history = model.fit(x, rng.normal(size=(8, 5, 3)), epochs=2, verbose=0, callbacks=[monitor])
    assert all(np.isfinite(values).all() for values in history.history.values())
    assert kl.certify(model, norm="token", sequence_length=8, check=True).is_finite
