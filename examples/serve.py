"""Serves an exported classifier with TensorFlow alone, as a server without Keras would.

    python examples/serve.py build/demo/saved_model/1 build/demo/requests.npz

The first argument is a version of an export. The program needs neither Keras nor keras_lipattn, and
blocks the import of both. For each request it prints the class, the margin between the two largest
logits, and the certified radius: no image closer than that, in the 2-norm over all pixels, gets
another class.
"""

import argparse
import sys

# TensorFlow imports Keras if it is installed. A server does not have it.
for _name in ("keras", "keras_lipattn"):
    sys.modules[_name] = None  # type: ignore[assignment]

import numpy as np
import tensorflow as tf

# For float32 values, relative to max(1, max|y|).
_TOLERANCE = 1e-5


def main(model: str, requests: str) -> int:
    """Answer the requests; return 1 if the answers differ from those of Keras."""
    loaded = tf.saved_model.load(model)
    with np.load(requests) as arrays:
        images, labels, logits = arrays["image"], arrays["label"], arrays["logits"]
    served = loaded.signatures["serving_default"](image=tf.constant(images))
    answers = loaded.signatures["certified"](image=tf.constant(images))
    answers = {name: tensor.numpy() for name, tensor in answers.items()}
    print("request  true class  class  margin  certified radius")
    rows = zip(labels, answers["class"], answers["margin"], answers["radius"], strict=True)
    for number, (label, winner, margin, radius) in enumerate(rows):
        print(f"{number:7d}  {label:10d}  {winner:5d}  {margin:6.4f}  {radius:16.4f}")
    (output,) = served.values()
    difference = float(np.abs(output.numpy() - logits).max() / max(1.0, np.abs(logits).max()))
    print(f"largest difference from Keras, relative to max(1, max|y|): {difference:.1e}", end="")
    print(f" (allowed: {_TOLERANCE:.0e})")
    return int(not difference <= _TOLERANCE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="folder of one version of the SavedModel")
    parser.add_argument("requests", help="npz file with image, label, and logits from Keras")
    arguments = parser.parse_args()
    sys.exit(main(arguments.model, arguments.requests))
