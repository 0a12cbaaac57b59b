"""`certified_accuracy`: its definitions, and attacks that may not contradict them."""

import keras
import numpy as np
import pytest
from foolbox.attacks import projected_gradient_descent as descent

import keras_lipattn as kl
from keras_lipattn.certification.classifier_head import logits_of
from keras_lipattn.linalg.precision import UNIT_ROUNDOFF

RADII = (0.05, 0.2, 1.0)


def problem(count=120, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(size=(count, 6)).astype("float32")
    return x, (np.digitize(x[:, 0] + x[:, 1] * x[:, 2], (0.5, 0.9)) % classes).astype("int64")


@pytest.fixture(scope="module")
def trained():
    keras.utils.set_random_seed(0)
    layers = [kl.SpectralDense(16), kl.MaxMin(), kl.SpectralDense(3)]
    model = keras.Sequential([keras.Input((6,)), *layers])
    model.compile(keras.optimizers.Adam(0.01), kl.losses.MarginCrossentropy(0.05, 10.0))
    model.fit(*problem(), epochs=30, verbose=0)
    return model


def with_softmax(model):
    return keras.Sequential([keras.Input((6,)), *model.layers, keras.layers.Softmax()])


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_every_share_is_its_definition(trained, norm):
    x, y = problem()
    found = kl.certified_accuracy(trained, x, y[:, None], RADII, norm)
    logits = trained.predict(x, verbose=0)
    certificate = kl.certify(trained, norm)
    right = logits.argmax(axis=1) == y
    radius = np.where(right, certificate.certified_radius(logits), 0.0)
    assert found.clean == right.mean() and 0.5 < found.clean < 1.0
    assert found.constant == certificate.total
    assert found.average_radius == radius.mean()
    for size in RADII:
        assert found.certified(size) == (radius > size).mean()
    assert found.broken_at is None and found.contradictions == 0


@pytest.mark.parametrize("end", ["softmax", "log_softmax"])
def test_probabilities_give_the_radii_of_their_logits(trained, end):
    x, y = problem()
    expected = kl.certified_accuracy(trained, x, y, RADII)
    ending = keras.layers.Activation(end)
    found = kl.certified_accuracy(
        keras.Sequential([keras.Input((6,)), *trained.layers, ending]), x, y, RADII
    )
    # Probabilities in float32 are rounded once more.
    np.testing.assert_allclose(found.certified_radii, expected.certified_radii, atol=1e-6)
    np.testing.assert_array_equal(found.correct, expected.correct)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_logits_of_probabilities_lead_by_no_more_than_the_logits(dtype):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(500, 1)) * 10.0 ** rng.uniform(-3, 2, size=(500, 1))
    rounded = keras.ops.convert_to_numpy(
        keras.ops.cast(keras.ops.sigmoid(keras.ops.convert_to_tensor(logits)), dtype)
    )
    found = logits_of(rounded, "sigmoid")
    roundoff = UNIT_ROUNDOFF[dtype]
    assert np.isfinite(found).all()
    # A probability loses as many digits as it has a leading 0.5 or 1.
    assert (np.abs(found) <= np.abs(logits) * (1.0 + 1e-9) + 4.0 * roundoff).all()
    assert (found * logits >= 0.0).all()
    few = np.abs(logits) < 2.0
    np.testing.assert_allclose(found[few], logits[few], atol=40.0 * roundoff)
    several = rng.normal(size=(500, 4)) * 10.0 ** rng.uniform(-3, 2, size=(500, 1))
    for end in (keras.ops.softmax, keras.ops.log_softmax):
        output = keras.ops.cast(end(keras.ops.convert_to_tensor(several)), dtype)
        found = logits_of(keras.ops.convert_to_numpy(output), "softmax")
        gaps = np.max(several, -1, keepdims=True) - several
        allowed = gaps * (1.0 + 2.0 * roundoff) + 4.0 * roundoff
        assert (np.max(found, -1, keepdims=True) - found <= allowed).all()


def test_probabilities_of_zero_are_certified_no_further_than_their_logits(trained):
    x, y = problem()
    kernel = trained.layers[-1].kernel
    sharp = keras.Sequential([keras.Input((6,)), *trained.layers[:-1], keras.layers.Dense(3)])
    sharp.layers[-1].set_weights([1e4 * kernel.numpy(), np.zeros(3)])
    expected = kl.certified_accuracy(sharp, x, y, RADII)
    found = kl.certified_accuracy(with_softmax(sharp), x, y, RADII)
    assert (with_softmax(sharp).predict(x, verbose=0) == 0.0).any()
    assert (found.certified_radii <= expected.certified_radii + 1e-6).all()


def test_local_radii_are_never_smaller(trained):
    x, y = (part[:6] for part in problem())
    globally = kl.certified_accuracy(trained, x, y, RADII)
    locally = kl.certified_accuracy(trained, x, y, RADII, local=True)
    assert (locally.certified_radii >= globally.certified_radii).all()
    np.testing.assert_array_equal(locally.correct, globally.correct)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("several", [False, True])
def test_an_attack_contradicts_no_certificate(trained, norm, several):
    x, y = problem()
    kinds = {
        "l2": descent.L2ProjectedGradientDescentAttack,
        "linf": descent.LinfProjectedGradientDescentAttack,
    }
    attack = [kinds[norm](steps=10), kinds[norm](steps=5)] if several else True
    found = kl.certified_accuracy(
        trained, x, y, RADII, norm, attack=attack, batch_size=50, bounds=(0.0, 1.0)
    )
    assert found.contradictions == 0
    for radius in RADII:
        assert found.certified(radius) <= found.attacked(radius) <= found.clean
    # The attack finds something.
    assert found.attacked(RADII[-1]) < 0.5 < found.attacked(RADII[0])


@pytest.mark.parametrize("named", [False, True])
def test_an_attack_changes_the_array_of_floats_and_keeps_masks(named):
    keras.utils.set_random_seed(0)
    series, mask = keras.Input((5, 3), name="series"), keras.Input((5,), dtype="bool", name="mask")
    x = kl.TransformerEncoder(8, 2)(kl.OrthogonalDense(8)(series), padding_mask=mask)
    logits = kl.OrthogonalDense(3)(keras.layers.GlobalAveragePooling1D()(x, mask=mask))
    model = keras.Model([mask, series], logits)
    rng = np.random.default_rng(0)
    arrays = {
        "mask": np.arange(5) < rng.integers(1, 6, size=(60, 1)),
        "series": rng.uniform(size=(60, 5, 3)).astype("float32"),
    }
    x = arrays if named else list(arrays.values())
    y = model.predict(x, verbose=0).argmax(axis=1)
    attack = descent.L2ProjectedGradientDescentAttack(steps=10)
    found = kl.certified_accuracy(model, x, y, RADII, attack=attack, batch_size=25)
    assert found.contradictions == 0
    assert found.attacked(RADII[-1]) < found.attacked(RADII[0])
    for size in RADII:
        assert found.certified(size) <= found.attacked(size)
    # One changed step of a short series moves its mean more than one of a long series.
    within = {"mask": np.ones((60, 5), bool), "series": arrays["series"]}
    longer = within if named else list(within.values())
    y = model.predict(longer, verbose=0).argmax(axis=1)
    full = kl.certified_accuracy(model, longer, y, RADII, attack=attack)
    assert full.attacked(0.2) != found.attacked(0.2)


def test_a_certificate_that_an_attack_contradicts_is_named(trained):
    x, y = problem()
    found = kl.certified_accuracy(trained, x, y, RADII, attack=True)
    wrong = type(found)(**{**vars(found), "certified_radii": 100.0 * found.certified_radii})
    assert wrong.contradictions > 0 and "do not trust" in str(wrong)
    assert "do not trust" not in str(found)


def test_the_table_has_a_row_for_each_radius_and_the_plot_is_written(trained, tmp_path):
    x, y = problem()
    for attack in (None, True):
        found = kl.certified_accuracy(trained, x, y, RADII, attack=attack)
        lines = found.table().splitlines()
        assert len(lines) == 3 + len(RADII)
        assert f"{found.certified(0.2):.4f}" in lines[4]
        assert ("under attack" in lines[0]) == bool(attack)
        found.plot(tmp_path / "curve.png")
        assert (tmp_path / "curve.png").stat().st_size > 1000


def test_weights_choose_the_tokens_that_count():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 3))
    model = keras.Model(inputs, kl.OrthogonalDense(4)(inputs))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 5, 3)).astype("float32"), rng.integers(0, 4, size=(30, 5))
    valid = np.arange(5) < rng.integers(1, 6, size=(30, 1))
    # Padded tokens have a class that does not exist.
    found = kl.certified_accuracy(
        model, x, np.where(valid, y, -1), RADII, sample_weight=valid, norm="token"
    )
    every = kl.certified_accuracy(model, x, y, RADII, norm="token")
    counted = valid.ravel()
    assert found.clean == every.correct[counted].mean()
    assert found.average_radius == pytest.approx(every.certified_radii[counted].mean())
    for size in RADII:
        assert found.certified(size) == (every.certified_radii[counted] > size).mean()
    assert str(found).startswith(f"{counted.sum()} examples")
    twice = kl.certified_accuracy(model, x, y, RADII, sample_weight=1.0 + valid, norm="token")
    both = (every.correct.sum() + every.correct[counted].sum()) / (150 + counted.sum())
    assert twice.clean == pytest.approx(both)
    assert every.sample_weight is None


def test_bad_arguments_are_named(trained):
    x, y = problem()
    for arguments, message in [
        (dict(radii=[0.2, 0.1]), "ascending"),
        (dict(radii=[-0.1]), "radii"),
        (dict(radii=[0.1], norm="token", attack=True), "token"),
        (dict(radii=[0.1], norm="linf", certificate=kl.certify(trained)), "norm"),
    ]:
        with pytest.raises(ValueError, match=message):
            kl.certified_accuracy(trained, x, y, **arguments)
    for classes in (y[:5], y.astype("float32"), np.eye(3)[y]):
        with pytest.raises(ValueError, match="`y` must"):
            kl.certified_accuracy(trained, x, classes, RADII)
    with pytest.raises(ValueError, match="`x` must hold at least one example"):
        kl.certified_accuracy(trained, x[:0], y[:0], RADII)
    for weights in (np.ones(5), -np.ones(len(y)), np.zeros(len(y)), np.full(len(y), np.nan)):
        with pytest.raises(ValueError, match="`sample_weight` must"):
            kl.certified_accuracy(trained, x, y, RADII, sample_weight=weights)
    with pytest.raises(TypeError, match=r"certified_accuracy.*Received: ignore_class"):
        kl.certified_accuracy(trained, x, y, RADII, ignore_class=-1)
    with pytest.raises(ValueError, match=r"for each pair of tokens.*inputs of the model"):
        kl.certified_accuracy(trained, x, y, RADII, mask=x > 0.0)
    other = keras.models.clone_model(trained)
    with pytest.raises(ValueError, match="of other weights"):
        kl.certified_accuracy(trained, x, y, RADII, certificate=kl.certify(other))
    regression = keras.Sequential([keras.Input((6,)), kl.SpectralDense(1)])
    with pytest.raises(ValueError, match="head"):
        kl.certified_accuracy(regression, x, y, RADII)
    with pytest.raises(ValueError, match="no attack"):
        kl.certified_accuracy(trained, x, y, RADII).attacked(0.1)
    with pytest.raises(ValueError, match="exactly one array of floating-point"):
        kl.certified_accuracy(trained, (10 * x).astype("int32"), y, RADII, attack=True)


def over_tokens():
    x = keras.Input((None, 2))
    return keras.Model(x, keras.layers.Dense(2)(keras.ops.sum(x, axis=1)))


class ByLength(keras.layers.Layer):
    def call(self, x):
        return x * (1.0 if x.shape[1] == 3 else 100.0)


def by_length():
    x = keras.Input((None, 2))
    return keras.Model(
        x, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling1D()(ByLength()(x)))
    )


def looked_up():
    tokens = keras.Input((4,), dtype="int32")
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(5, 2)(tokens))
    return keras.Model(tokens, keras.layers.Dense(2)(x))


@pytest.mark.parametrize(
    ("make", "options", "inside", "outside"),
    [
        (over_tokens, {"input_radius": 2.0, "sequence_length": 9}, np.ones((2, 3, 2)), 3.0),
        (over_tokens, {"sequence_length": 3}, np.ones((2, 3, 2)), np.ones((2, 9, 2))),
        (by_length, {"sequence_length": 3}, np.ones((2, 3, 2)), np.ones((2, 2, 2))),
        (looked_up, {"input_radius": 1.0}, None, np.ones((2, 4), "int32")),
    ],
    ids=["radius", "length", "shape", "embeddings"],
)
def test_examples_that_the_certificate_does_not_cover_have_no_radius(
    make, options, inside, outside
):
    model = make()
    outside = outside * inside if np.ndim(outside) == 0 else outside
    for x, is_covered in ((inside, True), (outside, False)):
        if x is None:
            continue
        y = model.predict(x, verbose=0).argmax(axis=1)
        found = kl.certified_accuracy(model, x, y, RADII, **options)
        assert found.clean == 1.0 and (found.certified_radii > 0.0).all() == is_covered
        assert (found.certified_radii > 0.0).any() == is_covered


def test_a_certificate_near_an_input_is_refused(trained):
    x, y = problem(2)
    certificate = kl.certify(trained, center=x[0], radius=0.1)
    with pytest.raises(ValueError, match="must be global"):
        kl.certified_accuracy(trained, x, y, RADII, certificate=certificate)
