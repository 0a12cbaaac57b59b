"""A callback that writes the history of a training that may be interrupted."""

import csv
import os
import pathlib
import warnings
from typing import Any

import keras
import numpy as np

from keras_lipattn._whole_file import whole_file

_MISSING = "NA"


class DurableCSVLogger(keras.callbacks.Callback):
    """Writes the logs of every epoch to a CSV file, one row each, across interruptions.

    `keras.callbacks.CSVLogger` appends rows. A program that is killed between a row and its backup
    writes the row twice when it is run again, and a row longer than a buffer may stay half-written.
    Here the whole table is replaced atomically at the end of every epoch, and an epoch that is
    trained again replaces its row: a `fit` from epoch `k` on keeps the rows before `k` and drops
    those from `k` on.

    If the table cannot be written, for example because the disk is full, there is a warning, the
    file stays as it was, training continues, and the next epoch writes all rows.

    Args:
        filename: Local path of the file.
        separator: Separator of the columns.

    Raises:
        ValueError: From `fit`, if the file exists and is not such a table.

    Example:

    >>> import pathlib
    >>> model = keras.Sequential([keras.Input((4,)), SpectralDense(3)])
    >>> model.compile("adam", "mse")
    >>> x, y = np.ones((8, 4)), np.zeros((8, 3))
    >>> logger = DurableCSVLogger("history.csv")
    >>> history = model.fit(x, y, epochs=2, callbacks=[LipschitzMonitor(), logger], verbose=0)
    >>> len(pathlib.Path("history.csv").read_text().splitlines())
    3
    """

    def __init__(self, filename: str | os.PathLike, separator: str = ",") -> None:
        super().__init__()
        self.filename = filename
        self.separator = separator
        self._rows: list[dict[str, Any]] = []

    def on_train_begin(self, logs=None):
        self._rows = self._read()

    def on_epoch_end(self, epoch, logs=None):
        row = {"epoch": epoch, **{key: _cell(value) for key, value in (logs or {}).items()}}
        self._rows = [old for old in self._rows if int(old["epoch"]) < epoch] + [row]
        columns = sorted({key for row in self._rows for key in row} - {"epoch"})
        target = pathlib.Path(self.filename)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(target) as path, open(path, "w", newline="") as file:
                writer = csv.DictWriter(
                    file, ["epoch", *columns], restval=_MISSING, delimiter=self.separator
                )
                writer.writeheader()
                writer.writerows(self._rows)
        except OSError as error:
            warnings.warn(
                f"The history of epoch {epoch + 1} could not be written. Training continues, and "
                f"the next epoch writes it too. Received: {error}",
                stacklevel=2,
            )

    def _read(self) -> list[dict[str, Any]]:
        path = pathlib.Path(self.filename)
        if not path.exists():
            return []
        with open(path, newline="") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file, delimiter=self.separator))
        for row in rows:
            if None in row or None in row.values() or not str(row.get("epoch")).isdecimal():
                raise ValueError(
                    "The history file must be a table with the number of an epoch in every row. "
                    f"Move it, or pass another path. Received: {path} with the row {row}"
                )
        return rows


def _cell(value: Any) -> Any:
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else array.tolist()
