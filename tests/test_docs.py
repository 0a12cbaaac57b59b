"""Every example in a docstring prints what it says, and every Python block of a page runs."""

import ast
import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import keras
import numpy as np
import pytest
from helpers import documents

import keras_lipattn as kl
from tools.check_site import public_names

# For JAX, in tests_backends/test_docs.py; and one story, in tests/test_serving_guide.py.
ELSEWHERE = ("docs/backends.md", "docs/serving.md")
PROGRAMS = {k: code for k, code in documents.programs().items() if k.split(":")[0] not in ELSEWHERE}
# The names that an example may use without importing them.
NAMES = {"keras": keras, "np": np, "keras_lipattn": kl, **{n: getattr(kl, n) for n in kl.__all__}}


def docstrings() -> Iterator[doctest.DocTest]:
    package = documents.ROOT / "keras_lipattn"
    finder = doctest.DocTestFinder()
    for path in sorted(package.rglob("*.py")):
        if ">>>" not in path.read_text():
            continue
        name = ".".join(path.relative_to(documents.ROOT).with_suffix("").parts)
        module = importlib.import_module(name.removesuffix(".__init__"))
        for test in finder.find(module, globs=dict(NAMES)):
            if test.examples:
                yield test


@pytest.mark.parametrize("test", [pytest.param(test, id=test.name) for test in docstrings()])
def test_examples_in_docstrings_print_what_they_say(test, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert not report, "".join(report)


def test_examples_in_docstrings_are_found():
    source = "".join(p.read_text() for p in (documents.ROOT / "keras_lipattn").rglob("*.py"))
    found = sum(len(test.examples) for test in docstrings())
    assert found == len(re.findall(r"^\s*>>> ", source, re.MULTILINE)) > 0


@pytest.mark.parametrize("block", PROGRAMS)
def test_python_blocks_run(block, tmp_path):
    (tmp_path / "block.py").write_text(PROGRAMS[block])
    done = subprocess.run(
        [sys.executable, "block.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(documents.ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_links_between_pages_lead_to_files():
    for path in [documents.ROOT / "README.md", *(documents.ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([\w./-]+\.\w+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_every_page_is_in_the_table_of_contents():
    docs = documents.ROOT / "docs"
    pages = {str(path.relative_to(docs).with_suffix("")) for path in docs.rglob("*.md")}
    assert documents.toctree() == pages


def test_every_public_name_is_on_a_page_of_the_api():
    pages = [path.read_text() for path in (documents.ROOT / "docs" / "api").glob("*.md")]
    text = "\n".join(pages)
    whole = set(re.findall(r"automodule:: (\S+)\n   :members:", text))
    single = set(re.findall(r"auto(?:class|function|exception):: (\S+)", text))
    for name, places in public_names().items():
        modules = {place.rpartition(".")[0] for place in places}
        assert modules & whole or single & {*places}, name


@pytest.mark.parametrize("name", public_names())
def test_every_public_name_has_an_example_that_runs(name):
    module, _, attribute = public_names()[name][0].rpartition(".")
    assert ">>> " in (inspect.getdoc(getattr(importlib.import_module(module), attribute)) or "")


@pytest.mark.parametrize("page", documents.cells())
def test_cells_of_notebooks_are_python(page):
    # `make docs` runs them.
    ast.parse(documents.cells()[page])
