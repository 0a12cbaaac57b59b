"""Ordinary models become Lipschitz ones: complete, sound, trainable, saved, and reported."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false

import warnings

import keras
import numpy as np
import pytest
from helpers import jacobians
from helpers.ordinary_models import FEATURES, KINDS, TOKENS, batch, outputs_of
from keras import layers, ops

import keras_lipattn as kl
from examples.gallery import EXAMPLES

# Keras warns when it loads layers without `build`, whose state it makes in their first call.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*`?build:UserWarning"),
    # A model of the gallery takes the mask out of the graph on purpose.
    pytest.mark.filterwarnings("ignore:.*was passed an input with a mask:UserWarning"),
]

# Layers of the models whose own code adds.
SUMS_IN_CODE = {
    "text_classifier": {"block"},
    "nested": {"inner/stack/block"},
    "dynamic": {"block"},
    "subclassed": {"one", "two"},
}
# Totals of random kernels: a few exceed 1 through sums and cross-attention.
LARGEST = {"encoder_decoder": 2.0, "nested": 3.0, "shared": 1.5}
ALTERNATIVES = [
    {"dense": "spectral"},
    {"attention": "cosine"},
    {"attention": "bounded", "token_radius": 2.0},
    {"norm": "token"},
    {"lipschitz_bound": 0.5, "branch_weight": 0.5},
]


def options_of(kind):
    return {"sequence_length": TOKENS} if kind == "dynamic" else {}


def made(kind):
    keras.utils.set_random_seed(4)
    model = KINDS[kind]()
    random = np.random.default_rng(7)
    for weight in model.weights:
        # Biases and statistics away from where they start, variances positive.
        weight.assign(np.array(weight) + 0.1 * np.abs(random.standard_normal(weight.shape)))
    return model


def converted(kind, **options):
    return kl.make_lipschitz(made(kind), **options_of(kind), **options)


def certified(kind, model, **options):
    return kl.certify(model, **options_of(kind), **options)


def kinds_of(model):
    return {type(layer) for layer in model._flatten_layers()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_with_a_large_constant_is_replaced(kind):
    result = converted(kind)
    assert set(result.kept) == SUMS_IN_CODE.get(kind, set()), str(result)
    assert all("sums `x + y` run in its code" in text for text in result.kept.values())
    assert result.certificate.total <= LARGEST.get(kind, 1.0) + 1e-6, str(result.certificate)
    gone = {
        layers.Dense,
        layers.EinsumDense,
        layers.Conv1D,
        layers.Conv2D,
        layers.Add,
        layers.MultiHeadAttention,
        layers.LayerNormalization,
        layers.RMSNormalization,
        layers.BatchNormalization,
    }
    assert not kinds_of(result.model) & gone
    assert certified(kind, result.model).total == result.certificate.total


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_outputs_and_names_are_those_of_the_original(kind):
    old = made(kind)
    x = batch(old)
    before, weights = outputs_of(old, x), old.get_weights()
    new = kl.make_lipschitz(old, **options_of(kind)).model
    assert isinstance(new, type(old)) and new.name == old.name
    assert [one.shape for one in outputs_of(new, x)] == [one.shape for one in before]
    # Sums of a graph, which were no layers, have names too.
    assert {layer.name for layer in old.layers} <= {layer.name for layer in new.layers}
    # The original does not change.
    for one, other in zip(outputs_of(old, x), before, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(old.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "kind, options",
    [(kind, {}) for kind in KINDS]
    + [(kind, one) for kind in ("nested", "encoder_decoder") for one in ALTERNATIVES],
    ids=str,
)
def test_attacks_do_not_refute_the_certificate(kind, options):
    result = converted(kind, **options)
    assert result.certificate.is_finite, result.certificate.reasons
    # Any weights are legal: the caps hold for all of them.
    random = np.random.default_rng(5)
    for weight in result.model.trainable_weights:
        weight.assign(np.array(weight) + 0.3 * random.standard_normal(weight.shape))
    norm = options.get("norm", "l2")
    certificate = certified(kind, result.model, norm=norm, check=True)
    assert certificate.is_finite
    x = batch(result.model, seed=3)
    if isinstance(x, np.ndarray) and x.dtype.kind == "f":
        # Models that end in a softmax are certified before it, whose constant is 1/2.
        one_token = (-1, *[1] * (x.ndim - 2), result.model(x).shape[-1])

        def run(each):
            return ops.reshape(result.model(each, training=False), one_token)

        found = jacobians.ascend(run, x[0], norm, steps=6)
        assert 0.0 < found <= certificate.total * (1.0 + 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_new_model_trains_and_stays_certified(kind):
    model = converted(kind).model
    x = batch(model, size=8)
    targets = [np.random.default_rng(1).random(one.shape) for one in outputs_of(model, x)]
    targets = keras.tree.pack_sequence_as(model(x), targets)
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    before = [np.array(weight) for weight in model.trainable_weights]
    losses = model.fit(x, targets, epochs=4, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    moved = [
        np.abs(np.array(w) - b).max() for w, b in zip(model.trainable_weights, before, strict=True)
    ]
    assert min(moved) > 0.0
    assert certified(kind, model).total <= LARGEST.get(kind, 1.0) + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_new_model_is_saved_and_loaded(kind, tmp_path):
    model = converted(kind).model
    x = batch(model)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    again.save(tmp_path / "again.keras")
    for path in ("model.keras", "again.keras"):
        loaded = keras.saving.load_model(tmp_path / path)
        for one, other in zip(outputs_of(loaded, x), outputs_of(model, x), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_monitor_penalizes_and_exports_the_new_model(tmp_path):
    model = converted("vision_transformer").model
    x = batch(model, size=8)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(), jit_compile=False)
    monitor = kl.LipschitzMonitor(penalty=0.1)
    logs = model.fit(x, np.arange(8) % 3, batch_size=4, verbose=0, callbacks=[monitor]).history
    assert logs["lipschitz_total"][-1] <= 1.0 + 1e-6
    certificate, _ = kl.export_saved_model(model, tmp_path / "served")
    assert certificate.is_finite


def test_masks_reach_the_new_layers():
    result = converted("text_classifier")
    ids = batch(result.model)
    padded = np.concatenate([ids[:, :-2], np.zeros_like(ids[:, -2:])], axis=1)
    embedding = result.model.get_layer("embedding")
    table = np.array(embedding.embeddings)
    before = outputs_of(result.model, padded)[0]
    # What padding is embedded as does not matter.
    table[0] += 5.0
    embedding.embeddings.assign(table)
    np.testing.assert_allclose(outputs_of(result.model, padded)[0], before, rtol=0, atol=1e-6)


SUMS = {
    "operator": (lambda x, y: x + y, True),
    "operation": (lambda x, y: ops.add(x, y), True),
    "keywords": (lambda x, y: ops.add(x1=x, x2=y), True),
    "layer": (lambda x, y: layers.Add()([x, y]), False),
}


@pytest.mark.parametrize("mask_zero", [False, True])
@pytest.mark.parametrize("length", [6, None])
@pytest.mark.parametrize("name", SUMS)
def test_the_report_names_the_sums_where_a_mask_was_lost(name, length, mask_zero):
    add, loses = SUMS[name]
    words = keras.Input((length,), dtype="int32")
    table = layers.Embedding(9, 4, mask_zero=mask_zero)
    x = table(words)
    x = add(x, layers.Dense(4)(layers.Dense(6, activation="gelu")(x)))
    x = add(x, layers.Dense(4)(x))
    attention = layers.MultiHeadAttention(1, 4)(x, x)
    old = keras.Model(words, layers.Dense(2)(layers.GlobalAveragePooling1D()(attention)))
    with warnings.catch_warnings():
        # Keras would warn that a `Sequential` loses the mask.
        warnings.simplefilter("error", UserWarning)
        result = kl.make_lipschitz(old, sequence_length=6)
        result.model.predict(np.array([[1, 2, 0, 0, 0, 0]]), verbose=0)
    noted = [path for path, text in result.replaced.items() if "mask that `x + y` loses" in text]
    sums = [path for path, text in result.replaced.items() if text.startswith("Add -> Residual")]
    assert len(sums) == 2
    # The second sum of the original gets no mask any more.
    assert noted == (sums[:1] if loses and mask_zero else [])
    assert all(path in str(result) for path in noted)
    # Whether the embedding of the padding matters is what the report says.
    for model, sees_padding in ((old, loses or not mask_zero), (result.model, not mask_zero)):
        ids = np.array([[1, 2, 3, 0, 0, 0]])
        before = model.predict(ids, verbose=0)
        embedding = model.get_layer(table.name)
        embedding.embeddings.assign(
            np.array(embedding.embeddings) + 3.0 * (np.arange(9) == 0)[:, None]
        )
        assert np.allclose(model.predict(ids, verbose=0), before, atol=1e-6) != sees_padding


def test_weights_are_the_first_weights_of_the_new_layers():
    old = made("convolutional")
    new = kl.make_lipschitz(old, dense="spectral").model
    for name in ("first", "second", "pointwise", "odd", "logits"):
        layer = new.get_layer(name)
        inner = layer.layers[-2] if isinstance(layer, keras.Sequential) else layer
        before = np.array(old.get_layer(name).kernel)
        np.testing.assert_array_equal(np.array(inner.kernel).reshape(before.shape), before)
        if inner.bias is not None:
            np.testing.assert_array_equal(np.array(inner.bias), np.array(old.get_layer(name).bias))


@pytest.mark.parametrize("name", ["patches", "pointwise"])
def test_a_convolution_that_is_a_dense_layer_computes_the_same(name):
    old = made("conv1d")
    # Without activation and cap, so that both are the same function.
    old.get_layer(name).activation = keras.activations.linear
    layer = old.get_layer(name)
    layer.kernel.assign(0.01 * np.array(layer.kernel))
    result = kl.make_lipschitz(old, dense="spectral")
    x = np.random.default_rng(1).random((2, *layer.input.shape[1:])).astype("float32")
    # Float32, added in another order.
    np.testing.assert_allclose(
        np.array(result.model.get_layer(name)(x)), np.array(layer(x)), rtol=1e-5, atol=1e-6
    )


def test_a_layer_that_is_used_twice_stays_one_layer():
    result = converted("nested")
    inner = [layer for layer in result.model.layers if layer.name == "inner"]
    assert len(inner) == 1 and len(inner[0]._inbound_nodes) >= 2
    assert "inner/stack/inside" in result.replaced
    block = result.model.get_layer("adds")
    assert type(block.add) is kl.Residual
    shared = converted("shared").model.get_layer("ranks")
    # On tensors of two ranks it keeps its activation.
    assert type(shared) is kl.OrthogonalDense and shared.activation is keras.activations.relu


def test_the_weight_of_a_residual_is_that_of_the_branch():
    model = converted("vision_transformer", branch_weight=0.3).model
    # The branch comes first in this sum, and second in that one.
    assert abs(model.get_layer("add0").alpha_value() - 0.7) < 1e-6
    sums = [one for one in model.layers if type(one) is kl.Residual and one.name != "add0"]
    assert any(abs(one.alpha_value() - 0.3) < 1e-6 for one in sums)


def test_what_does_not_change_stays_added():
    result = converted("vision_transformer")
    # The positions, which are no branch.
    kept = [node for node in result.model.operations if type(node).__name__ == "Add"]
    assert len(kept) == 1 and not isinstance(kept[0], layers.Layer)


def test_a_normalization_after_a_sum_in_code_becomes_the_mean():
    model = converted("subclassed").model
    scales = [norm.scale for block in model.blocks for norm in block.norms]
    assert scales == [0.5] * 4


def test_layers_that_are_named_stay():
    result = converted("vision_transformer", keep=("attention0", "logits"))
    assert type(result.model.get_layer("attention0")) is layers.MultiHeadAttention
    assert type(result.model.get_layer("logits")) is layers.Dense
    assert set(result.kept) == {"attention0", "logits"}
    assert "keep" in result.kept["logits"]
    block = converted("text_classifier", keep="block")
    assert type(block.model.get_layer("block").att) is layers.MultiHeadAttention
    assert not any(path.startswith("block") for path in block.replaced)


class Untouched(layers.Layer):
    """Code with sums and no normalization, an own dense layer and attention with a gate."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.own = Own(FEATURES, name="own")
        self.gated = layers.MultiHeadAttention(2, 4, use_gate=True, name="gated")
        self.heads = layers.EinsumDense("abc,cde->abde", (None, 2, 4), name="heads")
        self.wave = layers.Conv1D(FEATURES, 3, padding="same", name="wave")
        self.recurrent = layers.LSTM(FEATURES, return_sequences=True, name="recurrent")

    def call(self, x):
        x = x + 3.0 * self.own(x)
        x = self.recurrent(self.wave(self.gated(x, x)))
        return ops.reshape(self.heads(x), ops.shape(x))


class Own(layers.Dense):
    def call(self, inputs, training=None):
        return 3.0 * super().call(inputs)


def test_what_stays_is_listed_with_its_reason():
    inputs = keras.Input((TOKENS, FEATURES))
    model = keras.Model(inputs, Untouched(name="block")(inputs))
    with keras.saving.custom_object_scope({"Untouched": Untouched, "Own": Own}):
        result = kl.make_lipschitz(model)
    text = str(result)
    for path, reason in {
        "block/own": "subclass",
        "block/gated": "gate",
        "block/heads": "equation",
        "block/wave": "no Lipschitz replacement",
        "block/recurrent": "LSTM",
        "block": "1 sum `x + y` runs in its code",
    }.items():
        assert reason in result.kept[path]
        assert path in text
    assert result.replaced == {}
    assert not result.certificate.is_finite and "no bound" in text


def test_the_report_names_every_layer():
    result = converted("vision_transformer")
    text = str(result)
    assert all(path in text and what in text for path, what in result.replaced.items())
    assert "must be trained" in text
    assert result.replaced["patches"] == "Conv2D -> SpaceToDepth, OrthogonalDense"
    assert result.replaced["wide0"] == "Dense -> OrthogonalDense"
    assert result.replaced["gelu0"] == "Activation -> MaxMin"
    assert result.replaced["attention1"] == "MultiHeadAttention -> L2MultiHeadAttention"


def test_only_attention_on_several_tensors_is_bounded():
    result = converted("encoder_decoder")
    assert result.replaced["causal"].endswith("L2MultiHeadAttention")
    assert result.replaced["cross"].endswith("BoundedMultiHeadAttention")
    assert result.replaced["three"] == "Add -> Average"


def test_a_compiled_model_stays_compiled():
    old = made("shared")
    old.compile(keras.optimizers.SGD(0.125), "mse", metrics=["mae"])
    new = kl.make_lipschitz(old).model
    assert float(new.optimizer.learning_rate) == 0.125 and new.optimizer is not old.optimizer
    assert new.loss == "mse"


def test_frozen_layers_stay_frozen_except_for_new_attention():
    old = made("vision_transformer")
    for name in ("wide0", "attention0"):
        old.get_layer(name).trainable = False
    new = kl.make_lipschitz(old).model
    assert not new.get_layer("wide0").trainable_weights
    assert new.get_layer("attention0").trainable_weights


def test_mixed_precision_is_kept():
    inputs = keras.Input((TOKENS, FEATURES))
    dense = layers.Dense(FEATURES, "relu", dtype="mixed_bfloat16", name="dense")
    norm = layers.LayerNormalization(dtype="mixed_bfloat16", name="norm")
    result = kl.make_lipschitz(keras.Model(inputs, dense(norm(inputs))))
    assert result.model.get_layer("dense").dtype_policy.name == "mixed_bfloat16"
    assert result.model.output.dtype == "bfloat16"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dense": "sparse"}, "`dense` must be one of"),
        ({"attention": "dot"}, "`attention` must be one of"),
        ({"lipschitz_bound": 0.0}, "`lipschitz_bound`"),
        ({"norm": "l1"}, "`norm`"),
        ({"branch_weight": 1.0}, "`branch_weight`"),
        ({"token_radius": -1.0}, "`token_radius`"),
        ({"keep": ["nothing"]}, "`keep` names no layer"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=rf"(?s){message}.*Received"):
        converted("shared", **options)


def test_an_unknown_length_is_refused_with_its_remedy():
    with pytest.raises(ValueError, match="`sequence_length`"):
        kl.make_lipschitz(made("dynamic"))


def test_a_model_without_weights_is_refused():
    with pytest.raises(ValueError, match="built"):
        kl.make_lipschitz(keras.Sequential([layers.Dense(3)]))


class NeedsKernel(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(FEATURES, "relu", name="dense")

    def call(self, x):
        return ops.matmul(self.dense(x), ops.transpose(self.dense.kernel))


def test_code_that_needs_the_old_layer_is_refused_until_it_is_kept():
    inputs = keras.Input((TOKENS, FEATURES))
    model = keras.Model(inputs, NeedsKernel(name="tied")(inputs))
    with keras.saving.custom_object_scope({"NeedsKernel": NeedsKernel}):
        with pytest.raises(ValueError, match=r"(?s)`keep`.*kernel"):
            kl.make_lipschitz(model)
        assert kl.make_lipschitz(model, keep=["tied"]).replaced == {}


def test_adapted_statistics_are_copied():
    x = np.random.default_rng(2).normal(3.0, 2.0, (32, FEATURES)).astype("float32")
    normalization = layers.Normalization(name="scale")
    normalization.adapt(x)
    inputs = keras.Input((FEATURES,))
    model = keras.Model(inputs, layers.Dense(3)(normalization(inputs)))
    new = kl.make_lipschitz(model).model.get_layer("scale")
    np.testing.assert_array_equal(np.array(new(x)), np.array(normalization(x)))


# The pooling of this model multiplies two tensors of the model.
_UNBOUNDED = {"compact_convolutional_transformer"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_models_of_the_gallery_become_certifiable(example, monkeypatch):
    if example.missing:
        pytest.skip(example.missing)

    def attention(*args, lipschitz_bound, **kwargs):
        return layers.MultiHeadAttention(*args, **kwargs)

    monkeypatch.setattr(example.module("as_written"), "L2MultiHeadAttention", attention)
    model = example.make("as_written")
    x, _ = example.batch()
    options = {"assume_fixed_mask": example.assume_fixed_mask}
    if example.subclassed:
        options["inputs"] = x
    assert not kl.certify(model, **options).total < 1e4
    result = kl.make_lipschitz(model, **options)
    if example.name in _UNBOUNDED:
        assert list(result.kept) == ["sequence_pooling/matmul"]
    else:
        # Sums before normalization, and the scales of inputs, are all that is left.
        assert result.certificate.total <= 6.0, str(result)


def test_the_report_advises_against_a_class_token():
    tokens = keras.Input((5, 8))
    x = layers.MultiHeadAttention(2, 4)(tokens, tokens)
    result = kl.make_lipschitz(keras.Model(tokens, layers.Dense(3)(x[:, 0])))
    (line,) = result.advice
    assert "One of 5 tokens" in line and line in str(result)
    for pooled in (x[:, 1:], layers.Flatten()(x), layers.GlobalAveragePooling1D()(x)):
        assert kl.make_lipschitz(keras.Model(tokens, layers.Dense(3)(pooled))).advice == ()


@pytest.mark.parametrize("limited", [False, True])
def test_the_report_advises_to_limit_the_vectors_of_words(limited):
    constraint = keras.constraints.MaxNorm(1.0, axis=1) if limited else None
    words = keras.Input((5,), dtype="int32")
    x = layers.Embedding(9, 8, embeddings_constraint=constraint)(words)
    model = keras.Model(words, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))
    advice = kl.make_lipschitz(model).advice
    assert advice == () if limited else "MaxNorm" in advice[0]
