"""A normalizing flow of invertible attention on real series with padding: Japanese Vowels.

The flow maps a series `x` of 12 channels and 7 to 29 steps to `z`, and its density is

    log p(x) = log normal(z) + log |det dz/dx|

with an invertible Transformer of `keras_lipattn.InvertibleResidual` layers, trained by the unbiased
Russian-roulette log-determinant, evaluated by the exact one. Variants: perceptrons alone, which
treat every step separately, and with attention between steps, scaled by the published bound or by
that of this package. Inverses use Anderson acceleration.

    pip install --no-deps aeon==1.6.0
    python examples/papers/density.py

Reference:
    Chen, Behrmann, Duvenaud, Jacobsen, "Residual flows for invertible generative modeling",
    NeurIPS 2019; Kim, Papamakarios, Mnih, "The Lipschitz constant of self-attention", ICML 2021.
"""

import math
import time

import keras
import numpy as np
import report
import tensorflow as tf
import vowels
from keras import ops

from keras_lipattn import (
    InvertibleResidual,
    InvertibleSequential,
    L2MultiHeadAttention,
    PositionEmbedding,
    SpectralDense,
)
from keras_lipattn.bounds import published_head_bound, unit_head_bound

BLOCKS = 4
COEFFICIENT = 0.95
BATCH = 54
LOG_2 = math.log(2.0)
VARIANTS = ("no attention", "attention, published bound", "attention, our bound")


class Flow(keras.layers.Layer):
    """An invertible Transformer, followed by a normal distribution of learned scale."""

    def __init__(self, variant, seed):
        super().__init__()
        ours = unit_head_bound(vowels.LENGTH).value
        factor = ours / published_head_bound(vowels.LENGTH) if "published" in variant else 1.0
        layers = []
        for index in range(BLOCKS):
            if variant != "no attention":
                attention = keras.Sequential(
                    [PositionEmbedding(vowels.LENGTH), L2MultiHeadAttention(4, 6)]
                )
                # The published bound would scale the same branch by this coefficient.
                coefficient = COEFFICIENT * factor
                layers.append(InvertibleResidual(attention, coefficient, seed=seed + index))
            perceptron = keras.Sequential(
                [
                    SpectralDense(64, activation="silu", spectral_norm=None),
                    SpectralDense(vowels.CHANNELS, spectral_norm=None),
                ]
            )
            layers.append(InvertibleResidual(perceptron, COEFFICIENT, seed=seed + index))
        self.transform = InvertibleSequential(layers)

    def build(self, input_shape):
        self.transform.build(input_shape)
        shape = (vowels.CHANNELS,)
        self.mean = self.add_weight(name="mean", shape=shape, initializer="zeros")
        self.log_scale = self.add_weight(name="log_scale", shape=shape, initializer="zeros")

    def log_density(self, x, mask, **options):
        """Log-density of each series in nats, `(B,)`."""
        z = self.transform(x, mask=mask)
        normal = (z - self.mean) * ops.exp(-ops.convert_to_tensor(self.log_scale))
        entries = -0.5 * (normal**2 + math.log(2.0 * math.pi)) - self.log_scale
        entries = ops.where(mask[..., None], entries, 0.0)
        volume = self.transform.log_det_jacobian(x, mask, **options).value
        return ops.sum(entries, axis=(1, 2)) + volume

    def sample(self, mask, seed):
        """Normal noise for the lengths in `mask`, and the `Inversion` that maps it to series."""
        normal = keras.random.normal((*mask.shape, vowels.CHANNELS), seed=seed)
        z = self.mean + ops.exp(ops.convert_to_tensor(self.log_scale)) * normal
        z = ops.where(mask[..., None], z, 0.0)
        return z, self.transform.inverse(z, mask, acceleration="anderson")


def bits_per_dimension(flow, series, mask, **options):
    """Mean over all entries, batch by batch."""
    compiled = tf.function(lambda x, m: flow.log_density(x, m, **options), autograph=False)
    total = 0.0
    for start in range(0, len(series), 10):
        x, m = series[start : start + 10], mask[start : start + 10]
        total += float(ops.sum(compiled(tf.constant(x), tf.constant(m))))
    return -total / (mask.sum() * vowels.CHANNELS * LOG_2)


def gaussian_bits(data, full_covariance):
    """Test bits per dimension of one normal distribution of all steps, fitted to the training."""
    train, test = (series[mask].astype(np.float64) for series, mask, _ in data.values())
    centered = test - train.mean(axis=0)
    covariance = np.cov(train.T)
    if not full_covariance:
        covariance = np.diag(np.diag(covariance))
    distances = np.einsum("ni,ij,nj->n", centered, np.linalg.inv(covariance), centered)
    volume = np.linalg.slogdet(2.0 * np.pi * covariance)[1]
    return float(0.5 * (distances.mean() + volume) / (vowels.CHANNELS * LOG_2))


def train(variant, seed, data, epochs):
    """A trained flow and its training curve in bits per dimension."""
    keras.utils.set_random_seed(seed)
    series, mask, _ = data["train"]
    flow = Flow(variant, seed)
    flow.build((None, vowels.LENGTH, vowels.CHANNELS))
    steps = epochs * (len(series) // BATCH)
    rate = keras.optimizers.schedules.CosineDecay(0.003, steps)
    optimizer = keras.optimizers.Adam(rate, clipnorm=1.0)
    optimizer.build(flow.trainable_variables)

    def step(x, m):
        with tf.GradientTape() as tape:
            density = ops.sum(flow.log_density(x, m, method="roulette"))
            dimensions = ops.sum(ops.cast(m, "float32")) * vowels.CHANNELS * LOG_2
            loss = -density / dimensions
        gradients = tape.gradient(loss, flow.trainable_variables)
        optimizer.apply(gradients, flow.trainable_variables)
        return loss

    compiled = tf.function(step, autograph=False)
    rng, curve = np.random.default_rng(seed), []
    for _ in range(epochs):
        order = rng.permutation(len(series)).reshape(-1, BATCH)
        losses = [compiled(tf.constant(series[rows]), tf.constant(mask[rows])) for rows in order]
        curve.append(float(np.mean(losses)))
    return flow, curve


def compute(full):
    """Train all variants for 10 epochs with one seed; in the full setting, 100 epochs, 3 seeds."""
    data = vowels.load()
    series, mask, _ = data["test"]
    results = {
        "epochs": 100 if full else 10,
        "gaussian": {
            "one variance a channel": gaussian_bits(data, False),
            "full covariance": gaussian_bits(data, True),
        },
        "variants": [],
    }
    # The small setting evaluates a part of the test series.
    tested = len(series) if full else 50
    for variant in VARIANTS:
        for seed in range(3 if full else 1):
            start = time.monotonic()
            flow, curve = train(variant, seed, data, results["epochs"])
            bits = bits_per_dimension(flow, series[:tested], mask[:tested])
            z, found = flow.sample(mask[:8], seed)
            back = flow.transform(found.solution, mask=mask[:8])
            again = flow.transform.inverse(
                flow.transform(series[:8], mask=mask[:8]), mask[:8], acceleration="anderson"
            )
            results["variants"].append(
                {
                    "variant": variant,
                    "seed": seed,
                    "curve": curve,
                    "test_bits": bits,
                    "error_of_forward": float(ops.max(ops.abs(back - z))),
                    "error_of_inverse": float(ops.max(ops.abs(again.solution - series[:8]))),
                    "steps": int(ops.max(again.steps)),
                    "seconds": time.monotonic() - start,
                    "samples": np.asarray(found.solution)[:4, :, :3].tolist() if seed == 0 else [],
                }
            )
    results["real"] = series[:4, :, :3].tolist()
    results["lengths"] = mask[:4].sum(axis=1).tolist()
    return results


def draw(results, folder):
    """Draw the learning curves and real and sampled series, and write the table."""
    colors = dict(zip(VARIANTS, ("0.5", "tab:orange", "tab:blue"), strict=True))
    fig, axes = report.figure(3)
    for run in results["variants"]:
        axes[0].plot(
            run["curve"],
            color=colors[run["variant"]],
            linewidth=1,
            label=run["variant"] if run["seed"] == 0 else None,
        )
    axes[0].set(xlabel="epoch", ylabel="training bits per dimension", title="Learning curves")
    axes[0].legend(frameon=False, fontsize=8)
    sampled = [run["samples"] for run in results["variants"] if run["seed"] == 0][-1]
    for axis, series, title in (
        (axes[1], results["real"], "Two real series"),
        (axes[2], sampled, f"Two samples: {VARIANTS[-1]}"),
    ):
        for index, line in enumerate(("-", "--")):
            length = results["lengths"][index]
            for channel, color in enumerate(("tab:red", "tab:green", "tab:purple")):
                values = [step[channel] for step in series[index][:length]]
                axis.plot(values, color=color, linestyle=line, linewidth=1)
        axis.set(xlabel="step", ylim=(-4, 4), title=f"{title}, first three channels")
    report.save(fig, folder, "density")
    rows = [
        [f"normal, {name}", "", f"{bits:.3f}", "", "", ""]
        for name, bits in results["gaussian"].items()
    ]
    for variant in VARIANTS:
        runs = [run for run in results["variants"] if run["variant"] == variant]
        bits = [run["test_bits"] for run in runs]
        spread = f" +- {np.std(bits, ddof=1):.3f}" if len(bits) > 1 else ""
        rows.append(
            [
                f"flow, {variant}",
                f"{np.mean([run['curve'][-1] for run in runs]):.3f}",
                f"{np.mean(bits):.3f}{spread}",
                f"{max(run['error_of_inverse'] for run in runs):.1e}",
                f"{max(run['error_of_forward'] for run in runs):.1e}",
                f"{max(run['steps'] for run in runs)}",
            ]
        )
    header = ["model", "training bits per dimension", "test bits per dimension"]
    header += ["inverse after forward", "forward after inverse", "steps"]
    report.table("density", folder, header, rows)


def main(argv=None):
    options = report.arguments(__doc__, argv)
    report.produce("density", options, compute, draw)


if __name__ == "__main__":
    main()
