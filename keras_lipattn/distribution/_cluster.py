"""What a strategy tells about its cluster."""

from typing import Any

import keras


def runs_on_workers(strategy: Any) -> bool:
    """Whether `strategy` joins several processes which all run the same program."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return False
    # Without a cluster, as without `TF_CONFIG`, it is a `MirroredStrategy`.
    return bool(strategy.cluster_resolver.cluster_spec())
