"""Object detection with a vision Transformer that outputs the corners of one box."""

import keras
from keras import layers, ops

from examples.gallery import batches
from keras_lipattn import CenterNormalization, L2MultiHeadAttention, Residual, SpectralDense

PATCH_SIZE = 4
PROJECTION_DIM = 32
NUM_HEADS = 4
TRANSFORMER_UNITS = [2 * PROJECTION_DIM, PROJECTION_DIM]
TRANSFORMER_LAYERS = 2
HEAD_UNITS = [64, 32, 16]


class Patches(layers.Layer):
    def __init__(self, patch_size, **kwargs):
        super().__init__(**kwargs)
        self.patch_size = patch_size

    def call(self, images):
        batch, height, width, channels = ops.shape(images)
        rows, columns = height // self.patch_size, width // self.patch_size
        patches = ops.image.extract_patches(images, size=self.patch_size)
        return ops.reshape(patches, (batch, rows * columns, self.patch_size**2 * channels))

    def get_config(self):
        return {**super().get_config(), "patch_size": self.patch_size}


class PatchEncoder(layers.Layer):
    def __init__(self, num_patches, projection_dim, **kwargs):
        super().__init__(**kwargs)
        self.num_patches = num_patches
        self.projection_dim = projection_dim
        self.projection = SpectralDense(units=projection_dim)
        self.position_embedding = layers.Embedding(input_dim=num_patches, output_dim=projection_dim)

    def call(self, patch):
        positions = ops.expand_dims(ops.arange(start=0, stop=self.num_patches, step=1), axis=0)
        projected_patches = self.projection(patch)
        return projected_patches + self.position_embedding(positions)

    def get_config(self):
        sizes = {"num_patches": self.num_patches, "projection_dim": self.projection_dim}
        return {**super().get_config(), **sizes}


def mlp(x, hidden_units, dropout_rate):
    for units in hidden_units:
        x = SpectralDense(units, activation=keras.activations.gelu)(x)
        x = layers.Dropout(dropout_rate)(x)
    return x


def make_model():
    height, width, _ = batches.IMAGE_SHAPE
    num_patches = (height // PATCH_SIZE) * (width // PATCH_SIZE)
    inputs = keras.Input(shape=batches.IMAGE_SHAPE)
    patches = Patches(PATCH_SIZE)(inputs)
    encoded_patches = PatchEncoder(num_patches, PROJECTION_DIM)(patches)
    for _ in range(TRANSFORMER_LAYERS):
        x1 = CenterNormalization()(encoded_patches)
        attention_output = L2MultiHeadAttention(
            num_heads=NUM_HEADS, key_dim=PROJECTION_DIM, dropout=0.1, lipschitz_bound=1.0
        )(x1, x1)
        x2 = Residual(alpha=0.5)([encoded_patches, attention_output])
        x3 = CenterNormalization()(x2)
        x3 = mlp(x3, hidden_units=TRANSFORMER_UNITS, dropout_rate=0.1)
        encoded_patches = Residual(alpha=0.5)([x2, x3])
    representation = CenterNormalization()(encoded_patches)
    representation = layers.Flatten()(representation)
    representation = layers.Dropout(0.3)(representation)
    features = mlp(representation, hidden_units=HEAD_UNITS, dropout_rate=0.3)
    bounding_box = SpectralDense(4)(features)
    model = keras.Model(inputs=inputs, outputs=bounding_box, name="object_detection")
    model.compile(
        optimizer=keras.optimizers.AdamW(learning_rate=0.001, weight_decay=0.0001),
        loss=keras.losses.MeanSquaredError(),
    )
    return model
