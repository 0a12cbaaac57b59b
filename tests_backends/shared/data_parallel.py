"""One training on any number of devices, recorded by a process of its own: `data_parallel N FILE`.

JAX learns the number of devices when it starts.
"""

import os
import subprocess
import sys
from typing import Any


def run(devices, path):
    """The arrays that `record` writes to `path` (`.npz`) in a process with so many devices."""
    import numpy as np

    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {
        **os.environ,
        "XLA_FLAGS": flags,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-m", "shared.data_parallel", str(devices), path],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{devices} devices failed. Received: {done.stderr[-4000:]}")
    return dict(np.load(path))


def record(devices, path):
    import jax  # pyright: ignore[reportMissingImports]
    import keras
    import numpy as np
    from helpers import monitor_models
    from shared import cases

    import keras_lipattn as kl

    assert len(jax.devices()) == devices
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    model = cases.with_weights(monitor_models.capped())
    optimizer = keras.optimizers.Adam(0.02)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = monitor_models.data(32)
    history = model.fit(
        x,
        y,
        batch_size=8,
        epochs=5,
        shuffle=False,
        verbose=0,
        validation_data=(x, y),
        callbacks=[kl.LipschitzMonitor(penalty=0.1, target=0.1, running_freq=1)],
    ).history
    arrays: dict[str, Any] = {f"log {key}": np.array(values) for key, values in history.items()}
    for variable in model.variables:
        value = variable.value
        assert len(value.sharding.device_set) == devices
        copies = [np.asarray(shard.data) for shard in value.addressable_shards]
        # A replicated variable that differs between devices would go unseen otherwise.
        assert all(np.array_equal(copy, copies[0], equal_nan=True) for copy in copies)
        arrays[f"weight {variable.path}"] = copies[0]
    arrays["evaluated"] = np.array(model.evaluate(x, y, batch_size=8, verbose=0))
    arrays["predicted"] = model.predict(x, batch_size=8, verbose=0)
    arrays["certified"] = np.array(kl.certify(model).total)
    np.savez(path, **arrays)


if __name__ == "__main__":
    record(int(sys.argv[1]), sys.argv[2])
