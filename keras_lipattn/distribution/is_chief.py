"""Who writes files for all workers."""

from typing import Any

from keras_lipattn.distribution._cluster import runs_on_workers


def is_chief(strategy: Any) -> bool:
    """Whether this process is the one that writes files: the chief of several workers, or alone.

    What only the chief does must not need the other workers: it may read weights, save, certify and
    export, but not `fit`, `evaluate` or `predict`, and not create variables under the strategy. The
    others would not join, and every worker fails. So call `export_saved_model` outside of
    `strategy.scope()`.

    Args:
        strategy: A `tf.distribute.Strategy`, such as `model.distribute_strategy`.

    Returns:
        A Boolean; `True` where one process drives all replicas.

    Example:

    ```python
    callbacks = [LipschitzMonitor(), SharedBackup("backup")]
    if is_chief(strategy):
        callbacks.append(keras.callbacks.CSVLogger("history.csv"))
    model.fit(dataset, epochs=10, callbacks=callbacks)
    if is_chief(strategy):
        export_saved_model(model, "export")
    ```
    """
    if not runs_on_workers(strategy):
        return True
    resolver = strategy.cluster_resolver
    if "chief" in resolver.cluster_spec().jobs:
        return resolver.task_type == "chief"
    return resolver.task_type == "worker" and resolver.task_id == 0
