"""Legal cases of the bounds and adversaries that try to break them, in float64 numpy.

Nothing here is shared with the package: the Jacobian comes from the formula of the layer,
`X -> sum_h softmax(-|x_i B_h - x_j B_h|^2) X B_h C_h`, not from the theorems.
"""

import math

import numpy as np
from scipy.special import lambertw


def masks(tokens, rng):
    """Masks that keep the diagonal, by name; the class of `"hub"` and below is `"any"`."""
    index = np.arange(tokens)
    lag = index[:, None] - index
    reach = max(1, tokens // 4)
    blocks = index // (reach + 1)
    everything = np.ones((tokens, tokens), bool)
    diagonal = np.eye(tokens, dtype=bool)
    return {
        "full": everything,
        "causal": np.tril(everything),
        "hub": diagonal | (index[None] < 1),
        "spokes": diagonal | (index[:, None] < 1),
        "window": np.abs(lag) <= reach,
        "causal window": (lag >= 0) & (lag <= reach),
        "blocks": blocks[:, None] == blocks,
        "causal blocks": (blocks[:, None] == blocks) & (lag >= 0),
        "prefix": (lag >= 0) | (index[None] <= reach),
        "random": diagonal | (rng.random((tokens, tokens)) < rng.choice([0.2, 0.5, 0.9])),
    }


def mask_class(name):
    """The class of a mask from `masks`."""
    return name if name in ("full", "causal") else "any"


def witnesses(tokens, width):
    """Inputs at which the theorems are sharp or nearly so, shape `(tokens, width)` each."""
    n = tokens - 1
    reach = math.sqrt(float(lambertw(n * math.exp(-1.5)).real) + 1.5)
    found = []
    # The other tokens half on each side of a center: the largest diagonal block.
    for center in (0, tokens - 1):
        y = np.zeros((tokens, width))
        others = [i for i in range(tokens) if i != center]
        y[others[::2], 0], y[others[1::2], 0] = reach, -reach
        found.append(y)
    # A hub with a star around it, off its axis where there is room: the order of growth.
    hub = math.ceil(math.sqrt(n))
    y = np.zeros((tokens, width))
    star = np.arange(hub, tokens)
    y[star, (star - hub) % width] = math.sqrt(max(math.log(tokens), 0.1) / 2.0)
    y[star, 0] += math.sqrt(0.5)
    found.append(y)
    # A simplex, as far as the width allows, and all tokens in one place.
    y = np.zeros((tokens, width))
    y[np.arange(tokens), np.arange(tokens) % width] = math.sqrt(0.5 * math.log(tokens) + 0.2)
    found.append(y)
    found.append(np.zeros((tokens, width)))
    return found


def inputs(tokens, width, rng):
    """Structured and random inputs of the unit head, shape `(tokens, width)` each."""
    found = witnesses(tokens, width)
    found += [y + rng.normal(size=y.shape) * 0.2 / math.sqrt(width) for y in found[:4]]
    spread = math.sqrt((math.log(tokens) + 0.5) / width)
    found += [rng.normal(size=(tokens, width)) * size * spread for size in (0.5, 1.0, 1.5, 2.2)]
    return found


def layers(rng, *, count, max_width=5):
    """Random folded kernels `(b, c)` of shapes `(H, D, k)` and `(H, k, O)`."""
    for _ in range(count):
        heads, inner, key, value, outer = rng.integers(1, [4, *[max_width + 1] * 4])
        sizes = rng.choice([0.3, 1.0, 3.0], size=3)
        query = rng.normal(size=(heads, inner, key)) * sizes[0]
        values = rng.normal(size=(heads, inner, value)) * sizes[1]
        output = rng.normal(size=(heads, value, outer)) * sizes[2]
        yield fold(query, values, output)


def fold(query, value, output):
    """`(b, c)` from kernels of shapes `(H, D, k)`, `(H, D, v)` and `(H, v, O)`."""
    b = query / query.shape[-1] ** 0.25
    return b, np.swapaxes(b, 1, 2) @ value @ output


def unit_head(width):
    """The unit head itself, as a layer of one head."""
    return np.eye(width)[None], np.eye(width)[None]


def attention(y, mask):
    """Attention matrix of one head, shape `(N, N)`."""
    with np.errstate(divide="ignore"):
        scores = np.log(mask) - np.square(y[:, None] - y[None]).sum(axis=-1)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def apply(x, b, c, mask):
    """The layer, shape `(N, O)`."""
    return sum(
        attention(x @ query, mask) @ (x @ query) @ output
        for query, output in zip(b, c, strict=True)
    )


def pull_back(x, b, c, mask, covectors):
    """`J^T u` of the layer for covectors `u` of shape `(N, O)`; shape `(N, D)`."""
    total = np.zeros_like(x)
    for query, output in zip(b, c, strict=True):
        y = x @ query
        prob = attention(y, mask)
        mean = prob @ y
        u = covectors @ output.T
        along = u @ y.T - np.sum(u * mean, axis=1, keepdims=True)
        loads = prob * along
        # Through the values, through the keys' distance, through the query's.
        gradient = prob.T @ u - 2.0 * (loads.sum(axis=0)[:, None] * y - loads.T @ y)
        gradient += 2.0 * (loads @ y - loads.sum(axis=1, keepdims=True) * y)
        total += gradient @ query.T
    return total


def jacobian(x, b, c, mask):
    """Dense Jacobian `[i, o, j, a]` of the layer."""
    tokens, outer = len(x), c.shape[-1]
    rows = [
        pull_back(x, b, c, mask, covector.reshape(tokens, outer))
        for covector in np.eye(tokens * outer)
    ]
    return np.reshape(rows, (tokens, outer, *x.shape))


def attained(jac, norm):
    """Norm of a Jacobian with the pair that attains it (for `"token"`: nearly attains).

    Returns:
        `(value, covector, direction)` with `value = <covector, J direction>`.
    """
    tokens, outer, sources, inner = jac.shape
    if norm == "l2":
        u, values, v = np.linalg.svd(jac.reshape(tokens * outer, -1))
        return values[0], u[:, 0].reshape(tokens, outer), v[0].reshape(sources, inner)
    if norm == "linf":
        sums = np.abs(jac).sum(axis=(2, 3))
        i, o = np.unravel_index(sums.argmax(), sums.shape)
        covector = np.zeros((tokens, outer))
        covector[i, o] = 1.0
        return sums[i, o], covector, np.sign(jac[i, o])
    # Alternating maximization over the rows all at once, from coordinates and in between.
    starts = np.concatenate([np.eye(outer), np.random.default_rng(0).normal(size=(2, outer))])
    best = (0.0, np.zeros((tokens, outer)), np.zeros((sources, inner)))
    for start in starts:
        u = np.tile(start, (tokens, 1))
        for _ in range(15):
            v = np.einsum("iojb,io->ijb", jac, u)
            v /= np.linalg.norm(v, axis=-1, keepdims=True) + 1e-300
            u = np.einsum("iojb,ijb->io", jac, v)
            values = np.linalg.norm(u, axis=-1)
            u /= values[:, None] + 1e-300
        i = values.argmax()
        if values[i] > best[0]:
            covector = np.zeros((tokens, outer))
            covector[i] = u[i]
            best = values[i], covector, v[i]
    return best


def jacobian_norm(x, b, c, mask, norm):
    """Norm of the layer's Jacobian (a lower bound of it for `"token"`)."""
    return attained(jacobian(x, b, c, mask), norm)[0]


def ascend(x, b, c, mask, norm, *, steps=40, rate=0.2, project=None):
    """Gradient ascent on the norm of the Jacobian; the largest norm on the way.

    With the attaining pair `(u, v)` held fixed, the gradient of `<u, J(x) v>` is the change of
    `J(x)^T u` along `v`, taken by a central difference.
    """
    best = 0.0
    h = 1e-5
    for step in range(steps):
        value, covector, direction = attained(jacobian(x, b, c, mask), norm)
        best = max(best, value)
        gradient = pull_back(x + h * direction, b, c, mask, covector)
        gradient -= pull_back(x - h * direction, b, c, mask, covector)
        size = np.abs(gradient).max()
        if size == 0.0:
            break
        x = x + rate / (1.0 + 3.0 * step / steps) * gradient / size
        if project is not None:
            x = project(x)
    return max(best, jacobian_norm(x, b, c, mask, norm))
