"""Models in the style of the public Keras examples, small enough to train in seconds.

Each model is there twice, as a module with `make_model()` which returns it compiled:

- `as_written`: as its author would have it, with `L2MultiHeadAttention` under a cap where
  `keras.layers.MultiHeadAttention` stood for self-attention. Most of its layers create their
  sublayers in `__init__` and have no `build()`.
- `edited`: after the edits that its certificate proposes, such as `CenterNormalization` for
  `LayerNormalization`. The difference of the two files is what a user has to change.

`python -m tools.gallery` runs both through training, saving, certification and export.
"""

from examples.gallery.models import EXAMPLES, VERSIONS, Example

__all__ = ["EXAMPLES", "VERSIONS", "Example"]
