"""Domains that rules pass on hold every output token, and augmentation counts as in `predict`."""

import keras
import numpy as np
import pytest
from helpers.certify_cases import layer_cases, model_of
from keras import layers, ops

from keras_lipattn.certification import certify
from keras_lipattn.certification.options import Options
from keras_lipattn.certification.propagation import Propagation
from keras_lipattn.certification.traced_model import TracedModel

CASES = {case.name: case for case in layer_cases()}
NAMES = [
    name
    for name, case in CASES.items()
    if not case.options
    and name.startswith(("ops_", "resizing", "center_crop", "up_sampling", "augmentation", "patch"))
]
RADIUS = 2.0
NORMS = ("l2", "token", "linf")


def tokens_within(shape, radius: float, seed: int = 0) -> np.ndarray:
    """Inputs whose tokens have norm `radius`, among them tokens of one entry and equal tokens."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(24, *shape))
    values[8:12] = np.eye(shape[-1])[rng.integers(shape[-1], size=(4, *shape[:-1]))]
    values[12:16] = 1.0
    values[16:20] = np.sign(values[16:20])
    values[20:] = np.eye(shape[-1])[0]
    return values * (radius / np.linalg.norm(values, axis=-1, keepdims=True))


@pytest.mark.parametrize("name", NAMES)
def test_domains_hold_every_output_token(name):
    case = CASES[name]
    model = model_of(case)
    values = tokens_within(case.shape, RADIUS).astype(case.dtype)
    outputs = np.asarray(model(values, training=False), np.float64)
    tokens = outputs.reshape(-1, outputs.shape[-1] if outputs.ndim > 1 else 1)
    # Of the layers that Keras has in float32.
    rounding = 1.0 + 1e-6
    for norm in NORMS:
        traced = TracedModel(model, None, None)
        options = Options(norm=norm, input_radius=RADIUS)
        (state,) = Propagation(traced.trace, traced.comparison, options).run(traced.names)
        token_range = state.range
        center = 0.0 if token_range.center is None else token_range.center
        distances = np.linalg.norm(tokens - center, axis=-1)
        assert distances.max() <= token_range.radius * rounding
        assert np.abs(tokens).max() <= token_range.largest * rounding


@pytest.mark.parametrize("name", NAMES)
def test_examples_of_a_batch_stay_apart(name):
    case = CASES[name]
    model = model_of(case)
    values = np.random.default_rng(1).normal(size=(3, *case.shape)).astype(case.dtype)
    moved = values.copy()
    moved[1:] += 1.0
    before, after = (np.asarray(model(x, training=False)) for x in (values, moved))
    np.testing.assert_array_equal(before[0], after[0])


def small(build, shape=(4, 4, 3)):
    x = keras.Input(shape, dtype="float64")
    return keras.Model(x, build(x))


def test_augmentation_in_front_of_a_model_is_the_identity_and_later_dropout_too():
    def build(x):
        x = layers.RandomFlip(dtype="float64")(x)
        x = layers.RandomRotation(0.1, dtype="float64")(x)
        return layers.Dropout(0.5, dtype="float64")(x)

    model = small(build)
    for norm in NORMS:
        assert certify(model, norm).total == pytest.approx(1.0, rel=1e-8)
    # The graph is as it was: Keras still augments in training.
    x = np.random.default_rng(0).normal(size=(8, 4, 4, 3))
    assert not np.allclose(model(x, training=True), x)
    # Keras feeds float32.
    np.testing.assert_allclose(model.predict(x, verbose=0), x, atol=1e-6)
    nested = small(lambda x: keras.Sequential([keras.Input((4, 4, 3)), layers.RandomZoom(0.3)])(x))
    assert certify(nested).total == pytest.approx(1.0, rel=1e-8)


def test_augmentation_that_code_keeps_on_is_refused():
    class Always(layers.Layer):
        def __init__(self):
            super().__init__(dtype="float64")
            self.inner = layers.RandomFlip(dtype="float64")

        def call(self, x):
            return self.inner(x, training=True)

    assert "training=True" in certify(small(lambda x: Always()(x))).reasons[0]


class WithoutTraining(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = layers.RandomFlip()

    def call(self, x):
        return self.inner(x)


def test_a_model_that_takes_no_training_argument_augments_in_predict_and_is_refused():
    model = WithoutTraining()
    model(np.zeros((1, 4, 4, 3), "float32"))
    assert "training=True" in certify(model).reasons[0]


BATCH = {
    "cumulative sum": lambda x: ops.cumsum(x, axis=0),
    "picked": lambda x: ops.take(x, [0, 0, 1], axis=0),
    "sorted": lambda x: ops.sort(x, axis=0),
    "norm": lambda x: ops.norm(x, axis=0),
    "deviation": lambda x: ops.std(x, axis=0),
    "triangle": lambda x: ops.tril(ops.reshape(x, (-1, 48))),
    "turned": lambda x: ops.rot90(x, axes=(0, 1)),
    "summed": lambda x: ops.einsum("bijd->ijd", x),
    "reflected": lambda x: ops.pad(x, ((1, 1), (0, 0), (0, 0), (0, 0)), mode="reflect"),
    "image": lambda x: layers.Resizing(3, 2, dtype="float64")(ops.reshape(x, (-1, 16, 3))),
    "cropped": lambda x: layers.CenterCrop(3, 2, dtype="float64")(ops.reshape(x, (-1, 16, 3))),
    "patches": lambda x: ops.image.extract_patches(ops.reshape(x, (-1, 16, 3)), 2),
}


@pytest.mark.parametrize("name", BATCH)
def test_what_mixes_the_examples_of_a_batch_is_refused(name):
    for norm in NORMS:
        certificate = certify(small(BATCH[name]), norm)
        assert not certificate.is_finite and certificate.reasons[0]


def test_constant_indices_are_certified_at_every_length():
    x = keras.Input((None, 4), dtype="float64")
    model = keras.Model(x, ops.concatenate([ops.take(x, [0, 0], axis=1), x], axis=1))
    first = keras.Model(x, ops.take(x, 0, axis=1))
    assert certify(first, "token").total == certify(first).total == pytest.approx(1.0)
    assert certify(model, "linf").total == pytest.approx(1.0)
    twice = keras.Model(x, ops.take(x, [1, 1, 0], axis=1))
    assert certify(twice).total == pytest.approx(2.0**0.5)
    # The last token may be the first one.
    assert not certify(keras.Model(x, ops.take(x, [0, -1], axis=1))).is_finite


@pytest.mark.parametrize("first", [False, True])
def test_resizing_images_of_unknown_size_covers_each_size(first):
    form = "channels_first" if first else "channels_last"
    for options in ({}, {"interpolation": "nearest"}, {"pad_to_aspect_ratio": True}):

        def resized(shape, options=options):
            shape = (3, *shape) if first else (*shape, 3)
            return small(layers.Resizing(4, 5, data_format=form, dtype="float64", **options), shape)

        for norm in NORMS:
            unknown = certify(resized((None, None)), norm)
            assert unknown.is_finite
            for sizes in ((1, 1), (2, 9), (9, 3), (4, 5), (12, 30)):
                # Both are rounded up, one in more steps.
                assert certify(resized(sizes), norm).total <= unknown.total * (1.0 + 1e-8)


def test_the_indices_of_top_k_are_refused():
    model = small(lambda x: ops.top_k(x, 2)[0])
    assert "keras.ops.sort" in certify(model).reasons[0]


def test_a_variance_needs_a_bounded_domain():
    model = small(lambda x: ops.var(x, axis=-1))
    assert "input_radius" in certify(model).reasons[0]
    assert certify(model, input_radius=1.0).is_finite
