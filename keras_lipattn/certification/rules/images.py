"""Image layers: augmentation, resizing, cropping, patches (docs/theory.md, section 8)."""

import functools
import math
from collections.abc import Callable

import keras
import numpy as np
from keras.src.utils import image_utils

from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.maps import CenterValue, LipschitzMap, unbounded
from keras_lipattn.certification.reasons import (
    SIZE_VARIES,
    Cause,
    Reason,
    in_training,
)
from keras_lipattn.certification.registry import register_operation, register_rule
from keras_lipattn.certification.rules.linear import matrix_map
from keras_lipattn.certification.rules.linear_operations import axes_map
from keras_lipattn.certification.rules.other_layers import identity
from keras_lipattn.certification.rules.reshaping import repeated, spatial_last
from keras_lipattn.certification.tensor_state import Enclosure, TensorState
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.linalg import SAFETY

_NOT_BATCHED = Reason(
    "its input is not a batch of images, so it changes the examples of a batch together",
    cause=Cause.BATCH,
)
# Backends interpolate in float32: relative errors of norms and of values.
_MARGIN = 1.0 + 1e-5
_ROUNDING = 5e-7
# Largest number of entries of all images in a probe.
_MOST_WORK = 1_000_000_000

# Layers that return their input at inference, by the names that Keras exports.
_AUGMENTATIONS = (
    "AugMix CutMix MaxNumBoundingBoxes MixUp RandAugment RandomBrightness RandomColorDegeneration "
    "RandomColorJitter RandomContrast RandomCrop RandomElasticTransform RandomErasing RandomFlip "
    "RandomGaussianBlur RandomGrayscale RandomHue RandomInvert RandomPerspective "
    "RandomPosterization RandomRotation RandomSaturation RandomSharpness RandomShear "
    "RandomTranslation RandomZoom Equalization Solarization"
).split()
_KNOWN = [getattr(keras.layers, name) for name in _AUGMENTATIONS if hasattr(keras.layers, name)]


@register_rule(*_KNOWN)
def augmentation(layer, call):
    if call.training:
        return unbounded(in_training("it changes images at random"))
    if not isinstance(call.argument("data"), TensorState):
        return unbounded("its input is not a single tensor of images")
    if call.state.shape != call.shape:
        # The output of RandomCrop has another shape than Keras infers.
        return unbounded("its output has another shape than its input")
    return identity()


@register_rule(keras.layers.Resizing)
def resizing(layer, call):
    if not isinstance(call.argument("data"), TensorState):
        return unbounded("its input is not a single tensor of images")
    return _resize((layer.height, layer.width), layer, call)


@register_operation("Resize")
def resize(operation, call):
    return _resize(operation.size, operation, call)


@register_rule(keras.layers.UpSampling2D)
def up_sampling(layer, call):
    first = layer.data_format == "channels_first"
    if layer.interpolation == "nearest":
        layer_map = repeated(call, math.prod(layer.size))
        return spatial_last(layer_map, call) if first else layer_map
    height, width = call.shape[1:] if first else call.shape[:2]
    options = (("interpolation", layer.interpolation),)
    return _separable("resize", (height, width), options, call, first)


@register_rule(keras.layers.CenterCrop)
def center_crop(layer, call):
    state = call.state
    if not isinstance(call.argument("data"), TensorState):
        return unbounded("its input is not a single tensor of images")
    if state.rank != 4:
        return unbounded(_NOT_BATCHED)
    first = layer.data_format == "channels_first"
    sizes = state.shape[1:] if first else state.shape[:2]
    if None in sizes or any(state.dynamic[1:] if first else state.dynamic[:2]):
        return unbounded(SIZE_VARIES)
    target = (layer.height, layer.width)
    if sizes[0] >= target[0] and sizes[1] >= target[1]:
        cuts = []
        for size, length in zip(sizes, target, strict=True):
            start = (size - length) // 2
            cuts.append(np.eye(size)[start : start + length])
        return axes_map(dict(zip(_axes(first), cuts, strict=True)), call, "entries are dropped")
    return _separable("smart_resize", target, (), call, first)


def _resize(size, source, call: LayerCall) -> LipschitzMap:
    """The map of a resize with the options that a layer or operation holds."""
    if source.fill_mode != "constant":
        return unbounded(
            f"its fill mode {source.fill_mode!r} has no rule", remedy='use `fill_mode="constant"`'
        )
    options = (
        ("interpolation", source.interpolation),
        ("antialias", bool(source.antialias)),
        ("crop_to_aspect_ratio", bool(source.crop_to_aspect_ratio)),
        ("pad_to_aspect_ratio", bool(source.pad_to_aspect_ratio)),
        ("fill_value", float(source.fill_value)),
    )
    first = source.data_format == "channels_first"
    return _separable("resize", tuple(size), options, call, first)


def _axes(first: bool) -> tuple[int, int]:
    return (2, 3) if first else (1, 2)


def _separable(kind: str, size, options: tuple, call: LayerCall, first: bool) -> LipschitzMap:
    """The map of a resize that acts on rows and columns separately, and alike on channels."""
    state = call.state
    if state.rank != 4 or not state.fold:
        return unbounded(_NOT_BATCHED)
    if not state.dtype.startswith(("float", "bfloat")):
        return unbounded("it rounds to integers, and they jump when the input changes")
    axes = _axes(first)
    sizes = [state.shape[axis - 1] for axis in axes]
    if None in size:
        return unbounded(SIZE_VARIES)
    if None in sizes or any(state.dynamic[axis - 1] for axis in axes):
        return _of_any_image(kind, size, dict(options), call, first)
    known = _matrices(kind, tuple(int(n) for n in size), options, *sizes)
    if known is None:
        return unbounded(
            "its image is too large, or it does not act on rows and columns separately"
        )
    rows, columns, offset = known
    copied = all(np.isin(matrix, (0.0, 1.0)).all() for matrix in (rows, columns))
    layer_map = axes_map(
        dict(zip(axes, (rows, columns), strict=True)),
        call,
        "norms along rows and columns",
        margin=1.0 if copied else _MARGIN,
        offset=float(np.abs(offset).max(initial=0.0)),
    )
    # TensorFlow rounds to float32 even where it copies pixels, unless it picks the nearest.
    nearest = dict(options).get("interpolation") == "nearest"
    exact = copied and (nearest or state.dtype != "float64")
    return _with_center(layer_map, rows, columns, offset, exact, call, first)


def _of_any_image(kind: str, size, options: dict, call: LayerCall, first: bool) -> LipschitzMap:
    """The map of a resize of images of unknown size: its pixels are averages or constants."""
    if kind != "resize" or options["interpolation"] not in ("nearest", "bilinear"):
        return unbounded(SIZE_VARIES)
    offset = abs(options.get("fill_value", 0.0))
    columns = math.sqrt(size[1])
    # The square of a 2-norm is at most the largest row sum times the largest column sum.
    tokens = _MARGIN * (columns if first else 1.0)
    constants = {"l2": _MARGIN * math.sqrt(size[0]) * columns, "token": tokens, "linf": _MARGIN}
    before, width = call.state.range, call.shape[-1]
    token_range = None
    if before.bounded and width is not None:
        token_range = TokenRange(
            tokens * before.outer_radius + math.sqrt(width) * offset,
            None,
            _MARGIN * before.largest + offset,
        )
    center = CenterValue(reason="backends interpolate in float32")
    return LipschitzMap(
        constant=constants[call.norm],
        theorem="averages of pixels, for images of any size",
        range=token_range,
        center=center,
    )


def _with_center(layer_map, rows, columns, offset, exact: bool, call: LayerCall, first: bool):
    """The same map with its value at the center, which backends compute in float32."""
    known = call.state.enclosure
    if known is None:
        return layer_map
    letters = "nchw" if first else "nhwc"
    equation = f"Hh,{letters},Ww->{letters.replace('h', 'H').replace('w', 'W')}"
    value = np.einsum(equation, rows, known.value, columns, optimize=True)
    value = value + (offset if first else offset[:, :, None])
    error = 0.0
    if not exact:
        sizes = [float(np.linalg.norm(np.abs(matrix), 2)) for matrix in (rows, columns)]
        error = _ROUNDING * math.prod(sizes) * Enclosure(known.value).size
    center = CenterValue(value=value, rounding_error=error)
    return type(layer_map)(
        constant=layer_map.constant,
        theorem=layer_map.theorem,
        exact=layer_map.exact,
        range=layer_map.range,
        center=center,
    )


@functools.lru_cache(maxsize=64)
def _matrices(kind: str, size: tuple, options: tuple, height: int, width: int):
    """Matrices along rows and columns and the offset of a resize, `None` if not known."""

    def run(target: tuple) -> Callable:
        def resized(images):
            tensor = keras.ops.convert_to_tensor(images)
            if kind == "smart_resize":
                result = image_utils.smart_resize(tensor, target, data_format="channels_last")
            else:
                result = keras.ops.image.resize(
                    tensor, target, data_format="channels_last", **dict(options)
                )
            return np.asarray(keras.ops.convert_to_numpy(result), np.float64)

        return resized

    keeps_ratio = any(dict(options).get(f"{way}_to_aspect_ratio") for way in ("crop", "pad"))
    if kind == "resize" and not keeps_ratio:
        # One axis at a time: images of one column, then images of one row.
        by_rows = _probe(run((size[0], 1)), height, 1)
        by_columns = _probe(run((1, size[1])), 1, width)
        if by_rows is None or by_columns is None:
            return None
        return by_rows[0], by_columns[1], np.zeros(size)
    return _probe(run(size), height, width)


def _probe(run: Callable, height: int, width: int):
    """Matrices along rows and columns and the offset of a map of images of one channel."""
    if (height + width) * height * width > _MOST_WORK:
        return None
    offset = run(np.zeros((1, height, width, 1)))[0, :, :, 0]
    total = run(np.ones((1, height, width, 1)))[0, :, :, 0] - offset
    row, column = np.unravel_index(np.abs(total).argmax(), total.shape)
    if total[row, column] == 0.0:
        return None

    def images(axis: int, size: int, cut) -> np.ndarray:
        found = []
        count = max(1, 4_000_000 // (height * width))
        for start in range(0, size, count):
            basis = np.eye(size)[start : start + count]
            basis = basis[:, :, None] if axis == 0 else basis[:, None, :]
            batch = np.broadcast_to(basis, (len(basis), height, width))[..., None]
            found.append(cut(run(np.array(batch))[..., 0] - offset))
        return np.concatenate(found).T

    rows = images(0, height, lambda out: out[:, :, column])
    columns = images(1, width, lambda out: out[:, row, :]) / total[row, column]
    # A random image shows whether the map acts on rows and columns separately.
    image = np.random.default_rng(0).normal(size=(height, width))
    expected = run(image[None, :, :, None])[0, :, :, 0] - offset
    if not np.allclose(rows @ image @ columns.T, expected, rtol=1e-4, atol=1e-4):
        return None
    return rows, columns, offset


@register_operation("RGBToGrayscale")
def grayscale(operation, call):
    if call.state.rank != 4:
        return unbounded(_NOT_BATCHED)
    first = operation.data_format == "channels_first"
    channels = call.state.shape[0 if first else -1]
    if channels == 1:
        return identity("identity")
    if channels != 3:
        return unbounded(SIZE_VARIES)
    pixels = np.eye(3).reshape(3, 1, 1, 3)
    weights = keras.ops.convert_to_numpy(
        keras.ops.image.rgb_to_grayscale(pixels, data_format="channels_last")
    )
    matrix = np.asarray(weights, np.float64).reshape(1, 3)
    if first:
        return axes_map({1: matrix}, call, "norm of the weights of the colors")
    return matrix_map(matrix.T, None, call.norm)


@register_operation("ExtractPatches")
def patches(operation, call):
    state = call.state
    spatial = len(operation.size)
    if state.rank != spatial + 2:
        return unbounded(_NOT_BATCHED)
    strides, dilation = (
        (int(value),) * spatial if np.ndim(value) == 0 else tuple(int(v) for v in value)
        for value in (operation.strides, operation.dilation_rate)
    )
    overlap = math.prod(
        -(-k * math.gcd(s, d) // s)
        for k, s, d in zip(operation.size, strides, dilation, strict=True)
    )
    first = operation.data_format == "channels_first"
    # With channels first, a token of the output contains parts of one row of the image.
    offsets = 1 if first else math.prod(operation.size)
    constants = {"l2": math.sqrt(overlap), "token": math.sqrt(offsets), "linf": 1.0}
    before = state.range
    return LipschitzMap(
        constant=SAFETY * constants[call.norm],
        theorem="patches",
        exact=call.norm == "linf",
        range=TokenRange(SAFETY * math.sqrt(offsets) * before.outer_radius, None, before.largest),
    )
