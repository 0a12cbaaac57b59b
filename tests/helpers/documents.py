"""The Python blocks of the documentation as programs."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]

_FIT = """
import keras
import numpy as np
from keras_lipattn import L2MultiHeadAttention, LipschitzMonitor, SpectralDense

x = np.random.default_rng(0).normal(size=(16, 6, 8)).astype("float32")
y = x[:, :, :3].copy()

def build_model():
    return keras.Sequential([keras.Input((6, 8)), L2MultiHeadAttention(2, 4), SpectralDense(3)])
"""

# What a page takes for granted, such as the reader's model and data.
SETUP = {
    "docs/backends.md": _FIT,
    "docs/distribution.md": _FIT
    + """
import tensorflow as tf
from keras_lipattn import export_saved_model
from keras_lipattn.distribution import SharedBackup, is_chief, multi_worker

dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
""",
    "docs/interruptions.md": _FIT
    + """
model = build_model()
model.compile("adam", "mse")
class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 2
    def __getitem__(self, index):
        return x[8 * index : 8 * index + 8], y[8 * index : 8 * index + 8]
data = Batches()
""",
}


def cells() -> dict[str, str]:
    """Maps each notebook to the Python of its cells, which `make docs` runs."""
    found = {}
    for path in sorted((ROOT / "docs").rglob("*.md")):
        pattern = r"^```\{code-cell\} python\n((?::[^\n]*\n)*)(.*?)^```"
        blocks = re.findall(pattern, path.read_text(), re.DOTALL | re.MULTILINE)
        if blocks:
            found[str(path.relative_to(ROOT))] = "\n".join(block for _, block in blocks)
    return found


def toctree() -> set[str]:
    """The pages that a table of contents of the site names, without their endings."""
    docs = ROOT / "docs"
    listed = {"index"}
    for path in docs.rglob("*.md"):
        for block in re.findall(
            r"^```\{toctree\}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE
        ):
            entries = (line for line in block.split("\n") if line and not line.startswith(":"))
            listed |= {str((path.parent / entry).relative_to(docs)) for entry in entries}
    return listed


def programs() -> dict[str, str]:
    """Maps `"page:number"` to a Python block of a page, after the set-up of the page."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = {}
    for path in files:
        page = str(path.relative_to(ROOT))
        blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
        found |= {f"{page}:{i}": SETUP.get(page, "") + block for i, block in enumerate(blocks)}
    return found
