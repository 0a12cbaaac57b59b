"""Certified classification of real series with padding: which speaker said two vowels.

The Japanese Vowels are 270 and 370 utterances of nine speakers, 12 channels and 7 to 29 steps. The
mask of the valid steps is an input of the model. Three models with a certified constant of at most
1 are compared at the same loss, budget and seeds: a Transformer of two blocks that takes a mean
over all places, with zeros in place of the padding; the same without attention; and the same with a
mean over the valid steps, whose constant is larger. All test series are attacked.

    pip install --no-deps aeon==1.6.0
    python examples/papers/padded_series.py
"""

import time

import keras
import numpy as np
import report
import vowels
from keras import layers, ops

import keras_lipattn as kl

RADII = (0.5, 1.0, 2.0, 3.0)
SPEAKERS, WIDTH = 9, 64
LOSS_RADIUS = 2.0
VARIANTS = ("attention", "no attention", "attention, mean over valid steps")


def build(variant):
    """A classifier of series `(29, 12)` with masks `(29,)`."""
    series = keras.Input((vowels.LENGTH, vowels.CHANNELS), name="series")
    mask = keras.Input((vowels.LENGTH,), dtype="bool", name="mask")
    x = kl.OrthogonalDense(WIDTH)(series)
    x = kl.PositionEmbedding(initializer=keras.initializers.RandomNormal(stddev=0.3))(x)
    for _ in range(2):
        if variant != "no attention":
            attention = kl.L2MultiHeadAttention(4, WIDTH // 4, lipschitz_bound=1.0)
            x = residual(x, attention(x, query_mask=mask))
        y = kl.MaxMin()(kl.OrthogonalDense(2 * WIDTH)(x))
        x = residual(x, kl.OrthogonalDense(WIDTH)(y))
    if variant.endswith("valid steps"):
        x = layers.GlobalAveragePooling1D()(x, mask=mask)
    else:
        x = layers.GlobalAveragePooling1D()(x * ops.cast(mask, x.dtype)[..., None])
    x = kl.MaxMin()(kl.OrthogonalDense(WIDTH)(x))
    return keras.Model([series, mask], kl.OrthogonalDense(SPEAKERS)(x))


def residual(x, branch):
    """A weighted mean of a skip and a branch."""
    return kl.Residual(0.5, trainable_alpha=True)([x, branch])


def train(variant, seed, data, epochs):
    """A trained model. The loss asks for one radius, whatever the constant."""
    series, mask, speakers = data
    keras.utils.set_random_seed(seed)
    model = build(variant)
    total = kl.certify(model).total
    batch = 30
    steps = epochs * -(-len(series) // batch)
    loss = kl.losses.MarginCrossentropy(
        LOSS_RADIUS, temperature=20.0 / (LOSS_RADIUS * total), lipschitz=total
    )
    model.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.02, steps)), loss)
    model.fit([series, mask], speakers, batch_size=batch, epochs=epochs, verbose=0)
    return model


def compute(full):
    """Train each variant for 5 epochs with one seed; in the full setting, 60 epochs, 3 seeds."""
    data = vowels.load()
    series, mask, speakers = data["test"]
    tested = len(series) if full else 40
    results = {"epochs": 60 if full else 5, "radii": RADII, "runs": []}
    for variant in VARIANTS:
        for seed in range(3 if full else 1):
            start = time.process_time()
            model = train(variant, seed, data["train"], results["epochs"])
            trained = time.process_time()
            found = kl.certified_accuracy(
                model,
                [series[:tested], mask[:tested]],
                speakers[:tested],
                RADII,
                attack=True,
            )
            results["runs"].append(
                {
                    "variant": variant,
                    "seed": seed,
                    "constant": found.constant,
                    "clean": found.clean,
                    "average radius": found.average_radius,
                    "certified": [found.certified(radius) for radius in RADII],
                    "under attack": [found.attacked(radius) for radius in RADII],
                    "contradictions": found.contradictions,
                    "processor seconds": trained - start,
                    "processor seconds of the attack": time.process_time() - trained,
                }
            )
    return results


def mean_and_range(values):
    """In percent: the mean, and half of the range if there are several."""
    spread = f" ± {50 * np.ptp(values):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def draw(results, folder):
    """Draw certified accuracy and accuracy under attack over the radius, and write the table."""
    colors = dict(zip(VARIANTS, ("tab:blue", "0.5", "tab:orange"), strict=True))
    fig, axes = report.figure(1)
    radii = [0.0, *results["radii"]]
    rows = []
    for variant in VARIANTS:
        runs = [run for run in results["runs"] if run["variant"] == variant]
        for key, style in (("certified", "-"), ("under attack", ":")):
            curve = np.mean([[run["clean"], *run[key]] for run in runs], axis=0)
            label = variant if key == "certified" else None
            axes[0].plot(radii, curve, style, color=colors[variant], label=label)
        shares = zip(*[[run["clean"], *run["certified"]] for run in runs], strict=True)
        rows.append(
            [
                variant,
                f"{max(run['constant'] for run in runs):.3f}",
                *map(mean_and_range, shares),
                mean_and_range([run["under attack"][1] for run in runs]),
                f"{sum(run['contradictions'] for run in runs)}",
                f"{np.mean([run['processor seconds'] for run in runs]):.0f}",
            ]
        )
    axes[0].set(xlabel="radius, 2-norm of all steps", ylabel="accuracy", ylim=(0, 1))
    axes[0].set_title("solid: certified, dotted: under attack", fontsize=10)
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    report.save(fig, folder, "padded_series")
    header = ["model", "certified constant", "clean"]
    header += [f"certified at {radius:g}" for radius in results["radii"]]
    header += [f"under attack at {results['radii'][1]:g}", "contradictions", "processor seconds"]
    report.table("padded_series", folder, header, rows)


def main(argv=None):
    options = report.arguments(__doc__, argv)
    report.produce("padded_series", options, compute, draw)


if __name__ == "__main__":
    main()
