"""Image classification with a vision Transformer: augmentation and patches inside the model."""

import keras
from keras import layers, ops

from examples.gallery import batches
from keras_lipattn import CenterNormalization, L2MultiHeadAttention, Residual, SpectralDense

IMAGE_SIZE = 24
PATCH_SIZE = 6
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
PROJECTION_DIM = 32
NUM_HEADS = 4
TRANSFORMER_UNITS = [2 * PROJECTION_DIM, PROJECTION_DIM]
TRANSFORMER_LAYERS = 2
HEAD_UNITS = [64, 32]


class Patches(layers.Layer):
    """Cuts images into patches and flattens each of them."""

    def __init__(self, patch_size, **kwargs):
        super().__init__(**kwargs)
        self.patch_size = patch_size

    def call(self, images):
        batch, height, width, channels = ops.shape(images)
        count = (height // self.patch_size) * (width // self.patch_size)
        patches = ops.image.extract_patches(images, size=self.patch_size)
        return ops.reshape(patches, (batch, count, self.patch_size**2 * channels))

    def get_config(self):
        return {**super().get_config(), "patch_size": self.patch_size}


class PatchEncoder(layers.Layer):
    """Projects patches and adds an embedding of their positions."""

    def __init__(self, num_patches, projection_dim, **kwargs):
        super().__init__(**kwargs)
        self.num_patches = num_patches
        self.projection_dim = projection_dim
        self.projection = SpectralDense(units=projection_dim)
        self.position_embedding = layers.Embedding(input_dim=num_patches, output_dim=projection_dim)

    def call(self, patches):
        positions = ops.expand_dims(ops.arange(start=0, stop=self.num_patches, step=1), axis=0)
        return self.projection(patches) + self.position_embedding(positions)

    def get_config(self):
        sizes = {"num_patches": self.num_patches, "projection_dim": self.projection_dim}
        return {**super().get_config(), **sizes}


def mlp(x, hidden_units, dropout_rate):
    for units in hidden_units:
        x = SpectralDense(units, activation=keras.activations.gelu)(x)
        x = layers.Dropout(dropout_rate)(x)
    return x


def make_model():
    augmentation = keras.Sequential(
        [
            layers.Normalization(),
            layers.Resizing(IMAGE_SIZE, IMAGE_SIZE),
            layers.RandomFlip("horizontal"),
            layers.RandomRotation(factor=0.02),
            layers.RandomZoom(height_factor=0.2, width_factor=0.2),
        ],
        name="augmentation",
    )
    augmentation.layers[0].adapt(batches.images()[0])

    inputs = keras.Input(shape=batches.IMAGE_SHAPE)
    x = augmentation(inputs)
    x = Patches(PATCH_SIZE)(x)
    x = PatchEncoder(NUM_PATCHES, PROJECTION_DIM)(x)
    for _ in range(TRANSFORMER_LAYERS):
        x1 = CenterNormalization()(x)
        attention_output = L2MultiHeadAttention(
            num_heads=NUM_HEADS,
            key_dim=PROJECTION_DIM // NUM_HEADS,
            dropout=0.1,
            lipschitz_bound=1.0,
        )(x1, x1)
        x2 = Residual(alpha=0.5)([x, attention_output])
        x3 = CenterNormalization()(x2)
        x3 = mlp(x3, hidden_units=TRANSFORMER_UNITS, dropout_rate=0.1)
        x = Residual(alpha=0.5)([x2, x3])
    x = CenterNormalization()(x)
    x = layers.Flatten()(x)
    x = layers.Dropout(0.5)(x)
    x = mlp(x, hidden_units=HEAD_UNITS, dropout_rate=0.5)
    logits = SpectralDense(batches.CLASSES)(x)
    model = keras.Model(inputs=inputs, outputs=logits, name="vision_transformer")
    model.compile(
        optimizer=keras.optimizers.AdamW(learning_rate=0.001, weight_decay=0.0001),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    )
    return model
