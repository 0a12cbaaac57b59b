"""Builds a page that runs the classifier of `make demo` in a browser and attacks it there.

    python -m tools.playground

It needs the results of `examples/digits.py` in --demo and `npm ci` in this folder. The page is
--out_dir/index.html. It loads nothing from the network, and works from a file too. The program also
writes expected.json there, the answers of Keras for `npm test`.
"""

import base64
import dataclasses
import gzip
import json
import pathlib
import shutil
from typing import Any

import keras
import numpy as np
import onnx
import tensorflow as tf
import tf2onnx
from absl import app, flags, logging

import keras_lipattn as kl
from examples.image_data import ImageData, load_images

_DEMO = flags.DEFINE_string("demo", "build/playground_demo", "folder of examples/digits.py")
_OUT_DIR = flags.DEFINE_string("out_dir", "build/playground", "folder of the page")
_DATA_DIR = flags.DEFINE_string("data_dir", "build/data", "folder of prepared data sets")

_HERE = pathlib.Path(__file__).parent
_RUNTIME = _HERE / "node_modules" / "onnxruntime-web" / "dist"
_SCRIPT = "ort.wasm.min.js"
_CLASSES = 10
_SAMPLES_OF_EACH_CLASS = 2
_OPSET = 17


@dataclasses.dataclass(frozen=True)
class Demo:
    """The results of `examples/digits.py`: the Keras model, and its newest export."""

    model: keras.Model
    export: pathlib.Path
    certificate: kl.Certificate


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are understood. Received: {argv[1:]}")
    logging.set_verbosity(logging.ERROR)
    if not _RUNTIME.is_dir():
        raise SystemExit(f"onnxruntime-web is missing: run `npm ci` in {_HERE}")
    demo = read_demo(pathlib.Path(_DEMO.value))
    data = load_images("digits", _DATA_DIR.value)
    out_dir = pathlib.Path(_OUT_DIR.value)
    out_dir.mkdir(parents=True, exist_ok=True)
    for path in [*(_HERE / "page").iterdir(), _RUNTIME / _SCRIPT]:
        shutil.copy(path, out_dir)
    runtime = {
        suffix: _packed((_RUNTIME / f"ort-wasm-simd-threaded.{suffix}").read_bytes())
        for suffix in ("mjs", "wasm")
    }
    _write_script(out_dir / "runtime.js", "RUNTIME", runtime)
    images, labels = samples(data)
    content = {
        "side": images.shape[1],
        "total": demo.certificate.total,
        "certified": _packed(certified_onnx(demo.export)),
        "gradient": _packed(gradient_onnx(demo.export)),
        "samples": [
            {"label": int(label), "pixels": image.ravel().tolist()}
            for image, label in zip(images, labels, strict=True)
        ],
    }
    _write_script(out_dir / "data.js", "DATA", content)
    (out_dir / "expected.json").write_text(json.dumps(expected(demo, images)))
    size = sum(path.stat().st_size for path in out_dir.iterdir())
    print(f"wrote {out_dir / 'index.html'}, {size / 2**20:.1f} MiB in all")


def read_demo(folder: pathlib.Path) -> Demo:
    """Read the results of `examples/digits.py` from their folder."""
    versions = [path for path in (folder / "saved_model").glob("*") if path.name.isdigit()]
    if not versions or not (folder / "model.keras").exists():
        raise SystemExit(f"Run `python examples/digits.py --out_dir={folder}` first.")
    certificate = kl.Certificate.from_json((folder / "certificate.json").read_text())
    model = keras.saving.load_model(folder / "model.keras")
    if not certificate.matches(model):
        raise SystemExit(f"The certificate in {folder} is not that of the model there.")
    return Demo(model, max(versions, key=lambda path: int(path.name)), certificate)


def samples(data: ImageData) -> tuple[np.ndarray, np.ndarray]:
    """The first test images of each class, in the order of the classes."""
    images, labels = data.test
    rows = [np.flatnonzero(labels == label)[:_SAMPLES_OF_EACH_CLASS] for label in range(_CLASSES)]
    chosen = np.concatenate(rows)
    return images[chosen], labels[chosen]


def expected(demo: Demo, images: np.ndarray) -> list[dict[str, Any]]:
    """Classes by Keras, and radii by the certificate without the allowance for rounding."""
    logits = demo.model.predict(images, verbose=0)
    radii = demo.certificate.certified_radius(logits)
    return [
        {"class": int(row.argmax()), "radius": float(radius)}
        for row, radius in zip(logits, radii, strict=True)
    ]


def certified_onnx(export: pathlib.Path) -> bytes:
    """The signature `certified` of an export as ONNX."""
    certified = tf.saved_model.load(str(export)).signatures["certified"]
    image = certified.structured_input_signature[1]["image"]
    function = tf.function(lambda image: certified(image=image))
    return _converted(function, tf.TensorSpec(image.shape, image.dtype, "image"))


def gradient_onnx(export: pathlib.Path) -> bytes:
    """The logits of an export and the gradient of their product with a direction, as ONNX.

    onnxruntime-web has no gradients, so the backward pass is part of the graph.
    """
    certified = tf.saved_model.load(str(export)).signatures["certified"]
    image = certified.structured_input_signature[1]["image"]

    @tf.function
    def differentiate(image, direction):
        with tf.GradientTape() as tape:
            tape.watch(image)
            logits = certified(image=image)["logits"]
            product = tf.reduce_sum(logits * direction)
        return {"logits": logits, "gradient": tape.gradient(product, image)}

    return _converted(
        differentiate,
        tf.TensorSpec(image.shape, image.dtype, "image"),
        tf.TensorSpec((None, _CLASSES), image.dtype, "direction"),
    )


def _converted(function: Any, *signature: tf.TensorSpec) -> bytes:
    model, _ = tf2onnx.convert.from_function(function, input_signature=signature, opset=_OPSET)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def _write_script(path: pathlib.Path, name: str, content: dict[str, Any]) -> None:
    """Write data as a script: a page that is a file may not read other files."""
    path.write_text(f"const {name} = {json.dumps(content)};\n")


if __name__ == "__main__":
    app.run(main)
