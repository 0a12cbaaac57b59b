"""How far a model computed in low precision is from its twin in float64, on handwritten digits.

    python examples/precision.py

Trains the digits model of examples/digits.py for a few epochs in float32, with monitor, penalty and
caps, gives its weights to twins under other dtype policies, and prints for each how far its logits
are from those in float64, what the export allows for that, and what remains of the radii.
docs/precision.md has its table.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

import keras_lipattn
from image_data import load_images
from patch_transformer import Architecture, patch_transformer

POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")
_EPOCHS = 30
_IMAGE, _CLASSES = (8, 8, 1), 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deviation:
    """A model under one policy, compared with its twin in float64.

    Attributes:
        policy: The dtype policy.
        constant: Certified constant of the model under this policy.
        largest: Largest difference of a logit, over the largest logit.
        median: Median over the images of the largest difference of their logits, over the
            largest logit.
        classes: Share of images with another class.
        allowance: Median of what the export takes off the margins, over the largest logit.
        radius: Median radius of the `certified` signature, images of radius 0 included.
    """

    policy: str
    constant: float
    largest: float
    median: float
    classes: float
    allowance: float
    radius: float


def twin(build: Callable[[], Any], model: Any, policy: str) -> Any:
    """`build()` under another policy, with the weights of `model`."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        copy = build()
    finally:
        keras.config.set_dtype_policy(before)
    copy.set_weights(model.get_weights())
    return copy


def deviations(build: Callable[[], Any], model: Any, images: np.ndarray) -> Iterator[Deviation]:
    """The `Deviation` of each policy.

    Args:
        build: Makes the model, under the policy in force.
        model: Its trained weights.
        images: Inputs to compare on.

    Yields:
        A `Deviation` for each of `POLICIES`.
    """
    exact = _logits(twin(build, model, "float64"), images)
    size = np.abs(exact).max()
    norms = np.linalg.norm(images.reshape(len(images), -1).astype(np.float64), axis=1)
    for policy in POLICIES:
        copy = twin(build, model, policy)
        with tempfile.TemporaryDirectory() as folder:
            certificate, path = keras_lipattn.export_saved_model(copy, folder, verbose=False)
            record = path / "assets.extra" / "export.json"
            kappa = json.loads(record.read_text())["rounding"]["kappa"]
        logits = _logits(copy, images)
        difference = np.abs(logits - exact).max(axis=1)
        largest = np.maximum(1.0, np.abs(logits).max(axis=1))
        allowance = 2.0 * kappa * (certificate.total * norms + largest)
        radius = [
            certificate.certified_radius(row, allowance=float(taken))
            for row, taken in zip(logits, allowance, strict=True)
        ]
        yield Deviation(
            policy=policy,
            constant=certificate.total,
            largest=float(difference.max() / size),
            median=float(np.median(difference) / size),
            classes=float((logits.argmax(axis=1) != exact.argmax(axis=1)).mean()),
            allowance=float(np.median(allowance) / size),
            radius=float(np.median(radius)),
        )


def table(rows: list[Deviation]) -> str:
    """The rows as a table of Markdown."""
    lines = [
        "| policy | constant | logits, largest | median | other class | allowance | radius |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.policy} | {row.constant:.4f} | {row.largest:.1e} | {row.median:.1e} | "
        f"{row.classes:.4f} | {row.allowance:.1e} | {row.radius:.4f} |"
        for row in rows
    ]
    return "\n".join(lines)


def _logits(model: Any, images: np.ndarray) -> np.ndarray:
    return np.asarray(model.predict(images, batch_size=512, verbose=0)).astype(np.float64)


def _digits_model() -> keras.Model:
    return patch_transformer(_IMAGE, _CLASSES, Architecture(patch=2))


def main() -> None:
    if len(sys.argv) > 1:
        sys.exit(f"There are no arguments. Received: {sys.argv[1:]}")
    data = load_images("digits", "build/data")
    keras.utils.set_random_seed(0)
    model: Any = _digits_model()
    loss = keras_lipattn.losses.MarginCrossentropy(radius=0.2, temperature=30.0)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    monitor = keras_lipattn.LipschitzMonitor(
        penalty=0.05, target={"block1_attention": 0.95, "block2_attention": 0.95}
    )
    model.fit(*data.train, batch_size=64, epochs=_EPOCHS, verbose=2, callbacks=[monitor])
    images, labels = data.test
    accuracy = (_logits(model, images).argmax(axis=1) == labels).mean()
    print(f"{len(images)} test images, {_EPOCHS} epochs, seed 0, accuracy {accuracy:.4f}\n")
    print(table(list(deviations(_digits_model, model, images))))


if __name__ == "__main__":
    main()
