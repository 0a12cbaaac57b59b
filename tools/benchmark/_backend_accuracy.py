"""How accurate the attention weights of a backend's fused kernel are."""

from unittest import mock

import numpy as np
from keras import ops

from keras_lipattn.layers import _fused_attention
from keras_lipattn.layers._masks import Mask

COUNT, FEATURES = 32, 16


def row_error(dtype, *, center, parts=None):
    """Largest error of a row of weights over keys `center + 0.3 N(0, 1)`, as total variation.

    Rows are read off with unit vectors, far below the tokens, as further features.

    Args:
        dtype: Dtype the kernel computes in.
        center: Mean of every feature: the squares of keys grow with it, their distances do not.
        parts: Number of features which hold the bias of a key; as many as the package uses by
            default.

    Returns:
        Half the sum of absolute differences to the weights in float64, the largest of all rows.
    """
    rng = np.random.default_rng(1)
    near = center + 0.3 * rng.normal(size=(1, 1, COUNT, FEATURES))
    near = ops.cast(ops.convert_to_tensor(near.astype("float32")), dtype)
    near = ops.convert_to_numpy(ops.cast(near, "float32")).astype("float64")
    # Squares of 2**-24 and less move no score; the kernel's values are the features it scores.
    units = np.broadcast_to(2.0**-12 * np.eye(COUNT), (1, 1, COUNT, COUNT))
    y = np.concatenate([near, units], axis=-1)
    scores = -np.square(near[0, 0, :, None] - near[0, 0, None]).sum(axis=-1)
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    steps = _fused_attention._STEPS[dtype]
    with mock.patch.dict(_fused_attention._STEPS, {dtype: steps[-(parts or len(steps)) :]}):
        tokens = ops.convert_to_tensor(y.astype("float32"))
        found = _fused_attention.fused_attention(tokens, Mask(), dtype)
    found = ops.convert_to_numpy(ops.cast(found, "float32"))[0, 0, :, FEATURES:] * 2.0**12
    return float(0.5 * np.abs(found - weights).sum(axis=-1).max())
