"""Rooms of the package use those on their right in CONTRIBUTING.md, never those on their left."""

import ast
import pathlib
import re

import pytest

import keras_lipattn

PACKAGE = pathlib.Path(keras_lipattn.__file__).parent
CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"


def _order():
    (line,) = re.findall(r"^- One direction only: `(.*?)`", CONTRIBUTING.read_text(), re.MULTILINE)
    return line.split(" > ")


def _imported(path):
    """Full names of what a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative name"
            yield node.module
            # A room may be what is imported.
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_every_room_has_its_place():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(_order())


@pytest.mark.parametrize("room", _order())
def test_a_room_uses_only_those_on_its_right(room):
    order = _order()
    left = order[: order.index(room)]
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        rooms = {
            name.split(".")[1]
            for name in _imported(path)
            if name is not None and name.startswith("keras_lipattn.")
        }
        assert not rooms & set(left), f"{path} imports {sorted(rooms & set(left))}"
