"""Conversion of encoders of keras-hub, where it is installed."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_lipattn as kl

keras_hub = pytest.importorskip("keras_hub", reason="keras-hub is not installed")


def encoder():
    inputs = keras.Input((6, 8))
    return keras.Model(inputs, keras_hub.layers.TransformerEncoder(16, 2, name="encoder")(inputs))


def vision():
    return keras_hub.models.ViTBackbone(
        image_shape=(16, 16, 3),
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=16,
    )


@pytest.mark.parametrize(
    "make, shape, paths",
    [
        (encoder, (2, 6, 8), ("encoder/self_attention_layer",)),
        (
            vision,
            (2, 16, 16, 3),
            tuple(f"vit_encoder/transformer_block_{index}/mha" for index in (1, 2)),
        ),
    ],
)
def test_its_attention_is_replaced_saved_and_loaded(make, shape, paths, tmp_path):
    old = make()
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    conversion = kl.convert_attention(old, x)
    assert conversion.replaced == paths and conversion.kept == {}
    assert isinstance(conversion.model, type(old))
    kinds = {type(layer) for layer in conversion.model._flatten_layers()}
    assert kl.L2MultiHeadAttention in kinds and layers.MultiHeadAttention not in kinds
    conversion.model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(np.array(again(x)), np.array(conversion.model(x)))
