"""Program that answers a file of requests from a SavedModel with TensorFlow and numpy alone.

Run as `python _serving_program.py MODEL REQUESTS.npz RESULTS.npz`. Keras and this
package cannot be imported in it.
"""

import sys

BLOCKED = ("keras", "keras_lipattn", "tf_keras")

# `None` rather than an import hook that raises: TensorFlow handles a missing Keras.
for _name in BLOCKED:
    sys.modules[_name] = None  # type: ignore[assignment]

import numpy as np
import tensorflow as tf


def main(model: str, requests: str, results: str) -> None:
    loaded = tf.saved_model.load(model)
    answers = {}
    with np.load(requests, allow_pickle=False) as arrays:
        calls: dict[str, dict[str, np.ndarray]] = {}
        for key in arrays.files:
            signature, name = key.split(":", 1)
            calls.setdefault(signature, {})[name] = arrays[key]
    for signature, inputs in calls.items():
        serve = loaded.signatures[signature]
        _, specs = serve.structured_input_signature
        tensors = {
            name: tf.cast(array, specs[name].dtype)
            if array.dtype.kind != "U"
            else tf.constant(array)
            for name, array in inputs.items()
        }
        for name, tensor in serve(**tensors).items():
            # numpy has no bfloat16 to write.
            wide = tf.cast(tensor, tf.float32) if tensor.dtype == tf.bfloat16 else tensor
            answers[f"{signature}:{name}"] = wide.numpy()
    imported = [name for name in BLOCKED if sys.modules[name] is not None]
    if imported:
        raise RuntimeError(f"The model must be served without Keras. Received: {imported}")
    np.savez(results, **answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
