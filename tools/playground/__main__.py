"""Builds a page that runs the classifier of `make demo` in a browser and attacks it there.

    make playground

It needs the results of `examples/digits.py` in --demo and the packages of package.json in
--node_modules. The page is --out_dir/index.html. It loads nothing from the network, and works from
a file too. The program also writes expected.json there, the answers of Keras for test.mjs.
"""

import base64
import gzip
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import onnx
import tensorflow as tf
import tf2onnx
from absl import app, flags, logging
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

import keras_lipattn as kl

_DEMO = flags.DEFINE_string("demo", "build/playground_demo", "folder of examples/digits.py")
_OUT_DIR = flags.DEFINE_string("out_dir", "build/playground", "folder of the page")
_NODE_MODULES = flags.DEFINE_string(
    "node_modules", "build/playground_npm/node_modules", "folder with onnxruntime-web"
)

_PAGE = pathlib.Path(__file__).parent / "page"
_SCRIPT = "ort.wasm.min.js"
_OPSET = 17
# Of an attack, toward each other class.
_STARTS = 2


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are understood. Received: {argv[1:]}")
    logging.set_verbosity(logging.ERROR)
    demo, out_dir = pathlib.Path(_DEMO.value), pathlib.Path(_OUT_DIR.value)
    runtime_dir = pathlib.Path(_NODE_MODULES.value) / "onnxruntime-web" / "dist"
    if not runtime_dir.is_dir():
        raise SystemExit("onnxruntime-web is missing: run `make playground`, which installs it.")
    versions = [path for path in (demo / "saved_model").glob("*") if path.name.isdigit()]
    if not versions:
        raise SystemExit(f"Run `python examples/digits.py --out_dir={demo}` first.")
    export = max(versions, key=lambda path: int(path.name))
    certificate = kl.Certificate.from_json(
        (export / "assets.extra" / "certificate.json").read_text()
    )
    with np.load(demo / "requests.npz") as requests:
        images, labels, logits = requests["image"], requests["label"], requests["logits"]
    out_dir.mkdir(parents=True, exist_ok=True)
    for path in [*_PAGE.iterdir(), runtime_dir / _SCRIPT]:
        shutil.copy(path, out_dir)
    runtime = {
        suffix: _packed((runtime_dir / f"ort-wasm-simd-threaded.{suffix}").read_bytes())
        for suffix in ("mjs", "wasm")
    }
    _write_script(out_dir / "runtime.js", "RUNTIME", runtime)
    content = {
        "side": images.shape[1],
        "classes": logits.shape[-1],
        "total": certificate.total,
        "certified": _packed(certified_onnx(export)),
        "gradient": _packed(gradient_onnx(export, _STARTS * (logits.shape[-1] - 1))),
        "starts": _STARTS,
        "samples": [
            {"label": int(label), "pixels": image.ravel().tolist()}
            for image, label in zip(images, labels, strict=True)
        ],
    }
    _write_script(out_dir / "data.js", "DATA", content)
    # By Keras, without the allowance for rounding.
    expected = [
        {"class": int(row.argmax()), "radius": float(radius)}
        for row, radius in zip(logits, certificate.certified_radius(logits), strict=True)
    ]
    (out_dir / "expected.json").write_text(json.dumps(expected))
    size = sum(path.stat().st_size for path in out_dir.iterdir())
    print(f"wrote {out_dir / 'index.html'}, {size / 2**20:.1f} MiB in all")


def certified_onnx(export: pathlib.Path) -> bytes:
    """The signature `certified` of an export as ONNX."""
    # Kept, since its functions do not keep their variables.
    loaded = tf.saved_model.load(str(export))
    certified = loaded.signatures["certified"]
    image = certified.structured_input_signature[1]["image"]
    function = tf.function(lambda image: certified(image=image))
    return _converted(function, tf.TensorSpec(image.shape, image.dtype, "image"))


def gradient_onnx(export: pathlib.Path, batch: int) -> bytes:
    """The logits of an export and the gradient of their product with a direction, as ONNX.

    onnxruntime-web has no gradients, so the backward pass is part of the graph. It takes batches of
    one size: tf2onnx does not convert gradients of sums over unknown shapes.
    """
    loaded = tf.saved_model.load(str(export))
    certified = loaded.signatures["certified"]
    frozen = convert_variables_to_constants_v2(certified)
    graph = frozen.graph.as_graph_def()
    (served,) = frozen.inputs
    outputs = dict(zip(sorted(certified.structured_outputs), frozen.outputs, strict=True))
    logits = outputs["logits"]

    @tf.function
    def differentiate(image, direction):
        (result,) = tf.graph_util.import_graph_def(
            graph, input_map={served.name: image}, return_elements=[logits.name]
        )
        (gradient,) = tf.gradients(tf.reduce_sum(result * direction), image)
        return {"logits": result, "gradient": gradient}

    return _converted(
        differentiate,
        tf.TensorSpec((batch, *served.shape[1:]), served.dtype, "image"),
        tf.TensorSpec((batch, *logits.shape[1:]), served.dtype, "direction"),
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
