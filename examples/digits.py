"""Trains, certifies, exports and serves a Transformer with L2 self-attention on small images.

    python examples/digits.py [--dataset=digits|mnist|fashion_mnist] [--penalty=0] [--epochs=N]

A monitor watches the certified Lipschitz bound of every layer while the model trains, and penalizes
those of attention above their target. The results are in --out_dir:

    saved_model/1/    for TensorFlow Serving, with the certificate in assets.extra/; the next
                      run writes saved_model/2/
    certificate.json  the certificate
    history.csv       losses and certified bounds, an epoch a line
    bounds.png        the bounds over the epochs
    requests.npz      a test image of each class, with the answers of Keras

At last a second process, which has neither Keras nor this package, serves these requests.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys
import time

import keras
import numpy as np
from absl import app, flags, logging

import keras_lipattn
from image_data import DATASETS, ImageData, load_images
from patch_transformer import Architecture, patch_transformer

_DATASET = flags.DEFINE_enum("dataset", "digits", DATASETS, "what to learn")
_OUT_DIR = flags.DEFINE_string("out_dir", "build/demo", "folder of the results")
_DATA_DIR = flags.DEFINE_string("data_dir", "build/data", "folder of prepared data sets")
_EPOCHS = flags.DEFINE_integer("epochs", None, "number of epochs", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the initial weights and the order of the images")
_PENALTY = flags.DEFINE_float(
    "penalty", 0.05, "coefficient of the penalty of attention above its target", lower_bound=0.0
)
_TARGET = flags.DEFINE_float("target", 1.0, "certified bound to reach in every attention layer")
_RADIUS = flags.DEFINE_float("radius", None, "radius that the loss asks for, in pixel units")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "factor of the logits in the loss")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 0.01, "largest learning rate")

_CLASSES = 10
# The hinge of the penalty lets a bound settle within about a percent of where it starts, so it
# starts a little below the target.
_HINGE = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What differs from one data set to the next.

    Attributes:
        architecture: Sizes of the model.
        epochs: Number of epochs.
        batch_size: Images a step.
        radius: Radius that the loss asks for.
        temperature: Factor of the logits in the loss.
        radii: Radii at which the certified accuracy is reported.
    """

    architecture: Architecture
    epochs: int
    batch_size: int
    radius: float
    temperature: float
    radii: tuple[float, float, float]


_MNIST = Recipe(
    architecture=Architecture(patch=7, head_units=256),
    epochs=20,
    batch_size=256,
    radius=0.5,
    temperature=20.0,
    radii=(0.1, 0.3, 0.5),
)
_RECIPES = {
    "digits": Recipe(
        architecture=Architecture(patch=2),
        epochs=100,
        batch_size=64,
        radius=0.2,
        temperature=30.0,
        radii=(0.1, 0.2, 0.3),
    ),
    "mnist": _MNIST,
    "fashion_mnist": dataclasses.replace(_MNIST, radius=0.3),
}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are understood. Received: {argv[1:]}")
    started = time.monotonic()
    logging.set_verbosity(logging.WARNING)
    recipe = _with_flags(_RECIPES[_DATASET.value])
    out_dir = pathlib.Path(_OUT_DIR.value)
    out_dir.mkdir(parents=True, exist_ok=True)
    data = load_images(_DATASET.value, _DATA_DIR.value)
    keras.utils.set_random_seed(_SEED.value)
    model = patch_transformer(data.train[0].shape[1:], _CLASSES, recipe.architecture)
    monitor = _train(model, data, recipe, out_dir)
    requests, labels = _first_of_each_class(*data.test)
    certificate, saved_model = keras_lipattn.export_saved_model(
        model, out_dir / "saved_model", example_batch=requests
    )
    (out_dir / "certificate.json").write_text(certificate.to_json())
    # After what matters: a plot that cannot be written is an error.
    monitor.plot(out_dir / "bounds.png")
    _report(model, certificate, data, recipe)
    np.savez(
        out_dir / "requests.npz",
        image=requests,
        label=labels,
        logits=model.predict(requests, verbose=0),
    )
    _serve(saved_model, out_dir / "requests.npz")
    print(f"\nIn {out_dir}: {', '.join(sorted(path.name for path in out_dir.iterdir()))}")
    print(f"{_DATASET.value}, seed {_SEED.value}: {time.monotonic() - started:.0f} s in all")


def _first_of_each_class(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    _, rows = np.unique(labels, return_index=True)
    return images[rows], labels[rows]


def _with_flags(recipe: Recipe) -> Recipe:
    given = {"epochs": _EPOCHS, "radius": _RADIUS, "temperature": _TEMPERATURE}
    changes = {name: flag.value for name, flag in given.items() if flag.value is not None}
    return dataclasses.replace(recipe, **changes)


class _Progress(keras.callbacks.ProgbarLogger):
    """The progress bar, with the bounds of attention and of the model only."""

    def on_epoch_end(self, epoch, logs=None):
        shown = ("loss", "accuracy", "lipschitz_total", "attention")
        logs = {key: value for key, value in (logs or {}).items() if key.endswith(shown)}
        super().on_epoch_end(epoch, logs)


def _attention_layers(model: keras.Model) -> list[keras_lipattn.L2MultiHeadAttention]:
    return [
        layer for layer in model.layers if isinstance(layer, keras_lipattn.L2MultiHeadAttention)
    ]


def _train(
    model: keras.Model, data: ImageData, recipe: Recipe, out_dir: pathlib.Path
) -> keras_lipattn.LipschitzMonitor:
    images, labels = data.train
    steps = recipe.epochs * -(-len(images) // recipe.batch_size)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.01 * _LEARNING_RATE.value,
        decay_steps=steps - steps // 20,
        warmup_target=_LEARNING_RATE.value,
        warmup_steps=steps // 20,
    )
    model.compile(
        keras.optimizers.Adam(schedule),
        keras_lipattn.losses.MarginCrossentropy(recipe.radius, recipe.temperature),
        # For logits of constant 1: a forecast, the certificate is computed after training.
        metrics=["accuracy", keras_lipattn.metrics.CertifiedAccuracy(recipe.radius)],
    )
    monitor = keras_lipattn.LipschitzMonitor(
        penalty=_PENALTY.value,
        target={layer.name: _HINGE * _TARGET.value for layer in _attention_layers(model)},
    )
    model.fit(
        images,
        labels,
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,
        validation_data=data.validation,
        # The monitor first: the others read what it writes.
        callbacks=[
            monitor,
            keras.callbacks.CSVLogger(os.fspath(out_dir / "history.csv")),
            _Progress(),
        ],
        # A progress bar on a terminal, else one line per epoch.
        verbose=1 if sys.stdout.isatty() else 2,
    )
    return monitor


def _report(
    model: keras.Model, certificate: keras_lipattn.Certificate, data: ImageData, recipe: Recipe
) -> None:
    images, labels = data.test
    logits = model.predict(images, batch_size=500, verbose=0)
    right = logits.argmax(axis=-1) == labels
    radii = np.where(right, certificate.certified_radius(logits), 0.0)
    print(f"\n{_DATASET.value}: {len(labels)} test images, radii in the 2-norm, pixels in [0, 1]")
    print(f"  test accuracy                     {right.mean():.4f}")
    print(f"  certified Lipschitz constant      {certificate.total:.4g}")
    for layer in _attention_layers(model):
        bound = certificate.row(layer.name).constant
        verdict = "reached" if bound <= _TARGET.value else "MISSED"
        print(f"  {layer.name:32s}  {bound:.4g} (target {_TARGET.value:g}: {verdict})")
    median = float(np.median(radii[right])) if right.any() else 0.0
    print(f"  median certified radius           {median:.4f} (of correctly classified images)")
    for radius in recipe.radii:
        share = float((radii > radius).mean())
        print(f"  certified accuracy at {radius:<4g}        {share:.4f}")
    if certificate.vacuous:
        print(f"  {certificate.vacuous}")


def _serve(saved_model: pathlib.Path, requests: pathlib.Path) -> None:
    program = pathlib.Path(__file__).with_name("serve.py")
    print("\nServed by another process, without Keras and without this package:", flush=True)
    served = subprocess.run(
        [sys.executable, program, saved_model, requests],
        stderr=subprocess.PIPE,
        text=True,
    )
    if served.returncode:
        # Only then: TensorFlow's start-up messages would drown the answers.
        sys.stderr.write(served.stderr)
        raise SystemExit(f"The serving process failed. Received: status {served.returncode}")


if __name__ == "__main__":
    app.run(main)
