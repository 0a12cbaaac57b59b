"""Infinitely deep attention: residual networks converge to the flow of an equation.

1. Residual networks of depth k, `x + (time / k) f(x)`, and two methods of higher order, against the
   flow of `dx/dt = f(x)` found by an adaptive solver (DOP853 of SciPy): error and fitted order. The
   branch f is L2 attention, attention and a perceptron, or attention whose weights
   change with depth.
2. Distance of two inputs under the flow, against the certificate: at random inputs, and at a token
   between two groups, where the derivative of attention is largest.

    python examples/papers/continuous_depth.py

Reference:
    Vuckovic, Baratin, Tachet des Combes, "On the regularity of attention", 2021.
"""

# Keras's tensors are TensorFlow's here, which pyright cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false

import itertools

import keras
import numpy as np
import report
import tensorflow as tf
from scipy.integrate import solve_ivp

from keras_lipattn import ContinuousDepth, L2MultiHeadAttention, SpectralDense
from keras_lipattn.bounds import s_star

TOKENS, FEATURES, HEADS = 16, 16, 4
TIME = 1.0
STYLES = {
    "euler": ("residual network (Euler)", "tab:blue"),
    "midpoint": ("midpoint", "tab:orange"),
    "rk4": ("classical Runge-Kutta", "tab:green"),
}
# An odd number of tokens: two equal groups and the one between them.
CRITICAL_TOKENS = 33
TIMES = (0.25, 0.5, 1.0, 1.5, 2.0)


def attention():
    return L2MultiHeadAttention(HEADS, FEATURES // HEADS, dtype="float64")


def perceptron():
    return keras.Sequential(
        [
            attention(),
            SpectralDense(4 * FEATURES, activation="softplus", dtype="float64"),
            SpectralDense(FEATURES, dtype="float64"),
        ]
    )


BRANCHES = {
    "attention": attention,
    "attention, then a perceptron": perceptron,
    "attention, three depths": lambda: [attention() for _ in range(3)],
}


def reference(branch, x, time, decay=0.0):
    """The flow at `time`, by an adaptive solver of order 8."""
    branches = branch if isinstance(branch, list) else [branch]

    @tf.function(autograph=False)
    def images(state):
        return tf.stack([each(state) for each in branches])

    def field(t, flat):
        state = flat.reshape(x.shape)
        place = np.clip(t / time, 0.0, 1.0) * (len(branches) - 1)
        weights = np.maximum(0.0, 1.0 - np.abs(place - np.arange(len(branches))))
        return (
            np.tensordot(weights, images(tf.constant(state)).numpy(), 1) - decay * state
        ).ravel()

    flat = x.ravel()
    # Weights have kinks at the depths of the branches: solve each part separately.
    for start, end in itertools.pairwise(np.linspace(0.0, time, max(2, len(branches)))):
        found = solve_ivp(field, (start, end), flat, "DOP853", rtol=1e-12, atol=1e-13)
        flat = found.y[:, -1]
    return flat.reshape(x.shape)


def convergence(name, depths):
    """Relative errors of each method for each number of steps, against the flow."""
    keras.utils.set_random_seed(0)
    branch = BRANCHES[name]()
    x = np.random.default_rng(0).normal(size=(1, TOKENS, FEATURES))
    exact, curves, bounds = None, {}, {}
    for method in STYLES:
        errors, undone = [], []
        for steps in depths:
            layer = ContinuousDepth(branch, TIME, steps, method, dtype="float64")
            y = layer(x).numpy()
            if exact is None:
                exact = reference(branch, x, TIME)
            errors.append(float(np.linalg.norm(y - exact) / np.linalg.norm(exact)))
            back = layer.reverse(y).numpy()
            undone.append(float(np.linalg.norm(back - x) / np.linalg.norm(x)))
        bounds[method] = layer.lipschitz().value
        bounds["flow"] = layer.flow_lipschitz().value
        curves[method] = {"error": errors, "undone": undone, "order": order(depths, errors)}
    return {"branch": name, "methods": curves, "certified": bounds}


def order(depths, errors):
    """Order fitted over the last three doublings with errors above rounding errors."""
    points = [(k, error) for k, error in zip(depths, errors, strict=True) if error > 1e-12][-4:]
    k, error = np.log(np.array(points)).T
    return float(-np.polyfit(k, error, 1)[0])


def unit_head(tokens, decay, time, steps):
    """One head `softmax_j(-|x_i - x_j|^2) x_j` on scalar tokens, as a flow."""
    head = L2MultiHeadAttention(1, 1, use_bias=False, dtype="float64")
    layer = ContinuousDepth(head, time, steps, decay=decay, dtype="float64")
    layer.build((None, tokens, 1))
    for kernel in (head.query_kernel, head.value_kernel, head.output_kernel):
        kernel.assign(np.ones(kernel.shape))
    return layer


def critical_input(tokens):
    """Scalar tokens, the last at the origin between two groups at the critical distance."""
    x = np.zeros((1, tokens, 1))
    x[0, : tokens // 2] = np.sqrt(s_star(tokens - 1) + 1.5)
    x[0, tokens // 2 : -1] = -x[0, 0]
    return x


def stretch(layer, x):
    """Largest singular value of the derivative of the flow at `x`."""
    # A copy for every entry of the output: one derivative gives all rows.
    copies = tf.constant(np.repeat(x, x.size, axis=0))
    with tf.GradientTape() as tape:
        tape.watch(copies)
        entries = tf.reshape(layer(copies), (x.size, x.size))
        total = tf.linalg.trace(entries)
    return float(np.linalg.norm(tf.reshape(tape.gradient(total, copies), (x.size, x.size)), 2))


def parting(steps_a_unit):
    """Growth of distances: certified, and found at two inputs.

    The decay 1 keeps the two groups in place, which attention alone would drive apart.
    """
    rows = []
    x = critical_input(CRITICAL_TOKENS)
    cloud = np.random.default_rng(0).normal(size=x.shape)
    for time in TIMES:
        layer = unit_head(CRITICAL_TOKENS, 1.0, time, max(4, round(steps_a_unit * time)))
        near = x.copy()
        near[0, -1] += 1e-6
        distance = np.linalg.norm(layer(near).numpy() - layer(x).numpy()) / 1e-6
        rows.append(
            {
                "time": time,
                "flow": layer.flow_lipschitz().value,
                "steps": layer.lipschitz().value,
                "pair": float(distance),
                "critical": stretch(layer, x),
                "cloud": stretch(layer, cloud),
            }
        )
    return rows


def compute(full):
    """Run depths up to 32, or 512 in the full setting."""
    depths = [2**power for power in range(1, 10 if full else 6)]
    return {
        "depths": depths,
        "convergence": [convergence(name, depths) for name in BRANCHES],
        "parting": parting(16 if full else 8),
    }


def draw(results, folder):
    """Draw the plots and write the tables."""
    fig, (left, right) = report.figure(2)
    lines = dict(zip(BRANCHES, ("-", "--", ":"), strict=True))
    for row in results["convergence"]:
        for method, (name, color) in STYLES.items():
            left.loglog(
                results["depths"],
                row["methods"][method]["error"],
                color=color,
                linestyle=lines[row["branch"]],
                label=name if row["branch"] == "attention" else None,
            )
    for name, line in lines.items():
        left.plot([], [], color="0.3", linestyle=line, label=name)
    left.set(xlabel="depth $k$ (steps)", ylabel="relative error", ylim=(1e-21, 3.0))
    left.set_title("Distance to the flow")
    left.legend(frameon=False, fontsize=8)
    rows = results["parting"]
    times = [row["time"] for row in rows]
    for key, label, style in (
        ("flow", "certified, Gronwall", "k--"),
        ("steps", "certified, steps that run", "k+"),
        ("critical", "largest at the critical input", "o-"),
        ("pair", "two inputs, 1e-6 apart", "x"),
        ("cloud", "largest at random tokens", "s-"),
    ):
        right.semilogy(times, [row[key] for row in rows], style, label=label)
    right.set(xlabel="time", ylabel="change of output / change of input")
    right.set_title(f"One head, {CRITICAL_TOKENS} tokens, decay 1")
    right.legend(frameon=False, fontsize=8)
    report.save(fig, folder, "continuous_depth")
    deepest = results["depths"][-1]
    report.table(
        "continuous_depth",
        folder,
        [
            "branch",
            "method",
            "fitted order",
            f"error at depth {deepest}",
            "there and back",
            "certified, steps / flow",
        ],
        [
            [
                row["branch"],
                STYLES[method][0],
                f"{curve['order']:.2f}",
                f"{curve['error'][-1]:.1e}",
                f"{curve['undone'][-1]:.1e}",
                f"{row['certified'][method]:.4g} / {row['certified']['flow']:.4g}",
            ]
            for row in results["convergence"]
            for method, curve in row["methods"].items()
        ],
    )
    report.table(
        "continuous_depth_parting",
        folder,
        [
            "time",
            "certified, flow",
            "certified, steps",
            "found, critical input",
            "found, random tokens",
            "growth found / certified",
        ],
        [
            [
                f"{row['time']:g}",
                f"{row['flow']:.4g}",
                f"{row['steps']:.4g}",
                f"{row['critical']:.4g}",
                f"{row['cloud']:.4g}",
                f"{np.log(row['critical']) / np.log(row['flow']):.2f}",
            ]
            for row in rows
        ],
    )


def main(argv=None):
    options = report.arguments(__doc__, argv)
    report.produce("continuous_depth", options, compute, draw)


if __name__ == "__main__":
    main()
