"""Trains a classifier of images for a certified radius and records its certified accuracy.

    python examples/certified_images.py --dataset=mnist --goal=small --model=attention --seed=0
    python examples/certified_images.py --dataset=mnist --goal=large --model=perceptron --seed=0

Three models are compared at the same data, loss, budget and seed: a patch Transformer whose
attention has a hard cap (`attention`), the same without attention (`no_attention`), and a
perceptron with orthogonal kernels and as many weights (`perceptron`). `--goal` chooses the radius
that the loss asks for. Reported are the certified accuracy, and the accuracy under attack on the
first --attacked test images. A run adds a line to --record, a file of JSON lines. An interrupted
run continues where it stopped.

`python examples/certified_images.py --table --record=FILE` prints a Markdown table of the record,
and `--plot=IMAGE --record=FILE` draws it.
"""

import collections
import dataclasses
import json
import os
import pathlib
import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging

import keras_lipattn
from image_data import load_images
from keras_lipattn import MaxMin, OrthogonalDense
from patch_transformer import Architecture, patch_transformer

_MODELS = ("attention", "no_attention", "perceptron")
_DATASETS = ("mnist", "fashion_mnist", "cifar10")
_DATASET = flags.DEFINE_enum("dataset", "mnist", _DATASETS, "what to learn")
_GOAL = flags.DEFINE_enum("goal", "small", ["small", "large"], "small or large radii")
_MODEL = flags.DEFINE_enum("model", "attention", _MODELS, "what learns")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the initial weights and the order of the images")
_EPOCHS = flags.DEFINE_integer("epochs", 15, "number of epochs", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 1, "threads of TensorFlow", lower_bound=1)
_ATTACKED = flags.DEFINE_integer("attacked", 1000, "test images to attack; 0 for no attack")
_RECORD = flags.DEFINE_string("record", "build/results/images.jsonl", "file of the results")
_DATA_DIR = flags.DEFINE_string("data_dir", "build/data", "folder of prepared data sets")
_TABLE = flags.DEFINE_bool("table", False, "print the table of the record and train nothing")
_PLOT = flags.DEFINE_string("plot", None, "image to draw the record in; nothing is trained")

_CLASSES = 10
_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Goal:
    """What the loss asks for.

    Attributes:
        radius: Radius of the loss, in the 2-norm, pixels in [0, 1].
        temperature: Factor of the logits in the loss.
        shift: Largest shift of a training image in pixels, along each axis.
    """

    radius: float
    temperature: float
    shift: float


@dataclasses.dataclass(frozen=True)
class Setting:
    """What depends on the data.

    Attributes:
        radii: Where the certified accuracy is reported.
        architecture: The patch Transformer, with attention or without.
        flip: Whether half of the training images are mirrored.
        learning_rate: Largest learning rate.
        goals: A `Goal` by its name.
    """

    radii: tuple[float, ...]
    architecture: Architecture
    flip: bool
    learning_rate: float
    goals: dict[str, Goal]


_ARCHITECTURE = Architecture(patch=7, width=96, head_units=512, head_layers=2, attention_bound=1.0)
_GRAY = Setting(
    radii=(0.3, 0.5, 1.0, 1.58),
    architecture=_ARCHITECTURE,
    flip=False,
    learning_rate=0.03,
    goals={"small": Goal(0.5, 20.0, 1.0), "large": Goal(2.2, 6.0, 0.0)},
)
_COLOR = Setting(
    radii=(36 / 255, 72 / 255, 108 / 255),
    # Color images have more to learn: convolutions before the tokens.
    architecture=dataclasses.replace(
        _ARCHITECTURE, patch=2, width=256, head_layers=1, convolutions=(64, 128)
    ),
    flip=True,
    # More layers in a row.
    learning_rate=0.01,
    goals={"small": Goal(0.3, 10.0, 4.0), "large": Goal(0.8, 6.0, 4.0)},
)
_SETTINGS = {"mnist": _GRAY, "fashion_mnist": _GRAY, "cifar10": _COLOR}


def build(name: str, image_shape: tuple[int, int, int], architecture: Architecture) -> keras.Model:
    """One of the three models, with a constant of 1 at most."""
    if name == "perceptron":
        image = keras.Input(image_shape, name="image")
        x = keras.layers.Flatten()(image)
        for _ in range(4):
            x = MaxMin()(OrthogonalDense(512)(x))
        return keras.Model(image, OrthogonalDense(_CLASSES)(x), name=name)
    architecture = dataclasses.replace(architecture, attention=name == "attention")
    return patch_transformer(image_shape, _CLASSES, architecture)


def training_set(
    images: np.ndarray, classes: np.ndarray, shift: float, flip: bool
) -> tf.data.Dataset:
    """Batches of shuffled images, each shifted at random and mirrored if `flip`."""
    side = images.shape[1]
    move = keras.Sequential(
        [keras.layers.RandomTranslation(shift / side, shift / side, fill_mode="constant")]
        + flip * [keras.layers.RandomFlip("horizontal")]
    )
    data = tf.data.Dataset.from_tensor_slices((images, classes))
    data = data.shuffle(len(images), seed=_SEED.value).batch(_BATCH)
    return data.map(lambda x, y: (move(x, training=True), y)).prefetch(2)


def train(model: keras.Model, data, goal: Goal, setting: Setting, folder: pathlib.Path) -> None:
    # Nothing is chosen by the validation images, so they are learned from.
    both = zip(data.train, data.validation, strict=True)
    images, classes = (np.concatenate(parts) for parts in both)
    steps = _EPOCHS.value * -(-len(images) // _BATCH)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.01 * setting.learning_rate,
        decay_steps=steps - steps // 20,
        warmup_target=setting.learning_rate,
        warmup_steps=steps // 20,
    )
    model.compile(
        keras.optimizers.Adam(schedule),
        keras_lipattn.losses.MarginCrossentropy(goal.radius, goal.temperature),
        metrics=["accuracy"],
    )
    model.fit(
        training_set(images, classes, goal.shift, setting.flip),
        epochs=_EPOCHS.value,
        # `training_set` shuffles.
        shuffle=False,
        callbacks=[keras_lipattn.DurableBackup(folder)],
        verbose=2,
    )


def evaluate(model: keras.Model, images: np.ndarray, classes: np.ndarray, radii) -> dict:
    """Accuracies on the test images, and under attack on the first of them."""
    certificate = keras_lipattn.certify(model)
    found = keras_lipattn.certified_accuracy(model, images, classes, radii, certificate=certificate)
    results = {
        "constant": certificate.total,
        "clean": found.clean,
        "average radius": found.average_radius,
        "median radius": float(np.median(found.certified_radii)),
        "certified": {f"{radius:g}": found.certified(radius) for radius in radii},
    }
    print(found)
    if _ATTACKED.value:
        some = slice(_ATTACKED.value)
        attacked = keras_lipattn.certified_accuracy(
            model,
            images[some],
            classes[some],
            radii,
            certificate=certificate,
            attack=True,
            bounds=(0.0, 1.0),
        )
        print(attacked)
        results["attacked images"] = len(attacked.correct)
        results["under attack"] = {f"{radius:g}": attacked.attacked(radius) for radius in radii}
        results["contradictions"] = attacked.contradictions
    return results


def recorded(record: pathlib.Path) -> dict[tuple[str, str, str, int], list[dict]]:
    """The runs of each data set, goal, model and number of epochs."""
    runs = collections.defaultdict(list)
    for line in record.read_text().splitlines():
        run = json.loads(line)
        runs[run["dataset"], run["goal"], run["model"], run["epochs"]].append(run)
    return runs


def table(record: pathlib.Path) -> str:
    """One table a data set: mean over the seeds of each setting, and half of the range."""
    runs = recorded(record)
    lines = []
    for dataset in sorted({key[0] for key in runs}):
        radii = next(iter(runs[key] for key in runs if key[0] == dataset))[0]["certified"]
        heads = ["data", "goal", "model", "epochs", "seeds", "clean", *radii, "minutes"]
        lines += ["", f"| {' | '.join(heads)} |", len(heads) * "| --- " + "|"]
        for key in sorted(key for key in runs if key[0] == dataset):
            found = runs[key]
            columns = [[run["clean"] for run in found]]
            columns += [[run["certified"][radius] for run in found] for radius in radii]
            shares = [
                f"{100 * np.mean(each):.2f}" + (len(each) > 1) * f" ± {50 * np.ptp(each):.2f}"
                for each in columns
            ]
            minutes = f"{np.mean([run['processor seconds'] for run in found]) / 60:.1f}"
            cells = [*map(str, key), str(len(found)), *shares, minutes]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines[1:])


def plot(record: pathlib.Path, image: str) -> None:
    """Certified accuracy over the radius, one panel a data set."""
    from matplotlib.figure import Figure

    runs = recorded(record)
    datasets = sorted({key[0] for key in runs})
    figure = Figure(figsize=(1.0 + 4.5 * len(datasets), 4.0), layout="constrained")
    colors = {model: f"C{index}" for index, model in enumerate(sorted({key[2] for key in runs}))}
    for place, dataset in enumerate(datasets):
        axes = figure.add_subplot(1, len(datasets), place + 1)
        for (_, goal, model, _), found in sorted(
            item for item in runs.items() if item[0][0] == dataset
        ):
            radii = [float(radius) for radius in found[0]["certified"]]
            shares = np.mean([[run["clean"], *run["certified"].values()] for run in found], axis=0)
            style = {"small": "-", "large": "--"}[goal]
            label = f"{model}, {goal}"
            axes.plot([0.0, *radii], shares, style, color=colors[model], marker=".", label=label)
        axes.set(title=dataset, xlabel="radius, 2-norm, pixels in [0, 1]", ylim=(0.0, 1.0))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="lower left")
    figure.axes[0].set_ylabel("certified accuracy")
    figure.savefig(image, dpi=100)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are understood. Received: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    record = pathlib.Path(_RECORD.value)
    if _TABLE.value or _PLOT.value:
        if _PLOT.value:
            plot(record, _PLOT.value)
        if _TABLE.value:
            print(table(record))
        return
    tf.config.threading.set_intra_op_parallelism_threads(_THREADS.value)
    tf.config.threading.set_inter_op_parallelism_threads(_THREADS.value)
    started, processor = time.monotonic(), time.process_time()
    chosen = _SETTINGS[_DATASET.value]
    goal = chosen.goals[_GOAL.value]
    data = load_images(_DATASET.value, _DATA_DIR.value)
    keras.utils.set_random_seed(_SEED.value)
    model = build(_MODEL.value, data.train[0].shape[1:], chosen.architecture)
    setting = {"dataset": _DATASET.value, "goal": _GOAL.value, "model": _MODEL.value}
    setting |= {"seed": _SEED.value, "epochs": _EPOCHS.value}
    folder = record.parent / "backups" / "-".join(map(str, setting.values()))
    train(model, data, goal, chosen, folder)
    results = setting | dataclasses.asdict(goal) | {"weights": model.count_params()}
    results |= evaluate(model, *data.test, chosen.radii)
    results |= {
        "seconds": round(time.monotonic() - started),
        "processor seconds": round(time.process_time() - processor),
        "threads": _THREADS.value,
    }
    record.parent.mkdir(parents=True, exist_ok=True)
    with open(record, "a") as file:
        file.write(json.dumps(results) + os.linesep)
    print(f"{results['seconds']} s in all; added to {record}")


if __name__ == "__main__":
    app.run(main)
