"""The monitor with subclassed models: new ones, integer inputs, and structures of inputs."""

# pyright: reportArgumentType=false, reportCallIssue=false

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.monitor_models import attention, compiled, dense
from keras import layers, ops

import keras_lipattn as kl
from keras_lipattn._seen_calls import remember_call, remembered_call

EXAMPLES, TOKENS, FEATURES, WORDS, CLASSES = 8, 5, 6, 11, 3

random = np.random.default_rng(3)
IDS = random.integers(0, WORDS, (EXAMPLES, TOKENS)).astype("int32")
TRACES = random.standard_normal((EXAMPLES, TOKENS, FEATURES)).astype("float32")
LABELS = random.integers(0, CLASSES, EXAMPLES)


class OfWords(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(WORDS, FEATURES)
        self.attention = attention()
        self.head = dense(CLASSES, name="head")

    def call(self, inputs, training=None):
        x = self.embedding(inputs)
        return self.head(ops.mean(x + self.attention(x, training=training), axis=1))


class OfTwo(OfWords):
    """Called on words and on traces."""

    def call(self, inputs, training=None):
        if isinstance(inputs, dict):
            inputs = inputs["words"], inputs["traces"]
        words, traces = inputs
        x = self.attention(self.embedding(words), training=training)
        return self.head(ops.mean(x + traces, axis=1))


class Block(layers.Layer):
    """Creates its layers in `__init__`, and has no `build`."""

    def __init__(self, name, deep=True):
        super().__init__(name=name)
        self.attention = attention(name=f"{name}_attention")
        self.inner = Block(f"{name}_inner", deep=False) if deep else None

    def call(self, inputs, training=None):
        x = inputs + self.attention(inputs, training=training)
        return x if self.inner is None else self.inner(x, training=training)


class OfBlocks(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [Block("first"), Block("second")]
        self.head = dense(CLASSES, name="head")

    def call(self, inputs, training=None):
        x = inputs
        for block in self.blocks:
            x = block(x, training=training)
        return self.head(ops.mean(x, axis=1))


BLOCK_KEYS = {
    f"{block}_{layer}"
    for block in ("first", "second")
    for layer in (f"{block}_attention", f"{block}_inner_{block}_inner_attention")
}
# Class, inputs, and the keys of the layers.
CASES = {
    "integers": (OfWords, IDS, {"attention", "head"}),
    "dictionary": (OfTwo, {"words": IDS, "traces": TRACES}, {"attention", "head"}),
    "tuple": (OfTwo, (IDS, TRACES), {"attention", "head"}),
    "blocks": (OfBlocks, TRACES, {*BLOCK_KEYS, "head"}),
}


def train(model, x, monitor, **kwargs):
    options = {"batch_size": 4, "epochs": 2, "verbose": 0, "shuffle": False, **kwargs}
    return model.fit(x, LABELS, callbacks=[monitor], **options).history


@pytest.mark.parametrize("called_before", [False, True], ids=["new", "called before"])
@pytest.mark.parametrize("case", CASES)
def test_every_layer_and_the_total_are_finite_from_the_first_epoch(case, called_before):
    kind, x, keys = CASES[case]
    model = compiled(kind())
    if called_before:
        model(keras.tree.map_structure(ops.convert_to_tensor, x))
    # Warnings are errors: nothing is infinite.
    history = train(model, x, kl.LipschitzMonitor())
    bounds = {key: values for key, values in history.items() if key.startswith("lipschitz_")}
    assert set(bounds) == {"lipschitz_total", *(f"lipschitz_{key}" for key in keys)}
    assert all(len(values) == 2 and np.isfinite(values).all() for values in bounds.values())


@pytest.mark.parametrize("case", CASES)
def test_the_total_is_that_of_a_certificate_for_the_dtypes_of_the_data(case):
    kind, x, _ = CASES[case]
    model = compiled(kind())
    monitor = kl.LipschitzMonitor(norm="token")
    total = train(model, x, monitor)["lipschitz_total"][-1]
    # A tuple holds the arguments of the call.
    assert total == kl.certify(model, norm="token", inputs=(x,)).total
    words = [array for array in keras.tree.flatten(x) if array.dtype == np.int32]
    assert monitor.certificate is not None
    assert len(monitor.certificate.threat_model.fixed_inputs) == len(words)


@pytest.mark.parametrize("case", CASES)
def test_the_penalty_acts_from_the_first_batch_on_a_new_model(case):
    kind, x, keys = CASES[case]

    def history(penalty):
        keras.utils.set_random_seed(5)
        monitor = kl.LipschitzMonitor(penalty=penalty, target=0.1, running_freq=1)
        return train(compiled(kind()), x, monitor), monitor

    plain, _ = history(0.0)
    penalized, monitor = history(0.5)
    assert len(monitor.running_history["batch"]) == 4
    for key in keys:
        assert all(map(math.isfinite, monitor.running_history[f"running_{key}"]))
        # Without the penalty, bounds change little within four steps.
        assert penalized[f"lipschitz_{key}"][-1] < plain[f"lipschitz_{key}"][-1]
    bounds = [penalized[f"running_{key}"][0] / 0.1 for key in keys]
    # The loss of the first epoch includes the penalty, of running bounds that change little.
    added = penalized["loss"][0] - plain["loss"][0]
    assert added == pytest.approx(0.5 * sum(map(math.log, bounds)), rel=0.05)


def test_a_new_model_learns_as_without_a_monitor():
    def weights(*callbacks):
        keras.utils.set_random_seed(5)
        model = compiled(OfWords())
        model.fit(IDS, LABELS, batch_size=4, epochs=2, verbose=0, callbacks=list(callbacks))
        return model.get_weights()

    plain, watched = weights(), weights(kl.LipschitzMonitor(condense=False))
    for one, other in zip(plain, watched, strict=True):
        np.testing.assert_array_equal(one, other)


def test_lower_bounds_are_below_the_bounds_of_a_new_model():
    x = {"words": IDS, "traces": TRACES}
    history = train(
        compiled(OfTwo()),
        x,
        kl.LipschitzMonitor(lower_bound_data=keras.tree.map_structure(lambda array: array[:2], x)),
    )
    for key in ("attention", "head"):
        for lower, bound in zip(history[f"lower_{key}"], history[f"lipschitz_{key}"], strict=True):
            assert 0.0 < lower <= bound * (1 + 1e-5)


def test_lengths_that_vary_are_left_open():
    batches = [(IDS[:4, :3], LABELS[:4]), (IDS[4:], LABELS[4:])]
    signature = tf.TensorSpec((None, None), "int32"), tf.TensorSpec((None,), "int64")
    dataset = tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=signature)
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(len(batches)))
    model, monitor = compiled(OfWords()), kl.LipschitzMonitor(sequence_length=7)
    history = model.fit(dataset, verbose=0, shuffle=False, callbacks=[monitor]).history
    assert monitor.certificate is not None
    assert monitor.certificate.threat_model.max_tokens == 7
    assert history["lipschitz_attention"] == [model.attention.lipschitz(7).value]
    with pytest.warns(UserWarning, match="no finite Lipschitz bound"):
        history = model.fit(
            dataset, verbose=0, shuffle=False, callbacks=[kl.LipschitzMonitor()]
        ).history
    assert history["lipschitz_total"] == [math.inf]


def test_a_new_sequential_model_is_built_from_the_data():
    model = compiled(
        keras.Sequential(
            [
                attention(),
                layers.GlobalAveragePooling1D(),
                dense(CLASSES, name="head"),
            ]
        )
    )
    history = train(model, TRACES, kl.LipschitzMonitor(penalty=0.1))
    assert set(history) == {"loss", *(f"lipschitz_{key}" for key in ("total", "attention", "head"))}
    assert np.isfinite(history["lipschitz_total"]).all()


def test_the_argument_inputs_takes_precedence():
    class Swapped(OfTwo):
        def call(self, inputs, training=None):
            traces, words = inputs
            return super().call((words, traces), training=training)

    model = compiled(Swapped())
    specs = keras.KerasTensor((None, TOKENS, FEATURES)), keras.KerasTensor((None, TOKENS), "int32")
    monitor = kl.LipschitzMonitor(inputs=(specs,))
    train(model, (TRACES, IDS), monitor)
    assert monitor.certificate == kl.certify(model, inputs=(specs,))


def test_a_call_is_remembered_as_long_as_the_model_lives():
    model = OfTwo()
    assert remembered_call(model) is None
    remember_call(model, {"words": IDS, "traces": TRACES})
    remembered = remembered_call(model)
    assert remembered is not None
    (specs,) = remembered
    assert {name: (spec.shape, spec.dtype) for name, spec in specs.items()} == {
        "words": ((None, TOKENS), "int32"),
        "traces": ((None, TOKENS, FEATURES), "float32"),
    }
    assert remembered_call(OfTwo()) is None


class OwnStep(OfTwo):
    """A model whose `train_step` calls it on two arguments."""

    def call(self, words, traces, training=None):
        return super().call((words, traces), training=training)

    def train_step(self, data):
        words, traces, y = data[0]["words"], data[0]["traces"], data[1]
        with tf.GradientTape() as tape:
            loss = self.compute_loss(None, y, self(words, traces, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


def test_a_step_that_calls_on_something_else_needs_weights_and_inputs():
    x = {"words": IDS, "traces": TRACES}
    with pytest.raises(ValueError, match=r"on the inputs of `fit` did not create them.*Received"):
        train(compiled(OwnStep()), x, kl.LipschitzMonitor(penalty=0.1))
    model = compiled(OwnStep())
    model(ops.convert_to_tensor(IDS), ops.convert_to_tensor(TRACES))
    monitor = kl.LipschitzMonitor(penalty=0.1, inputs=(IDS, TRACES))
    assert np.isfinite(train(model, x, monitor)["lipschitz_total"]).all()
