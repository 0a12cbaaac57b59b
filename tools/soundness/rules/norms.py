"""Norms of Jacobians of models with several inputs and outputs."""

import numpy as np


class Geometry:
    """The positions of tokens in vectors that concatenate several tensors.

    Args:
        inputs: shapes of the certified tensors of one example.
        outputs: shapes of the outputs for one example.
        up_to_shift: whether outputs are only known up to a number that is added to all entries.
            Half of the largest difference of two entries is then what is measured in `"linf"`.
    """

    def __init__(self, inputs, outputs, *, up_to_shift: bool = False):
        self._up_to_shift = up_to_shift
        self._input_tokens = _tokens(inputs)
        self._output_tokens = _tokens(outputs)
        self.inputs = sum(int(np.prod(shape)) for shape in inputs)
        self.outputs = sum(int(np.prod(shape)) for shape in outputs)

    def sizes(self, changes: np.ndarray, norm: str, side: str) -> np.ndarray:
        """Norms of changes `(n, entries)` of the `"inputs"` or `"outputs"`."""
        if norm == "l2":
            return np.linalg.norm(changes, axis=1)
        if norm == "linf":
            if side == "outputs" and self._up_to_shift:
                return 0.5 * (changes.max(axis=1) - changes.min(axis=1))
            return np.abs(changes).max(axis=1, initial=0.0)
        tokens = self._input_tokens if side == "inputs" else self._output_tokens
        return np.linalg.norm(_padded(changes)[:, tokens], axis=-1).max(axis=1, initial=0.0)

    def dual(self, row: np.ndarray, norm: str) -> tuple[float, np.ndarray]:
        """Norm of a linear function of the input, and the direction that attains it."""
        if norm == "l2":
            return float(np.linalg.norm(row)), row
        if norm == "linf":
            return float(np.abs(row).sum()), np.sign(row)
        tokens = _padded(row[None])[0, self._input_tokens]
        sizes = np.linalg.norm(tokens, axis=-1, keepdims=True)
        direction = np.zeros(self.inputs + 1)
        direction[self._input_tokens] = tokens / np.maximum(sizes, 1e-300)
        return float(sizes.sum()), direction[:-1]

    def attained(self, jacobian: np.ndarray, norm: str):
        """A lower estimate of the operator norm, exact except in the token norm.

        Returns:
            The number, and the covector and direction for which it is `u^T J v`.
        """
        if not np.isfinite(jacobian).all():
            return 0.0, np.zeros(self.outputs), np.zeros(self.inputs)
        if norm == "l2":
            u, s, v = np.linalg.svd(jacobian, full_matrices=False)
            return float(s[0]), u[:, 0], v[0]
        if norm == "linf":
            covectors = np.eye(self.outputs)
            if self._up_to_shift:
                covectors = 0.5 * (covectors[:, None] - covectors).reshape(-1, self.outputs)
            sums = np.abs(covectors @ jacobian).sum(axis=1)
            covector = covectors[sums.argmax()]
            return float(sums.max()), covector, np.sign(covector @ jacobian)
        return self._token(jacobian)

    def _token(self, jacobian):
        """`max_u sum_j |J_j^T u|` over unit `u` in one output token, by ascent from two points."""
        rows = _padded(_padded(jacobian).T).T[self._output_tokens]
        blocks = rows[:, :, self._input_tokens]
        tokens, width = self._output_tokens.shape
        wide = blocks.reshape(tokens, width, -1)
        starts = [np.linalg.svd(wide, full_matrices=False)[0][:, :, 0]]
        loudest = np.linalg.norm(wide, axis=-1).argmax(axis=1)
        starts.append(np.eye(width)[loudest])
        best = (0.0, np.zeros(self.outputs), np.zeros(self.inputs))
        for u in starts:
            for _ in range(8):
                pulls = np.einsum("tojw,to->tjw", blocks, u)
                sizes = np.linalg.norm(pulls, axis=-1, keepdims=True)
                steps = pulls / np.maximum(sizes, 1e-300)
                totals = sizes.sum(axis=(1, 2))
                token = int(totals.argmax())
                if totals[token] > best[0]:
                    covector, direction = np.zeros(self.outputs + 1), np.zeros(self.inputs + 1)
                    covector[self._output_tokens[token]] = u[token]
                    direction[self._input_tokens] = steps[token]
                    best = (float(totals[token]), covector[:-1], direction[:-1])
                u = np.einsum("tojw,tjw->to", blocks, steps)
                u = u / np.maximum(np.linalg.norm(u, axis=-1, keepdims=True), 1e-300)
        return best


def _tokens(shapes) -> np.ndarray:
    """Indices of the entries of each token, `(tokens, widest)`; -1 stands for none."""
    rows, start = [], 0
    for shape in shapes:
        size = int(np.prod(shape))
        width = shape[-1] if shape else 1
        rows += [list(range(start + i, start + i + width)) for i in range(0, size, width or 1)]
        start += size
    widest = max((len(row) for row in rows), default=1)
    return np.array([row + [-1] * (widest - len(row)) for row in rows], int).reshape(-1, widest)


def _padded(rows: np.ndarray) -> np.ndarray:
    """The rows with a zero appended, for the index -1."""
    return np.concatenate([rows, np.zeros((len(rows), 1))], axis=1)
