"""The layer drops in for the standard one: calls, saving, masks, training, export."""

# The annotations of TensorFlow and numpy do not cover what is passed and returned here.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false

import copy
import inspect
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.layer_cases import CAPS, FEATURES, HEADS, KEY_DIM, LENGTH, OPTIONS, Case, randomize

import keras_lipattn as kl

NO_BOUND = "no Lipschitz bound exists for cross-attention"


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(2, LENGTH, FEATURES)).astype("float32")


def _functional(layer, length=LENGTH, **call):
    inputs = keras.Input((length, FEATURES))
    return keras.Model(inputs, layer(inputs, **call))


@keras.saving.register_keras_serializable("tests")
class Block(keras.Model):
    """A subclassed model that calls its layer as users of the standard layer do."""

    def __init__(self, attention=None, way="value", **kwargs):
        super().__init__(**kwargs)
        self.attention = attention or kl.L2MultiHeadAttention(HEADS, KEY_DIM)
        self.way = way

    def call(self, x, other=None):
        if self.way == "value":
            return self.attention(x, x)
        if self.way == "names":
            return self.attention(query=x, value=x, key=x)
        return self.attention(x, other)

    def get_config(self):
        attention = keras.saving.serialize_keras_object(self.attention)
        return {**super().get_config(), "attention": attention, "way": self.way}

    @classmethod
    def from_config(cls, config):
        attention = keras.saving.deserialize_keras_object(config.pop("attention"))
        return cls(attention, **config)


# Signatures -------------------------------------------------------------------


def test_call_arguments_are_those_of_the_standard_layer():
    ours, standard = (
        list(inspect.signature(layer.call).parameters)
        for layer in (kl.L2MultiHeadAttention, keras.layers.MultiHeadAttention)
    )
    # What the standard layer has not comes last.
    assert ours == [*standard, "token_weights"]


def test_constructor_takes_what_the_standard_layer_takes_in_its_order():
    ours, standard = (
        list(inspect.signature(layer.__init__).parameters)
        for layer in (kl.L2MultiHeadAttention, keras.layers.MultiHeadAttention)
    )
    # `use_gate` is refused, which takes no parameter.
    assert set(standard) - {"use_gate"} <= set(ours)
    positional = standard[: standard.index("kernel_initializer")]
    assert ours[: len(positional)] == positional


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", ["numpy", "tensor", "float64 numpy"])
def test_self_attention_may_be_spelled_in_every_way(x, dtype, kind):
    layer = kl.L2MultiHeadAttention(HEADS, KEY_DIM, dtype=dtype)
    given = {"numpy": x, "tensor": tf.constant(x), "float64 numpy": x.astype("float64")}[kind]
    expected = layer(given)
    for output in (
        layer(given, given),
        layer(given, given, given),
        layer(given, value=given),
        layer(given, key=given),
        layer(query=given, value=given, key=given),
        layer(given, None, None),
    ):
        np.testing.assert_array_equal(output, expected)


def test_masks_may_be_given_by_position(x):
    layer = kl.L2MultiHeadAttention(HEADS, KEY_DIM)
    valid = np.arange(LENGTH)[None] < np.array([[3], [5]])
    pairs = np.tril(np.ones((LENGTH, LENGTH), bool))
    t = tf.constant(x)
    found = layer(t, t, t, tf.constant(valid), None, None, tf.constant(pairs))
    np.testing.assert_array_equal(found, layer(t, query_mask=valid, attention_mask=pairs))
    np.testing.assert_array_equal(
        layer(t, attention_mask=pairs.tolist()), layer(t, None, None, *[None] * 3, pairs)
    )


def test_shapes_of_the_standard_layer_build_it():
    layer = kl.L2MultiHeadAttention(HEADS, KEY_DIM)
    layer.build((2, LENGTH, FEATURES), (2, LENGTH, FEATURES))
    assert layer.built
    shape = (2, LENGTH, FEATURES)
    assert layer.compute_output_shape(shape, shape, shape) == shape
    with pytest.raises(ValueError, match=NO_BOUND):
        kl.L2MultiHeadAttention(HEADS, KEY_DIM).build((2, 5, 4), value_shape=(2, 6, 4))


# Cross-attention --------------------------------------------------------------


@pytest.mark.parametrize("name", ["value", "key"])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("make", [np.copy, tf.constant, tf.identity, lambda x: x[:, :3]])
def test_any_other_tensor_is_cross_attention(x, name, dtype, make):
    layer = kl.L2MultiHeadAttention(HEADS, KEY_DIM, dtype=dtype)
    with pytest.raises(ValueError, match=rf"{NO_BOUND}\. Received: {name}=\w+ of shape \(2,"):
        layer(x, **{name: make(x)})


def test_cross_attention_is_refused_in_every_kind_of_model(x):
    inputs, other = keras.Input((LENGTH, FEATURES)), keras.Input((LENGTH, FEATURES))
    with pytest.raises(ValueError, match=f"{NO_BOUND}.*Received: value=KerasTensor"):
        kl.L2MultiHeadAttention(HEADS, KEY_DIM)(inputs, other)
    with pytest.raises(ValueError, match=NO_BOUND):
        kl.L2MultiHeadAttention(HEADS, KEY_DIM)(inputs, inputs + 0.0)
    with pytest.raises(ValueError, match=NO_BOUND):
        Block(way="cross")(x, x.copy())
    layer = kl.L2MultiHeadAttention(HEADS, KEY_DIM)
    layer.build(x.shape)
    with pytest.raises(ValueError, match=NO_BOUND):
        tf.function(lambda x, y: layer(x, y))(x, x)


def test_cross_attention_is_refused_where_keras_calls_without_call_dunder(x):
    layer = kl.L2MultiHeadAttention(HEADS, KEY_DIM)
    layer.build(x.shape)
    states = (layer.trainable_variables, layer.non_trainable_variables)
    x = tf.constant(x)
    outputs, _ = layer.stateless_call(*states, x, x)
    np.testing.assert_array_equal(outputs, layer(x))
    with pytest.raises(ValueError, match=NO_BOUND):
        layer.stateless_call(*states, x, 2.0 * x)
    with pytest.raises(ValueError, match=NO_BOUND):
        layer.compute_output_spec(keras.KerasTensor(x.shape), keras.KerasTensor(x.shape))


@pytest.mark.parametrize("way", ["value", "names"])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_models_which_pass_their_input_twice_work_and_reload(x, tmp_path, way, dtype):
    block = Block(kl.L2MultiHeadAttention(HEADS, KEY_DIM, dtype=dtype), way)
    inputs = keras.Input((LENGTH, FEATURES))
    functional = keras.Model(
        inputs, kl.L2MultiHeadAttention(HEADS, KEY_DIM, dtype=dtype)(inputs, inputs)
    )
    for model in (block, functional):
        expected = model(x)
        model.save(tmp_path / "model.keras")
        reloaded = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(reloaded(x), expected)
        np.testing.assert_allclose(
            reloaded.predict(x, verbose=0),
            expected,
            rtol=0,
            atol=1e-5 if dtype == "float32" else 0.1,
        )


# Saving -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "cap"), [*((name, None) for name in OPTIONS), *(("plain", cap) for cap in CAPS)]
)
def test_config_holds_every_argument(options, cap):
    case = Case(options, cap=cap, dtype="float32")
    layer = kl.L2MultiHeadAttention(**case.constructor, name="some")
    config = layer.get_config()
    again = kl.L2MultiHeadAttention.from_config(config)
    assert again.get_config() == config
    arguments = set(inspect.signature(kl.L2MultiHeadAttention.__init__).parameters)
    assert arguments - {"self", "kwargs", "activity_regularizer"} <= set(config)


def test_config_of_objects_survives():
    layer = kl.L2MultiHeadAttention(
        2,
        3,
        kernel_initializer=keras.initializers.HeNormal(seed=1),
        bias_initializer="ones",
        kernel_regularizer=keras.regularizers.L2(0.1),
        bias_regularizer="l1",
        activity_regularizer=keras.regularizers.L1(0.2),
        kernel_constraint=keras.constraints.MaxNorm(1.0),
        bias_constraint="non_neg",
        flash_attention=True,
    )
    config = layer.get_config()
    again = kl.L2MultiHeadAttention.from_config(config)
    assert again.get_config() == config
    assert again.flash_attention
    assert float(again.activity_regularizer.l1) == pytest.approx(0.2)
    assert again.kernel_constraint.max_value == 1.0


@pytest.mark.parametrize("cap", [None, "both", "token"])
def test_models_reload_bit_for_bit(x, tmp_path, cap):
    layer = Case(cap=cap, dtype="float32").layer()
    model = _functional(layer)
    mask = np.tril(np.ones((LENGTH, LENGTH), bool))
    masked = _functional(layer, attention_mask=mask)
    for one in (model, masked):
        one.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(again(x), one(x))
        restored = again.layers[-1]
        assert restored.max_sequence_length == layer.max_sequence_length
        assert restored.lipschitz().value == layer.lipschitz().value
    model.save_weights(tmp_path / "some.weights.h5")
    other = _functional(Case(cap=cap, dtype="float32").layer(seed=8))
    assert not np.allclose(other(x), model(x))
    other.load_weights(tmp_path / "some.weights.h5")
    np.testing.assert_array_equal(other(x), model(x))


def test_every_choice_of_caps_has_one_layout_of_weights(tmp_path):
    layers = [Case(cap=cap, dtype="float32").layer() for cap in (None, *CAPS)]
    layouts = {tuple((w.name, tuple(w.shape)) for w in layer.weights) for layer in layers}
    assert len(layouts) == 1
    model = _functional(layers[0])
    model.save_weights(tmp_path / "free.weights.h5")
    for layer in layers[1:]:
        _functional(layer).load_weights(tmp_path / "free.weights.h5")


def test_a_layer_can_be_copied_and_pickled(x):
    layer = Case(cap="both", dtype="float32").layer()
    model = _functional(layer)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        np.testing.assert_array_equal(again(x), model(x))
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(clone(x), model(x))


# Shapes -----------------------------------------------------------------------


def test_one_model_serves_every_batch_and_length(x):
    layer = kl.L2MultiHeadAttention(HEADS, KEY_DIM, lipschitz_bound=0.5, max_sequence_length=9)
    model = _functional(layer, length=None)
    graph = tf.function(model, input_signature=[tf.TensorSpec((None, None, FEATURES))])
    rng = np.random.default_rng(0)
    for batch in (1, 3):
        for length in (1, 4, 9):
            x = rng.normal(size=(batch, length, FEATURES)).astype("float32")
            np.testing.assert_allclose(graph(x), layer(x), atol=1e-5)
    assert graph.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("options", OPTIONS)
def test_symbolic_shapes_are_those_of_outputs(options):
    case = Case(options, dtype="float32")
    layer = kl.L2MultiHeadAttention(**case.constructor)
    x = case.inputs()
    symbolic = layer.compute_output_spec(keras.KerasTensor(x.shape), return_attention_scores=True)
    outputs = layer(x, return_attention_scores=True)
    for spec, output in zip(symbolic, outputs, strict=True):
        assert tuple(spec.shape) == tuple(output.shape)
        assert spec.dtype == output.dtype
    assert layer.compute_output_shape(x.shape) == tuple(outputs[0].shape)
    functional = layer(keras.Input(x.shape[1:]), return_attention_scores=True)
    assert tuple(functional[0].shape[1:]) == tuple(outputs[0].shape[1:])


@pytest.mark.parametrize("built", [False, True])
def test_shapes_that_no_call_accepts_have_no_output_shape(built):
    layer = kl.L2MultiHeadAttention(HEADS, KEY_DIM)
    shape = (None, LENGTH, FEATURES)
    if built:
        layer.build(shape)
    assert layer.compute_output_shape(shape, shape, shape) == shape
    assert layer.compute_output_shape(list(shape), list(shape)) == shape
    for name in ("value", "key"):
        with pytest.raises(ValueError, match=rf"`{name}_shape` must be .*Received: {name}_shape="):
            layer.compute_output_shape(shape, **{f"{name}_shape": (None, LENGTH + 1, FEATURES)})
    wrong = [(None, FEATURES), (None, LENGTH, None), (None, LENGTH, 0)]
    if built:
        wrong += [(None, LENGTH, FEATURES + 1), (None, 2, LENGTH, FEATURES)]
    for query in wrong:
        with pytest.raises(ValueError, match=r"Received: query_shape=\(None, "):
            layer.compute_output_shape(query)
        with pytest.raises(ValueError, match=r"Received: query_shape=\(None, "):
            layer.compute_output_spec(keras.KerasTensor(query))
    axes = kl.L2MultiHeadAttention(HEADS, KEY_DIM, attention_axes=2)
    with pytest.raises(ValueError, match=r"`attention_axes` must be .*Received"):
        axes.compute_output_shape(shape)


# Masks that Keras carries -----------------------------------------------------


def test_masks_reach_the_layer_and_the_next_one(x):
    tokens = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 1]])
    inputs = keras.Input((LENGTH,), dtype="int32")
    embedded = keras.layers.Embedding(9, FEATURES, mask_zero=True)(inputs)
    layer = kl.L2MultiHeadAttention(HEADS, KEY_DIM, bias_initializer="ones")
    hidden = kl.SpectralDense(3)(layer(embedded))
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)
    model = keras.Model(inputs, [embedded, hidden, pooled])
    raw, hidden, pooled = model(tokens)
    np.testing.assert_array_equal(hidden._keras_mask, tokens > 0)
    # The pooling counts valid tokens alone.
    np.testing.assert_allclose(pooled[0], np.mean(hidden[0, :3], axis=0), atol=1e-6)
    np.testing.assert_array_equal(layer(raw)[0, 3:], 0.0)
    alone = layer(raw[:1, :3].numpy())
    np.testing.assert_allclose(layer(raw)[0, :3], alone[0], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_a_mask_is_kept_through_sequential_models_and_low_precision(dtype):
    model = keras.Sequential(
        [
            keras.layers.Masking(0.0),
            kl.L2MultiHeadAttention(HEADS, KEY_DIM, dtype=dtype, bias_initializer="ones"),
            kl.L2MultiHeadAttention(HEADS, KEY_DIM, dtype=dtype, bias_initializer="ones"),
        ]
    )
    x = np.ones((1, LENGTH, FEATURES), "float32")
    x[:, 3:] = 0.0
    output = model(x)
    np.testing.assert_array_equal(keras.ops.cast(output, "float32")[0, 3:], 0.0)
    assert np.abs(keras.ops.cast(output, "float32")[0, :3]).min() > 0.0


@pytest.mark.parametrize("cap", [None, "both"])
def test_a_model_that_fit_builds_learns_and_keeps_masks(cap):
    layer = kl.L2MultiHeadAttention(**Case(cap=cap, dtype="float32").constructor)
    model = keras.Sequential([keras.layers.Masking(0.0), layer])
    x = np.random.default_rng(0).normal(size=(4, LENGTH, FEATURES)).astype("float32")
    x[:, 3:] = 0.0
    model.compile("sgd", "mse")
    model.fit(x, x, epochs=2, verbose=0)
    np.testing.assert_array_equal(model.predict(x, verbose=0)[:, 3:], 0.0)
    np.testing.assert_allclose(model.predict(x, verbose=0), model(x), atol=1e-6)


# Training ---------------------------------------------------------------------


def test_regularizers_and_constraints_act():
    layer = kl.L2MultiHeadAttention(
        HEADS,
        KEY_DIM,
        kernel_regularizer=keras.regularizers.L2(0.5),
        bias_regularizer=keras.regularizers.L1(2.0),
        activity_regularizer=keras.regularizers.L2(0.25),
        kernel_constraint=keras.constraints.NonNeg(),
        bias_constraint=keras.constraints.NonNeg(),
    )
    x = np.random.default_rng(0).normal(size=(2, LENGTH, FEATURES)).astype("float32")
    model = _functional(layer)
    randomize(layer)
    output = model(x)
    kernels = [layer.query_kernel, layer.value_kernel, layer.output_kernel]
    expected = [0.5 * np.square(k).sum() for k in kernels]
    expected += [2.0 * np.abs(layer.output_bias).sum(), 0.25 * np.square(output).sum() / 2]
    np.testing.assert_allclose(sorted(map(float, model.losses)), sorted(expected), rtol=1e-5)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.train_on_batch(x, x)
    for weight in layer.trainable_variables:
        assert np.min(weight) >= 0.0


@pytest.mark.parametrize(
    ("cap", "dtype", "jit_compile"),
    [
        (None, "float32", False),
        ("linf", "mixed_float16", False),
        ("token", "mixed_bfloat16", True),
    ],
)
def test_it_trains(x, cap, dtype, jit_compile):
    layer = kl.L2MultiHeadAttention(**{**Case(cap=cap, dtype=dtype).constructor, "dropout": 0.1})
    model = _functional(layer)
    model.compile("adam", "mse", jit_compile=jit_compile)
    before = [np.copy(w) for w in layer.trainable_variables]
    history = model.fit(x, 0.1 * x, epochs=3, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    for old, weight in zip(before, layer.trainable_variables, strict=True):
        assert np.isfinite(weight).all()
        assert not np.array_equal(old, weight)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_those_of_finite_differences(training):
    for call in ("no mask", "causal", "everything"):
        case = Case(call=call)
        layer, x = case.layer(), tf.Variable(case.inputs())
        weights = layer.trainable_variables
        cotangent = np.random.default_rng(4).normal(size=layer(x).shape)

        def loss(case=case, layer=layer, x=x, cotangent=cotangent):
            return tf.reduce_sum(case.run(layer, x, training=training) * cotangent)

        with tf.GradientTape() as tape:
            value = loss()
        gradients = tape.gradient(value, [x, *(w.value for w in weights)])
        rng = np.random.default_rng(5)
        for variable, gradient in zip([x, *weights], gradients, strict=True):
            start = np.copy(keras.ops.convert_to_numpy(variable))
            direction = rng.normal(size=start.shape)
            if case.valid() is not None and variable is x:
                direction[~case.valid()] = 0.0
            ends = []
            for step in (1e-5, -1e-5):
                variable.assign(start + step * direction)
                ends.append(float(loss()))
            variable.assign(start)
            # Central differences of step 1e-5 in float64: 1e-10 of the third derivative.
            slope = (ends[0] - ends[1]) / 2e-5
            assert np.vdot(gradient, direction) == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("call", ["no mask", "everything"])
def test_derivatives_can_be_differentiated_and_run_forward(call, training):
    case = Case(call=call)
    layer, x = case.layer(), case.inputs()
    rng = np.random.default_rng(4)
    cotangent = tf.constant(rng.normal(size=layer(x).shape))
    direction = rng.normal(size=x.shape)
    if case.valid() is not None:
        direction[~case.valid()] = 0.0
    direction = tf.constant(direction)

    def run(x):
        return case.run(layer, x, training=training)

    def pulled(x, cotangent):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(run(x) * cotangent)
        return tape.gradient(y, x)

    h = 1e-5
    ends = [tf.constant(x + step * direction.numpy()) for step in (h, -h)]
    # Central differences of step 1e-5 in float64.
    second = (pulled(ends[0], cotangent) - pulled(ends[1], cotangent)) / (2.0 * h)
    pushed = (run(ends[0]) - run(ends[1])) / (2.0 * h)
    x = tf.constant(x)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([x, cotangent])
        along = tf.reduce_sum(pulled(x, cotangent) * direction)
    np.testing.assert_allclose(tape.gradient(along, x), second, atol=1e-7)
    # Reverse mode twice is forward mode.
    np.testing.assert_allclose(tape.gradient(along, cotangent), pushed, atol=1e-8)
    with tf.autodiff.ForwardAccumulator(x, direction) as accumulator:
        y = run(x)
    np.testing.assert_allclose(accumulator.jvp(y), pushed, atol=1e-8)


# Export -----------------------------------------------------------------------


@pytest.mark.parametrize(("cap", "condense"), [(None, False), ("l2", False), ("l2", True)])
def test_plain_keras_exports_it(x, tmp_path, cap, condense):
    layer = Case(cap=cap, dtype="float32").layer(max_sequence_length=LENGTH)
    model = _functional(layer, length=None)
    if condense:
        layer.condense()
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "served"))
    np.testing.assert_allclose(served.serve(x), model(x), atol=1e-6)
