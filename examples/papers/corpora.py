"""Texts as sequences of small integers: Python's documentation, tiny Shakespeare, Penn Treebank.

The first is part of Python. The others are read from the folder that the environment variable
`LIPATTN_DATA` names:

- `tinyshakespeare.txt`: the first 90 % are for training, 5 % for validation, 5 % for testing.
- `ptb.zip`: the word-level files of Mikolov's preprocessing, `ptb.train.txt` and so on. One
  blank at the beginning and one at the end of each line go, other blanks become `_`, line ends
  stay: 5,017,482, 393,042 and 442,423 symbols.
"""

import importlib
import os
import pathlib
import typing
import zipfile

import numpy as np

NAMES = ("pydoc", "shakespeare", "ptb")
_PARTS = ("train", "valid", "test")


class Corpus(typing.NamedTuple):
    """A text in three parts.

    Attributes:
        name: one of `NAMES`.
        symbols: the different characters, in order.
        train: integers that index `symbols`, like those of the other parts.
        valid: for choosing learning rates.
        test: for the final number.
    """

    name: str
    symbols: str
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray

    def text(self, indices) -> str:
        """The characters of some integers."""
        return "".join(self.symbols[index] for index in np.asarray(indices))


def load(name: str) -> Corpus:
    """Reads a text.

    Args:
        name: One of `NAMES`.

    Returns:
        A `Corpus`.

    Raises:
        ValueError: If there is no such text.
        FileNotFoundError: If its file is not there; the message says how to provide it.
    """
    if name == "pydoc":
        return encode(name, split(_documentation()))
    if name == "shakespeare":
        return encode(name, split(_file("tinyshakespeare.txt").read_text("utf-8")))
    if name == "ptb":
        with zipfile.ZipFile(_file("ptb.zip")) as archive:
            raw = [archive.read(f"ptb.{part}.txt").decode("utf-8") for part in _PARTS]
        return encode(name, [treebank_symbols(text) for text in raw])
    raise ValueError(f"There is no such text: choose one of {NAMES}. Received: {name!r}")


def split(text: str) -> list[str]:
    """90 % for training, 5 % for validation, 5 % for testing, in the order of the text."""
    first, second = int(0.9 * len(text)), int(0.95 * len(text))
    return [text[:first], text[first:second], text[second:]]


def treebank_symbols(text: str) -> str:
    """The characters of a word-level file, blanks between words written as `_`."""
    lines = (line.removeprefix(" ").removesuffix(" ") for line in text.splitlines())
    return "".join(f"{line.replace(' ', '_')}\n" for line in lines)


def encode(name: str, parts: list[str]) -> Corpus:
    """Three strings as integers, numbered over all of them."""
    symbols = "".join(sorted(set().union(*parts)))
    numbers = {symbol: index for index, symbol in enumerate(symbols)}
    return Corpus(
        name, symbols, *(np.array([numbers[s] for s in part], np.int32) for part in parts)
    )


def frequency_nats(corpus: Corpus, given: int) -> float:
    """Nats per character of the test text by the frequencies of the training text.

    Args:
        corpus: The text.
        given: Number of characters before that are known, 0 or 1.

    Returns:
        A float. Every count begins with one.
    """
    symbols = len(corpus.symbols)

    def pairs(text):
        return text[:-1] * (symbols if given else 0) + text[1:]

    counts = 1.0 + np.bincount(pairs(corpus.train), minlength=symbols ** (given + 1))
    counts = counts.reshape(-1, symbols)
    logs = np.log(counts / counts.sum(axis=1, keepdims=True)).ravel()
    return float(-logs[pairs(corpus.test)].mean())


def _documentation():
    # Imported by name: what `pydoc help()` prints has no types.
    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n".join(topics[title] for title in sorted(topics))


def _file(name):
    folder = os.environ.get("LIPATTN_DATA")
    path = pathlib.Path(folder or "") / name
    if folder is None or not path.is_file():
        raise FileNotFoundError(
            f"This text is read from {name} in the folder that LIPATTN_DATA names; "
            "--corpus pydoc needs no file. "
            f"Received: LIPATTN_DATA={folder!r}" + (" without that file" if folder else "")
        )
    return path
