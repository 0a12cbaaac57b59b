"""The code in the documentation runs as printed."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BLOCKS = [
    pytest.param(code, id=f"{path}:{number}")
    for path in ("docs/certification.md",)
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", (ROOT / path).read_text(), re.DOTALL | re.MULTILINE)
    )
]


@pytest.mark.parametrize("code", BLOCKS)
def test_code_blocks_run(code):
    exec(compile(code, "block", "exec"), {"__name__": "block"})
