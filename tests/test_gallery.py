"""The gallery: its models are right without this package too, and no failure of a step is lost."""

import importlib.util

import keras
import numpy as np
import pytest

from examples.gallery import EXAMPLES, VERSIONS
from tools.gallery import page, trial

pytestmark = [
    # The models are written without `build()`, as the originals are; Keras warns of that.
    pytest.mark.filterwarnings("ignore:.*build:UserWarning"),
    # The encoder of video classification takes the mask out of the graph on purpose.
    pytest.mark.filterwarnings("ignore:.*was passed an input with a mask:UserWarning"),
]

_PAIRS = [
    pytest.param(example, version, id=f"{example.name}-{version}")
    for example in EXAMPLES
    for version in VERSIONS
]
by_name = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)


def skip_if_missing(example):
    if example.missing:
        pytest.skip(example.missing)


def check_outputs(example, outputs):
    arrays = [keras.ops.convert_to_numpy(array) for array in keras.tree.flatten(outputs)]
    batch = len(keras.tree.flatten(example.batch())[0])
    assert tuple(array.shape for array in arrays) == tuple(
        (batch, *shape) for shape in example.outputs
    )
    assert all(np.isfinite(array).all() for array in arrays)


@pytest.mark.parametrize("example, version", _PAIRS)
def test_model_builds_and_gives_outputs_of_the_right_shape(example, version):
    skip_if_missing(example)
    model = example.make(version)
    assert 1_000 <= model.count_params() <= 100_000
    check_outputs(example, model(example.batch()[0], training=False))


@by_name
def test_model_is_right_with_the_attention_of_keras(example, monkeypatch, tmp_path):
    # So whatever fails with L2 attention in its place is a fault of the latter.
    skip_if_missing(example)

    def attention(*args, lipschitz_bound, **kwargs):
        return keras.layers.MultiHeadAttention(*args, **kwargs)

    monkeypatch.setattr(example.module("as_written"), "L2MultiHeadAttention", attention)
    model = example.make("as_written")
    x, _ = example.batch()
    # Without `training=False` Keras augments images in a direct call.
    expected = model(x, training=False)
    check_outputs(example, expected)
    model.save(tmp_path / "model.keras")
    classes = example.custom_objects("as_written")
    # The optimizer has no state before the first step, which Keras takes for a fault of the file.
    loaded = keras.saving.load_model(
        tmp_path / "model.keras", custom_objects=classes, compile=False
    )
    # The same operations on the same weights, up to the order in which threads add.
    assert trial.difference(expected, loaded(x, training=False)) <= 1e-4


@by_name
def test_batch_is_the_same_every_time(example):
    first, second = (keras.tree.flatten(example.batch()) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@by_name
def test_edits_are_few(example):
    assert trial.edited_lines(example, "as_written") == 0
    assert 0 < trial.edited_lines(example, "edited") <= 30


def test_a_changed_line_counts_once_and_an_added_one_too(monkeypatch):
    texts = {"as_written": "a\nb\nc\n", "edited": "a\nB\nc\nd\n"}
    example = EXAMPLES[0]
    monkeypatch.setattr(type(example), "source", lambda self, version: texts[version])
    assert trial.edited_lines(example, "edited") == 2


def test_a_missing_package_is_a_reason_to_skip(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "keras_hub" else find_spec(name),
    )
    (example,) = [example for example in EXAMPLES if example.needs == "keras_hub"]
    result = trial.run(example, "edited")
    assert result.skipped == "the package keras_hub is not installed"
    assert not result.done and not result.failures
    assert result.skipped in page.page([result], "a machine")


def test_a_step_that_raises_is_recorded_with_its_first_line():
    result = trial.Trial(example="some_model", version="edited", edited_lines=7)
    with result.step("built"):
        pass
    with result.step("fitted"):
        raise ValueError("no\nand more")
    assert result.done == ["built"]
    text = page.page([result], "a machine")
    assert "| some model | edited |  | yes | **failed** | not reached |" in text
    assert "- some model, edited, fitted: ValueError: no\n" in text
    assert "and more" not in text


def test_a_model_that_cannot_be_built_has_no_further_step(monkeypatch):
    example = EXAMPLES[0]
    monkeypatch.setattr(type(example), "make", lambda self, version: 1 / 0)
    result = trial.run(example, "as_written")
    assert result.failures == {"built": "ZeroDivisionError: division by zero"}
    assert not result.done


def test_a_loaded_model_with_other_outputs_is_a_failure(monkeypatch):
    example = next(example for example in EXAMPLES if example.name == "timeseries_transformer")
    load = keras.saving.load_model

    def load_other_weights(*args, **kwargs):
        model = load(*args, **kwargs)
        model.set_weights([weight + 0.1 for weight in model.get_weights()])
        return model

    monkeypatch.setattr(keras.saving, "load_model", load_other_weights)
    for name in ("certify", "export_saved_model", "LipschitzMonitor"):
        # Nothing but loading matters here.
        monkeypatch.delattr(trial, name)
    result = trial.run(example, "as_written")
    assert "outputs of the loaded model differ by" in result.failures["reloaded"]


def test_the_line_of_an_error_of_a_layer_names_the_layer_and_the_cause():
    message = (
        "Exception encountered when calling Block.call().\n\n"
        "\x1b[1mCould not automatically infer the output shape. Error encountered:\n\n"
        "the cause\x1b[0m\n\nArguments received"
    )
    assert trial.first_line(ValueError(message)) == (
        "ValueError: Exception encountered when calling Block.call(). the cause"
    )


@pytest.mark.parametrize(
    "total, expected", [(0.5, "0.5"), (123.4, "123"), (2e6, "10^6.3"), (np.inf, "inf")]
)
def test_totals_which_say_nothing_are_powers_of_ten(total, expected):
    result = trial.Trial(
        example="model", version="edited", total=total, log10=float(np.log10(total))
    )
    assert page.total(result) == expected
