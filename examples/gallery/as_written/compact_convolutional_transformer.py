"""Compact convolutional Transformer: conv tokenizer, stochastic depth, sequence pooling."""

import keras
from keras import layers, ops

from examples.gallery import batches
from keras_lipattn import L2MultiHeadAttention

CONV_CHANNELS = [16, 32]
PROJECTION_DIM = 32
NUM_HEADS = 2
TRANSFORMER_UNITS = [PROJECTION_DIM, PROJECTION_DIM]
TRANSFORMER_LAYERS = 2
STOCHASTIC_DEPTH_RATE = 0.1


class CCTTokenizer(layers.Layer):
    def __init__(self, channels, kernel_size=3, padding=1, pooling_size=3, **kwargs):
        super().__init__(**kwargs)
        self.conv_model = keras.Sequential()
        for filters in channels:
            self.conv_model.add(
                layers.Conv2D(
                    filters,
                    kernel_size,
                    padding="valid",
                    use_bias=False,
                    activation="relu",
                    kernel_initializer="he_normal",
                )
            )
            self.conv_model.add(layers.ZeroPadding2D(padding))
            self.conv_model.add(layers.MaxPooling2D(pooling_size, strides=2, padding="same"))

    def call(self, images):
        outputs = self.conv_model(images)
        _, height, width, channels = ops.shape(outputs)
        return ops.reshape(outputs, (-1, height * width, channels))


class PositionEmbedding(layers.Layer):
    def __init__(self, sequence_length, initializer="glorot_uniform", **kwargs):
        super().__init__(**kwargs)
        self.sequence_length = sequence_length
        self.initializer = keras.initializers.get(initializer)

    def build(self, input_shape):
        self.position_embeddings = self.add_weight(
            shape=(self.sequence_length, input_shape[-1]),
            initializer=self.initializer,
            name="embeddings",
            trainable=True,
        )

    def call(self, inputs, start_index=0):
        shape = ops.shape(inputs)
        positions = ops.convert_to_tensor(self.position_embeddings)
        positions = ops.slice(positions, (start_index, 0), (shape[-2], shape[-1]))
        return ops.broadcast_to(positions, shape)

    def get_config(self):
        initializer = keras.initializers.serialize(self.initializer)
        config = {"sequence_length": self.sequence_length, "initializer": initializer}
        return {**super().get_config(), **config}


class SequencePooling(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = layers.Dense(1)

    def call(self, x):
        weights = ops.softmax(self.attention(x), axis=1)
        weights = ops.transpose(weights, axes=(0, 2, 1))
        return ops.squeeze(ops.matmul(weights, x), axis=-2)


class StochasticDepth(layers.Layer):
    def __init__(self, drop_prob, **kwargs):
        super().__init__(**kwargs)
        self.drop_prob = drop_prob
        self.seed_generator = keras.random.SeedGenerator(1337)

    def call(self, x, training=None):
        if not training:
            return x
        keep_prob = 1 - self.drop_prob
        shape = (ops.shape(x)[0],) + (1,) * (len(x.shape) - 1)
        kept = keep_prob + keras.random.uniform(shape, 0, 1, seed=self.seed_generator)
        return (x / keep_prob) * ops.floor(kept)


def mlp(x, hidden_units, dropout_rate):
    for units in hidden_units:
        x = layers.Dense(units, activation=ops.gelu)(x)
        x = layers.Dropout(dropout_rate)(x)
    return x


def make_model():
    height, width, _ = batches.IMAGE_SHAPE
    augmentation = keras.Sequential(
        [
            layers.Rescaling(scale=1.0 / 255),
            layers.RandomCrop(height, width),
            layers.RandomFlip("horizontal"),
        ],
        name="augmentation",
    )
    inputs = layers.Input(batches.IMAGE_SHAPE)
    x = augmentation(inputs)
    encoded_patches = CCTTokenizer(CONV_CHANNELS)(x)
    encoded_patches += PositionEmbedding(encoded_patches.shape[1])(encoded_patches)
    for i in range(TRANSFORMER_LAYERS):
        rate = STOCHASTIC_DEPTH_RATE * i / (TRANSFORMER_LAYERS - 1)
        x1 = layers.LayerNormalization(epsilon=1e-5)(encoded_patches)
        attention_output = L2MultiHeadAttention(
            num_heads=NUM_HEADS, key_dim=PROJECTION_DIM, dropout=0.1, lipschitz_bound=1.0
        )(x1, x1)
        attention_output = StochasticDepth(rate)(attention_output)
        x2 = layers.Add()([attention_output, encoded_patches])
        x3 = layers.LayerNormalization(epsilon=1e-5)(x2)
        x3 = mlp(x3, hidden_units=TRANSFORMER_UNITS, dropout_rate=0.1)
        x3 = StochasticDepth(rate)(x3)
        encoded_patches = layers.Add()([x3, x2])
    representation = layers.LayerNormalization(epsilon=1e-5)(encoded_patches)
    weighted_representation = SequencePooling()(representation)
    logits = layers.Dense(batches.CLASSES)(weighted_representation)
    model = keras.Model(inputs, logits, name="compact_convolutional_transformer")
    model.compile(
        optimizer=keras.optimizers.AdamW(learning_rate=0.001, weight_decay=0.0001),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model
