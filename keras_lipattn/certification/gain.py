"""The Lipschitz constant of a tensor with respect to the certified inputs of the model."""

import dataclasses
import math
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Gain:
    """Bounds of the change of a tensor, relative to changes of the certified inputs.

    Constants are stored as natural logarithms, so that deep networks do not overflow. For the
    2-norm there is one logarithm for each certified input, with

        |change of the tensor|^2 <= sum_i exp(2 logs[i]) |change of input i|^2 .

    The constant for all inputs together is then the largest one: `Add` of two inputs has the
    constant sqrt(2), and `Concatenate` of two inputs has 1. The token norm and the max norm are
    maxima themselves, so there is one logarithm, with the key 0. The change of the tensor may be
    measured in another norm than those of the inputs.

    Args:
        norm: norm of the change of the tensor, `"l2"`, `"token"` or `"linf"`.
        logs: maps the number of a certified input to a logarithm. An input without an entry has no
            influence.
    """

    norm: str
    logs: Mapping[int, float]

    @property
    def log(self) -> float:
        """Logarithm of the constant for all inputs together, `-inf` for no influence."""
        return max(self.logs.values(), default=-math.inf)

    @classmethod
    def of_source(cls, norm: str, source: int) -> "Gain":
        """The gain of certified input number `source` itself."""
        return cls(norm, {source if norm == "l2" else 0: 0.0})

    @classmethod
    def none(cls, norm: str) -> "Gain":
        """The gain of a tensor that depends on no certified input."""
        return cls(norm, {})

    @classmethod
    def unbounded(cls, norm: str, gains: Sequence["Gain"]) -> "Gain":
        """A gain without a bound for any input that occurs in one of `gains`."""
        keys = {key for gain in gains for key in gain.logs}
        return cls(norm, dict.fromkeys(sorted(keys), math.inf))

    def scaled(self, constant: float) -> "Gain":
        """The gain after a map of this constant. An unbounded gain stays unbounded."""
        if constant == 0.0 and self.log < math.inf:
            return Gain(self.norm, {})
        shift = math.log(constant) if constant > 0.0 else 0.0
        return Gain(self.norm, {key: log + shift for key, log in self.logs.items()})

    def smaller(self, other: "Gain") -> "Gain":
        """The smaller of two valid bounds of the same tensor."""
        return other if other.log < self.log else self

    @classmethod
    def stacked(cls, norm: str, gains: Sequence["Gain"], *, entrywise: bool = False) -> "Gain":
        """The gain of several tensors taken as one.

        Args:
            norm: `"l2"`, `"token"` or `"linf"`.
            gains: gains of the tensors.
            entrywise: whether entries of different tensors share a token, so that the squares of
                the token norms add.
        """
        if norm == "l2" or (norm == "token" and entrywise):
            keys = {key for gain in gains for key in gain.logs}
            return cls(
                norm,
                {
                    key: 0.5 * log_sum([2.0 * gain.logs.get(key, -math.inf) for gain in gains])
                    for key in sorted(keys)
                },
            )
        # The largest of changes with different inputs is at most the root of their squares.
        keys = {key for gain in gains for key in gain.logs}
        return cls(
            norm,
            {key: max(gain.logs.get(key, -math.inf) for gain in gains) for key in sorted(keys)},
        )

    @classmethod
    def summed(cls, norm: str, gains: Sequence["Gain"]) -> "Gain":
        """The gain of the sum of tensors: `|a + b| <= |a| + |b|`."""
        gains = [gain for gain in gains if gain.logs]
        if not gains:
            return cls.none(norm)
        total = gains[0]
        for gain in gains[1:]:
            total = _sum_of_two(total, gain)
        return total


def log_sum(logs: Sequence[float]) -> float:
    """Logarithm of the sum of exponentials."""
    top = max(logs, default=-math.inf)
    if math.isinf(top):
        return top
    return top + math.log(math.fsum(math.exp(log - top) for log in logs))


def _sum_of_two(a: Gain, b: Gain) -> Gain:
    """`|a + b|^2 <= (1 + s) |a|^2 + (1 + 1/s) |b|^2` for the best of many `s > 0`."""
    keys = sorted({*a.logs, *b.logs})
    if len(keys) == 1:
        return Gain(a.norm, {keys[0]: log_sum([a.logs[keys[0]], b.logs[keys[0]]])})
    if math.isinf(a.log) or math.isinf(b.log):
        return Gain.unbounded(a.norm, [a, b])

    def split(log_s: float) -> dict[int, float]:
        own = 0.5 * log_sum([0.0, log_s])
        other = 0.5 * log_sum([0.0, -log_s])
        return {
            key: 0.5
            * log_sum(
                [
                    2.0 * (own + a.logs.get(key, -math.inf)),
                    2.0 * (other + b.logs.get(key, -math.inf)),
                ]
            )
            for key in keys
        }

    # The largest entry is a convex function of s, hence unimodal in log s. At the balanced s
    # it is at most |a| + |b|; any s is valid, so the precision of the search costs nothing.
    low, high = b.log - a.log - 40.0, b.log - a.log + 40.0
    candidates = [split(b.log - a.log)]
    for _ in range(120):
        left, right = low + (high - low) / 3.0, high - (high - low) / 3.0
        if max(split(left).values()) < max(split(right).values()):
            high = right
        else:
            low = left
    candidates.append(split(0.5 * (low + high)))
    return Gain(a.norm, min(candidates, key=lambda logs: max(logs.values())))
