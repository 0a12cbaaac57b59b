"""Scaled cosine attention in float64 loops, written from its formula alone.

With `z^ = z / sqrt(|z|^2 + epsilon)` and, for head `h`, `q_i = x_i W_Q,h + b_Q,h` and so on:

    P_ij     = exp(temperature q_i^ . k_j^) / (sum of these over the j that i sees)
    output_i = sum_h sum_j P_ij v_j^ W_O,h + bias
"""

import math
from typing import Any

import keras
import numpy as np
from helpers.loop_attention import sees


def weights(layer):
    """Kernels, and biases or `None`, in float64, rounded to the compute dtype."""
    names = ("query", "key", "value", "output")

    def numpy(variable):
        cast = keras.ops.cast(variable.value, layer.compute_dtype)
        return keras.ops.convert_to_numpy(cast).astype(np.float64)

    kernels = [numpy(getattr(layer, f"{name}_kernel")) for name in names]
    if not layer.use_bias:
        return kernels, None
    return kernels, [numpy(getattr(layer, f"{name}_bias")) for name in names]


def attending(temperature, epsilon):
    """The function of one sequence, for `loop_attention.attend_over_axes`."""

    def unit(z):
        return z / math.sqrt(np.square(z).sum() + epsilon)

    def attend(
        x, kernels, biases, *, valid=None, attention_mask: Any = None, causal=False, window=None
    ):
        output = kernels[3]
        length, heads = len(x), output.shape[0]
        flat = output.reshape(heads, output.shape[1], -1)
        result = np.zeros((length, flat.shape[-1]))
        scores = np.zeros((heads, length, length))
        for h in range(heads):
            mask = attention_mask if np.ndim(attention_mask) != 3 else attention_mask[h]
            query, key, value = (
                [
                    unit(x[i] @ kernels[n][:, h] + (0.0 if biases is None else biases[n][h]))
                    for i in range(length)
                ]
                for n in range(3)
            )
            for i in range(length):
                if valid is not None and not valid[i]:
                    continue
                keys = [
                    j
                    for j in range(length)
                    if (valid is None or valid[j])
                    and sees(i, j, attention_mask=mask, causal=causal, window=window)
                ]
                exponentials = [math.exp(temperature * (query[i] @ key[j])) for j in keys]
                for j, exponential in zip(keys, exponentials, strict=True):
                    scores[h, i, j] = exponential / math.fsum(exponentials)
                    result[i] += scores[h, i, j] * value[j] @ flat[h]
        for i in range(length):
            if biases is not None and (valid is None or valid[i]):
                result[i] += biases[3].reshape(-1)
        return result.reshape(length, *output.shape[2:]), scores

    return attend
