"""Subpackages import only what stands to their right in CONTRIBUTING.md, never to their left."""

import ast
import pathlib
import re

import pytest

import keras_lipattn as kl

PACKAGE = pathlib.Path(kl.__file__).parent
CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"


def _order():
    (line,) = re.findall(r"^- One direction only: `(.*?)`", CONTRIBUTING.read_text(), re.MULTILINE)
    return line.split(" > ")


def _files(subpackage):
    """Files of a subpackage, or of a public module in its place."""
    module = PACKAGE / f"{subpackage}.py"
    return [module] if module.exists() else sorted((PACKAGE / subpackage).rglob("*.py"))


def _imported(path):
    """Full names of everything that a file imports, at any level."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative name"
            yield node.module
            # The imported name may be a subpackage.
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_every_subpackage_and_public_module_has_its_place():
    subpackages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("[!_]*.py")} - {"version"}
    assert subpackages | modules == set(_order())


@pytest.mark.parametrize("subpackage", _order())
def test_a_subpackage_imports_only_what_stands_to_its_right(subpackage):
    order = _order()
    left = order[: order.index(subpackage)]
    files = _files(subpackage)
    assert files
    for path in files:
        imported = {
            name.split(".")[1]
            for name in _imported(path)
            if name is not None and name.startswith("keras_lipattn.")
        }
        assert not imported & set(left), f"{path} imports {sorted(imported & set(left))}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_module_has_the_name_of_a_function_in_it(path):
    # A function would hide its module where both are imported.
    functions = [
        node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    assert path.stem not in functions


def test_no_layer_has_a_method_that_torch_modules_own():
    # On PyTorch every Keras layer is a `torch.nn.Module`, whose `forward` Keras defines.
    owned = {"forward", "train", "eval", "apply", "to", "float", "double", "half", "modules"}
    for name in kl.layers.__all__:
        layer = getattr(kl.layers, name)
        if isinstance(layer, type):
            defined = {name for parent in layer.__mro__ for name in vars(parent)}
            assert not owned & defined
