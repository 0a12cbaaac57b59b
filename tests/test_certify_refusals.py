"""What has no constant gets `inf` with a reason that helps; bad arguments get errors."""

import math
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.certify_cases import array_of, default_dtype, layer_cases, model_of
from keras import layers, ops

import keras_lipattn as kl
from keras_lipattn.certification import Certificate, LayerCall, LipschitzMap, certify, register_rule

CASES = {case.name: case for case in layer_cases()}


def model(build, shape=(5, 4), **kwargs):
    x = keras.Input(shape, **kwargs)
    return keras.Model(x, build(x))


def attend(x, layer=None, **kwargs):
    return (layer or layers.MultiHeadAttention(2, 2))(x, x, **kwargs)


def tanh(x):
    return layers.Activation("tanh")(x)


class ByTensorFlow(layers.Layer):
    def call(self, x):
        return tf.cumsum(x, axis=1)


class Louder(layers.Dense):
    """Not what it inherits from."""

    def call(self, x):
        return ops.multiply(5.0, super().call(x))


class Noisy(layers.Layer):
    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(1)

    def call(self, x):
        return x * keras.random.normal((4,), seed=self.seeds)


def quantized(x):
    layer = layers.Dense(4)
    y = layer(x)
    layer.quantize("int8")
    return y


TURN = 10j * np.eye(4, dtype="complex64")


def along_the_batch(layer):
    """A model with a layer on a tensor whose only axis is that of a batch of fixed size."""
    layer.build((4,))

    class Along(layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = layer

        def call(self, x):
            return ops.expand_dims(self.inner(ops.sum(x, axis=(1, 2))), -1)

    return model(Along(), None, batch_shape=(4, 5, 4))


REFUSED = {
    # name: (model, a piece of the reason)
    "rms_scaling": (
        lambda: model(layers.LayerNormalization(rms_scaling=True)),
        "rms_scaling",
    ),
    "thresholded relu": (lambda: model(layers.ReLU(threshold=1.0)), "threshold"),
    "hard shrinkage": (lambda: model(layers.Activation("hard_shrink")), "discontinuous"),
    "threshold": (lambda: model(lambda x: ops.threshold(x, 0.5, 0.0)), "discontinuous"),
    "sparsemax": (lambda: model(layers.Activation("sparsemax")), "jumps"),
    "gated linear unit": (lambda: model(layers.Activation("glu")), "gate"),
    "exponential": (lambda: model(layers.Activation("exponential")), "unbounded"),
    "own activation": (lambda: model(layers.Activation(lambda x: x * x)), "not bounded"),
    "own activation of a convolution": (
        lambda: model(layers.Conv1D(3, 2, activation=lambda x: 9.0 * x)),
        "not known",
    ),
    "masking": (lambda: model(layers.Masking()), "assume_fixed_mask"),
    "computed mask": (
        lambda: model(
            lambda x: (
                x * ops.cast(ops.expand_dims(ops.any(ops.not_equal(x, 0.0), -1), -1), "float32")
            )
        ),
        "assume_fixed_mask",
    ),
    "computed attention mask": (
        lambda: model(
            lambda x: kl.L2MultiHeadAttention(2, 2)(
                x, attention_mask=ops.greater(ops.einsum("btd,bsd->bts", x, x), 0.0)
            )
        ),
        "",
    ),
    "rounding": (lambda: model(lambda x: ops.round(x)), "no rule"),
    "sign": (lambda: model(lambda x: ops.sign(x)), "no rule"),
    "square root": (lambda: model(lambda x: ops.sqrt(x)), "no rule"),
    "square": (lambda: model(lambda x: ops.square(x)), "not bounded"),
    "product of branches": (
        lambda: model(lambda x: layers.Multiply()([x, layers.Dense(4)(x)])),
        "not bounded",
    ),
    "dot of branches": (lambda: model(lambda x: layers.Dot(axes=2)([x, x])), "not bounded"),
    "own attention": (lambda: model(lambda x: ops.einsum("btd,bsd->bts", x, x)), "not bounded"),
    "division": (
        lambda: model(lambda x: x / ops.add(1.0, ops.sum(x, -1, keepdims=True))),
        "divides",
    ),
    "attention on free tokens": (lambda: model(attend), "unbounded"),
    "gated attention": (
        lambda: model(
            lambda x: attend(
                layers.LayerNormalization()(x), layers.MultiHeadAttention(2, 2, use_gate=True)
            )
        ),
        "gate",
    ),
    "cross attention": (
        lambda: model(lambda x: layers.MultiHeadAttention(2, 2)(x, layers.Dense(4)(x))),
        "tokens are unbounded",
    ),
    "attention scores": (
        lambda: model(lambda x: kl.L2MultiHeadAttention(2, 2)(x, return_attention_scores=True)),
        "scores",
    ),
    "grouped queries": (
        lambda: model(lambda x: layers.GroupQueryAttention(2, 4, 2)(x, x)),
        "tokens are unbounded",
    ),
    "dot-product attention": (
        lambda: model(lambda x: layers.Attention()([x, x])),
        "tokens are unbounded",
    ),
    "additive attention": (
        lambda: model(lambda x: layers.AdditiveAttention()([x, x])),
        "tokens are unbounded",
    ),
    "scores of attention": (
        lambda: model(
            lambda x: layers.Attention()([tanh(x), tanh(x)], return_attention_scores=True)
        ),
        "scores",
    ),
    "gate of another tensor": (
        lambda: model(lambda x: x * ops.sigmoid(x + 1.0)),
        "not bounded",
    ),
    "jump between branches": (
        lambda: model(lambda x: ops.where(x > 0, x, 0.5)),
        "jumps",
    ),
    "jump between constants": (
        lambda: model(lambda x: ops.where(x > 0, 1.0, 0.0)),
        "jump",
    ),
    "jump away from 0": (
        lambda: model(lambda x: ops.where(x > 1.0, x, 0.5 * x)),
        "jump",
    ),
    "branches of another tensor": (
        lambda: model(lambda x: ops.where(x > 0, x + 1.0, 0.5 * x)),
        "jumps",
    ),
    "sign as a number": (
        lambda: model(lambda x: ops.where(x > 0, x, 0.5 * x) + ops.cast(x > 0, "float32")),
        "jump",
    ),
    "one condition for two": (
        lambda: model(lambda x: (lambda c: ops.where(c, x, 0.0) + ops.where(c, 1.0, 0.0))(x > 0)),
        "jump",
    ),
    "negated condition": (
        lambda: model(lambda x: ops.where(ops.logical_not(x > 0), x, 0.0)),
        "jump",
    ),
    "product of examples": (
        lambda: model(lambda x: ops.einsum("btd,ctd->btc", tanh(x), tanh(x))),
        "batch axis",
    ),
    "sum over examples": (
        lambda: model(lambda x: ops.einsum("btd,btd->td", tanh(x), tanh(x))),
        "batch",
    ),
    "sum before a product": (
        lambda: model(lambda x: ops.einsum("btd,bsd->bd", tanh(x), tanh(x))),
        "before the product",
    ),
    "products of all examples": (
        lambda: model(lambda x: ops.dot(tanh(x), tanh(x)), (4, 4)),
        "batch",
    ),
    "normalized dot": (
        lambda: model(lambda x: layers.Dot(2, normalize=True)([tanh(x), tanh(x)])),
        "close to 0",
    ),
    "lstm": (lambda: model(layers.LSTM(3)), "recurrent"),
    "gru": (lambda: model(layers.GRU(3)), "recurrent"),
    "simple rnn": (lambda: model(layers.SimpleRNN(3)), "recurrent"),
    "bidirectional": (lambda: model(layers.Bidirectional(layers.LSTM(3))), "recurrent"),
    "convolutional lstm": (lambda: model(layers.ConvLSTM1D(2, 2), (3, 5, 4)), "recurrent"),
    "batch statistics": (
        lambda: model(lambda x: layers.BatchNormalization()(x, training=True)),
        "training=True",
    ),
    "dropout at inference": (
        lambda: model(lambda x: layers.Dropout(0.5)(x, training=True)),
        "training=True",
    ),
    "softmax of the batch": (lambda: model(layers.Softmax(axis=0)), "batch"),
    "mean of the batch": (lambda: model(lambda x: x - ops.mean(x, axis=0, keepdims=True)), "batch"),
    "bicubic resize of any image": (
        lambda: model(layers.Resizing(3, 4, interpolation="bicubic"), (None, None, 2)),
        "size",
    ),
    "int8 kernel": (lambda: model(quantized), "quantized"),
    "lambda": (lambda: model(layers.Lambda(lambda x: tf.cumsum(x))), "Lambda"),
    "raw TensorFlow": (lambda: model(ByTensorFlow()), "ByTensorFlow"),
    "random numbers": (lambda: model(Noisy()), "random numbers"),
    "filled with a tensor": (
        lambda: model(lambda x: ops.full_like(x, ops.mean(x, axis=-1, keepdims=True))),
        "fills a tensor",
    ),
    "complex factor": (
        lambda: model(lambda x: ops.absolute(ops.cast(x, "complex64") * np.complex64(0.1 + 10j))),
        "complex",
    ),
    "complex kernel": (
        lambda: model(lambda x: ops.imag(ops.matmul(ops.cast(x, "complex64"), TURN))),
        "complex",
    ),
    "shrinkage by a negative number": (
        lambda: model(lambda x: ops.soft_shrink(x, -1.0)),
        "parameter",
    ),
    "shrinkage by NaN": (lambda: model(lambda x: ops.soft_shrink(x, math.nan)), "parameter"),
    "negative square": (lambda: model(lambda x: ops.squareplus(x, -1.0)), "parameter"),
    "infinite square": (lambda: model(lambda x: ops.squareplus(x, math.inf)), "parameter"),
    "celu of NaN": (lambda: model(lambda x: ops.celu(x, math.nan)), "parameter"),
    "elu of infinity": (lambda: model(lambda x: ops.elu(x, math.inf)), "parameter"),
    "slope too large for float32": (lambda: model(lambda x: ops.leaky_relu(x, 1e39)), "parameter"),
    "leaky layer of NaN": (lambda: model(layers.LeakyReLU(math.nan)), "parameter"),
    "elu layer of infinity": (lambda: model(layers.ELU(math.inf)), "parameter"),
    "relu layer of NaN": (lambda: model(layers.ReLU(negative_slope=math.nan)), "parameter"),
    "relu up to NaN": (lambda: model(layers.ReLU(max_value=math.nan)), "parameter"),
    "relu up to a negative number": (
        lambda: model(lambda x: keras.activations.relu(x, max_value=-1.0)),
        "parameter",
    ),
    "activation that moves tokens": (
        lambda: model(layers.Dense(3, activation=layers.Permute((2, 1)))),
        "shape",
    ),
    "activation that joins tokens": (
        lambda: model(layers.Dense(4, activation=layers.Reshape((20,)))),
        "shape",
    ),
    "pairs of examples": (lambda: along_the_batch(kl.MaxMin()), "batch"),
    "halves of the batch": (lambda: along_the_batch(kl.HalfAbs()), "batch"),
    "centered examples": (
        lambda: along_the_batch(kl.CenterNormalization()),
        "batch",
    ),
    "projected batch": (
        lambda: along_the_batch(kl.layers.TokenProjection(1.0)),
        "batch",
    ),
    "picked examples": (
        lambda: model(lambda x: ops.take(x, np.array([0, 0, 1]), axis=0)),
        "batch",
    ),
}


# What a reason tells to do, or why nothing helps.
REMEDIES = (
    "register_rule",
    "`assume_fixed_mask=True`",
    "`input_radius`",
    "use ",
    "pass `",
    "training=True",
    "quantized",
    "keep the examples of a batch apart",
    "build the model with fixed sizes",
    "joined along the tokens",
    "leave out `return_attention_scores=True`",
    "only when `training` is true",
)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:You passed `rms_scaling=True`")
@pytest.mark.filterwarnings("ignore:Layer 'lambda")
def test_refused_with_a_reason(name):
    build, piece = REFUSED[name]
    refused = build()
    for norm in ("l2", "token", "linf"):
        certificate = certify(refused, norm=norm)
        assert certificate.total == math.inf
        assert certificate.vacuous
        reason = " ".join(certificate.reasons)
        assert piece in reason
        assert any(remedy in reason for remedy in REMEDIES), reason
        bad = [row for row in certificate.rows if not row.is_finite]
        assert any(not row.explained_by for row in bad)
        for row in bad:
            if row.explained_by:
                assert not certificate.row(row.explained_by).is_finite
            else:
                assert f"`{row.path}` ({row.layer}): {row.reason}" in certificate.reasons
        assert Certificate.from_json(certificate.to_json()) == certificate
        assert "no bound" in str(certificate)


@pytest.mark.parametrize("name", CASES)
def test_weights_that_are_not_finite_are_never_a_number(name):
    case = CASES[name]
    broken = model_of(case)
    if not broken.weights:
        assert certify(broken, **dict(case.options)).is_finite
        return
    for norm, value in (("l2", np.nan), ("linf", np.inf)):
        for variable in broken.weights:
            if "_vector" not in variable.path and "running" not in variable.path:
                variable.assign(np.full(variable.shape, value))
        certificate = certify(broken, norm=norm, **dict(case.options))
        assert certificate.total == math.inf
        assert certificate.reasons and certificate.reasons[0]


def test_a_single_broken_weight_is_enough():
    broken = model(lambda x: layers.Dense(3)(layers.Dense(4, activation="relu")(x)))
    kernel = broken.layers[1].kernel
    value = array_of(kernel)
    value[0, 0] = np.nan
    kernel.assign(value)
    certificate = certify(broken)
    assert certificate.total == math.inf
    assert [row.is_finite for row in certificate.rows] == [False, True]


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
@pytest.mark.parametrize(
    "layer",
    [
        layers.GlobalAveragePooling1D(),
        layers.AveragePooling1D(2, padding="same"),
        layers.Softmax(axis=1),
        layers.LayerNormalization(axis=1),
        kl.L2MultiHeadAttention(2, 4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_inputs_without_entries_are_refused(layer, norm):
    empty = model(lambda x: type(layer).from_config(layer.get_config())(x[:, 2:2]))
    certificate = certify(empty, norm)
    assert certificate.total == math.inf
    assert "its input has no entries" in certificate.reasons[0]


def test_a_zero_kernel_does_not_hide_what_is_unbounded():
    hidden = model(lambda x: layers.Dense(3, kernel_initializer="zeros")(attend(x)))
    assert certify(hidden).total == math.inf


def test_a_rule_is_advised_only_where_it_helps():
    broken = model(layers.Dense(3))
    broken.layers[1].kernel.assign(np.full((4, 3), np.nan))
    (reason,) = certify(broken).reasons
    assert "NaN or infinite" in reason
    assert "register_rule" not in reason and "; " not in reason
    with default_dtype("mixed_float16"):
        large = model(layers.Dense(3))
    large.layers[1].kernel.assign(np.full((4, 3), 1e6))
    assert "register_rule" not in certify(large).reasons[0]
    assert "register_rule" not in certify(model(layers.LSTM(3))).reasons[0]
    assert "register_rule(ByTensorFlow)" in certify(model(ByTensorFlow())).reasons[0]


def test_layers_of_one_name_in_a_subclassed_model_have_rows_of_their_own():
    class Twins(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = layers.Dense(4, use_bias=False, name="twin")
            self.second = layers.Dense(4, activation="relu", use_bias=False, name="twin")

        def call(self, x):
            # Not in the order in which they were made, and one of them twice.
            return self.first(ops.tanh(self.second(self.second(x))))

    twins = Twins()
    twins(np.ones((1, 5, 4), np.float32))
    first, second = (np.linalg.norm(array_of(layer.kernel), 2) for layer in twins.layers)
    certificate = certify(twins)
    # Less than the product: the activations lie between two linear maps.
    assert 0.0 < certificate.total <= first * second**2 * (1.0 + 1e-5)
    assert certificate.row("twin").constant == pytest.approx(first, rel=1e-5)
    for path in ("twin#2", "twin#2:call2"):
        assert certificate.row(path).constant == pytest.approx(second, rel=1e-5)
    assert [layer.name for layer in twins.layers] == ["twin", "twin"]


@pytest.mark.parametrize("build", [layers.Masking(), lambda x: x * ops.cast(x > 0.0, "float32")])
def test_masks_computed_from_inputs_may_be_assumed_fixed(build):
    certificate = certify(model(build), assume_fixed_mask=True)
    assert certificate.total == pytest.approx(1.0)
    assert certificate.threat_model.assumed_masks
    assert "ASSUMED" in str(certificate)
    assert Certificate.from_json(certificate.to_json()) == certificate


def test_masking_before_attention():
    masked = model(lambda x: kl.L2MultiHeadAttention(2, 2)(layers.Masking()(x)))
    assert not certify(masked).is_finite
    assert certify(masked, assume_fixed_mask=True).is_finite


def test_a_subclass_that_computes_something_else_is_looked_into():
    loud = model(Louder(3, use_bias=False))
    plain = np.linalg.norm(loud.layers[1].get_weights()[0], 2)
    assert certify(loud).total == pytest.approx(5.0 * plain, rel=1e-5)


def test_an_activation_of_ones_own_is_looked_into():
    impostor = type("relu", (), {"__call__": lambda self, x: 9.0 * x})()
    dense = layers.Dense(3, activation=impostor, use_bias=False)
    built = model(dense)
    assert certify(built).total == pytest.approx(9.0 * np.linalg.norm(dense.kernel, 2), rel=1e-5)


def test_a_subclass_that_only_adds_arguments_keeps_the_rule():
    class Named(layers.Dense):
        def __init__(self, units, note="", **kwargs):
            super().__init__(units, **kwargs)
            self.note = note

        def get_config(self):
            return {**super().get_config(), "note": self.note}

    certificate = certify(model(Named(3)))
    assert certificate.rows[0].layer == "Named"
    assert certificate.rows[0].theorem == "spectral norm"


def test_a_call_replaced_on_the_instance_is_not_trusted():
    layer: Any = layers.Dense(4)
    tampered = model(layer)
    layer.call = lambda x, training=None: 100.0 * x
    assert certify(tampered).total == pytest.approx(100.0)
    layer.call = lambda x: 100.0 * tf.abs(x)
    assert "replaced on the instance" in certify(tampered).reasons[0]


def test_rules_can_be_registered():
    class Tripling(layers.Layer):
        def call(self, x):
            return tf.math.cumsum(x) * 0.0 + 3.0 * x

    tripled = model(Tripling())
    assert not certify(tripled).is_finite

    @register_rule(Tripling)
    def tripling(layer, call: LayerCall):
        assert call.norm in ("l2", "linf")
        return 3.0

    assert certify(tripled).total == pytest.approx(3.0)

    @register_rule(Tripling)
    def bounded(layer, call):
        return LipschitzMap(constant=math.inf, reason="it grew up")

    assert "it grew up" in certify(tripled, norm="linf").reasons[0]

    @register_rule(Tripling)
    def broken(layer, call):
        return math.nan

    assert not certify(tripled).is_finite


@pytest.mark.parametrize("wrong", [(), (3,), (int,), ("Dense",)])
def test_rules_are_for_layers(wrong):
    with pytest.raises(ValueError, match="Received"):
        register_rule(*wrong)


def test_a_rule_must_say_why_it_has_no_constant():
    with pytest.raises(ValueError, match="reason"):
        LipschitzMap(constant=math.inf)
    with pytest.raises(ValueError, match="reason"):
        LipschitzMap(constant=math.nan)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(norm="l1"),
        dict(norm=2),
        dict(sequence_length=0),
        dict(sequence_length=-3),
        dict(sequence_length=2.5),
        dict(sequence_length=True),
        dict(input_radius=0.0),
        dict(input_radius=-1.0),
        dict(input_radius=math.nan),
        dict(input_radius=math.inf),
        dict(mask="padding"),
    ],
)
def test_bad_arguments_are_errors_that_say_what_came(arguments):
    good = model(layers.Dense(2))
    with pytest.raises(ValueError, match="Received"):
        certify(good, **arguments)


@pytest.mark.parametrize("thing", [None, 3, layers.Dense(2), keras.Sequential([layers.Dense(2)])])
def test_only_built_models(thing):
    with pytest.raises(ValueError, match="Received"):
        certify(thing)


def test_kernels_are_measured_after_the_cast():
    for policy, step in (("mixed_bfloat16", 2.0**-9), ("mixed_float16", 2.0**-12)):
        with default_dtype(policy):
            cast = model(layers.Dense(1, use_bias=False), (1,))
        cast.set_weights([np.array([[1.0 + step]], np.float32)])
        # Rounded to 1 in the dtype of the computation.
        assert certify(cast).total == pytest.approx(1.0, rel=1e-8)
    with default_dtype("mixed_float16"):
        large = model(layers.Dense(1, use_bias=False), (1,))
    large.set_weights([np.array([[1e6]], np.float32)])
    assert certify(large).total == math.inf


def test_mixed_precision_inside_a_layer_without_a_rule():
    class Scale(layers.Layer):
        def build(self, shape):
            self.factor = self.add_weight(name="factor", shape=(1,))

        def call(self, x):
            return x * self.factor

    with default_dtype("mixed_bfloat16"):
        cast = model(Scale(), (1,))
    cast.set_weights([np.array([1.0 + 2.0**-9], np.float32)])
    assert certify(cast).total == pytest.approx(1.0, rel=1e-8)
