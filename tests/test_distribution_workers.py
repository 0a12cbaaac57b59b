"""Several workers: the limits of Keras, the chief, and the backup."""

import json

import pytest
import tensorflow as tf
from helpers import monitor_models, strategy_runs

from keras_lipattn.distribution import SharedBackup, is_chief, multi_worker

PROGRAM = strategy_runs.TESTS / "helpers" / "stock_fit.py"


class Cluster(tf.distribute.MultiWorkerMirroredStrategy):
    """A strategy with the attributes that `is_chief` reads, without a running cluster."""

    def __init__(self, jobs, task_type, task_id):
        self._resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec(jobs), task_type=task_type, task_id=task_id
        )

    @property
    def cluster_resolver(self):
        return self._resolver


TWO = {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}
WITH_CHIEF = {"chief": ["127.0.0.1:3"], **TWO}


@pytest.mark.parametrize(
    ("jobs", "task", "chief"),
    [
        (TWO, ("worker", 0), True),
        (TWO, ("worker", 1), False),
        (WITH_CHIEF, ("chief", 0), True),
        (WITH_CHIEF, ("worker", 0), False),
        (WITH_CHIEF, ("worker", 1), False),
        ({**TWO, "evaluator": ["127.0.0.1:4"]}, ("evaluator", 0), False),
    ],
)
def test_one_process_of_a_cluster_is_the_chief(jobs, task, chief):
    assert is_chief(Cluster(jobs, *task)) == chief


def test_a_process_that_drives_all_replicas_is_the_chief(two_cpus):
    assert is_chief(tf.distribute.get_strategy())
    assert is_chief(tf.distribute.MirroredStrategy(two_cpus))
    assert is_chief(None)


def test_without_workers_a_model_is_not_changed(two_cpus):
    for strategy in (tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(two_cpus)):
        with strategy.scope():
            model = monitor_models.compiled(monitor_models.sequential())
        before = dict(vars(model))
        assert multi_worker(model) is model
        assert vars(model) == before


@pytest.mark.parametrize("chief", [True, False])
def test_only_the_chief_changes_the_backup(chief, tmp_path):
    model = monitor_models.compiled(monitor_models.sequential())
    model._distribute_strategy = Cluster(TWO, "worker", 0 if chief else 1)
    backup = SharedBackup(str(tmp_path / "backup"))
    backup.set_model(model)
    backup.on_train_begin()
    backup.on_epoch_begin(0)
    backup.on_epoch_end(0)
    assert (tmp_path / "backup").exists() == chief
    (tmp_path / "backup").mkdir(exist_ok=True)
    backup.on_train_end()
    assert (tmp_path / "backup").exists() != chief


def test_a_backup_is_restored_by_all_workers(tmp_path):
    model = monitor_models.compiled(monitor_models.sequential())
    monitor_models.fit(model, SharedBackup(str(tmp_path), delete_checkpoint=False), epochs=2)
    other = monitor_models.compiled(monitor_models.sequential())
    other._distribute_strategy = Cluster(TWO, "worker", 1)
    backup = SharedBackup(str(tmp_path))
    backup.set_model(other)
    backup.on_train_begin()
    assert other._initial_epoch == 2
    assert (monitor_models.weights(other) == monitor_models.weights(model)).all()


@pytest.mark.distributed
@pytest.mark.parametrize("cause", ["build", "steps"])
def test_keras_alone_still_fails_with_workers(cause):
    # When this fails, `multi_worker` no longer needs that change.
    for finished in strategy_runs.run(PROGRAM, cause, workers=2):
        assert finished.returncode == 3, finished.output


@pytest.mark.distributed
def test_a_monitor_adds_no_collective(tmp_path):
    path = tmp_path / "collectives.json"
    program = strategy_runs.TESTS / "helpers" / "collectives.py"
    for finished in strategy_runs.run(program, path, workers=2):
        assert finished.returncode == 0, finished.output
    found = json.loads(path.read_text())
    assert found.keys() == {"no monitor", "running bounds", "penalty"}
    for step in found.values():
        # Only the gradient, in one piece: running vectors need no synchronization.
        assert step["collectives"] == {f"CollectiveReduceV2 of {step['weights']}": 1}
