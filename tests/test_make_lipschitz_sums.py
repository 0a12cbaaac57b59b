"""Sums in the code of layers stay sums, and `make_lipschitz` says so, with the remedy."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

import keras
import numpy as np
import pytest
from helpers.ordinary_models import CLASSES, FEATURES, KINDS, TOKENS, AddsItself, register
from keras import layers

import keras_lipattn as kl

# Keras warns when it loads layers without `build`, whose state it makes in their first call.
pytestmark = pytest.mark.filterwarnings("ignore:.*`?build:UserWarning")


@register
class Adding(layers.Layer):
    """A block whose sums are in its own code, or layers, before or after its normalizations."""

    def __init__(self, norm="pre", add="code", **kwargs):
        super().__init__(**kwargs)
        self.norm, self.add = norm, add
        self.supports_masking = True
        self.attention = layers.MultiHeadAttention(2, 4)
        self.dense = layers.Dense(FEATURES, "gelu")
        self.norms = [layers.LayerNormalization() for _ in range(2)]
        # A block that adds in its code does not call them. Its operations have the same names.
        self.adds = [layers.Add(name=name) for name in ("add", "add_1")]

    def build(self, input_shape):
        self.attention.build(input_shape, input_shape)
        for layer in (self.dense, *self.norms):
            layer.build(input_shape)

    def call(self, x):
        for norm, add, branch in zip(
            self.norms, self.adds, (lambda y: self.attention(y, y), self.dense), strict=True
        ):
            y = branch(norm(x) if self.norm == "pre" else x)
            if self.add == "layers" or (self.add == "first" and add is self.adds[0]):
                x = add([x, y])
            else:
                x = layers.Add()([x, y]) if self.add == "created" else x + y
            x = norm(x) if self.norm == "post" else x
        return x

    def get_config(self):
        return {**super().get_config(), "norm": self.norm, "add": self.add}


def encoder(norm, add, last_norm, masking=False):
    inputs = x = keras.Input((TOKENS, FEATURES))
    x = layers.Masking(name="masking")(x) if masking else x
    for index in range(3):
        x = Adding(norm, add, name=f"block{index}")(x)
    x = layers.LayerNormalization(name="last")(x) if last_norm else x
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(x)))


@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("last_norm", [False, True])
@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_sums_in_the_code_of_a_layer_are_listed_with_their_remedy(norm, last_norm, masking):
    unbounded = {"masking"} if masking else set()
    result = kl.make_lipschitz(encoder(norm, "code", last_norm, masking))
    blocks = {f"block{index}" for index in range(3)}
    # Not the `Add` layers that are not called.
    assert set(result.kept) == blocks | unbounded, str(result)
    for path in blocks:
        assert "2 sums" in result.kept[path] and "keras.layers.Add()" in result.kept[path]
        assert result.kept[path] in str(result)
    scaled = [text for text in result.replaced.values() if "Rescaling" in text]
    assert bool(scaled) == (norm != "none" or last_norm)
    assert all("sums in code, see `kept`" in text for text in scaled)
    # The remedy helps.
    followed = kl.make_lipschitz(encoder(norm, "layers", last_norm, masking))
    assert set(followed.kept) == unbounded
    changes = [*followed.replaced.values()]
    assert changes.count("Add -> Residual") == 6
    assert not any("Rescaling" in text for text in changes)


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_one_sum_in_code_is_listed_where_another_one_is_a_layer(norm):
    result = kl.make_lipschitz(encoder(norm, "first", True))
    assert set(result.kept) == {f"block{index}" for index in range(3)}
    assert all("1 sum `x + y` runs" in text for text in result.kept.values())
    assert [*result.replaced.values()].count("Add -> Residual") == 3


def test_a_sum_in_the_code_of_a_layer_that_the_user_keeps_is_part_of_its_entry():
    result = kl.make_lipschitz(encoder("pre", "code", False), keep=["block0", "block1"])
    assert result.kept["block0"].startswith("it is named in `keep`")
    assert [path for path, text in result.kept.items() if "sums" in text] == ["block2"]


def test_a_sum_by_a_layer_that_is_created_in_the_call_is_listed_with_its_remedy():
    result = kl.make_lipschitz(encoder("pre", "created", True))
    for index in range(3):
        assert "create the layer in `__init__`" in result.kept[f"block{index}"]


def test_sums_in_the_code_of_the_model_are_listed_under_its_name():
    model = AddsItself(name="whole")
    model(np.zeros((1, FEATURES), "float32"))
    assert list(kl.make_lipschitz(model).kept) == ["whole"]


def test_the_report_names_the_new_model_and_the_next_steps():
    text = str(kl.make_lipschitz(KINDS["conv1d"]()))
    assert "`conversion.model`, must be trained" in text and "`certify(conversion.model)`" in text
