"""Training does not depend on the strategy or on the number of replicas.

Each strategy runs in separate processes; its workers communicate over sockets.
"""

import csv
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import monitor_models, strategy_record, strategy_runs

pytestmark = pytest.mark.distributed

# Float32 sums in another order, accumulated over twenty steps.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    @functools.cache
    def folder(name):
        return tmp_path_factory.mktemp(name)

    return folder


@pytest.fixture(scope="module")
def run(folder_of):
    return once(lambda name: strategy_runs.records(name, folder_of(name)))


def once(function):
    """The function, called once for each argument. A failure is kept and raised again, since
    another try would find the files of the first one.
    """

    @functools.cache
    def outcome(argument):
        try:
            return function(argument), None
        except Exception as error:
            return None, error

    def call(argument):
        result, error = outcome(argument)
        if error is not None:
            raise error
        return result

    return call


def test_a_run_that_failed_is_not_tried_again_in_its_folder():
    tried = []

    def fail(name):
        tried.append(name)
        raise RuntimeError(f"{name} failed")

    run = once(fail)
    for name in ("mirrored-2", "mirrored-2", "workers-2"):
        with pytest.raises(RuntimeError, match=f"{name} failed"):
            run(name)
    assert tried == ["mirrored-2", "workers-2"]


@pytest.fixture(scope="module")
def alone(run):
    """The arrays of one device."""
    return run("default")[0]


@pytest.fixture(params=strategy_runs.STRATEGIES)
def name(request):
    return request.param


def _assert_same(records, alone, *prefixes):
    keys = [key for key in alone if key.startswith(prefixes)]
    assert keys
    for record in records:
        for key in keys:
            np.testing.assert_allclose(record[key], alone[key], rtol=0, atol=TOLERANCE, err_msg=key)


def test_every_replica_takes_part(name, run):
    _, workers, replicas = strategy_runs.STRATEGIES[name]
    assert [record["replicas"] for record in run(name)] == [replicas] * workers


def test_fit_ends_with_the_same_losses_and_weights(name, run, alone):
    assert np.ptp(alone["fit_loss"]) > 0.1
    _assert_same(run(name), alone, "fit_loss", "fit_accuracy", "fit_val", "weights")


def test_evaluate_gives_the_same(name, run, alone):
    _assert_same(run(name), alone, "evaluated")


def test_predict_gives_the_same_in_the_same_order(name, run, alone):
    assert len(alone["predicted"]) == strategy_record.PREDICTED
    _assert_same(run(name), alone, "predicted")


def test_the_monitor_gives_the_same_bounds(name, run, alone):
    _assert_same(run(name), alone, "fit_lipschitz", "fit_running", "batch", "certified")


def test_the_penalty_has_the_same_gradient(name, run, alone):
    assert np.abs(alone["gradient"]).max() > 0.01
    _assert_same(run(name), alone, "gradient")


def test_running_vectors_are_the_same_on_all_replicas(name, run, alone):
    # Each replica assigns its own copy, from the same weights in the same order.
    assert all(record["apart"] == 0.0 for record in run(name))
    first, *others = run(name)
    for other in others:
        for key in first:
            np.testing.assert_array_equal(other[key], first[key], err_msg=key)
    _assert_same([first], alone, "running")


def test_only_the_chief_writes_files(name, run, folder_of):
    run(name)
    records = {f"record-{index}.npz" for index in range(strategy_runs.STRATEGIES[name][1])}
    written = {path.name for path in folder_of(name).iterdir()}
    assert written == {*records, "backup", "best.keras", "history.csv", "saved_model"}
    with open(folder_of(name) / "history.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == [*"01234"]


def test_the_export_of_the_chief_predicts_like_all_workers(name, run, folder_of):
    (record, *_) = run(name)
    served = tf.saved_model.load(str(folder_of(name) / "saved_model" / "1"))
    x, _ = monitor_models.data(strategy_record.EXAMPLES)
    signature = served.signatures["serving_default"]  # pyright: ignore
    (given,) = signature.structured_input_signature[1]
    (outputs,) = signature(**{given: tf.constant(x[: strategy_record.PREDICTED])}).values()
    np.testing.assert_allclose(outputs, record["predicted"], rtol=0, atol=TOLERANCE)


def test_the_chief_saves_a_plain_model(name, run, folder_of):
    (record, *_) = run(name)
    model = keras.saving.load_model(folder_of(name) / "best.keras")
    # Its bound decreases in every epoch, so the last model is the best.
    np.testing.assert_allclose(
        monitor_models.weights(model), record["weights"], rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("name", ["default", *strategy_runs.STRATEGIES])
def test_a_killed_process_resumes_where_it_was(name, alone, tmp_path):
    strategy, workers, _ = strategy_runs.STRATEGIES.get(name, (name, 1, 1))
    finished = strategy_runs.run(
        strategy_runs.PROGRAM, strategy, tmp_path, "killed", workers=workers
    )
    # The others are notified, and do not wait forever.
    assert finished[-1].returncode == -9
    assert all(worker.returncode != 0 for worker in finished), finished
    assert not list(tmp_path.glob("record-*.npz"))
    records = strategy_runs.records(name, tmp_path, "resumed")
    resumed = [key for key in alone if key.startswith(("fit_", "batch_"))]
    for record in records:
        assert record["resumed_from"] == strategy_record.KILLED_IN
        for key in resumed:
            whole = alone[key]
            left = whole[-len(record[key]) :]
            assert len(left) == len(whole) * 2 // 5
            np.testing.assert_allclose(record[key], left, rtol=0, atol=TOLERANCE, err_msg=key)
    _assert_same(records, alone, "weights", "running_", "predicted", "certified")
    with open(tmp_path / "history.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == [*"01234"]
