"""Exports in a program in C, which has no Python in it."""

import os
import pathlib
import shutil
import struct
import subprocess

import numpy as np
import pytest
import tensorflow as tf
from helpers import documents
from helpers.runtime_contract import RuntimeContract, signature_of, subject  # noqa: F401

COMPILER = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
LIBRARIES = pathlib.Path(tf.sysconfig.get_lib())
NAMES = ["libtensorflow_cc.so.2", "libtensorflow_framework.so.2"]
pytestmark = pytest.mark.skipif(
    COMPILER is None or not all((LIBRARIES / name).exists() for name in NAMES),
    reason="needs a C compiler and the C library of TensorFlow",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "serve"
    source = documents.ROOT / "tests" / "helpers" / "serve.c"
    flags = ["-std=c11", "-Wall", "-Werror", "-O1", "-I", tf.sysconfig.get_include()]
    libraries = ["-L", LIBRARIES, *(f"-l:{name}" for name in NAMES), f"-Wl,-rpath,{LIBRARIES}"]
    subprocess.run([str(COMPILER), *flags, source, *libraries, "-o", path], check=True)
    return path


def write(arrays):
    """Arrays as the program reads them."""
    parts = []
    for array in arrays:
        kind = tf.as_dtype(array.dtype).as_datatype_enum
        parts.append(struct.pack(f"=2i{array.ndim}q", kind, array.ndim, *array.shape))
        parts.append(np.ascontiguousarray(array).tobytes())
    return b"".join(parts)


def read(file, count):
    """`count` arrays from an open file."""
    arrays = []
    for _ in range(count):
        kind, rank = struct.unpack("=2i", file.read(8))
        shape = struct.unpack(f"={rank}q", file.read(8 * rank))
        dtype = np.dtype(tf.as_dtype(kind).as_numpy_dtype)
        size = dtype.itemsize * int(np.prod(shape))
        arrays.append(np.frombuffer(file.read(size), dtype).reshape(shape))
    return arrays


class TestC(RuntimeContract):
    @pytest.fixture(scope="class")
    @classmethod
    def serve(cls, subject, folder, program):  # noqa: F811
        signature = signature_of(subject.path, "certified")
        inputs, outputs = dict(signature.inputs), dict(signature.outputs)
        names = [entry.name for entry in (*inputs.values(), *outputs.values())]

        def serve(*requests):
            content = [write(arrays[name] for name in inputs) for arrays in requests]
            (folder / "requests").write_bytes(b"".join(content))
            files = [folder / "requests", folder / "answers"]
            subprocess.run(
                [program, subject.path, *files, str(len(inputs)), *names], check=True, timeout=600
            )
            with open(folder / "answers", "rb") as file:
                for _ in requests:
                    (served,) = struct.unpack("=i", file.read(4))
                    if not served:
                        raise RuntimeError("The request was refused.")
                    yield dict(zip(outputs, read(file, len(outputs)), strict=True))

        # One start of the program for all requests: it takes seconds.
        requests = {**subject.ordinary, **subject.hostile, "two": subject.request(2)}
        answers = list(serve(*requests.values()))
        known = {write(r.values()): a for r, a in zip(requests.values(), answers, strict=True)}
        return lambda arrays: known[write(arrays.values())]
