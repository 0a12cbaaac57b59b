"""Code in which a tensor or a weight reaches the output past the arguments of a call.

Each model has a certificate above what its Jacobians show, or `inf` with a reason.
"""

import keras
import numpy as np
import pytest
from helpers.certify_cases import default_dtype, jacobian_norm, jacobians
from keras import layers, ops

import keras_lipattn as kl
from keras_lipattn.certification import TokenMixing, certify

NORMS = ("l2", "token", "linf")
_rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def in_float64():
    with default_dtype("float64"):
        yield


class Code(layers.Layer):
    """Runs a function of its input and its sublayers."""

    def __init__(self, function, sublayers=()):
        super().__init__()
        self.function = function
        self.sublayers = list(sublayers)

    def build(self, shape):
        for layer in self.sublayers:
            if not layer.built:
                layer.build(shape)

    def call(self, x):
        return self.function(x, *self.sublayers)


def model_of(function, shape=(4,), sublayers=()):
    inputs = keras.Input(shape)
    return keras.Model(inputs, Code(function, sublayers)(inputs))


def attention(query_shape, value_shape):
    layer = layers.MultiHeadAttention(2, 2)
    layer.build(query_shape, value_shape)
    return layer


def memory(x, attend, project):
    """Attention on constant tokens of length 100."""
    kept = 50.0 * np.random.default_rng(1).normal(size=(1, 5, 4))
    return attend(project(x), ops.broadcast_to(kept, (ops.shape(x)[0], 5, 4)))


def questions(x, attend, project):
    """Constant queries, as in pooling by attention."""
    kept = 200.0 * np.random.default_rng(1).normal(size=(1, 2, 4))
    return attend(ops.tile(kept, (ops.shape(x)[0], 1, 1)), project(x))


def scoped(x, dense):
    with keras.StatelessScope([(dense._kernel, 50.0 * dense._kernel)]):
        return dense(x)


def swapped(x, dense):
    before = dense.bias
    dense.bias = 50.0 * ops.abs(x)
    y = dense(x)
    dense.bias = before
    return y


def normalized(x, dense):
    """As wrappers of weight normalization do."""
    direction = dense.original = getattr(dense, "original", dense._kernel)
    dense._kernel = 50.0 * direction
    y = dense(x)
    dense._kernel = direction
    return y


MODELS = {
    "while loop": lambda: model_of(
        lambda x: ops.while_loop(
            lambda i, h: i < 3, lambda i, h: (i + 1, h + x), (ops.zeros((), "int32"), 0.0 * x)
        )[1]
    ),
    "for loop on zeros": lambda: model_of(
        lambda x: ops.fori_loop(0, 20, lambda i, h: ops.tanh(0.3 * h + x), ops.zeros_like(x))
    ),
    "scan": lambda: model_of(
        lambda x: ops.scan(
            lambda c, e: (c + e + x, c), ops.zeros_like(x), ops.zeros((3, 1, 4), "float64")
        )[0]
    ),
    "condition": lambda: model_of(
        lambda x: ops.cond(ops.any(ops.zeros_like(x) > 1.0), lambda: x, lambda: 10.0 * x)
    ),
    "clip between tensors": lambda: model_of(lambda x: ops.clip(x, 10.0 * x, 10.0 * x)),
    "clip zeros": lambda: model_of(lambda x: ops.clip(ops.zeros_like(x), 10.0 * x, 10.0 * x)),
    "initial maximum": lambda: model_of(
        lambda x: ops.max(x, -1, keepdims=True, initial=50.0 * x[:, :1])
    ),
    "soft shrink": lambda: model_of(lambda x: ops.soft_shrink(x, -50.0 * ops.abs(x))),
    "squareplus": lambda: model_of(lambda x: ops.squareplus(x, 9.0 * ops.square(x))),
    "memory": lambda: model_of(
        memory, (3, 4), [attention((None, 3, 4), (None, 5, 4)), kl.TokenProjection(0.5)]
    ),
    "questions": lambda: model_of(
        questions, (3, 4), [attention((None, 2, 4), (None, 3, 4)), kl.TokenProjection(0.2)]
    ),
    "stateless call": lambda: model_of(
        lambda x, dense: dense.stateless_call([50.0 * dense.kernel, dense.bias], [], x)[0],
        sublayers=[layers.Dense(4)],
    ),
    "scope": lambda: model_of(scoped, sublayers=[layers.Dense(4)]),
    "bias for a while": lambda: model_of(swapped, sublayers=[layers.Dense(4)]),
    "weight normalization": lambda: model_of(normalized, sublayers=[layers.Dense(4)]),
    "scale that broadcasts": lambda: keras.Sequential(
        [keras.Input((3, 1)), layers.Rescaling(scale=[1.0, 2.0, 3.0])]
    ),
    "offset that broadcasts": lambda: keras.Sequential(
        [keras.Input((3, 1)), layers.Rescaling(scale=1.0, offset=[1.0, 2.0, 3.0])]
    ),
    "offset with an axis more": lambda: keras.Sequential(
        [keras.Input((1, 3)), layers.Rescaling(scale=1.0, offset=[[1.0], [2.0]])]
    ),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", MODELS)
def test_a_certificate_holds_where_tensors_take_other_ways(name, norm):
    model = MODELS[name]()
    certificate = certify(model, norm)
    assert certificate.is_finite or certificate.reasons
    shape = model.input_shape[1:]
    for scale in (0.1, 1.0, 5.0):
        points = scale * _rng.normal(size=(3, *shape))
        widths = (shape[-1], model(points[:1]).shape[-1])
        for jacobian in jacobians(lambda x: model(x, training=False), points):
            # Rounding of float64.
            assert jacobian_norm(jacobian, norm, widths) <= certificate.total * (1.0 + 1e-9)


def test_code_that_cannot_be_traced_may_read_any_tensor():
    """Its visible argument is a mask, which is fixed."""
    kept = []

    class Keeps(layers.Layer):
        def call(self, x):
            kept.append(x)
            return x

    class Reads(layers.Layer):
        def call(self, flags):
            if isinstance(flags, keras.KerasTensor):
                raise TypeError("This is code for data.")
            return 50.0 * kept[-1]

        def compute_output_shape(self, shape):
            return (shape[0], 4)

    x, mask = keras.Input((4,)), keras.Input((4,), dtype="bool")
    model = keras.Model([x, mask], 0.1 * Keeps()(x) + Reads()(mask))
    certificate = certify(model)
    assert not certificate.is_finite and "Reads" in certificate.reasons[0]


@pytest.mark.parametrize("norm", NORMS)
def test_gains_of_two_norms_do_not_mix(norm):
    class Reversed(layers.Layer):
        def call(self, x):
            return x[:, ::-1]

    @kl.register_rule(Reversed)
    def reversed_tokens(layer, call):
        return TokenMixing(constant=1.0, theorem="tokens in reverse order")

    inputs = keras.Input((9, 2))
    x = layers.Dense(2, kernel_initializer="identity")(inputs)
    x = layers.Dense(2, kernel_initializer="identity")(Reversed()(x))
    model = keras.Model(inputs, layers.GlobalAveragePooling1D()(x))
    # A mean of 9 tokens: 1 / sqrt(9) in the 2-norm, 1 in both others.
    expected = 1.0 / 3.0 if norm == "l2" else 1.0
    assert certify(model, norm).total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("dtype", "wraps"), [("uint8", True), ("int16", True), ("int64", False)])
def test_integers_that_may_wrap_around_stay_fixed(dtype, wraps):
    inputs = keras.Input((3,), dtype="int32")
    outputs = ops.cast(ops.cast(inputs, dtype), "float64")
    certificate = certify(keras.Model(inputs, outputs))
    assert certificate.is_finite is not wraps
    if not wraps:
        assert certificate.total == pytest.approx(1.0)


def test_an_activation_may_read_any_tensor():
    """It is called on a mask, which is fixed."""

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.add = layers.Activation(lambda flags: ops.cast(flags, "float64") + self.kept)

        def call(self, inputs):
            x, flags = inputs
            self.kept = 50.0 * x
            return 0.1 * x + self.add(ops.cast(flags, "float64"))

    model, flags = Model(), np.ones((2, 4), bool)
    model([np.zeros((2, 4)), flags])
    specs = [keras.KerasTensor((2, 4), "float64"), keras.KerasTensor((2, 4), "bool")]
    assert not certify(model, inputs=[specs]).is_finite


def test_layers_of_keras_read_their_arguments_alone():
    words = keras.Input((3,), dtype="string")
    numbers = layers.StringLookup(vocabulary=["a", "b"])(words)
    x = layers.Embedding(4, 2, embeddings_initializer="ones")(numbers)
    certificate = certify(keras.Model(words, layers.Flatten()(x)))
    assert certificate.total == pytest.approx(1.0)


def test_a_bias_that_is_a_tensor_of_the_graph_has_no_bound():
    inputs = keras.Input((4,))
    dense = layers.Dense(4)
    dense.build((None, 4))
    dense.bias = 50.0 * inputs
    certificate = certify(keras.Model(inputs, dense(inputs)))
    assert not certificate.is_finite and "attribute" in certificate.reasons[0]


def test_ordinary_rescaling_keeps_its_constant():
    for scale, offset in ((2.0, 1.0), ([1.0, 2.0, 0.5], [0.0, 1.0, 2.0]), ([[2.0]], 0.0)):
        model = keras.Sequential([keras.Input((4, 4, 3)), layers.Rescaling(scale, offset)])
        assert certify(model).total == pytest.approx(2.0)


def test_layers_that_note_what_they_saw_have_a_certificate():
    class Notes(layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(4)
            self.seen = None

        def build(self, shape):
            self.dense.build(shape)

        def call(self, x):
            self.seen = self.dense(x)
            return self.seen

    inputs = keras.Input((4,))
    assert certify(keras.Model(inputs, Notes()(inputs))).is_finite


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "layer", [layers.Identity, layers.ActivityRegularization, lambda: layers.Dropout(0.5)]
)
def test_layers_of_several_tensors_keep_them_apart(layer, norm):
    x, kept = keras.Input((3, 4)), keras.Input((3, 4), dtype="bool")
    first, second = layer()([x, ops.cast(kept, "float64")])
    assert certify(keras.Model([x, kept], first - second), norm).total >= 1.0
    first, second = layer()([x, -2.0 * x])
    assert certify(keras.Model(x, first - second), norm).total >= 3.0


def test_a_sum_that_depends_on_the_number_of_examples_has_no_bound():
    x = keras.Input((3, 3))
    model = keras.Model(x, x + ops.mean(x, axis=2, keepdims=True))
    example = _rng.normal(size=(1, 3, 3))
    alone, together = model(example), model(np.repeat(example, 2, axis=0))
    assert not np.allclose(alone[0], together[0])
    assert "a single example" in certify(model).reasons[0]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + ops.mean(x, axis=1, keepdims=True),
        lambda x: x - ops.mean(x, axis=2, keepdims=True),
        lambda x: ops.mean(x, axis=2, keepdims=True) + x,
        lambda x: x + ops.mean(x, axis=(1, 2), keepdims=True),
        lambda x: 1.0 + ops.mean(x, axis=2, keepdims=True),
        lambda x: ops.add(np.ones(3), ops.mean(x, axis=2)),
        lambda x: x[..., :2] + ops.mean(x, axis=2, keepdims=True),
    ],
)
def test_other_sums_with_broadcasting_keep_their_bound(function):
    x = keras.Input((3, 3))
    model = keras.Model(x, function(x))
    example = _rng.normal(size=(1, 3, 3))
    np.testing.assert_allclose(
        model(example)[0], model(np.repeat(example, 2, axis=0))[0], rtol=1e-12
    )
    assert certify(model).is_finite
