"""Ways to make a kernel orthonormal, and what `OrthogonalDense` costs."""

import functools
import subprocess
import sys

import keras
import numpy as np
import tensorflow as tf

from keras_lipattn import (
    CenterNormalization,
    L2MultiHeadAttention,
    MaxMin,
    OrthogonalDense,
    Residual,
    SpaceToDepth,
    SpectralDense,
)
from keras_lipattn.linalg.cholesky import orthonormal
from tools.benchmark._program import FLAGS, run
from tools.benchmark._report import Row
from tools.benchmark._rounds import alternate
from tools.benchmark._steps import forward, tokens, training_step
from tools.benchmark.memory import kib_of

CLAIM = (
    "OrthogonalDense takes at most 1.25 times the training step of SpectralDense and as long at "
    "inference once condensed, where there are many more tokens than features (times it takes over "
    "SpectralDense); Cholesky is the cheapest factorization of a kernel (time of it and its "
    "derivative over those of Cholesky)"
)
# (batch, tokens, features, units)
LAYERS = [(64, 64, 96, 192), (64, 64, 256, 256), (256, 1, 512, 512), (256, 1, 1536, 512)]
KERNELS = [(96, 96), (192, 96), (512, 512), (1536, 512)]
POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
STEPS = 1000


def newton_schulz(kernel, iterations=12):
    """Polar factor by the iteration of Bjorck, after the largest row sum bounds the norm by 1."""
    gram = tf.matmul(kernel, kernel, transpose_a=True)
    factor = kernel / tf.sqrt(tf.reduce_max(tf.reduce_sum(tf.abs(gram), axis=0)))
    for _ in range(iterations):
        gram = tf.matmul(factor, factor, transpose_a=True)
        factor = 1.5 * factor - 0.5 * tf.matmul(factor, gram)
    return factor


def cayley(kernel):
    """Transform of Cayley of the skew part of a square block, continued by the other rows."""
    size = kernel.shape[1]
    square, rest = kernel[:size], kernel[size:]
    skew = square - tf.transpose(square) + tf.matmul(rest, rest, transpose_a=True)
    inverse = tf.linalg.inv(tf.eye(size) + skew)
    return tf.concat([2.0 * inverse - tf.eye(size), -2.0 * tf.matmul(rest, inverse)], axis=0)


def reflectors(kernel, block=32):
    """Product of a Householder reflection for each column, in blocks of the form I - Y T^-1 Y^T."""
    rows, columns = kernel.shape
    factor = tf.eye(rows, columns)
    for start in reversed(range(0, columns, block)):
        unit = tf.linalg.normalize(kernel[:, start : start + block], axis=0)[0]
        products = tf.matmul(unit, unit, transpose_a=True)
        upper = tf.linalg.band_part(products, 0, -1) - 0.5 * tf.eye(unit.shape[1])
        inner = tf.matmul(unit, factor, transpose_a=True)
        factor -= tf.matmul(unit, tf.linalg.triangular_solve(upper, inner, lower=False))
    return factor


METHODS = {
    "Cholesky": orthonormal,
    "Cholesky, two passes": functools.partial(orthonormal, passes=2),
    "Newton-Schulz": newton_schulz,
    "Cayley": cayley,
    "block reflectors": reflectors,
}


def measure():
    return [*_layers(), _classifier(), *_after_training(), *_kernels()]


def _layers():
    rows = []
    for shape in LAYERS[:2] if FLAGS.quick else LAYERS:
        batch, length, features, units = shape
        x = tokens(batch, length, features)
        layers = {"spectral": SpectralDense(units), "orthogonal": OrthogonalDense(units)}
        steps = {name: training_step(layer, x) for name, layer in layers.items()}
        training = alternate(steps, rounds=FLAGS.rounds)
        calls = {name: forward(layer, x, fold=True) for name, layer in layers.items()}
        condensed = alternate(calls, rounds=FLAGS.rounds)
        pair = ("orthogonal", "spectral")
        rows += [
            Row.ratio(f"{shape} training step", training, *pair, at_most=1.25),
            Row.ratio(f"{shape} inference, condensed", condensed, *pair, at_most=1.05),
        ]
    return rows


def _classifier():
    """The training step of a whole classifier of small images, with all dense layers of a kind."""
    images = tf.random.stateless_normal((256, 28, 28, 1), (0, 0))
    kinds = {"spectral": SpectralDense, "orthogonal": OrthogonalDense}
    steps = {name: training_step(_model(kind), images) for name, kind in kinds.items()}
    times = alternate(steps, rounds=FLAGS.rounds)
    return Row.ratio(
        "classifier of width 96, head 512, batch 256: training step",
        times,
        "orthogonal",
        "spectral",
        at_most=1.25,
    )


def _model(dense):
    inputs = keras.Input((28, 28, 1))
    x = dense(96)(SpaceToDepth(7)(inputs))
    for _ in range(2):
        x = CenterNormalization()(x)
        grid = keras.layers.Reshape((16, 96))(x)
        grid = L2MultiHeadAttention(4, 24, spectral_norm=1.0)(grid)
        x = Residual(0.5)([x, keras.layers.Reshape((4, 4, 96))(grid)])
        x = Residual(0.5)([x, dense(96)(MaxMin()(dense(192)(x)))])
    x = keras.layers.Flatten()(x)
    for _ in range(2):
        x = MaxMin()(dense(512)(x))
    return keras.Model(inputs, dense(10)(x))


def _after_training():
    """Largest distance of a singular value from 1 in the kernel that runs, after training."""
    rows = []
    for policy in POLICIES:
        layer = trained(policy, 50 if FLAGS.quick else STEPS)
        kernel = layer.host_weights().weights().output.astype(np.float64)
        values = np.linalg.svd(kernel, compute_uv=False)
        rows.append(
            Row(
                f"singular values after {STEPS} steps, {policy}",
                float(np.abs(values - 1.0).max()),
                "",
                at_most=1e-6,
                details={"condition number of the weight": _condition(layer)},
            )
        )
    return rows


def trained(policy, steps):
    """An `OrthogonalDense` after `steps` steps of Adam towards random targets."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((256, 96)), rng.standard_normal((256, 64))
    layer = OrthogonalDense(64, dtype=policy)
    model = keras.Sequential([keras.Input((96,)), layer])
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    model.fit(x, y, batch_size=64, epochs=-(-steps // 4), verbose=0)
    return layer


def _condition(layer):
    return float(np.linalg.cond(np.asarray(layer.kernel, np.float64)))


def _kernels():
    rows = []
    for shape in KERNELS[:2] if FLAGS.quick else KERNELS:
        # Like a kernel in training: condition 10.
        rng = np.random.default_rng(0)
        left, _ = np.linalg.qr(rng.standard_normal(shape))
        right, _ = np.linalg.qr(rng.standard_normal((shape[1],) * 2))
        kernel = tf.constant(left * np.geomspace(1.0, 10.0, shape[1]) @ right, tf.float32)
        steps = {name: _derivative(method, kernel) for name, method in METHODS.items()}
        times = alternate(steps, rounds=FLAGS.rounds)
        for name, method in METHODS.items():
            values = np.linalg.svd(np.asarray(method(kernel), np.float64), compute_uv=False)
            row = Row.ratio(f"{shape} {name}", times, name, "Cholesky")
            row.details["largest error of a singular value"] = float(np.abs(values - 1.0).max())
            if not FLAGS.quick:
                row.details["MiB"] = _peak(name, shape)
            rows.append(row)
    return rows


def _derivative(method, kernel):
    """Function that runs a method and its derivative."""

    @tf.function(autograph=False)
    def step(kernel):
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            loss = tf.reduce_sum(method(kernel) * kernel)
        return tape.gradient(loss, kernel)

    concrete = step.get_concrete_function(kernel)
    return lambda: concrete(kernel)


def _peak(name, shape):
    """MiB that steps take above what the process takes at rest."""
    code = f"from tools.benchmark import orthogonal_kernels as o; o.report_peak({name!r}, {shape})"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    return float(output.stdout.split()[-1])


def report_peak(name, shape):
    step = _derivative(METHODS[name], tf.random.stateless_normal(shape, (0, 0)))
    at_rest = kib_of("/proc/self/status", "VmRSS")
    for _ in range(3):
        step()
    print((kib_of("/proc/self/status", "VmHWM") - at_rest) / 1024.0)


if __name__ == "__main__":
    run("orthogonal_kernels", CLAIM, measure)
