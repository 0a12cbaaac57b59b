"""Inverting attention: reconstruction error, steps of the iteration, log-determinants.

Three experiments with `keras_lipattn.InvertibleResidual`:

    curves   the error of `x_{k+1} = y - (layer(x_k) - x_k)` for dot-product attention
             `x + c f(x)` and for L2 attention `x + c f(x) / bound`, c = 0.5, 0.7, 0.9
    stacks   an invertible Transformer of 8 blocks, N = 64 tokens of D = 64 features, float32:
             reconstruction error and number of steps, plain and with Anderson acceleration,
             c = 0.5, 0.7, 0.9, 0.99
    log-det  1000 draws of the random log-determinants against the exact one

    python examples/papers/invertible.py

Reference:
    Kim, Papamakarios, Mnih, "The Lipschitz constant of self-attention", ICML 2021, Section 5.2.
"""

import time

import keras
import numpy as np
import report
import tensorflow as tf

from keras_lipattn import (
    InvertibleResidual,
    InvertibleSequential,
    L2MultiHeadAttention,
    SpectralDense,
)
from keras_lipattn.bounds import s_star

TOKENS = FEATURES = 64
BLOCKS = 8
HEADS = 8
COEFFICIENTS = (0.5, 0.7, 0.9)
STACK_COEFFICIENTS = (*COEFFICIENTS, 0.99)
# Factors of the standard deviation of Glorot's initializer.
GAINS = (1.0, 2.0)
ITERATIONS = 40
# The shortest time of these calls is reported.
REPETITIONS = 10
DRAWS = 1000


def inputs(count, tokens=TOKENS, features=FEATURES):
    """Standard normal tokens."""
    return np.random.default_rng(0).normal(size=(count, tokens, features)).astype("float32")


def initializer(gain):
    """Glorot's uniform initializer, times `gain`."""
    return keras.initializers.VarianceScaling(gain**2, "fan_avg", "uniform", seed=1)


def errors_of_iteration(term, x):
    """Largest error after each step of `x <- y - term(x)`, from `x = y`."""
    y = x + term(x)
    errors, estimate = [], y
    for _ in range(ITERATIONS):
        errors.append(float(np.abs(np.asarray(estimate) - x).max()))
        estimate = y - term(estimate)
    # A curve ends where the error overflows.
    return [error if np.isfinite(error) else None for error in errors]


def curves():
    """Errors of the iteration, for both kinds of attention."""
    x = inputs(4)
    result = []
    for gain in GAINS:
        dot_product = keras.layers.MultiHeadAttention(
            HEADS, FEATURES // HEADS, kernel_initializer=initializer(gain)
        )
        for coefficient in COEFFICIENTS:
            l2 = L2MultiHeadAttention(
                HEADS, FEATURES // HEADS, kernel_initializer=initializer(gain)
            )
            block = InvertibleResidual(l2, coefficient)
            terms = {
                "dot-product": lambda x, c=coefficient, f=dot_product: c * f(x, x),
                "L2": lambda x, f=block: f(x) - x,
            }
            for name, term in terms.items():
                errors = errors_of_iteration(term, x)
                case = f"weights x {gain:g}"
                result.append(
                    {"attention": name, "case": case, "coefficient": coefficient, "error": errors}
                )
    x = critical_input()
    for coefficient in COEFFICIENTS:
        block = InvertibleResidual(*critical_branches(0, x), coefficient)
        errors = errors_of_iteration(lambda x, f=block: f(x) - x, x)
        result.append(
            {
                "attention": "L2",
                "case": "critical input",
                "coefficient": coefficient,
                "error": errors,
            }
        )
    return result


def random_branches(index, x):
    """Attention and a perceptron with the default initializers."""
    perceptron = keras.Sequential(
        [
            SpectralDense(2 * FEATURES, activation="relu", spectral_norm=None),
            SpectralDense(FEATURES, spectral_norm=None),
        ]
    )
    return L2MultiHeadAttention(HEADS, FEATURES // HEADS), perceptron


def convex_branches(index, x):
    """Random attention, and a perceptron that is the gradient of a convex function.

    It is `W^T relu(W x)` with orthogonal `W`, so its derivatives are close to its constant.
    """
    attention, perceptron = random_branches(index, x)
    perceptron.build(x.shape)
    kernel = keras.initializers.Orthogonal(seed=index)((FEATURES, 2 * FEATURES))
    perceptron.layers[0].kernel.assign(kernel)
    perceptron.layers[1].kernel.assign(keras.ops.transpose(kernel))
    return attention, perceptron


def critical_branches(index, x):
    """Attention of one head of identity weights, scaled so that the input `x` is critical."""
    attention = L2MultiHeadAttention(1, FEATURES)
    attention.build(x.shape)
    scale = np.sqrt(s_star(TOKENS - 2) + 1.5) / np.abs(x[..., 0]).max()
    identity = np.eye(FEATURES)
    attention.query_kernel.assign(scale * FEATURES**0.25 * identity[:, None])
    attention.value_kernel.assign(identity[:, None])
    attention.output_kernel.assign(identity[None] / scale**2)
    return (attention,)


def critical_input():
    """Two groups of tokens around a central one, where the derivative of a head is largest.

    The last token is far from all others.
    """
    x = np.zeros((1, TOKENS, FEATURES), "float32")
    x[0, 2::2, 0], x[0, 1:-1:2, 0] = -1.0, 1.0
    x[0, 0, 0], x[0, -1, 1] = 0.01, 8.0
    return x


STACKS = {
    "random weights": (random_branches, lambda: inputs(1)),
    "perceptrons that use their constant": (convex_branches, lambda: inputs(1)),
    "attention at its critical input": (critical_branches, critical_input),
}


def stack(branches, x, coefficient):
    """An invertible Transformer of 8 blocks, and its output for `x`."""
    layers = []
    for index in range(BLOCKS):
        for branch in branches(index, x):
            layers.append(InvertibleResidual(branch, coefficient))
            x = np.asarray(layers[-1](x))
    return InvertibleSequential(layers), x


def reconstructions(coefficients):
    """Errors and steps of the inverses of stacks."""
    result = []
    for name, (branches, make) in STACKS.items():
        for coefficient in coefficients:
            x = make()
            model, y = stack(branches, x, coefficient)
            model.build(x.shape)
            row = {"stack": name, "coefficient": coefficient}
            for acceleration in ("plain", "anderson"):
                invert = tf.function(model.inverse, autograph=False)
                found, seconds = invert(y, acceleration=acceleration), []
                for _ in range(REPETITIONS):
                    start = time.perf_counter()
                    invert(y, acceleration=acceleration).solution.numpy()
                    seconds.append(time.perf_counter() - start)
                row[acceleration] = {
                    "error": float(np.abs(found.solution.numpy() - x).max()),
                    "steps": int(found.steps[0]),
                    "converged": bool(found.converged[0]),
                    "seconds": min(seconds),
                }
            result.append(row)
    return result


def draws(model, x, options):
    """Independent draws of a random log-determinant, `(DRAWS,)`."""

    @tf.function(autograph=False)
    def run():
        return tf.map_fn(
            lambda _: model.log_det_jacobian(x, **options).value[0],
            tf.range(DRAWS),
            fn_output_signature=tf.float32,
            parallel_iterations=1,
        )

    return run().numpy()


def log_determinants():
    """Means and standard deviations of random log-determinants, and the exact one."""
    keras.utils.set_random_seed(0)
    x = inputs(1, 6, 4)
    attention = L2MultiHeadAttention(2, 2)
    dense = SpectralDense(4, kernel_initializer="orthogonal", activation="tanh", spectral_norm=None)
    model = InvertibleSequential(
        [InvertibleResidual(branch, 0.9, seed=3) for branch in (attention, dense)]
    )
    model(x)
    exact = float(model.log_det_jacobian(x).value[0])
    settings = {
        "series of 10 terms, one probe": dict(method="series", num_terms=10, num_probes=1),
        "series of 60 terms, one probe": dict(method="series", num_terms=60, num_probes=1),
        "roulette, one probe": dict(method="roulette"),
        "roulette, 8 probes": dict(method="roulette", num_probes=8),
    }
    rows = []
    for name, options in settings.items():
        values = draws(model, tf.constant(x), options).astype(np.float64)
        found = model.log_det_jacobian(x, **options)
        rows.append(
            {
                "method": name,
                "mean": values.mean(),
                "spread": values.std(ddof=1),
                "standard_errors": (values.mean() - exact) / (values.std(ddof=1) / DRAWS**0.5),
                "truncation_error": float(found.truncation_error[0]),
            }
        )
    return {"exact": exact, "draws": DRAWS, "methods": rows}


def compute(full):
    """Run all three experiments; the small setting has one coefficient for the stacks."""
    keras.utils.set_random_seed(0)
    return {
        "curves": curves(),
        "stacks": reconstructions(STACK_COEFFICIENTS if full else COEFFICIENTS[-1:]),
        "log_det": log_determinants(),
    }


def draw(results, folder):
    """Draw the curves and write the tables of the stacks and of the log-determinants."""
    fig, axes = report.figure(2)
    lines = {"weights x 1": "-", "weights x 2": "--", "critical input": ":"}
    colors = dict(zip(COEFFICIENTS, ("tab:green", "tab:orange", "tab:red"), strict=True))
    for axis, attention in zip(axes, ("dot-product", "L2"), strict=True):
        for curve in results["curves"]:
            if curve["attention"] != attention:
                continue
            error = [np.nan if value is None else value for value in curve["error"]]
            axis.semilogy(
                range(len(error)),
                error,
                color=colors[curve["coefficient"]],
                linestyle=lines[curve["case"]],
                label=f"c = {curve['coefficient']}, {curve['case']}",
            )
        axis.set(title=f"{attention} attention", xlabel="step of the iteration", ylim=(1e-7, 1e7))
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("largest error of the inverse")
    report.save(fig, folder, "invertible")
    rows = []
    for row in results["stacks"]:
        plain, anderson = row["plain"], row["anderson"]
        rows.append(
            [
                row["stack"],
                f"{row['coefficient']}",
                f"{plain['steps']}",
                f"{anderson['steps']}",
                f"{plain['steps'] / anderson['steps']:.1f}x",
                f"{plain['error']:.1e}",
                f"{anderson['error']:.1e}",
                f"{1e3 * plain['seconds']:.0f} / {1e3 * anderson['seconds']:.0f}",
            ]
        )
    header = ["8 blocks", "c", "plain steps", "Anderson steps", "fewer", "plain error"]
    header += ["Anderson error", "milliseconds, plain / Anderson"]
    report.table("invertible_stacks", folder, header, rows)
    log_det = results["log_det"]
    rows = [["exact", f"{log_det['exact']:.5f}", "", "", "0"]]
    for row in log_det["methods"]:
        rows.append(
            [
                row["method"],
                f"{row['mean']:.5f}",
                f"{row['spread']:.3f}",
                f"{row['standard_errors']:+.2f}",
                f"{row['truncation_error']:.2g}",
            ]
        )
    header = [f"log-determinant, {log_det['draws']} draws", "mean", "standard deviation of a draw"]
    header += ["error of the mean / its standard error", "certified truncation error"]
    report.table("invertible_log_det", folder, header, rows)


def main(argv=None):
    options = report.arguments(__doc__, argv)
    report.produce("invertible", options, compute, draw)


if __name__ == "__main__":
    main()
