"""A rule is about the code of a class: layers and operations that run other code have no rule."""

import collections
import math

import keras
import numpy as np
import pytest
from helpers.certify_cases import jacobians
from keras import layers, ops

import keras_lipattn as kl
from keras_lipattn.bounds import LipschitzBound
from keras_lipattn.certification import certify, register_rule
from keras_lipattn.certification.registry import find_rule

TOKENS, WIDTH = 3, 4


def of(*parts, shape=(TOKENS, WIDTH)):
    return keras.Sequential([keras.Input(shape), *parts])


def attending(layer, change=lambda layer: None):
    x = keras.Input((TOKENS, WIDTH))
    model = keras.Model(x, layer(x, x))
    change(layer)
    return model


def patched(layer, name, shape=(TOKENS, WIDTH), call=None):
    """A model of a layer with one of its methods replaced by a hundred times its result."""
    x = keras.Input(shape)
    model = keras.Model(x, layer(x) if call is None else call(layer, x))
    original = getattr(layer, name)

    def larger(*args, **kwargs):
        return keras.tree.map_structure(
            lambda tensor: None if tensor is None else 100.0 * tensor, original(*args, **kwargs)
        )

    vars(layer)[name] = larger
    return model


def operation(function):
    x = keras.Input((WIDTH,))
    return keras.Model(x, function(x))


def measured(model, seed=0):
    """The largest norm of the Jacobian at some points."""
    points = np.random.default_rng(seed).normal(size=(3, *model.input_shape[1:]))
    found = jacobians(lambda x: model(x, training=False), points.astype("float32"))
    return max(np.linalg.norm(one, 2) for one in found)


def sound(model, **options):
    """Whether the certificate refuses the model with a reason, or holds where it is measured."""
    certificate = certify(model, **options)
    if not certificate.is_finite:
        return bool(certificate.reasons[0])
    return measured(model) <= certificate.total * (1.0 + 1e-5)


class LoudDense(kl.SpectralDense):
    def call_with_weights(self, weights, x):
        return 10.0 * super().call_with_weights(weights, x)


class LoudMaxMin(kl.MaxMin):
    def call(self, inputs):
        return 10.0 * super().call(inputs)


class LoudActivation(layers.Activation):
    def call(self, inputs):
        return 10.0 * super().call(inputs)


class LoudPositions(kl.PositionEmbedding):
    def call(self, inputs):
        return 10.0 * super().call(inputs)


class LoudResidual(kl.InvertibleResidual):
    def call(self, inputs, mask=None):
        return 10.0 * super().call(inputs, mask)


class LoudProjection(layers.EinsumDense):
    def call(self, inputs, training=None):
        return 10.0 * super().call(inputs)


class LowRank(layers.Layer):
    """A projection with an addition of its own, as in examples of fine-tuning."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.built = True

    def call(self, inputs):
        return 10.0 * self.inner(inputs)


class Hidden(layers.Dense):
    def __getattribute__(self, name):
        if name == "call":
            return lambda x, training=None: 10.0 * x
        return super().__getattribute__(name)


class LoudWhenCalled(layers.Dense):
    def __call__(self, *args, **kwargs):
        return 10.0 * super().__call__(*args, **kwargs)


BRANCHES = {
    "residual": lambda part: kl.InvertibleResidual(part, coefficient=0.5),
    "flow": lambda part: kl.ContinuousDepth(part, steps=2),
    "chain": lambda part: kl.InvertibleSequential([kl.InvertibleResidual(part, coefficient=0.5)]),
}


@pytest.mark.parametrize("around", BRANCHES.values(), ids=BRANCHES)
def test_parts_of_a_branch_run_the_code_of_their_classes(around):
    dense = of(around(LoudDense(WIDTH)))
    assert "call_with_weights" in certify(dense).reasons[0]
    part = kl.MaxMin()
    model = of(around(part))
    assert certify(model).is_finite
    assert sound(model)
    part.call = lambda inputs: 10.0 * inputs
    assert "replaced on the instance" in certify(model).reasons[0]


@pytest.mark.parametrize(
    "part",
    [LoudMaxMin, lambda: LoudActivation("tanh"), LoudPositions],
    ids=["maxmin", "activation", "positions"],
)
def test_a_branch_refuses_subclasses_that_do_not_know_their_constants(part):
    for around in BRANCHES.values():
        with pytest.raises(ValueError, match="Lipschitz constant"):
            of(around(part()))


def test_a_rule_of_ones_own_does_not_replace_the_constant_of_a_part():
    class Tenfold(LoudDense):
        pass

    @register_rule(Tenfold)
    def tenfold(layer, call):
        return 10.0

    assert not certify(of(kl.ContinuousDepth(Tenfold(WIDTH)))).is_finite


def test_blocks_of_a_chain_run_the_code_of_their_class():
    model = of(kl.InvertibleSequential([LoudResidual(kl.MaxMin(), coefficient=0.5)]))
    assert "overrides `call`" in certify(model).reasons[0]


ATTENTION = {
    "multi-head": lambda: layers.MultiHeadAttention(2, 2),
    "grouped": lambda: layers.GroupQueryAttention(2, 2, 1),
}


def replace_value(wrap):
    def change(layer):
        layer._tracker.unlock()
        layer._value_dense = wrap(layer._value_dense)

    return change


def loud_copy(old):
    new = LoudProjection(
        old.equation, output_shape=old.partial_output_shape, bias_axes=old.bias_axes
    )
    new.build((None, TOKENS, WIDTH))
    return new


def set_part(name, attribute, value):
    def change(layer):
        vars(getattr(layer, name))[attribute] = value

    return change


PARTS = {
    "subclass": (replace_value(loud_copy), "LoudProjection"),
    "wrapper": (replace_value(LowRank), "LowRank"),
    "activation": (set_part("_output_dense", "activation", lambda x: 10.0 * x), "linear map"),
    "equation": (set_part("_output_dense", "equation", "abcd,cde->aeb"), "linear map"),
    "call": (set_part("_key_dense", "call", lambda x, training=None: x), "replaced"),
    "softmax": (set_part("_softmax", "call", lambda x, mask=None: 10.0 * x), "replaced"),
    "axis": (set_part("_softmax", "axis", -2), "axis of their softmax"),
    "scores": (lambda layer: vars(layer).update(_dot_product_equation=""), "equations"),
    "sum": (lambda layer: vars(layer).update(_combine_equation=""), "equations"),
}


@pytest.mark.parametrize(("change", "reason"), PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("attention", ATTENTION.values(), ids=ATTENTION)
def test_parts_of_an_attention_layer_are_those_of_keras(attention, change, reason):
    assert certify(attending(attention()), input_radius=1.0).is_finite
    certificate = certify(attending(attention(), change), input_radius=1.0)
    assert reason in certificate.reasons[0]


@pytest.mark.parametrize(
    "model",
    [
        lambda: patched(
            layers.MultiHeadAttention(2, 2), "_compute_attention", call=lambda f, x: f(x, x)
        ),
        lambda: patched(layers.Conv2D(2, 3), "convolution_op", (6, 6, 2)),
        lambda: patched(layers.Attention(), "_apply_scores", call=lambda f, x: f([x, x])),
        lambda: patched(kl.L2MultiHeadAttention(2, 2), "shape_outputs"),
        lambda: patched(layers.TimeDistributed(layers.Dense(WIDTH)), "call"),
        lambda: of(Hidden(WIDTH)),
    ],
    ids=["attention", "convolution", "scores", "outputs", "wrapper", "attributes"],
)
def test_methods_replaced_on_an_instance_are_seen(model):
    assert sound(model(), input_radius=1.0)


class Bounded(layers.Layer):
    """States its constant by a method `lipschitz`."""

    def call(self, x):
        return self.inner(x)

    def inner(self, x):
        return ops.tanh(x)

    def lipschitz(self, sequence_length=None, norm="l2", mask="full"):
        return LipschitzBound(value=1.0, norm=norm, kind="certified", theorem="largest slope")


class LoudCall(Bounded):
    def call(self, x):
        return 100.0 * super().call(x)


class LoudInner(Bounded):
    def inner(self, x):
        return 100.0 * x


class BoundedAgain(LoudCall):
    def call(self, x):
        return 0.5 * ops.tanh(x)

    def lipschitz(self, sequence_length=None, norm="l2", mask="full"):
        return LipschitzBound(value=1.0, norm=norm, kind="certified", theorem="largest slope")


class OfOne:
    def lipschitz(self, sequence_length=None, norm="l2", mask="full"):
        return LipschitzBound(value=1.0, norm=norm, kind="certified", theorem="largest slope")


class ByMixin(OfOne, layers.Layer):
    def call(self, x):
        return ops.tanh(x)


class PositionAttention(kl.layers.SelfAttention):
    """Attention by the distance of positions, as its base class documents it."""

    def add_kernels(self):
        self.add_attention_kernel("value", (self.features, self.num_heads * self.value_dim))
        self.add_attention_kernel("out", (self.num_heads * self.value_dim, *self.output_token))

    def fold(self, kernels, factors, xp):
        kernels = (kernel * factor for kernel, factor in zip(kernels, factors, strict=True))
        return collections.namedtuple("Folded", ["projection", "output"])(*kernels)

    def matrices(self, weights, norm, xp):
        return {"product": xp.matmul(weights.projection, weights.output)}

    def bound(self, weights, norms, norm, tokens, mask, xp):
        return math.sqrt(tokens) * norms["product"]

    def attend(self, tokens, weights, mask, training, return_scores):
        position = ops.arange(tokens.shape[1], dtype=tokens.dtype)
        pairs = mask.softmax(-ops.abs(position[:, None] - position)[None, None])
        return ops.matmul(pairs[:, 0], ops.matmul(tokens, weights.projection)), None, pairs


class LoudAttention(PositionAttention):
    def attend(self, tokens, weights, mask, training, return_scores):
        heads, *others = super().attend(tokens, weights, mask, training, return_scores)
        return 100.0 * heads, *others


@pytest.mark.parametrize(
    "layer",
    [LoudCall, LoudInner, lambda: LoudAttention(2, 2)],
    ids=["call", "helper", "scores of attention"],
)
def test_a_constant_is_about_the_code_of_the_class_that_states_it(layer):
    model = of(layer())
    rule, reason = find_rule(model.layers[0])
    assert rule is None and "whose constant it inherits" in reason
    assert sound(model)


@pytest.mark.parametrize("layer", [Bounded, BoundedAgain, ByMixin, lambda: PositionAttention(2, 2)])
def test_a_class_may_state_its_constant(layer):
    model = of(layer())
    assert find_rule(model.layers[0])[0] is not None
    assert certify(model).is_finite and sound(model)


class WiderBias(layers.Dense):
    def build(self, input_shape):
        super().build(input_shape)
        self.bias = self.add_weight(shape=(6, self.units))


class LongerShape(layers.Dense):
    def compute_output_shape(self, input_shape):
        return (input_shape[0], 100, self.units)


class LongerSpec(layers.LeakyReLU):
    def compute_output_spec(self, x):
        return keras.KerasTensor((x.shape[0], 100, x.shape[2]))


class PlainShape(layers.MaxPooling1D):
    def build(self, input_shape):
        super().build(input_shape)

    def compute_output_shape(self, input_shape):
        return super().compute_output_shape(input_shape)


def with_array(layer, name, shape):
    model = of(layer, layers.GlobalAveragePooling1D(), shape=(1, WIDTH))
    setattr(layer, name, np.ones(shape, "float32"))
    return model


SHAPES = {
    "bias": lambda: with_array(layers.Dense(WIDTH), "bias", (6, WIDTH)),
    "slopes": lambda: with_array(layers.PReLU(), "alpha", (6, WIDTH)),
    "own bias": lambda: of(kl.SpectralDense(WIDTH, spectral_norm=1.0), WiderBias(2), shape=(1, 4)),
    "shape": lambda: of(LongerShape(WIDTH), layers.GlobalAveragePooling1D()),
    "spec": lambda: of(LongerSpec(), layers.GlobalAveragePooling1D()),
}


@pytest.mark.parametrize("model", SHAPES.values(), ids=SHAPES)
def test_shapes_are_those_that_the_code_returns(model):
    model = model()
    assert sound(model)
    assert "returns other shapes" in certify(model).reasons[0]


def test_a_subclass_that_says_the_right_shapes_keeps_the_rule():
    certificate = certify(of(PlainShape(2)))
    assert certificate.rows[0].layer == "PlainShape" and certificate.is_finite


def test_own_attention_overrides_only_what_it_is_asked_to():
    class Loud(kl.layers.SelfAttention):
        def shape_outputs(self, output, tokens):
            return 10.0 * super().shape_outputs(output, tokens)

        def add_kernels(self):
            self.add_attention_kernel("kernel", (self.features, *self.output_token))

        def fold(self, kernels, factors, xp):
            return kernels[0] * factors[0]

        def matrices(self, weights, norm, xp):
            return {"kernel": weights}

        def bound(self, weights, norms, norm, tokens, mask, xp):
            return norms["kernel"]

        def attend(self, tokens, weights, mask, training, return_scores):
            return ops.matmul(tokens, weights), None, None

    assert "overrides `shape_outputs`" in certify(of(Loud(2, 2))).reasons[0]


def test_code_around_the_call_of_a_layer_is_seen():
    assert sound(of(LoudWhenCalled(WIDTH)))
    certificate = certify(of(layers.TimeDistributed(LoudWhenCalled(WIDTH))))
    assert "__call__" in certificate.reasons[0]
    inner = kl.L2MultiHeadAttention(2, 2)
    assert certify(of(layers.TimeDistributed(inner), shape=(2, TOKENS, WIDTH))).is_finite


def test_code_around_the_call_of_a_model_is_refused():
    class Functional(keras.Model):
        def __call__(self, *args, **kwargs):
            return 10.0 * super().__call__(*args, **kwargs)

    class Subclassed(Functional):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            return self.dense(x)

    x = keras.Input((WIDTH,))
    subclassed = Subclassed()
    subclassed(np.zeros((1, WIDTH)))
    for model in (Functional(x, layers.Dense(3)(x)), subclassed):
        assert "__call__" in certify(model).reasons[0]


def tenfold(name):
    """An operation with the name of one of Keras."""
    methods = {
        "call": lambda self, x: 10.0 * x,
        "compute_output_spec": lambda self, x: keras.KerasTensor(x.shape, x.dtype),
    }
    return type(name, (keras.Operation,), methods)()


class Greater(keras.Operation):
    def call(self, x1, x2):
        return ops.greater(x1 + 1.0, x2)

    def compute_output_spec(self, x1, x2):
        return keras.KerasTensor(x1.shape, "bool")


IMPOSTORS = {
    "copy": lambda x: tenfold("Copy")(x),
    "filled": lambda x: 0.1 * x + tenfold("OnesLike")(x),
    "softmax": lambda x: tenfold("Softmax")(x),
    "comparison": lambda x: ops.where(Greater()(x, 0.0), x, 2.0 * x),
}


@pytest.mark.parametrize("function", IMPOSTORS.values(), ids=IMPOSTORS)
def test_the_name_of_an_operation_of_keras_is_not_enough(function):
    assert not certify(operation(function)).is_finite


def test_an_operation_in_a_graph_may_have_been_changed():
    model = operation(lambda x: ops.tanh(x))
    assert certify(model).is_finite
    (changed,) = [one for one in model.operations if type(one).__name__ == "Tanh"]
    changed.call = lambda x: 10.0 * x
    assert not certify(model).is_finite


def test_compiling_a_model_changes_none_of_its_code():
    model = of(layers.TimeDistributed(layers.Dense(2)), kl.MaxMin())
    before = certify(model).total
    model.compile("sgd", "mse", metrics=["mae"])
    model.fit(np.zeros((2, TOKENS, WIDTH)), np.zeros((2, TOKENS, 2)), verbose=0)
    model.layers[0].layer.trainable = False
    assert np.isfinite([before, certify(model).total]).all()
