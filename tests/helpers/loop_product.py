"""Dot-product attention on bounded tokens in float64 loops, written from its formula alone.

With tokens `x_i` projected onto the ball, `q_i = x_i W_Q,h + b_Q,h` and so on:

    P_ij     = exp(q_i . k_j / sqrt(key_dim) + b_h[i - j]) / (sum of these over the j that i sees)
    output_i = sum_h sum_j P_ij v_j W_O,h + bias
"""

import math
from typing import Any

import numpy as np
from helpers.loop_attention import by_place, in_ball


def attending(radius, relative_bias=None):
    """The function of one sequence, for `loop_attention.attend_over_axes`."""

    def attend(
        x, kernels, biases, *, valid=None, attention_mask: Any = None, causal=False, window=None
    ):
        x = in_ball(x, radius)
        output, length = kernels[3], len(x)
        heads, size = output.shape[0], kernels[0].shape[2]
        flat = output.reshape(heads, output.shape[1], -1)
        result = np.zeros((length, flat.shape[-1]))
        scores = np.zeros((heads, length, length))
        for h in range(heads):
            mask = attention_mask if np.ndim(attention_mask) != 3 else attention_mask[h]
            shared = h * kernels[1].shape[1] // heads
            query, key, value = (
                x @ kernels[n][:, at] + (0.0 if biases is None else biases[n][at])
                for n, at in enumerate((h, shared, shared))
            )
            for i in range(length):
                if valid is not None and not valid[i]:
                    continue
                keys = [
                    j
                    for j in range(length)
                    if (valid is None or valid[j])
                    and not (causal and j > i)
                    and not (window is not None and abs(i - j) >= window)
                    and (mask is None or mask[i][j])
                ]
                logits = [
                    query[i] @ key[j] / math.sqrt(size) + by_place(relative_bias, h, i - j)
                    for j in keys
                ]
                exponentials = [math.exp(logit - max(logits)) for logit in logits]
                for j, exponential in zip(keys, exponentials, strict=True):
                    scores[h, i, j] = exponential / math.fsum(exponentials)
                    result[i] += scores[h, i, j] * value[j] @ flat[h]
        for i in range(length):
            if biases is not None and (valid is None or valid[i]):
                result[i] += biases[3].reshape(-1)
        return result.reshape(length, *output.shape[2:]), scores

    return attend
