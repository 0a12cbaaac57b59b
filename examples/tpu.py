"""Connects to a TPU; as a program, `distributed.py` with `--strategy=tpu`.

python examples/tpu.py [--tpu=NAME] [flags of distributed.py]
"""

import tensorflow as tf
from absl import app, flags


def tpu_strategy(name: str) -> tf.distribute.Strategy:
    """Strategy for all cores of a TPU.

    Args:
        name: Argument of `TPUClusterResolver`: `"local"` on the machine of the TPU, the name or the
            address of a TPU, or `""` for the TPU that the environment names.

    Raises:
        SystemExit: If there is no TPU.
    """
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(name)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, RuntimeError, ImportError, OSError, tf.errors.OpError) as error:
        (cause, *_) = str(error).splitlines() or [type(error).__name__]
        raise SystemExit(
            "No TPU found: run this on a machine with a TPU (--tpu=local), name one that this "
            "machine can reach (--tpu=NAME), or choose another --strategy. "
            f"Received: --tpu={name!r} ({cause})"
        ) from error
    return tf.distribute.TPUStrategy(resolver)


if __name__ == "__main__":
    import distributed

    flags.FLAGS.set_default("strategy", "tpu")
    app.run(distributed.main)
