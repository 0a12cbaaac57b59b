"""Random models that `certify` has rules for, from a seed and an index."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

import keras_lipattn
from tools.soundness.rules.subjects import relative_biases

_ACTIVATIONS = ["relu", "tanh", "sigmoid", "gelu", "silu", "elu", "softplus", "leaky_relu"]


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A random model with what is needed to certify and attack it.

    Args:
        model: the model to certify.
        twin: the same weights in float64, to attack.
        points: inputs, `(B, ...)` float64.
        input_radius: of the certificate, or `None`.
    """

    model: keras.Model
    twin: keras.Model
    points: np.ndarray
    input_radius: float | None


def random_subject(seed: int, index: int) -> Subject:
    """Model number `index` of this seed."""
    rng = np.random.default_rng((seed, index))
    dtype = str(rng.choice(["float64", "float64", "float32"]))
    radius = float(rng.uniform(0.5, 4.0)) if rng.random() < 0.4 else None
    tokens, width = (int(size) for size in rng.integers(2, 6, size=2))
    shape = (tokens, width) if rng.random() < 0.85 else (width,)
    plan = int(rng.integers(2**32))
    keras.utils.set_random_seed(plan)
    model = _build(shape, plan, dtype, radius)
    _randomize(model, rng)
    if rng.random() < 0.15 and model.trainable_weights:
        _train(model, rng)
    twin = model
    if dtype != "float64":
        twin = _build(shape, plan, "float64", radius)
        twin.set_weights(model.get_weights())
    points = rng.normal(size=(4, *shape))
    if len(shape) == 2:
        # A token between two clusters of other tokens, where one head of attention is steepest.
        direction = rng.normal(size=shape[1])
        sides = np.where(np.arange(tokens) % 2, 1.0, -1.0) * (np.arange(tokens) > 0)
        cluster = np.outer(sides, 1.3 * direction / np.linalg.norm(direction))
        # Perturbed: at ties, gradients of maxima and minima are not directional derivatives.
        points[0] = cluster + 1e-3 * points[0]
    points *= 10.0 ** rng.uniform(-1.0, 0.7)
    if radius is not None:
        sizes = np.linalg.norm(points, axis=-1, keepdims=True)
        points = points * np.minimum(1.0, radius / np.maximum(sizes, 1e-300))
    return Subject(model, twin, points, radius)


def _build(shape, plan, dtype, radius) -> keras.Model:
    """The model of a plan: the same one for every dtype, apart from the weights."""
    rng = np.random.default_rng(plan)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        inputs = x = keras.Input(shape, dtype=dtype)
        for _ in range(rng.integers(1, 6)):
            x = _stage(rng, x, radius)
        if rng.random() < 0.3:
            x = layers.Flatten()(x)
            x = layers.Dense(3)(x)
        return keras.Model(inputs, x)
    finally:
        keras.config.set_dtype_policy(before)


def _stage(rng, x, radius):
    """A layer, or a layer in a residual branch."""
    y = _layer(rng, x, radius)
    kind = rng.choice(["plain", "residual", "concatenate"], p=[0.6, 0.25, 0.15])
    if kind == "residual" and y.shape == x.shape:
        alpha = None if rng.random() < 0.5 else float(rng.random())
        return keras_lipattn.Residual(alpha)([x, y])
    if kind == "concatenate" and y.shape[:-1] == x.shape[:-1] and y.shape[-1] + x.shape[-1] < 10:
        return layers.Concatenate()([x, y])
    return y


def _layer(rng, x, radius):
    """One layer that takes this tensor."""
    choices: list[Callable[..., Any]] = [
        _dense,
        _spectral_dense,
        _orthogonal_dense,
        _normalized_dense,
        _activation,
        _max_min,
        _half_abs,
        _center_normalization,
        _layer_normalization,
        _unit_normalization,
        _token_projection,
        _reshape,
    ]
    if len(x.shape) == 3:
        # Attention is more frequent than other layers.
        choices += [_l2_attention] * 4
        choices += [_bounded_attention] * 2
        choices += [_einsum_dense, _convolution, _pooling, _position_embedding, _permute]
        choices += [_normalized_attention, _space_to_depth, _norm_pooling]
        if radius is not None:
            choices.append(_attention)
    return choices[rng.integers(len(choices))](rng, x)


def _dense(rng, x):
    activation = str(rng.choice(_ACTIVATIONS)) if rng.random() < 0.4 else None
    return layers.Dense(int(rng.integers(1, 6)), activation=activation)(x)


def _spectral_dense(rng, x):
    cap = float(rng.choice([0.5, 1.0, 2.0]))
    return keras_lipattn.SpectralDense(int(rng.integers(1, 6)), spectral_norm=cap)(x)


def _orthogonal_dense(rng, x):
    return keras_lipattn.OrthogonalDense(int(rng.integers(1, 6)))(x)


def _normalized_dense(rng, x):
    return keras_lipattn.NormalizedDense(int(rng.integers(1, 6)))(x)


def _activation(rng, x):
    return layers.Activation(str(rng.choice([*_ACTIVATIONS, "softmax"])))(x)


def _max_min(rng, x):
    return keras_lipattn.MaxMin()(x if x.shape[-1] % 2 == 0 else layers.Dense(4)(x))


def _half_abs(rng, x):
    return keras_lipattn.HalfAbs()(x if x.shape[-1] % 2 == 0 else layers.Dense(4)(x))


def _space_to_depth(rng, x):
    return keras_lipattn.SpaceToDepth(2 if x.shape[1] % 2 == 0 else 1)(x)


def _norm_pooling(rng, x):
    return keras_lipattn.NormPooling(2 if x.shape[1] % 2 == 0 else None)(x)


def _center_normalization(rng, x):
    # With one feature its output is zero.
    return keras_lipattn.CenterNormalization()(x if x.shape[-1] > 1 else layers.Dense(4)(x))


def _layer_normalization(rng, x):
    make = layers.LayerNormalization if rng.random() < 0.5 else layers.RMSNormalization
    return make(epsilon=float(rng.choice([1e-3, 0.1, 1.0])))(x)


def _unit_normalization(rng, x):
    return layers.UnitNormalization()(x)


def _reshape(rng, x):
    size = int(np.prod(x.shape[1:]))
    widths = [width for width in range(1, 7) if size % width == 0]
    width = int(rng.choice(widths))
    return layers.Reshape((size // width, width))(x) if size // width <= 12 else x


def _token_projection(rng, x):
    return keras_lipattn.TokenProjection(float(10.0 ** rng.uniform(-1.0, 1.0)))(x)


def _bounded_attention(rng, x):
    heads = int(rng.integers(1, 4))
    options: dict[str, Any] = {"token_radius": float(10.0 ** rng.uniform(-0.7, 0.5))}
    cap = rng.random()
    if cap < 0.2:
        options["spectral_norm"] = float(rng.choice([0.5, 1.0, 2.0]))
    elif cap < 0.5:
        options["lipschitz_bound"] = float(rng.choice([0.5, 1.0, 4.0]))
        options["lipschitz_norm"] = str(rng.choice(["l2", "token", "linf"]))
    if rng.random() < 0.3:
        options["num_key_value_heads"] = 1
    if rng.random() < 0.3:
        options["max_relative_position"] = int(rng.integers(1, x.shape[1] + 1))
    if rng.random() < 0.3:
        options["value_dim"] = int(rng.integers(1, 4))
    layer = keras_lipattn.BoundedMultiHeadAttention(heads, int(rng.integers(1, 4)), **options)
    if rng.random() < 0.4:
        # Keys and values are linear images of some of the tokens.
        memory = layers.Dense(x.shape[-1])(x)[:, : int(rng.integers(1, x.shape[1] + 1))]
        return layer(x, memory)
    return layer(x, **_mask(rng, x.shape[1]))


def _l2_attention(rng, x):
    tokens = x.shape[1]
    caps = {}
    if rng.random() < 0.3:
        caps["token_radius"] = float(10.0 ** rng.uniform(-0.7, 0.5))
    if rng.random() < 0.3:
        caps["spectral_norm"] = float(rng.choice([0.5, 1.0, 2.0]))
    if rng.random() < 0.3:
        caps["lipschitz_bound"] = float(rng.choice([0.5, 1.0, 4.0]))
        caps["lipschitz_norm"] = str(rng.choice(["l2", "token", "linf"]))
    if rng.random() < 0.25:
        caps["sliding_window"] = int(rng.integers(1, tokens + 1))
    if rng.random() < 0.3:
        caps["max_relative_position"] = int(rng.integers(1, tokens + 1))
    if rng.random() < 0.3:
        caps["value_dim"] = int(rng.integers(1, 4))
    if rng.random() < 0.3:
        caps["output_shape"] = int(rng.integers(1, 6))
    layer = keras_lipattn.L2MultiHeadAttention(
        int(rng.integers(1, 4)), int(rng.integers(1, 4)), **caps
    )
    return layer(x, **_mask(rng, tokens))


def _mask(rng, tokens):
    kind = rng.choice(["none", "causal", "random"], p=[0.5, 0.25, 0.25])
    if kind == "causal":
        return {"use_causal_mask": True}
    if kind == "random":
        visible = np.eye(tokens, dtype=bool) | (rng.random((tokens, tokens)) < 0.6)
        return {"attention_mask": visible[None]}
    return {}


def _normalized_attention(rng, x):
    return _attention(rng, _layer_normalization(rng, x))


def _attention(rng, x):
    layer = layers.MultiHeadAttention(int(rng.integers(1, 3)), int(rng.integers(1, 4)))
    return layer(x, x, **_mask(rng, x.shape[1]))


def _einsum_dense(rng, x):
    width = int(rng.integers(1, 6))
    if rng.random() < 0.5:
        return layers.EinsumDense("btd,df->btf", output_shape=(x.shape[1], width), bias_axes="f")(x)
    return layers.EinsumDense("btd,ts->bsd", output_shape=(width, x.shape[-1]))(x)


def _convolution(rng, x):
    padding = str(rng.choice(["valid", "same", "causal"]))
    size = int(rng.integers(1, min(3, x.shape[1]) + 1))
    strides = int(rng.integers(1, 3))
    return layers.Conv1D(int(rng.integers(1, 5)), size, strides=strides, padding=padding)(x)


def _pooling(rng, x):
    kind = rng.integers(4)
    if kind == 0:
        return layers.GlobalAveragePooling1D()(x)
    if kind == 1:
        return layers.GlobalMaxPooling1D()(x)
    make = layers.AveragePooling1D if kind == 2 else layers.MaxPooling1D
    # Windows overlap with a stride of 1.
    return make(2, strides=int(rng.integers(1, 3)), padding="same")(x)


def _position_embedding(rng, x):
    return keras_lipattn.PositionEmbedding()(x)


def _permute(rng, x):
    return layers.Permute((2, 1))(x)


def _randomize(model, rng):
    """Assigns random weights, with a random scale for every layer."""
    for variable in model.trainable_weights:
        value = rng.normal(size=variable.shape) * 10.0 ** rng.uniform(-0.7, 0.4)
        if len(variable.shape) > 1:
            value = value / np.sqrt(variable.shape[0])
        if variable.path.endswith("relative_bias"):
            value = relative_biases(rng, value)
        variable.assign(value)


def _train(model, rng):
    """Trains a few steps on noise, which changes running norms and other states."""
    x = rng.normal(size=(8, *model.input_shape[1:]))
    y = rng.normal(size=(8, *model.output_shape[1:]))
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="mse", run_eagerly=True)
    for _ in range(3):
        model.train_on_batch(x, y)
