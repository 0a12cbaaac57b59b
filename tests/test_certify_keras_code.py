"""Ordinary Keras code: a certificate dominates every Jacobian, or is `inf` with a reason."""

import inspect
import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.certify_cases import default_dtype, jacobian_norm
from keras import layers, ops

import keras_lipattn as kl
from keras_lipattn.certification import Certificate, certify

NORMS = ("l2", "token", "linf")
LENGTH, WIDTH = 6, 4
SHAPE = (LENGTH, WIDTH)
# A Jacobian in float64 and its norm are this precise.
ROUNDING = 1e-9


@pytest.fixture(autouse=True)
def in_float64():
    with default_dtype("float64"):
        yield


# Measuring --------------------------------------------------------------------------------------


def moves(tensor) -> bool:
    return tensor.dtype.is_floating


def jacobian_of(run, example) -> tuple[np.ndarray, tuple[int, int]]:
    """Jacobian of everything that a batch of one example gives, and the widths of its tokens."""
    example = keras.tree.map_structure(lambda x: tf.constant(np.asarray(x)[None]), example)
    inputs = [leaf for leaf in keras.tree.flatten(example) if moves(leaf)]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(inputs)
        outputs = keras.tree.flatten(run(example))
        outputs = [tf.cast(output, "float64") for output in outputs if moves(output)]
        joined = tf.concat([tf.reshape(output, [-1]) for output in outputs], axis=0)
    parts = [
        tf.reshape(part, (joined.shape[0], -1))
        for part in tape.jacobian(
            joined,
            inputs,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
            experimental_use_pfor=False,
        )
    ]
    widths = [
        tensors[0].shape[-1] if len(tensors[0].shape) > 1 else 1 for tensors in (inputs, outputs)
    ]
    return np.concatenate(parts, axis=1), (widths[0], widths[1])


def measured(run, examples, norm: str) -> float:
    """The largest norm of a Jacobian at the examples."""
    best = 0.0
    for example in examples:
        jacobian, widths = jacobian_of(run, example)
        # Its squares may be too large or too small for a float.
        size = np.abs(jacobian).max(initial=0.0) or 1.0
        best = max(best, float(size * jacobian_norm(jacobian / size, norm, widths)))
    return best


def check(model, examples, *, finite=None, run=None, norms=NORMS, **options) -> dict:
    """Certifies in every norm and compares with Jacobians.

    Args:
        model: model to certify.
        examples: inputs without the batch axis, in the structure of the call.
        finite: whether the certificate must be finite, or `None` if it may be either.
        run: the function to differentiate, by default the model at inference.
        norms: norms to compare.
        **options: further arguments of `certify`.

    Returns:
        The certificates by norm.
    """
    run = run or (lambda x: model(x, training=False))
    certificates = {norm: certify(model, norm, **options) for norm in norms}
    for norm, certificate in certificates.items():
        truth = measured(run, examples, norm)
        assert truth <= certificate.total * (1.0 + ROUNDING) + 1e-12, (
            f"{norm}: found {truth:.6g}, certified {certificate.total:.6g}"
        )
        if not certificate.is_finite:
            assert all(certificate.reasons)
        if finite is not None:
            assert certificate.is_finite == finite, f"{norm}: {certificate.reasons}"
    return certificates


def examples(shape=SHAPE, *, count=3, spread=1.0, seed=0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.zeros(shape), *(spread * rng.normal(size=(count, *shape)))]


def model_of(build, shape=SHAPE) -> keras.Model:
    inputs = keras.Input(shape, dtype="float64")
    return keras.Model(inputs, build(inputs))


def bounded(x):
    """Entries in (-1, 1), with slope 1 at the origin."""
    return layers.Activation("tanh")(x)


def gated(signal, gate):
    """A product of bounded tensors: its constant shows the domain of the gate."""
    return layers.Multiply()([bounded(signal), gate])


def small_dense(units, activation=None, **kwargs):
    return layers.Dense(
        units,
        activation,
        kernel_initializer=keras.initializers.RandomNormal(stddev=1e-3, seed=1),
        **kwargs,
    )


# Gates: the values of activations ----------------------------------------------------------------

WITHOUT_A_CONSTANT = {"glu", "hard_shrink", "sparsemax", "threshold"}
ACTIVATIONS = sorted(
    name
    for name, function in inspect.getmembers(keras.activations, inspect.isfunction)
    if name not in {"deserialize", "get", "serialize"} | WITHOUT_A_CONSTANT
)
OF_ONE_ENTRY = [name for name in ACTIVATIONS if name not in ("softmax", "log_softmax")]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gate_is_at_least_the_value_of_its_activation_at_zero(name):
    value = abs(np.asarray(keras.activations.get(name)(tf.zeros((1, WIDTH), "float64")))).max()
    model = model_of(lambda x: gated(x, small_dense(WIDTH, name)(layers.LayerNormalization()(x))))
    found = check(model, examples(), norms=("l2",))["l2"].total
    assert found >= value


@pytest.mark.parametrize("name", ["sigmoid", "hard_sigmoid", "sparse_sigmoid"])
@pytest.mark.parametrize("way", ["dense", "layer", "operation", "own dense", "convolution"])
def test_gate_with_sigmoid_is_certified_for_every_way_to_write_it(name, way):
    def gate(x):
        y = layers.LayerNormalization()(x)
        if way == "dense":
            return small_dense(WIDTH, name)(y)
        if way == "convolution":
            init = keras.initializers.RandomNormal(stddev=1e-3, seed=1)
            return layers.Conv1D(WIDTH, 1, activation=name, kernel_initializer=init)(y)
        y = small_dense(WIDTH)(y)
        if way == "operation":
            return getattr(ops, name)(y)
        if way == "own dense":
            return kl.SpectralDense(WIDTH, activation=name)(0.01 * y)
        return layers.Activation(name)(y)

    check(model_of(lambda x: gated(x, gate(x))), examples(), finite=True)


def test_squeeze_and_excitation_block_is_certified():
    def block(x):
        y = layers.LayerNormalization()(x)
        gate = layers.GlobalAveragePooling1D(keepdims=True)(y)
        gate = small_dense(2, "relu")(gate)
        return gated(x, small_dense(WIDTH, "sigmoid")(gate))

    check(model_of(block), examples(), finite=True)


def test_gate_two_models_deep_is_certified():
    inner = model_of(
        lambda x: gated(x, small_dense(WIDTH, "sigmoid")(layers.LayerNormalization()(x)))
    )
    middle = model_of(lambda x: inner(x))
    check(model_of(lambda x: middle(x)), examples(), finite=True)


def test_no_class_changes_inside_the_certified_radius_behind_a_gate():
    model = model_of(
        lambda x: layers.Dense(2, use_bias=False)(
            gated(x, small_dense(WIDTH, "sigmoid")(layers.LayerNormalization()(x)))
        ),
        (WIDTH,),
    )
    certificate = certify(model)
    points = tf.constant(0.05 * np.random.default_rng(0).normal(size=(64, WIDTH)))
    logits = np.asarray(model(points))
    radii = certificate.certified_radius(logits)
    winner = logits.argmax(axis=-1)
    moved = tf.identity(points)
    for _ in range(10):
        with tf.GradientTape() as tape:
            tape.watch(moved)
            values = model(moved)
            margin = tf.gather(values, winner, batch_dims=1) - tf.gather(
                values, 1 - winner, batch_dims=1
            )
        step = tape.gradient(margin, moved)
        direction = step / tf.norm(step, axis=-1, keepdims=True)
        moved = points - 0.999 * radii[:, None] * direction
    assert (np.asarray(model(moved)).argmax(axis=-1) == winner).all()


# Masks by every route ---------------------------------------------------------------------------

# Keras says so of every nested model, although its layers inside do see the mask.
mask_is_dropped = pytest.mark.filterwarnings("ignore:Layer '.*was passed an input with a mask")


def one_token() -> np.ndarray:
    return np.arange(LENGTH) == 2


def masked_examples():
    return [(x, one_token()) for x in examples(count=1)]


def masked_model(build):
    x = keras.Input(SHAPE, dtype="float64")
    mask = keras.Input((LENGTH,), dtype="bool")
    return keras.Model([x, mask], build(x, mask))


class Pool(layers.Layer):
    """An average over the tokens of the mask that Keras fills in by name."""

    def call(self, query, query_mask=None):
        if query_mask is None:
            return ops.mean(query, axis=1)
        weights = ops.cast(query_mask, query.dtype)[..., None]
        return ops.sum(query * weights, axis=1) / ops.sum(weights, axis=1)


class PoolByMask(layers.Layer):
    def call(self, inputs, mask=None):
        return layers.GlobalAveragePooling1D()(inputs, mask=mask)


class Inside(layers.Layer):
    """Hands its mask on to a layer inside."""

    def __init__(self, inner=None, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner or layers.GlobalAveragePooling1D()

    def call(self, inputs, mask=None):
        return self.inner(inputs, mask)


class Marks(layers.Layer):
    """Sets the mask of its output in `call`."""

    def call(self, inputs, keep):
        outputs = ops.multiply(inputs, 1.0)
        keras.src.backend.set_keras_mask(outputs, keep)
        return outputs


def pooled(x):
    return layers.GlobalAveragePooling1D()(x)


def average_model():
    return model_of(pooled)


def sequential_average():
    model = keras.Sequential([keras.Input(SHAPE, dtype="float64"), layers.Activation("linear")])
    model.add(layers.GlobalAveragePooling1D())
    return model


def twice_nested():
    inner = average_model()
    return model_of(lambda x: inner(x))


MASK_ROUTES = {
    # name: (from input and mask to the output, whether the constant is known)
    "positional": (lambda x, m: layers.GlobalAveragePooling1D()(x, m), True),
    "keyword": (lambda x, m: layers.GlobalAveragePooling1D()(x, mask=m), True),
    "all by keyword": (lambda x, m: layers.GlobalAveragePooling1D()(inputs=x, mask=m), True),
    "functional model, keyword": (lambda x, m: average_model()(x, mask=m), True),
    "functional model, positional": (lambda x, m: average_model()(x, None, m), True),
    "sequential model": (lambda x, m: sequential_average()(x, mask=m), True),
    "two models deep": (lambda x, m: twice_nested()(x, mask=m), True),
    "layer in between": (lambda x, m: pooled(layers.Softmax(-1)(x, mask=m[..., None])), None),
    "custom layer, positional": (lambda x, m: Inside()(x, m), None),
    "custom layer, keyword": (lambda x, m: Inside()(x, mask=m), None),
    "custom layers two deep": (lambda x, m: Inside(Inside())(x, mask=m), None),
    "custom layer around a model": (lambda x, m: Inside(Inside(PoolByMask()))(x, m), None),
    "filled in by Keras": (lambda x, m: Pool()(Marks()(x, m)), None),
    "given by name": (lambda x, m: Pool()(x, query_mask=m), None),
    "set in a custom call": (lambda x, m: pooled(Marks()(x, m)), None),
    "set in a custom call, keyword": (lambda x, m: pooled(Marks()(x, keep=m)), None),
    "softmax, keyword": (lambda x, m: pooled(layers.Softmax()(100.0 * x, mask=m[..., None])), None),
}


@mask_is_dropped
@pytest.mark.parametrize("route", MASK_ROUTES)
def test_average_over_the_tokens_of_a_mask_is_certified_for_one_token(route):
    build, finite = MASK_ROUTES[route]
    model = masked_model(build)
    check(model, masked_examples(), finite=finite, run=lambda example: model(list(example)))


@mask_is_dropped
@pytest.mark.parametrize("positional", [True, False])
@pytest.mark.parametrize("nested", [0, 1, 2])
def test_mask_of_a_softmax_travels_on_to_the_average_after_it(positional, nested):
    square = (LENGTH, LENGTH)
    x = keras.Input(square, dtype="float64")
    mask = keras.Input((LENGTH,), dtype="bool")
    average = model_of(pooled, square)
    for _ in range(nested):
        inner = average
        average = model_of(lambda x, inner=inner: inner(x), square)
    softmax = layers.Softmax()
    y = softmax(x, mask) if positional else softmax(x, mask=mask)
    model = keras.Model([x, mask], average(y) if nested else pooled(y))
    # Two entries of the one token that counts share the weight of the softmax.
    keep = np.arange(LENGTH) < 2
    point = np.zeros(square)
    point[1:] = [10.0, -10.0, 0.0, 0.0, 0.0, 0.0]
    check(model, [(point, keep)], run=lambda example: model(list(example)))


@mask_is_dropped
@pytest.mark.parametrize("route", ["direct", "nested", "custom", "by name"])
def test_mask_of_a_masking_layer_reaches_the_average_behind_it(route):
    def build(x):
        y = layers.Masking()(x)
        if route == "nested":
            return twice_nested()(y)
        if route == "custom":
            return Inside()(y)
        if route == "by name":
            return Pool()(y)
        return pooled(y)

    point = np.zeros(SHAPE)
    point[2] = 1.0
    finite = True if route in ("direct", "nested") else None
    check(model_of(build), [point], finite=finite, assume_fixed_mask=True)


@mask_is_dropped
@pytest.mark.parametrize("route", ["direct", "nested", "custom", "by name"])
def test_mask_of_an_embedding_reaches_the_average_behind_it(route):
    def build(y):
        if route == "nested":
            return twice_nested()(y)
        if route == "custom":
            return Inside()(y)
        if route == "by name":
            return Pool()(y)
        return pooled(y)

    ids = keras.Input((LENGTH,), dtype="int32")
    table = layers.Embedding(5, WIDTH, mask_zero=True)
    model = keras.Model(ids, build(table(ids)))
    # The certified input is the embedded tokens: the rows of the table.
    certificate = certify(model, "l2")
    rows = np.asarray(table.embeddings)
    tokens = [0, 0, 3, 0, 0, 0], [0, 0, 4, 0, 0, 0]
    one, other = (np.asarray(model(np.asarray([row]))) for row in tokens)
    quotient = np.linalg.norm(one - other) / np.linalg.norm(rows[3] - rows[4])
    assert quotient <= certificate.total * (1.0 + ROUNDING)
    if route in ("direct", "nested"):
        assert certificate.is_finite


# Models called more than once -------------------------------------------------------------------


def classifier(ending, *, sequential=False):
    # Its square is zero: without the softmax in between two calls would give a constant.
    nilpotent = np.zeros((WIDTH, WIDTH))
    nilpotent[: WIDTH // 2, WIDTH // 2 :] = 4.0 * np.eye(WIDTH // 2)
    dense = layers.Dense(WIDTH, kernel_initializer=lambda shape, dtype: nilpotent)
    tail = (
        [layers.Dense(WIDTH, ending, kernel_initializer="identity")]
        if ending == "softmax"
        else [layers.Activation("softmax")]
        if ending == "layer"
        else [layers.Softmax()]
    )
    parts = [keras.Input((WIDTH,), dtype="float64"), dense, *tail]
    if sequential:
        return keras.Sequential(parts)
    x = parts[0]
    for part in parts[1:]:
        x = part(x)
    return keras.Model(parts[0], x)


@pytest.mark.parametrize("ending", ["softmax", "layer", "softmax layer"])
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("calls", [2, 3])
def test_only_the_last_softmax_of_a_model_called_again_is_left_out(ending, sequential, calls):
    inner = classifier(ending, sequential=sequential)

    def build(x):
        for _ in range(calls):
            x = inner(x)
        return x

    model = model_of(build, (WIDTH,))

    def logits(x):
        for _ in range(calls - 1):
            x = inner(x)
        # Adding the same number to all logits gives the same probabilities.
        return tf.math.log(inner(x))

    # What is certified is the pre-softmax logits: their centered part has the smaller Jacobian.
    check(model, examples((WIDTH,), spread=0.3), run=logits, norms=("l2",), finite=True)


def test_softmax_inside_of_a_model_that_is_called_again_two_deep_is_kept():
    inner = classifier("layer")
    middle = model_of(lambda x: inner(x), (WIDTH,))
    model = model_of(lambda x: middle(inner(x)), (WIDTH,))
    check(
        model,
        examples((WIDTH,), spread=0.3),
        run=lambda x: tf.math.log(inner(inner(x))),
        norms=("l2",),
        finite=True,
    )


@pytest.mark.parametrize("ending", ["layer", "softmax"])
def test_softmax_of_a_branch_is_kept_where_the_same_model_ends_the_graph(ending):
    inner = classifier(ending)
    model = model_of(lambda x: inner(layers.Add()([x, inner(x)])), (WIDTH,))
    check(
        model,
        examples((WIDTH,), spread=0.3),
        run=lambda x: tf.math.log(inner(x + inner(x))),
        norms=("l2",),
        finite=True,
    )


def test_sigmoid_of_a_model_that_is_called_again_is_kept():
    dense = layers.Dense(1, "sigmoid", kernel_initializer="ones")
    x = keras.Input((1,), dtype="float64")
    inner = keras.Model(x, dense(x))

    def build(x):
        # Without the sigmoid in between the two terms would cancel.
        pair = [layers.Rescaling(4.0)(inner(x)), layers.Rescaling(4.0)(x)]
        return inner(layers.Subtract()(pair))

    check(
        model_of(build, (1,)),
        examples((1,)),
        run=lambda x: 4.0 * (inner(x) - x),
        finite=True,
    )


# Dictionaries -----------------------------------------------------------------------------------


def unequal(first="b", second="a", kind="list"):
    """100 times the input `first`, 0.001 times the input `second`."""
    one, other = (keras.Input((WIDTH,), dtype="float64", name=name) for name in (first, second))
    output = layers.Add()([layers.Rescaling(100.0)(one), layers.Rescaling(0.001)(other)])
    inputs = {"list": [one, other], "dict": {first: one, second: other}}[kind]
    return keras.Model(inputs, output)


@pytest.mark.parametrize("names", [("b", "a"), ("a", "b")])
@pytest.mark.parametrize("kind", ["list", "dict"])
@pytest.mark.parametrize("loud", [0, 1])
@pytest.mark.parametrize("depth", [1, 2])
def test_inputs_in_a_dictionary_are_matched_by_name(names, kind, loud, depth):
    inner = unequal(*names, kind=kind)
    if depth == 2:
        first, second = (keras.Input((WIDTH,), dtype="float64", name=name) for name in names)
        inner = keras.Model([second, first], inner({names[0]: first, names[1]: second}))
    # The certified input goes to one of the two, a constant to the other.
    quiet = names[1 - loud]
    model = model_of(lambda x: inner({names[loud]: x, quiet: layers.Rescaling(0.01)(x)}), (WIDTH,))
    certificates = check(model, examples((WIDTH,)), finite=True)
    assert certificates["l2"].total < 101.0


@pytest.mark.filterwarnings("ignore:When providing `inputs` as a dict")
@pytest.mark.parametrize("keyword", [True, False])
def test_dictionary_whose_keys_differ_from_the_names_of_the_inputs(keyword):
    one, other = (keras.Input((WIDTH,), dtype="float64", name=name) for name in ("z", "a"))
    output = layers.Add()([layers.Rescaling(100.0)(one), layers.Rescaling(0.001)(other)])
    inner = keras.Model({"first": one, "second": other}, output)

    def build(x):
        given = {"second": layers.Rescaling(0.01)(x), "first": x}
        return inner(inputs=given) if keyword else inner(given)

    check(model_of(build, (WIDTH,)), examples((WIDTH,)), finite=True)


def test_model_called_on_a_longer_dictionary_takes_its_own_inputs():
    inner = unequal()
    model = model_of(lambda x: inner({"a": layers.Rescaling(0.01)(x), "aa": x, "b": x}), (WIDTH,))
    check(model, examples((WIDTH,)))


def test_model_with_inputs_in_a_dictionary_is_certified():
    model = unequal("z", "a", kind="dict")
    points = [{"z": x, "a": 0.5 * x} for x in examples((WIDTH,))]
    check(model, points, finite=True)


# The batch axis ---------------------------------------------------------------------------------


BATCH_IDIOMS = {
    "repeat, then group": lambda x: ops.reshape(ops.repeat(x, 2, axis=0), (-1, 2, *SHAPE)),
    "repeat on a negative axis": lambda x: ops.reshape(ops.repeat(x, 2, axis=-3), (-1, 2, *SHAPE)),
    "repeat": lambda x: ops.repeat(x, 2, axis=0),
    "repeat of all entries": lambda x: ops.reshape(ops.repeat(x, 2), (-1, 2, *SHAPE)),
    "repeat of all entries, by keyword": lambda x: ops.reshape(
        ops.repeat(x, repeats=2, axis=None), (-1, 2 * LENGTH, WIDTH)
    ),
    "tile": lambda x: ops.tile(x, (2, 1, 1)),
    "tile, then group": lambda x: ops.reshape(ops.tile(x, (2, 1, 1)), (-1, 2, *SHAPE)),
    "tile, then average": lambda x: layers.GlobalAveragePooling1D()(ops.tile(x, (2, 1, 1))),
    "broadcast": lambda x: ops.broadcast_to(x, (3, *SHAPE)),
    "times a constant for each example": lambda x: ops.multiply(
        x, np.array([1.0, 2.0, 3.0]).reshape(3, 1, 1)
    ),
    "plus a constant for each example": lambda x: ops.add(x, np.ones((3, 1, 1))),
    "minus a constant for each example": lambda x: ops.subtract(np.ones((3, 1, 1)), x),
    "maximum with a constant for each example": lambda x: ops.maximum(
        x, -10.0 * np.ones((3, 1, 1))
    ),
    "choice by a constant for each example": lambda x: ops.where(np.ones((3, 1, 1), bool), x, 0.0),
    "one example in front of another": lambda x: ops.concatenate([x, x], axis=0),
    "one example in front of another, negative": lambda x: ops.concatenate([x, x], axis=-3),
    "stack in front": lambda x: ops.stack([x, x], axis=0),
    "sum of examples": lambda x: ops.sum(x, axis=0),
    "sum of everything": lambda x: ops.sum(x),
    "mean of everything": lambda x: ops.mean(x, keepdims=True),
    "axes turned around": lambda x: ops.transpose(x),
    "batch axis last": lambda x: ops.moveaxis(x, 0, -1),
    "batch axis swapped": lambda x: ops.swapaxes(x, 0, 1),
    "flip of everything": lambda x: ops.flip(x),
    "roll of everything": lambda x: ops.roll(x, 1),
    "padding in front": lambda x: ops.pad(x, ((1, 1), (0, 0), (0, 0)), mode="symmetric"),
    "take of everything": lambda x: ops.take(x, [0, 0]),
    "softmax of everything": lambda x: ops.softmax(x, axis=None),
    "softmax over examples": lambda x: ops.softmax(x, axis=0),
    "matrix over examples": lambda x: ops.einsum("btd,bse->tdse", x, np.ones((1, 2, 3))),
    "einsum over examples": lambda x: ops.einsum("btd,de->te", x, np.eye(WIDTH)),
    "everything in one row": lambda x: ops.ravel(x),
    "a leading axis": lambda x: ops.expand_dims(x, 0),
}


@pytest.mark.filterwarnings("ignore:You are using a softmax over axis 0")
@pytest.mark.filterwarnings("ignore:Exception encountered when calling Written")
@pytest.mark.parametrize("idiom", BATCH_IDIOMS)
@pytest.mark.parametrize("custom", [False, True])
def test_operation_on_the_batch_axis_is_refused_or_counted(idiom, custom):
    build = BATCH_IDIOMS[idiom]

    class Written(layers.Layer):
        def call(self, x):
            return build(x)

    try:
        model = model_of(Written() if custom else build)
    except (ValueError, TypeError, NotImplementedError, UserWarning) as error:
        pytest.skip(f"Keras refuses it: {error}")
    check(model, examples(count=1))


def test_examples_mixed_through_a_tiled_batch_are_not_certified():
    """The output of one example then depends on another one."""
    model = model_of(lambda x: ops.reshape(ops.tile(x, (2, 1, 1)), (-1, 2, *SHAPE)))
    batch = np.random.default_rng(0).normal(size=(2, *SHAPE))
    moved = batch.copy()
    moved[1] += 1.0
    assert np.abs(np.asarray(model(batch) - model(moved))[0]).max() > 0.5
    for norm in NORMS:
        assert not certify(model, norm).is_finite


@pytest.mark.parametrize("width", [WIDTH // 2, 2 * WIDTH])
def test_tokens_in_the_batch_axis_and_back_are_certified(width):
    def build(x):
        rows = ops.reshape(x, (-1, WIDTH))
        return ops.reshape(layers.Dense(width)(rows), (-1, LENGTH, width))

    check(model_of(build), examples())


# Unknown sizes ----------------------------------------------------------------------------------


class TimesPosition(layers.Layer):
    def __init__(self, how="shape", **kwargs):
        super().__init__(**kwargs)
        self.how = how

    def call(self, x):
        length = ops.shape(x)[1]
        if self.how == "static":
            length = x.shape[1] or 0
        positions = ops.cast(ops.arange(0, length), x.dtype)
        if self.how == "ones":
            positions = ops.cumsum(ops.ones((length or 0,), x.dtype))
        return x * positions[:, None]


class Around(layers.Layer):
    """A custom layer with a custom layer inside."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, x):
        return self.inner(x)


LONG = 20


@pytest.mark.parametrize("how", ["shape", "static", "ones"])
@pytest.mark.parametrize("depth", ["layer", "two layers", "model", "time", "given by length"])
def test_layer_that_looks_at_its_length_is_certified_for_that_length(how, depth):
    def build(x):
        layer = TimesPosition(how)
        if depth == "two layers":
            return Around(Around(layer))(x)
        if depth == "model":
            inner = model_of(layer, (None, WIDTH))
            return inner(x)
        return layer(x)

    try:
        length = LONG if depth == "given by length" else None
        model = model_of(build, (length, WIDTH))
    except (ValueError, TypeError, UserWarning) as error:
        pytest.skip(f"Keras refuses it: {error}")
    options = {} if depth == "given by length" else {"sequence_length": LONG}
    check(model, examples((LONG, WIDTH), count=1), **options)


def test_subclassed_model_that_looks_at_its_length_is_certified_for_that_length():
    class Model(keras.Model):
        def call(self, x):
            return x * ops.cast(ops.arange(ops.shape(x)[1]), x.dtype)[:, None]

    model = Model()
    model(np.zeros((1, LONG, WIDTH)))
    spec = keras.KerasTensor((None, None, WIDTH), dtype="float64")
    check(model, examples((LONG, WIDTH), count=1), inputs=spec, sequence_length=LONG)


def test_radius_in_an_export_holds_where_a_layer_looks_at_its_length(tmp_path):
    x = keras.Input((None, WIDTH), dtype="float32")
    with default_dtype("float32"):
        y = layers.GlobalAveragePooling1D()(TimesPosition()(x))
        model = keras.Model(x, layers.Dense(2, kernel_initializer="identity")(y))
    exported = kl.export_saved_model(
        model, tmp_path, sequence_length=LONG, allow_uncertified=True, verbose=False
    )
    served = tf.saved_model.load(str(exported.path)).signatures
    point = np.zeros((1, LONG, WIDTH), np.float32)
    point[..., 0] = 1.0
    if "certified" not in served:
        return
    (name,) = served["certified"].structured_input_signature[1]
    radius = float(np.ravel(served["certified"](**{name: tf.constant(point)})["radius"])[0])
    # Exchanging the two features exchanges the classes.
    other = point[..., [1, 0, 2, 3]]
    assert np.argmax(model(point)) != np.argmax(model(other))
    assert radius <= np.linalg.norm(point - other)


# Training mode in a graph -----------------------------------------------------------------------


class Drops(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dropout = layers.Dropout(0.5, seed=1)

    def call(self, x, training=None):
        return self.dropout(x, training=training)


def dropping_model():
    return model_of(layers.Dropout(0.5, seed=1))


def dropping_sequential():
    return keras.Sequential([keras.Input(SHAPE, dtype="float64"), layers.Dropout(0.5, seed=1)])


def twice_dropping():
    inner = dropping_model()
    return model_of(lambda x: inner(x))


DROPPING = {
    "dropout": lambda: layers.Dropout(0.5, seed=1),
    "functional model": dropping_model,
    "sequential model": dropping_sequential,
    "two models deep": twice_dropping,
    "time distributed": lambda: layers.TimeDistributed(layers.Dropout(0.5, seed=1)),
    "custom layer": Drops,
    "model around a custom layer": lambda: model_of(Drops()),
    "gaussian dropout": lambda: layers.GaussianDropout(0.5, seed=1),
    "alpha dropout": lambda: layers.AlphaDropout(0.5, seed=1),
    "spatial dropout": lambda: layers.SpatialDropout1D(0.5, seed=1),
    "model around spatial dropout": lambda: model_of(layers.SpatialDropout1D(0.5, seed=1)),
    "model around gaussian dropout": lambda: model_of(layers.GaussianDropout(0.5, seed=1)),
}


@pytest.mark.parametrize("kind", DROPPING)
def test_dropout_that_a_graph_keeps_on_is_refused_or_counted(kind):
    layer = DROPPING[kind]()
    model = model_of(lambda x: layer(x, training=True))
    # Called without `training`, a model leaves what its graph says.
    check(model, examples(), run=model)


class TrainingInside(layers.Layer):
    """Calls a layer in training mode whatever its own mode is."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, x):
        return self.inner(x, training=True)


@pytest.mark.parametrize("kind", ["dropout", "functional model", "sequential model"])
def test_dropout_that_a_custom_layer_keeps_on_is_refused_or_counted(kind):
    model = model_of(TrainingInside(DROPPING[kind]()))
    check(model, examples(), run=model)


@pytest.mark.parametrize("kind", ["functional model", "sequential model", "custom layer"])
def test_dropout_off_in_a_graph_is_certified(kind):
    layer = DROPPING[kind]()
    model = model_of(lambda x: layer(x, training=False))
    check(model, examples(), finite=True if kind != "custom layer" else None)


@pytest.mark.parametrize("kind", ["layer", "functional model", "sequential model", "custom"])
def test_batch_statistics_that_a_graph_keeps_on_are_not_certified(kind):
    layer = layers.BatchNormalization()
    if kind == "functional model":
        layer = model_of(layer)
    elif kind == "sequential model":
        layer = keras.Sequential([keras.Input(SHAPE, dtype="float64"), layer])
    model = model_of(
        TrainingInside(layer) if kind == "custom" else lambda x: layer(x, training=True)
    )
    # One example of small variance: the batch norm divides by it.
    check(model, [1e-3 * x for x in examples()], run=model)


@pytest.mark.parametrize("kind", ["layer", "functional model", "sequential model", "custom"])
def test_running_norms_that_a_graph_keeps_on_are_refused_or_counted(kind):
    dense = kl.SpectralDense(8, spectral_norm=1.0, use_bias=False)
    layer = dense
    shape = (8,)
    if kind == "functional model":
        layer = model_of(dense, shape)
    elif kind == "sequential model":
        layer = keras.Sequential([keras.Input(shape, dtype="float64"), dense])
    model = model_of(
        TrainingInside(layer) if kind == "custom" else lambda x: layer(x, training=True), shape
    )
    # The running vector is far from the direction that the kernel stretches most.
    kernel = np.eye(8)
    kernel[0, 0] = 3.0
    dense.kernel.assign(kernel)
    vector = np.full(8, 1.0)
    vector[0] = 1e-3
    for variable in dense.variables:
        if variable.name.endswith("vector"):
            variable.assign((vector / np.linalg.norm(vector))[: variable.shape[0]])
    check(model, [np.zeros(shape)], run=model)


# Domains that single rules hand on --------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu", "softplus"])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_bias_of_a_depthwise_convolution_counts_in_a_gate(activation, dimensions):
    make = {1: layers.DepthwiseConv1D, 2: layers.DepthwiseConv2D}[dimensions]
    shape = (LENGTH,) * dimensions + (WIDTH,)

    def build(x):
        convolved = make(
            3,
            padding="same",
            activation=activation,
            bias_initializer=keras.initializers.Constant(3.0),
            depthwise_initializer=keras.initializers.RandomNormal(stddev=1e-3, seed=1),
        )
        return gated(x, convolved(bounded(x)))

    check(model_of(build, shape), examples(shape, count=1), finite=True, norms=("l2", "linf"))


@pytest.mark.parametrize(
    "make",
    [
        lambda **bias: layers.Conv1D(WIDTH, 3, padding="same", **bias),
        lambda **bias: layers.Conv1D(WIDTH, 3, padding="same", groups=2, **bias),
        lambda **bias: layers.SeparableConv1D(WIDTH, 3, padding="same", **bias),
        lambda **bias: layers.Conv1DTranspose(WIDTH, 3, padding="same", **bias),
        lambda **bias: layers.EinsumDense("abc,cd->abd", (LENGTH, WIDTH), bias_axes="d", **bias),
        lambda **bias: layers.EinsumDense("abc,bd->adc", (LENGTH, WIDTH), bias_axes="d", **bias),
        lambda **bias: layers.Dense(WIDTH, **bias),
    ],
    ids=["conv", "grouped", "separable", "transposed", "einsum", "einsum_tokens", "dense"],
)
def test_bias_counts_in_a_gate(make):
    layer = make(bias_initializer=keras.initializers.Constant(3.0))
    model = model_of(lambda x: gated(x, layer(bounded(x))))
    for variable in model.trainable_variables:
        if "kernel" in variable.path:
            variable.assign(1e-3 * variable)
    check(model, examples(count=1), norms=("l2", "linf"))


@pytest.mark.parametrize("alpha", [-1.0, -0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("keyword", [True, False])
def test_celu_is_certified_only_where_it_is_lipschitz(alpha, keyword):
    model = model_of(lambda x: ops.celu(x, alpha=alpha) if keyword else ops.celu(x, alpha))
    points = [np.full(SHAPE, value) for value in (-3.0, -1e-6, 1.0)]
    check(model, points, finite=alpha > 0.0)


@pytest.mark.parametrize("alpha", [-2.0, 0.5, 3.0])
def test_elu_with_any_alpha_is_certified(alpha):
    points = [np.full(SHAPE, value) for value in (-3.0, -1e-6, 1.0)]
    check(model_of(lambda x: ops.elu(x, alpha=alpha)), points, finite=True)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64", "bfloat16"])
def test_bits_read_as_another_type_have_no_constant(dtype):
    try:
        model = model_of(lambda x: ops.cast(ops.view(x, dtype), "float64"))
    except (ValueError, TypeError, NotImplementedError, UserWarning) as error:
        pytest.skip(f"Keras refuses it: {error}")
    for norm in NORMS:
        certificate = certify(model, norm)
        assert not certificate.is_finite
        assert all(certificate.reasons)


def test_bits_read_as_their_own_type_are_the_identity():
    # TensorFlow has no gradient for it.
    check(model_of(lambda x: ops.view(x, "float64")), examples(), run=lambda x: x)


@pytest.mark.parametrize("fill", [ops.ones_like, lambda x: ops.full_like(x, 3.0), ops.zeros_like])
def test_filled_tensors_are_constants(fill):
    check(model_of(lambda x: x + fill(x)), examples(), finite=True)


def test_products_with_ones_and_zeros_are_certified():
    check(model_of(lambda x: x * ops.ones_like(x)), examples(), finite=True)
    check(model_of(lambda x: x * ops.zeros_like(x)), examples(), finite=True)


def test_a_mask_computed_from_the_shape_alone_is_fixed():
    def attend(x):
        position = ops.cumsum(ops.ones_like(x[..., 0]), axis=1)
        mask = ops.greater_equal(position[:, :, None], position[:, None, :])
        y = layers.LayerNormalization()(x)
        return layers.MultiHeadAttention(2, 2)(y, y, attention_mask=mask)

    check(model_of(attend), examples(), finite=True)


# Attention rows that see no key ------------------------------------------------------------------


def attention(x, *, rank=2, outer=4.0, cancel=True, window=None, **call):
    """A layer whose output bias and value bias cancel, except in rows that see no key."""
    dropout = call.pop("dropout", 0.0)
    layer = layers.MultiHeadAttention(
        1,
        WIDTH,
        dropout=dropout,
        sliding_window=window,
        attention_axes=(1,) if rank == 3 else None,
    )
    y = layer(x, x, **call)
    for part in (layer._query_dense, layer._key_dense):
        part.kernel.assign(1e-3 * part.kernel)
    eye = np.eye(WIDTH)
    layer._value_dense.kernel.assign(1e-3 * eye[:, None, :])
    layer._output_dense.kernel.assign(eye[None])
    layer._output_dense.bias.assign(np.full(WIDTH, outer))
    if cancel:
        layer._value_dense.bias.assign(np.full((1, WIDTH), -outer))
    return y


def blind(length=LENGTH, rows=(0, 3)) -> np.ndarray:
    """A mask with rows that see nothing."""
    mask = np.ones((length, length), bool)
    mask[list(rows)] = False
    return mask


ROWS_WITHOUT_KEYS = {
    "dropout and a constant mask": lambda x: attention(
        bounded(x), dropout=0.1, attention_mask=blind()[None]
    ),
    "dropout and padding": lambda x: attention(
        layers.Masking()(bounded(x)), dropout=0.1, use_causal_mask=True
    ),
    "dropout and padding, all of it": lambda x: attention(
        layers.Masking()(bounded(x)), dropout=0.1
    ),
    "constant mask": lambda x: attention(bounded(x), attention_mask=blind()[None]),
    "padding": lambda x: attention(layers.Masking()(bounded(x)), use_causal_mask=True),
    "window and a constant mask": lambda x: attention(
        bounded(x), window=1, attention_mask=~np.eye(LENGTH, dtype=bool)[None]
    ),
    "window, dropout and a constant mask": lambda x: attention(
        bounded(x), window=1, dropout=0.1, attention_mask=~np.eye(LENGTH, dtype=bool)[None]
    ),
}


@pytest.mark.parametrize("case", ROWS_WITHOUT_KEYS)
def test_rows_that_see_no_key_are_in_the_domain_handed_on(case):
    # The operation, unlike the layer, does not look at masks.
    model = model_of(lambda x: ops.multiply(bounded(x), ROWS_WITHOUT_KEYS[case](x)))
    points = [1e-3 * x for x in examples()]
    # Tokens of zeros are padded; the first one alone sees nothing under a causal mask.
    points[1][0] = 0.0
    check(model, points, assume_fixed_mask=True, norms=("l2", "token"), finite=True)


def test_rows_that_see_no_key_are_in_the_domain_with_a_second_attention_axis():
    shape = (2, LENGTH, WIDTH)
    layer = layers.MultiHeadAttention(1, WIDTH, attention_axes=(2,))
    mask = np.ones((1, 2, LENGTH, LENGTH), bool)
    mask[:, :, 1] = False

    def build(x):
        y = bounded(x)
        return gated(x, layer(y, y, attention_mask=mask))

    model = model_of(build, shape)
    layer._value_dense.kernel.assign(1e-3 * np.eye(WIDTH)[:, None, :])
    layer._output_dense.kernel.assign(np.eye(WIDTH)[None])
    layer._output_dense.bias.assign(np.full(WIDTH, 4.0))
    layer._value_dense.bias.assign(np.full((1, WIDTH), -4.0))
    check(model, [1e-3 * x for x in examples(shape)], norms=("l2", "token"))


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("by_input", [False, True])
def test_rows_outside_of_every_window_average_over_all_keys(window, by_input):
    length = 16
    keep = np.arange(length) < length // 2
    near = np.abs(np.subtract.outer(np.arange(length), np.arange(length))) < window
    mask = ~near | keep[:, None]
    layer = layers.MultiHeadAttention(1, WIDTH, sliding_window=window)

    def build(x, given):
        y = bounded(x)
        return layer(y, y, attention_mask=given)

    x = keras.Input((length, WIDTH), dtype="float64")
    if by_input:
        given = keras.Input((length, length), dtype="bool")
        model = keras.Model([x, given], build(x, given))
        points, run = [(np.zeros((length, WIDTH)), mask)], lambda pair: model(list(pair))
    else:
        model = keras.Model(x, build(x, mask[None]))
        points, run = [np.zeros((length, WIDTH))], None
    for part in (layer._query_dense, layer._key_dense):
        part.kernel.assign(np.zeros_like(part.kernel))
    layer._value_dense.kernel.assign(np.eye(WIDTH)[:, None, :])
    layer._output_dense.kernel.assign(np.eye(WIDTH)[None])
    check(model, points, run=run, norms=("l2", "token"), finite=True)


# Sizes far apart --------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1e-100, 1e-150, 1e100, 1e150])
@pytest.mark.parametrize("which", ["query", "value", "output", "all"])
@pytest.mark.parametrize("call", [{}, {"use_causal_mask": True}], ids=["full", "causal"])
def test_heads_of_sizes_far_apart_are_certified(ratio, which, call):
    layer = kl.L2MultiHeadAttention(2, 2)
    model = model_of(lambda x: layer(x, **call))
    for name in ("query", "value", "output"):
        if which in (name, "all"):
            kernel = getattr(layer, f"{name}_kernel")
            sizes = np.ones(kernel.shape)
            axis = 0 if name == "output" else 1
            np.moveaxis(sizes, axis, 0)[1] = ratio if which != "all" else ratio**0.4
            kernel.assign(kernel * sizes)
    check(model, [1e-3 * x for x in examples(count=1)])


@pytest.mark.parametrize("ratio", [1e-100, 1e100])
@pytest.mark.parametrize("which", ["value", "output"])
def test_small_and_large_heads_have_positive_constants(ratio, which):
    layer = kl.L2MultiHeadAttention(2, 2)
    model = model_of(lambda x: layer(x))
    kernel = getattr(layer, f"{which}_kernel")
    sizes = np.ones(kernel.shape)
    np.moveaxis(sizes, 0 if which == "output" else 1, 0)[1] = ratio
    kernel.assign(kernel * sizes)
    for norm in NORMS:
        certificate = certify(model, norm)
        assert certificate.total > 0.0
        assert certificate.is_finite


@pytest.mark.parametrize("ratio", [1e-100, 1e100])
@pytest.mark.parametrize("which", ["query", "value", "output"])
def test_cosine_heads_of_sizes_far_apart_are_certified(ratio, which):
    layer = kl.ScaledCosineAttention(2, 2)
    model = model_of(lambda x: layer(x))
    kernel = getattr(layer, f"{which}_kernel")
    sizes = np.ones(kernel.shape)
    np.moveaxis(sizes, 0 if which == "output" else 1, 0)[1] = ratio
    kernel.assign(kernel * sizes)
    check(model, [1e-3 * x for x in examples(count=1)])


@pytest.mark.parametrize("ratio", [1e-100, 1e-150, 1e100, 1e150])
@pytest.mark.parametrize("part", ["query", "value", "output"])
def test_dot_product_heads_of_sizes_far_apart_are_certified(ratio, part):
    layer = layers.MultiHeadAttention(2, 2)

    def build(x):
        y = layers.LayerNormalization(epsilon=1.0)(x)
        return layer(y, y)

    model = model_of(build)
    kernel = getattr(layer, f"_{part}_dense").kernel
    sizes = np.ones(kernel.shape)
    np.moveaxis(sizes, 0 if part == "output" else 1, 0)[1] = ratio
    kernel.assign(kernel * sizes)
    check(model, examples(count=1, spread=0.1))


# Legal use that must not raise -------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-1, -2, 1, 2])
@pytest.mark.parametrize("custom", [False, True])
def test_dense_on_stacked_tensors_is_certified(axis, custom):
    class Stack(layers.Layer):
        def call(self, x):
            return ops.stack([x, -x], axis=axis)

    def build(x):
        y = Stack()(x) if custom else ops.stack([x, -x], axis=axis)
        return layers.Dense(3)(y)

    check(model_of(build), examples(), finite=True)


@pytest.mark.parametrize("count", [1, 3])
def test_dense_on_more_stacked_tensors_is_certified(count):
    def build(x):
        y = ops.stack([layers.Rescaling(1.0 + i)(x) for i in range(count)], axis=-1)
        return layers.Dense(2)(y)

    check(model_of(build), examples(), finite=True)


def test_dense_on_stacked_vectors_is_certified():
    check(
        model_of(lambda x: layers.Dense(3)(ops.stack([x, -2.0 * x], axis=-1)), (WIDTH,)),
        examples((WIDTH,)),
        finite=True,
    )


MERGING = {
    "add": layers.Add,
    "subtract": layers.Subtract,
    "average": layers.Average,
    "maximum": layers.Maximum,
    "minimum": layers.Minimum,
    "multiply": layers.Multiply,
    "concatenate": layers.Concatenate,
    "concatenate tokens": lambda: layers.Concatenate(axis=1),
    "residual": kl.Residual,
}


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("keyword", [True, False])
def test_merging_layer_called_by_keyword_is_certified(name, keyword):
    def build(x):
        pair = [bounded(x), bounded(layers.Dense(WIDTH)(x))]
        layer = MERGING[name]()
        return layer(inputs=pair) if keyword else layer(pair)

    check(model_of(build), examples(), finite=True)


@pytest.mark.parametrize("keyword", [True, False])
def test_dot_layer_is_certified_or_refused(keyword):
    def build(x):
        pair = [bounded(x), bounded(x)]
        return layers.Dot(axes=2)(inputs=pair) if keyword else layers.Dot(axes=2)(pair)

    check(model_of(build), examples())


def attend_by_keyword(x):
    return layers.MultiHeadAttention(2, 2)(query=x, value=x)


CALLED_BY_KEYWORD = {
    "dense": lambda x: layers.Dense(3)(inputs=x),
    "einsum": lambda x: layers.EinsumDense("abc,cd->abd", (LENGTH, 3))(inputs=x),
    "activation": lambda x: layers.Activation("gelu")(inputs=x),
    "softmax": lambda x: layers.Softmax()(inputs=x),
    "relu": lambda x: layers.ReLU()(inputs=x),
    "convolution": lambda x: layers.Conv1D(3, 3)(inputs=x),
    "normalization": lambda x: layers.LayerNormalization()(inputs=x),
    "pooling": lambda x: layers.GlobalAveragePooling1D()(inputs=x),
    "flatten": lambda x: layers.Flatten()(inputs=x),
    "reshape": lambda x: layers.Reshape((WIDTH, LENGTH))(inputs=x),
    "dropout": lambda x: layers.Dropout(0.5)(inputs=x),
    "l2 attention": lambda x: kl.L2MultiHeadAttention(2, 2)(query=x),
    "attention": lambda x: attend_by_keyword(bounded(x)),
    "time distributed": lambda x: layers.TimeDistributed(layers.Dense(3))(inputs=x),
    "functional model": lambda x: model_of(layers.Dense(3))(inputs=x),
    "sequential model": lambda x: keras.Sequential([layers.Dense(3)])(inputs=x),
    "two models deep": lambda x: model_of(lambda y: average_model()(inputs=y))(inputs=x),
    "ops.add": lambda x: ops.add(x1=x, x2=x),
    "ops.subtract": lambda x: ops.subtract(x1=x, x2=layers.Dense(WIDTH)(x)),
    "ops.multiply": lambda x: ops.multiply(x1=bounded(x), x2=bounded(x)),
    "ops.multiply by a constant": lambda x: ops.multiply(x1=x, x2=3.0),
    "ops.divide": lambda x: ops.divide(x1=x, x2=3.0),
    "ops.maximum": lambda x: ops.maximum(x1=x, x2=0.0),
    "ops.minimum": lambda x: ops.minimum(x1=x, x2=layers.Dense(WIDTH)(x)),
    "ops.matmul": lambda x: ops.matmul(x1=x, x2=np.eye(WIDTH)),
    "ops.matmul from the left": lambda x: ops.matmul(x1=np.eye(LENGTH), x2=x),
    "ops.where": lambda x: ops.where(condition=np.ones((LENGTH, 1), bool), x1=x, x2=0.0),
    "ops.concatenate": lambda x: ops.concatenate(xs=[x, x], axis=-1),
    "ops.stack": lambda x: ops.stack(x=[x, x], axis=1),
    "ops.mean": lambda x: ops.mean(x=x, axis=1),
    "ops.reshape": lambda x: ops.reshape(x=x, newshape=(-1, WIDTH, LENGTH)),
    "ops.relu": lambda x: ops.relu(x=x),
    "ops.clip": lambda x: ops.clip(x=x, x_min=-1.0, x_max=1.0),
    "ops.repeat": lambda x: ops.repeat(x=x, repeats=2, axis=1),
    "ops.layer_normalization": lambda x: ops.layer_normalization(x=x),
}


@pytest.mark.parametrize("name", CALLED_BY_KEYWORD)
def test_call_by_keyword_is_certified(name):
    check(model_of(CALLED_BY_KEYWORD[name]), examples(), finite=True)


@pytest.mark.parametrize("limits", [(1.0, -1.0), (-1.0, 1.0), (2.0, 0.5), (0.0, 0.0), (5, 3)])
@pytest.mark.parametrize("keyword", [True, False])
def test_clip_with_any_order_of_its_limits_is_certified_in_a_gate(limits, keyword):
    low, high = limits

    def clipped(x):
        return ops.clip(x, x_min=low, x_max=high) if keyword else ops.clip(x, low, high)

    model = model_of(lambda x: gated(x, clipped(x)))
    check(model, examples(spread=2.0), finite=True)
    check(model_of(clipped), examples(spread=2.0), finite=True)


@pytest.mark.parametrize("times", [2, [1, 2, 1, 3, 1, 1]])
@pytest.mark.parametrize("axis", [None, 1, -1])
def test_repeat_is_certified_or_refused_in_every_norm(times, axis):
    if axis != 1 and not isinstance(times, int):
        pytest.skip("as many numbers as tokens")
    model = model_of(lambda x: ops.repeat(x, times, axis=axis))
    check(model, examples(count=1))


@pytest.mark.parametrize("kind", ["dict", "list called with a dict"])
@pytest.mark.parametrize("batch", [False, True])
def test_center_with_named_inputs_is_certified(kind, batch):
    query, other = (keras.Input((WIDTH,), dtype="float64", name=name) for name in ("q", "a"))
    output = layers.Add()([layers.Rescaling(100.0)(query), layers.Dense(WIDTH, "tanh")(other)])
    model = keras.Model({"q": query, "a": other} if kind == "dict" else [query, other], output)
    center = {"q": np.ones(WIDTH), "a": np.zeros(WIDTH)}
    given = {name: np.stack([value] * 2) for name, value in center.items()} if batch else center
    check(model, [center], center=given, radius=0.1)


@pytest.mark.filterwarnings("ignore:When providing `inputs` as a dict")
@pytest.mark.parametrize("order", [("first", "second"), ("second", "first")])
def test_center_in_a_dictionary_whose_keys_are_no_names_is_certified(order):
    one, other = (keras.Input((WIDTH,), dtype="float64", name=name) for name in ("z", "a"))
    output = layers.Add()([layers.Rescaling(100.0)(one), layers.LayerNormalization()(other)])
    model = keras.Model(dict(zip(order, (one, other), strict=True)), output)
    center = dict(zip(order, (np.zeros(WIDTH), np.array([1.0, 2.0, 3.0, 4.0])), strict=True))
    found = check(model, [center], center=center, radius=0.01, norms=("l2", "token"))
    # The center of the normalized input is far from 0, where its constant is large.
    assert found["l2"].total < 102.0


def test_center_of_one_named_input_is_certified():
    query = keras.Input(SHAPE, dtype="float64", name="q")
    model = keras.Model({"q": query}, layers.LayerNormalization()(query))
    (center,) = examples(count=1)[1:]
    found = check(model, [{"q": center}], center={"q": center}, radius=0.01, norms=("l2", "token"))
    assert found["l2"].is_finite


BROKEN_CERTIFICATES = [
    "{}",
    "[]",
    '"text"',
    "7",
    "null",
    '{"schema": 2}',
    '{"schema": 2, "threat_model": {}}',
    '{"schema": 2, "threat_model": 3, "rows": [], "pairwise_constants": []}',
    '{"schema": 2, "threat_model": {}, "rows": 3, "pairwise_constants": []}',
    '{"schema": 2, "threat_model": {}, "rows": [3], "pairwise_constants": []}',
    '{"schema": 2, "threat_model": {}, "rows": [{}], "pairwise_constants": []}',
    '{"schema": 2, "threat_model": {}, "rows": [], "pairwise_constants": [1]}',
    '{"schema": 1}',
    "{",
    "",
]


@pytest.mark.parametrize("text", BROKEN_CERTIFICATES)
def test_text_that_is_no_certificate_is_a_value_error(text):
    with pytest.raises(ValueError):
        Certificate.from_json(text)


@pytest.mark.parametrize(
    "field", ["threat_model", "rows", "pairwise_constants", "total", "model", "log10"]
)
def test_certificate_without_a_field_is_a_value_error(field):
    content = json.loads(certify(model_of(layers.Dense(3))).to_json())
    del content[field]
    if field == "pairwise_constants":
        # It may be filled in: not every model has classes.
        content["threat_model"].pop("norm")
    with pytest.raises(ValueError):
        Certificate.from_json(json.dumps(content))


def test_certificates_written_and_read_are_equal():
    certificate = certify(model_of(layers.Dense(3)))
    assert Certificate.from_json(certificate.to_json()) == certificate
    assert math.isfinite(certificate.total)


def _attention_model(heads, tokens, key_dim, **options):
    inputs = keras.Input((tokens, 4))
    x = layers.LayerNormalization()(inputs)
    outputs = layers.MultiHeadAttention(heads, key_dim, **options)(x, x)
    model = keras.Model(inputs, outputs)
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=weight.shape) for weight in model.get_weights()])
    return model


def test_a_bias_that_keras_adds_along_the_tokens_is_refused():
    # When this fails, Keras adds as NumPy does, and the refusal can go.
    x, bias = np.zeros((1, 3, 3, 1), "float32"), np.arange(3, dtype="float32")[:, None]
    assert not np.array_equal(keras.ops.convert_to_numpy(keras.ops.add(x, bias)), x + bias)
    for heads, tokens, key_dim, options, refused in (
        (3, 3, 1, {}, True),
        # Shorter sequences are covered too.
        (3, 5, 1, {}, True),
        (3, 4, 2, {"value_dim": 1}, True),
        (3, 2, 1, {}, False),
        (3, 3, 2, {}, False),
        (3, 3, 1, {"use_bias": False}, False),
    ):
        certificate = certify(_attention_model(heads, tokens, key_dim, **options))
        assert certificate.is_finite != refused
        assert not refused or "along the tokens" in certificate.reasons[0]
    inputs = keras.Input((4, 5))
    layer = layers.EinsumDense("abc,cde->abde", output_shape=(None, 4, 1), bias_axes="d")
    model = keras.Model(inputs, layer(inputs))
    assert certify(model).is_finite
    layer.bias.assign(np.ones((4, 1)))
    assert "along the tokens" in certify(model).reasons[0]
