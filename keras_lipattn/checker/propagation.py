"""Bounds of the tensors of a served graph, step by step along a proof."""

import dataclasses
import math
from typing import Any

import numpy as np

from keras_lipattn.bounds.activated_product import activated_gap_constants
from keras_lipattn.checker.artifact import StatedCertificate
from keras_lipattn.checker.kinds import KINDS, Kind
from keras_lipattn.checker.operations import MOVES
from keras_lipattn.checker.refusal import NotVerified, require
from keras_lipattn.checker.served_function import Region, ServedFunction
from keras_lipattn.checker.step import Step
from keras_lipattn.checker.tensor_bounds import (
    OTHER_NORMS,
    Ball,
    Bounds,
    converted,
    full,
    relaxed,
)
from keras_lipattn.linalg import SAFETY

# Largest difference between a step and its definition in float64, relative to the largest entry.
# Constants such as epsilon are stored in float32.
_TOLERANCE = 1e-6
_BATCH = 3
# With more classes than this a certificate stores no pairwise constants.
_MOST_CLASSES = 256


class Propagation:
    """Checks the steps of a proof and computes the bounds of their outputs.

    Args:
        served: The signature that the proof is about.
        certificate: The certificate.
        entries: The steps of the proof.

    Attributes:
        sources: The tensors that the certified changes are of.
        checked: Number of steps that were checked.
    """

    def __init__(
        self, served: ServedFunction, certificate: StatedCertificate, entries: list[dict[str, Any]]
    ):
        self.served, self.certificate = served, certificate
        self.sources: list[str] = []
        self.checked = 0
        # TensorFlow drops what no output needs.
        self._entries = {
            served.tensor(entry["output"]): entry
            for entry in entries
            if served.has(entry["output"])
        }
        # Of each tensor in the norm of the certificate and in others that may help.
        self._bounds: dict[str, dict[str, Bounds]] = {}
        self._rng = np.random.default_rng(0)
        varying = any(None in shape[1:] for shape, _ in served.specs.values())
        require(
            not varying or certificate.max_tokens is not None,
            "no independent check of inputs of unknown length",
        )
        # The last length is the largest one.
        longest = certificate.max_tokens or 1
        self.lengths = sorted({max(longest // 2, 1), longest}) if varying else [longest]
        self._sizes: dict[str, list[tuple[int, ...]]] = {}

    def bounds_of(self, output: str) -> Bounds:
        """Bounds of a tensor, after its step and all steps before it are checked."""
        stack = [output]
        while stack:
            tensor = stack[-1]
            if tensor in self._bounds:
                stack.pop()
                continue
            before = self._inputs(tensor)
            missing = [one for one in before if one not in self._bounds]
            require(len(stack) <= 10_000, "the steps of the proof form a cycle")
            if missing:
                stack += missing
            else:
                self._bounds[tensor] = self._checked(tensor, before)
                stack.pop()
        return self._bounds[output][self.certificate.norm]

    def random_inputs(self, batch: int, length: int) -> dict[str, np.ndarray]:
        """Values for all inputs of the signature, by tensor."""
        feeds = {}
        for name, (shape, dtype) in self.served.specs.items():
            sizes = (batch, *(length if size is None else size for size in shape[1:]))
            if "float" in dtype:
                value = self.inside(self._rng.normal(size=sizes))
            elif dtype == "bool":
                value = np.ones(sizes, bool)
            else:
                # Where integers are looked up, 0 may mean padding.
                value = np.ones(sizes, np.int64)
            feeds[self.served.inputs[name]] = value
        return feeds

    def inside(self, x: np.ndarray) -> np.ndarray:
        """The nearest tokens in the ball of the certificate."""
        limit = self.certificate.limit
        if limit is None:
            return x
        norms = np.linalg.norm(x, axis=-1, keepdims=True)
        return x * np.minimum(1.0, limit / np.maximum(norms, 1e-300))

    def sizes(self, tensor: str) -> list[tuple[int, ...]]:
        """Sizes of a tensor without the batch axis, for each of `lengths`."""
        if tensor not in self._sizes:
            found = []
            for length in self.lengths:
                (value,) = self.served.run(self.random_inputs(2, length), [tensor])
                require(
                    value.ndim >= 1 and len(value) == 2,
                    f"no independent check of {tensor!r}, which has no row for each example",
                )
                found.append(value.shape[1:])
            self._sizes[tensor] = found
        return self._sizes[tensor]

    def _inputs(self, tensor: str) -> list[str]:
        """The tensors that the step of this one takes."""
        node = self.served.node(tensor)
        if node.op == "Placeholder":
            return []
        entry = self._entries.get(tensor)
        if entry is None:
            raise NotVerified(f"no independent check of {node.op} {node.name.partition('/')[2]!r}")
        if entry["kind"] == "source":
            return []
        if entry["kind"] not in KINDS:
            raise NotVerified(f"no independent check of {entry['layer']}")
        require(bool(entry["inputs"]), f"{entry['layer']}: it has no inputs")
        return [self.served.tensor(name) for name in entry["inputs"]]

    def _checked(self, tensor: str, inputs: list[str]) -> dict[str, Bounds]:
        sizes = self.sizes(tensor)
        varies = tuple(len(set(size)) > 1 for size in zip(*sizes, strict=True))
        if len(self.lengths) == 1 and self._length_varies():
            # The longest input is a single token.
            varies = tuple(size == 1 for size in sizes[-1])
        output = Bounds(0.0, sizes[-1], varies)
        if not inputs:
            source = self._source(tensor, output)
            return {norm: converted(source, self._norm, norm) for norm in self._norms}
        entry = self._entries[tensor]
        masks = [self.served.tensor(name) for name in entry["masks"]]
        for mask in masks:
            self._check_mask(mask, entry["layer"])
        region = self.served.region(tensor, [*inputs, *masks])
        step, kind = Step(entry, region), KINDS[entry["kind"]]
        region.check_operations(kind.allowed(step), step.layer)
        product = region.product() if kind.linear(step) else ""
        require(not product, f"{step.layer}: it multiplies two tensors at {product!r}")
        decision = region.of_changing(kind.fixed)
        require(not decision, f"{step.layer}: it compares entries at {decision!r}")
        if step.kind == "global_average" and bool(masks) != bool(step.parameters.get("masked")):
            raise NotVerified(f"{step.layer}: its masks are not those of its parameters")
        try:
            self._compare(step, kind, region, inputs, masks)
            after = self._after(step, kind, inputs, output)
        except (IndexError, ValueError) as error:
            raise NotVerified(f"{step.layer}: its arrays do not fit: {error}") from error
        self.checked += 1
        return after

    @property
    def _norm(self) -> str:
        return self.certificate.norm

    @property
    def _norms(self) -> tuple[str, ...]:
        return (self._norm, *OTHER_NORMS[self._norm])

    def _after(
        self, step: Step, kind: Kind, inputs: list[str], output: Bounds
    ) -> dict[str, Bounds]:
        """Bounds of the output in all norms, each at most another one at its price."""
        family: dict[str, Bounds] = {}
        for norm in self._norms:
            states = [self._bounds[one][norm] for one in inputs]
            if norm != self._norm and kind.is_larger(step, states[0], self._norm, norm):
                continue
            after = kind.bounds(step, states, norm, output)
            if norm == self._norm or math.isfinite(after.log) or after.log < 0.0:
                family[norm] = after.reshaped(output)
        for norm in self._norms:
            family.setdefault(norm, converted(family[self._norm], self._norm, norm))
        return relaxed(family)

    def _length_varies(self) -> bool:
        return any(None in shape[1:] for shape, _ in self.served.specs.values())

    def _source(self, tensor: str, output: Bounds) -> Bounds:
        node = self.served.node(tensor)
        if node.op != "Placeholder":
            layer = self._entries[tensor]["layer"]
            require(
                not self.served.depends_on_floats(tensor),
                f"{layer}: it looks up rows by a floating-point input",
            )
            looked_up = [f"{name}:0" for name in sorted(self.served.reached(tensor))]
            region = self.served.region(tensor, looked_up)
            for name, one in region.operations.items():
                require(
                    "float" not in self.served.dtypes[f"{name}:0"] or one.op in MOVES,
                    f"{layer}: operation {one.op} at {name!r} is no part of a lookup",
                )
        require("float" in self.served.dtypes[tensor], f"the input {node.name!r} is not looked up")
        self.sources.append(tensor)
        limit = self.certificate.limit
        return dataclasses.replace(output, ball=Ball() if limit is None else Ball(limit))

    def _check_mask(self, mask: str, layer: str) -> None:
        fixed = self.served.dtypes[mask] == "bool" and not self.served.depends_on_floats(mask)
        fixed = fixed and not set(self.served.ancestors(mask)) & set(self.sources)
        require(fixed, f"{layer}: its mask changes with the certified input")

    def _compare(
        self, step: Step, kind: Kind, region: Region, inputs: list[str], masks: list[str]
    ) -> None:
        """Compare the served step with its definition on random inputs, in float64."""
        for scale in kind.scales(step):
            for index in range(len(self.lengths)):
                # One tensor may be several inputs.
                feeds = {
                    one: scale * self._rng.normal(size=(_BATCH, *self.sizes(one)[index]))
                    for one in inputs
                }
                feeds |= {one: self._random_mask(self.sizes(one)[index]) for one in masks}
                values, valid = ([feeds[one] for one in names] for names in (inputs, masks))
                (found,) = self.served.run(feeds, [region.output], precise=True)
                with np.errstate(all="ignore"):
                    expected = kind.value(step, values, valid)
                require(
                    found.shape == expected.shape,
                    f"{step.layer}: the served graph gives shape {found.shape[1:]} instead of "
                    f"{expected.shape[1:]}",
                )
                size = float(np.abs(expected).max(initial=0.0))
                gap = float(np.abs(found - expected).max(initial=0.0))
                require(
                    gap <= _TOLERANCE * max(size, 1e-3 * scale),
                    f"{step.layer}: the served graph differs from a {step.kind} with the arrays "
                    f"and parameters of the proof by {gap:.3g}, relative to {size:.3g}",
                )

    def _random_mask(self, sizes: tuple[int, ...]) -> np.ndarray:
        mask = self._rng.random((_BATCH, *sizes)) < 0.7
        mask[..., 0] = True
        return mask


def pairwise(logits: Bounds, certificate: StatedCertificate, total: float) -> np.ndarray | None:
    """Constants of the differences of two logits, `None` where a certificate has none."""
    classes = logits.width
    if certificate.head not in ("softmax", "logits") or not 2 <= classes <= _MOST_CLASSES:
        return None
    linf = certificate.norm == "linf"
    pairs = np.full((classes, classes), total * (2.0 if linf else SAFETY * math.sqrt(2.0)))
    for features, linear in logits.routes:
        gaps = np.expand_dims(full(linear, classes), 2) - np.expand_dims(full(linear, classes), 1)
        sizes = np.abs(gaps).sum(axis=0) if linf else np.linalg.norm(gaps, axis=0)
        constant = SAFETY * math.exp(features.log) if features.log < 709.0 else math.inf
        with np.errstate(invalid="ignore"):
            found = constant * SAFETY * sizes
        pairs = np.fmin(pairs, np.where(np.isnan(found), np.inf, found))
    activated = logits.activated
    if activated is not None and activated.after is not None and activated.after.ndim == 2:
        gaps = activated_gap_constants(
            activated.before, activated.after, activated.slopes, certificate.norm
        )
        log = activated.root.log
        with np.errstate(invalid="ignore"):
            found = SAFETY * (math.exp(log) if log < 709.0 else math.inf) * gaps
        pairs = np.fmin(pairs, np.where(np.isnan(found), np.inf, found))
    np.fill_diagonal(pairs, 0.0)
    return np.minimum(pairs, pairs.T)
