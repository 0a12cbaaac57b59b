"""What is fuzzed: each target makes a case from random numbers, runs it, and names its faults."""

import contextlib
import functools
import importlib.util
import io
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from tools.fuzz import mutations

_TOOLS = pathlib.Path(__file__).parents[1]
# Imported or run by no file, however it was changed.
MARKER = "code_ran"
_MODULE = f"import pathlib\npathlib.Path({MARKER!r}).touch()\n\ndef run(x):\n    return x\n"
# References in a model file to code that must not be taken from it.
_REFERENCES: list[Any] = [
    {"module": "fuzz_marker", "class_name": "function", "config": "run"},
    {"module": "fuzz_marker", "class_name": "run", "config": {}, "registered_name": "run"},
    {"module": "os", "class_name": "function", "config": "system"},
    {"module": "builtins", "class_name": "function", "config": "exec"},
    {"class_name": "__lambda__", "config": {"value": "4wAAAAA="}},
    "fuzz_marker",
    "os",
    "system",
    "Lambda",
]
# Returns a message about what is wrong with a case, or an empty string.
Attack = Callable[[np.random.Generator], str]


def certificates() -> Attack:
    """Certificates in JSON, changed: `Certificate.from_json` raises `ValueError` at most."""
    import keras

    import keras_lipattn as lip

    certificate = lip.certify(_classifier(keras, lip))
    text = certificate.to_json()

    def attack(rng):
        changed = mutations.changed_text(text, rng)
        try:
            read = lip.Certificate.from_json(changed)
        except ValueError:
            return ""
        # Methods that take no argument may not fail for any certificate that can be read.
        str(read)
        lip.Certificate.from_json(read.to_json())
        with contextlib.suppress(ValueError):
            radius = read.certified_radius(np.array([[2.0, 1.0, 0.0]]))
            if not (radius >= 0.0).all():
                return f"a radius of {radius}"
        return ""

    return attack


def model_files() -> Attack:
    """Model files, changed: tools/certify.py prints a table or a message, and runs no code."""
    import keras

    import keras_lipattn as lip

    pathlib.Path("fuzz_marker.py").write_text(_MODULE)
    path = pathlib.Path("model.keras")
    files = []
    for model in (_classifier(keras, lip), _with_lambda(keras)):
        model.save(path)
        files.append(path.read_bytes())

    def attack(rng):
        content = files[rng.integers(len(files))]
        kind = rng.integers(4)
        if kind == 0:
            content = mutations.changed_bytes(content, rng)
        elif kind == 1:
            content = mutations.changed_archive(content, files, rng)
        elif kind == 2 or rng.integers(4):
            content = mutations.changed_member(content, "config.json", rng, _REFERENCES)
        else:
            content = mutations.changed_member(content, "metadata.json", rng, _REFERENCES)
        path.write_bytes(content)
        return run_tool("certify", [str(path), "--nocheck"])

    return attack


def exports() -> Attack:
    """Exports with a changed file: `verify_export` never says verified, and raises nothing."""
    import keras

    import keras_lipattn as lip
    from keras_lipattn.export import verify_export

    _, path = lip.export_saved_model(_classifier(keras, lip), "exports", verbose=False)
    files = sorted(file for file in path.rglob("*") if file.is_file())

    def attack(rng):
        file = files[rng.integers(len(files))]
        whole = file.read_bytes()
        changed = mutations.changed_bytes(whole, rng)
        if changed == whole:
            return ""
        file.write_bytes(changed)
        try:
            found = verify_export(path)
        finally:
            file.write_bytes(whole)
        return f"{file} was changed: {found}" if found.verified else ""

    return attack


def certify_flags() -> Attack:
    """Flags of tools/certify.py."""
    return _flags("certify", [])


def export_flags() -> Attack:
    """Flags of tools/export_saved_model.py."""
    return _flags("export_saved_model", ["exports"])


def _flags(name: str, more: list[str]) -> Attack:
    import keras

    import keras_lipattn as lip

    _classifier(keras, lip).save("model.keras")
    pathlib.Path("text.keras").write_text("text")
    np.savez("batch.npz", x=np.ones((2, 6, 8), np.float32))
    np.savez("wrong.npz", y=np.array(["a"]), z=np.ones(3))
    tool = _tool(name)
    values = ["", "0", "1", "-1", "1e400", "nan", "inf", "-inf", "6", "7", "0.5", "x", "l2", "linf"]
    values += ["token", "full", "any", "causal", "text.keras", "batch.npz", "wrong.npz", "missing"]
    values += ["missing/file.json", ".", "os", "fuzz.no.such", "true", "out.json", "out.png", "é\0"]
    names = [flag.name for flag in tool.flags.FLAGS.get_key_flags_for_module(tool)]
    files = ["model.keras", "text.keras", "missing.keras", ".", "", "batch.npz"]

    def attack(rng):
        arguments = [files[rng.integers(len(files)) if rng.integers(4) == 0 else 0], *more]
        if rng.integers(10) == 0:
            arguments = arguments[: rng.integers(len(arguments) + 1)]
        for _ in range(rng.integers(0, 5)):
            flag = names[rng.integers(len(names))] if rng.integers(12) else "no_such_flag"
            value = values[rng.integers(len(values))]
            arguments.append(f"--{flag}={value}" if rng.integers(8) else f"--{flag}")
        return run_tool(name, arguments)

    return attack


def _classifier(keras: Any, lip: Any) -> Any:
    inputs = keras.Input((None, 8), name="x")
    attention = lip.L2MultiHeadAttention(2, 4, lipschitz_bound=1.0, max_sequence_length=6)
    x = lip.Residual(0.5)([inputs, attention(lip.CenterNormalization()(inputs))])
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, lip.SpectralDense(3)(x))


def _with_lambda(keras: Any) -> Any:
    inputs = keras.Input((8,))
    run = lambda x: (__import__("pathlib").Path("code_ran").touch(), x)[1]  # noqa: E731
    x = keras.layers.Lambda(run, output_shape=(8,))(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    pathlib.Path(MARKER).unlink(missing_ok=True)
    return model


@functools.cache
def _tool(name: str) -> Any:
    """A program in `tools` as a module. Its flags can be defined only once."""
    sys.path.insert(0, str(_TOOLS))
    spec = importlib.util.spec_from_file_location(f"fuzzed_{name}", _TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_tool(name: str, arguments: list[str]) -> str:
    """Run a tool with these arguments; what is wrong, or an empty string."""
    tool = _tool(name)
    flags = tool.flags.FLAGS
    for flag in flags.get_key_flags_for_module(tool):
        flag.unparse()
    output = io.StringIO()
    code: Any = None
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        try:
            code = tool.main(tool.parse([name, *arguments]))
        except SystemExit as error:
            code = error.code
        except tool.app.UsageError as error:
            # `app.run` prints it.
            print(error, file=output)
            code = 2
        except Exception:
            return f"{arguments}: {traceback.format_exc()}"
    if os.path.exists(MARKER):
        os.remove(MARKER)
        return f"{arguments}: code ran"
    text = output.getvalue()
    if code not in (0, 1, 2) or "Traceback" in text or (code and not text.strip()):
        return f"{arguments}: exit code {code} and {json.dumps(text[-2000:])}"
    return ""


TARGETS: dict[str, Callable[[], Attack]] = {
    "certificates": certificates,
    "model_files": model_files,
    "certify_flags": certify_flags,
    "export_flags": export_flags,
    "exports": exports,
}
