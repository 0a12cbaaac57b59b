"""The assumptions of a certificate."""

import dataclasses
import math

from keras_lipattn.bounds.lipschitz_bound import NORMS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """The assumptions under which a certificate holds.

    Args:
        norm: `"l2"`, `"token"` or `"linf"`, of inputs and outputs alike.
        inputs: names of the certified inputs; the norm is that of all of them side by side.
        fixed_inputs: inputs of integers or booleans that stay fixed.
        output: what the output is, for instance `"pre-softmax logits"`.
        input_radius: radius of a ball around the origin that holds the tokens of the certified
            inputs, `inf` for no restriction.
        max_tokens: largest number of tokens, `None` when the shapes of the model determine it.
        shapes: if not empty, the certificate holds only for inputs of exactly these shapes (without
            the batch axis): Python code of the model ran at these sizes and may compute something
            else at others.
        mask: class of mask assumed for attention layers with an unknown mask, or `None`.
        assumed_masks: layers that compute a mask from a certified input; the mask was assumed to
            be fixed.
        center: for a local certificate, a description of its centers with a digest of their values;
            empty for a global certificate.
        radius: radius of the balls around the centers in the norm of the certificate, `inf` for a
            global certificate.
        lost: pairs of a layer and a reason: later layers have their global constants, since the
            value of this layer at the center is not known.

    Example:

    >>> model = keras.Sequential([keras.Input((4,), name="x"), keras_lipattn.SpectralDense(3)])
    >>> threat_model = keras_lipattn.certify(model, input_radius=1.0).threat_model
    >>> threat_model.norm, threat_model.inputs, threat_model.input_radius
    ('l2', ('x',), 1.0)
    """

    norm: str
    inputs: tuple[str, ...]
    fixed_inputs: tuple[str, ...] = ()
    output: str = "output"
    input_radius: float = math.inf
    max_tokens: int | None = None
    shapes: tuple[tuple[int | None, ...], ...] = ()
    mask: str | None = None
    assumed_masks: tuple[str, ...] = ()
    center: str = ""
    radius: float = math.inf
    lost: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [
            f"norm: {NORMS[self.norm]}, of inputs and outputs",
            "certified inputs: " + (", ".join(self.inputs) or "none"),
            f"output: {self.output}",
            "at inference (`training=False`), in real arithmetic, for the weights used there",
        ]
        if len(self.inputs) > 1:
            lines.append("a change of several inputs is measured as that of one tensor")
        if self.center:
            lines.append(
                f"ONLY for inputs within {self.radius:g} of {self.center}, in the norm above"
            )
        lines += [f"values are not known after {path}: {reason}" for path, reason in self.lost]
        if self.fixed_inputs:
            lines.append("fixed inputs: " + ", ".join(self.fixed_inputs))
        if math.isfinite(self.input_radius):
            lines.append(
                "only for inputs whose tokens have a Euclidean norm of at most "
                f"{self.input_radius:g}"
            )
        if self.shapes:
            shapes = " and ".join(str(shape) for shape in self.shapes)
            lines.append(
                f"only for inputs of shape {shapes} per example: its Python code ran at these "
                "sizes and may compute something else at others"
            )
        elif self.max_tokens is not None:
            lines.append(f"for at most {self.max_tokens} tokens that attend to each other")
        lines.append(
            "for a fixed mask and a fixed length"
            + (f"; unknown masks are of class {self.mask!r}" if self.mask else "")
        )
        if self.assumed_masks:
            lines.append(
                "ASSUMED: the masks computed from certified inputs by "
                + ", ".join(self.assumed_masks)
                + " do not change"
            )
        return "\n".join(lines)
