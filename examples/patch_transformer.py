"""A Transformer for small images whose Lipschitz constant is worth certifying."""

import dataclasses

import keras
from keras import initializers, layers

from keras_lipattn import (
    L2MultiHeadAttention,
    MaxMin,
    OrthogonalConv2D,
    OrthogonalDense,
    PositionEmbedding,
    Residual,
    SpaceToDepth,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a patch Transformer.

    Attributes:
        patch: Side of a patch in pixels, after the convolutions if there are any; divides the side
            of the image.
        width: Size of a token.
        heads: Number of attention heads; divides `width`.
        branch_weight: Weight of attention and MLP in their residuals at the start; it is learned.
        head_units: Units of each hidden layer of the classifier.
        head_layers: Hidden layers of the classifier.
        attention: Whether there is attention; the same model without it is a fair comparison.
        attention_bound: Cap of the constant of each attention layer, in the 2-norm.
        convolutions: Channels of the stages of convolutions before the tokens, none by default.
            Each stage halves the sides of the image and has two convolutions.
    """

    patch: int
    width: int = 64
    heads: int = 4
    branch_weight: float = 0.25
    head_units: int = 128
    head_layers: int = 1
    attention: bool = True
    attention_bound: float | None = None
    convolutions: tuple[int, ...] = ()


def patch_transformer(
    image_shape: tuple[int, int, int], classes: int, architecture: Architecture
) -> keras.Model:
    """Builds the classifier. Its output is one vector of logits an image.

    What makes its constant small:

    - attention runs along the columns of patches in the first block and along the rows in the
      second: the bound of attention grows with the number of tokens that see each other;
    - there is no `LayerNormalization`, whose constant is some 30;
    - a residual is a convex combination of a skip and a branch: its constant is at most 1 when that
      of the branch is, whatever the depth;
    - dense kernels are orthogonal, and `MaxMin` keeps lengths where ReLU would lose half of the
      entries, so little of the constant is wasted.

    Without `attention_bound`, attention kernels have a loose cap, 2: the penalty of a monitor is
    to do the rest.

    Args:
        image_shape: `(height, width, channels)`.
        classes: Number of classes.
        architecture: Sizes.

    Returns:
        A Functional model.

    Raises:
        ValueError: If the patches do not tile the image.
    """
    image = keras.Input(image_shape, name="image")
    x = image
    for stage, channels in enumerate(architecture.convolutions, start=1):
        x = _stage(x, channels, f"stage{stage}")
    height, width, channels = x.shape[1:]
    side = architecture.patch
    if height % side or width % side:
        raise ValueError(
            "The patches must tile the image. "
            f"Received: image_shape={image_shape}, patch={architecture.patch}"
        )
    rows, columns = height // side, width // side
    x = layers.Reshape((rows, side, columns, side * channels), name="split")(x)
    x = layers.Permute((1, 3, 2, 4), name="gather")(x)
    x = layers.Reshape((rows * columns, side * side * channels), name="patches")(x)
    x = OrthogonalDense(architecture.width, name="embed")(x)
    x = PositionEmbedding(initializer=initializers.RandomNormal(stddev=0.5), name="positions")(x)
    x = layers.Reshape((rows, columns, architecture.width), name="grid")(x)
    for block, axis in enumerate((1, 2), start=1):
        if architecture.attention:
            x = _attention_block(x, axis, f"block{block}", architecture)
        x = _mlp_block(x, f"block{block}", architecture)
    x = layers.Flatten(name="flatten")(x)
    for index in range(1, architecture.head_layers + 1):
        x = OrthogonalDense(architecture.head_units, name=f"head{index}")(x)
        x = MaxMin(name=f"head{index}_sort")(x)
    logits = OrthogonalDense(classes, name="logits")(x)
    return keras.Model(image, logits, name="patch_transformer")


def _stage(x, channels: int, name: str):
    """Half the sides, more channels, and two convolutions, all of them orthogonal."""
    x = OrthogonalDense(channels, name=f"{name}_down")(SpaceToDepth(2, name=f"{name}_cut")(x))
    for index in (1, 2):
        x = MaxMin(name=f"{name}_sort{index}")(x)
        x = OrthogonalConv2D(channels, name=f"{name}_conv{index}")(x)
    return MaxMin(name=f"{name}_sort3")(x)


def _attention_block(x, axis: int, name: str, architecture: Architecture):
    branch = L2MultiHeadAttention(
        architecture.heads,
        architecture.width // architecture.heads,
        attention_axes=axis,
        spectral_norm=2.0,
        lipschitz_bound=architecture.attention_bound,
        kernel_initializer="orthogonal",
        name=f"{name}_attention",
    )(x)
    return Residual(architecture.branch_weight, trainable_alpha=True, name=f"{name}_attention_add")(
        [x, branch]
    )


def _mlp_block(x, name: str, architecture: Architecture):
    branch = OrthogonalDense(2 * architecture.width, name=f"{name}_mlp_in")(x)
    branch = MaxMin(name=f"{name}_mlp_sort")(branch)
    branch = OrthogonalDense(architecture.width, name=f"{name}_mlp_out")(branch)
    return Residual(architecture.branch_weight, trainable_alpha=True, name=f"{name}_mlp_add")(
        [x, branch]
    )
