"""Speech recognition with a subclassed model: conv front end, encoder, causal decoder."""

import keras
import tensorflow as tf
from keras import layers, ops

from examples.gallery import batches
from keras_lipattn import CenterNormalization, L2MultiHeadAttention, Residual, SpectralDense


class TokenEmbedding(layers.Layer):
    def __init__(self, num_vocab=1000, maxlen=100, num_hid=64, **kwargs):
        super().__init__(**kwargs)
        self.emb = layers.Embedding(num_vocab, num_hid)
        self.pos_emb = layers.Embedding(input_dim=maxlen, output_dim=num_hid)

    def call(self, x):
        maxlen = ops.shape(x)[-1]
        x = self.emb(x)
        positions = ops.arange(start=0, stop=maxlen, step=1)
        return x + self.pos_emb(positions)


class SpeechFeatureEmbedding(layers.Layer):
    def __init__(self, num_hid=64, **kwargs):
        super().__init__(**kwargs)
        self.conv1 = layers.Conv1D(num_hid, 11, strides=2, padding="same", activation="relu")
        self.conv2 = layers.Conv1D(num_hid, 11, strides=2, padding="same", activation="relu")
        self.conv3 = layers.Conv1D(num_hid, 11, strides=2, padding="same", activation="relu")

    def call(self, x):
        return self.conv3(self.conv2(self.conv1(x)))


class TransformerEncoder(layers.Layer):
    def __init__(self, embed_dim, num_heads, feed_forward_dim, rate=0.1, **kwargs):
        super().__init__(**kwargs)
        self.att = L2MultiHeadAttention(num_heads=num_heads, key_dim=embed_dim, lipschitz_bound=1.0)
        self.ffn = keras.Sequential(
            [
                SpectralDense(feed_forward_dim, activation="relu"),
                SpectralDense(embed_dim),
            ]
        )
        self.layernorm1 = CenterNormalization()
        self.layernorm2 = layers.LayerNormalization(epsilon=1.0)
        self.dropout1 = layers.Dropout(rate)
        self.dropout2 = layers.Dropout(rate)
        self.residual1 = Residual(alpha=0.5)
        self.residual2 = Residual(alpha=0.5)

    def call(self, inputs, training=False):
        attn_output = self.att(inputs, inputs)
        attn_output = self.dropout1(attn_output, training=training)
        out1 = self.layernorm1(self.residual1([inputs, attn_output]))
        ffn_output = self.ffn(out1)
        ffn_output = self.dropout2(ffn_output, training=training)
        return self.layernorm2(self.residual2([out1, ffn_output]))


class TransformerDecoder(layers.Layer):
    def __init__(self, embed_dim, num_heads, feed_forward_dim, dropout_rate=0.1, **kwargs):
        super().__init__(**kwargs)
        self.layernorm1 = layers.LayerNormalization(epsilon=1.0)
        self.layernorm2 = CenterNormalization()
        self.layernorm3 = CenterNormalization()
        self.self_att = L2MultiHeadAttention(
            num_heads=num_heads, key_dim=embed_dim, lipschitz_bound=1.0
        )
        self.enc_att = layers.MultiHeadAttention(num_heads=num_heads, key_dim=embed_dim)
        self.self_dropout = layers.Dropout(0.5)
        self.enc_dropout = layers.Dropout(0.1)
        self.ffn_dropout = layers.Dropout(0.1)
        self.residual1 = Residual(alpha=0.5)
        self.residual2 = Residual(alpha=0.1)
        self.residual3 = Residual(alpha=0.5)
        self.ffn = keras.Sequential(
            [
                SpectralDense(feed_forward_dim, activation="relu"),
                SpectralDense(embed_dim),
            ]
        )

    def causal_attention_mask(self, batch_size, n_dest, n_src, dtype):
        i = ops.arange(n_dest)[:, None]
        j = ops.arange(n_src)
        mask = ops.cast(i >= j - n_src + n_dest, dtype)
        mask = ops.reshape(mask, [1, n_dest, n_src])
        return ops.tile(mask, (batch_size, 1, 1))

    def call(self, enc_out, target):
        input_shape = ops.shape(target)
        batch_size = input_shape[0]
        seq_len = input_shape[1]
        causal_mask = self.causal_attention_mask(batch_size, seq_len, seq_len, "bool")
        target_att = self.self_att(target, target, attention_mask=causal_mask)
        target_norm = self.layernorm1(self.residual1([target, self.self_dropout(target_att)]))
        enc_out = self.enc_att(target_norm, enc_out)
        enc_out_norm = self.layernorm2(self.residual2([target_norm, self.enc_dropout(enc_out)]))
        ffn_out = self.ffn(enc_out_norm)
        return self.layernorm3(self.residual3([enc_out_norm, self.ffn_dropout(ffn_out)]))


class Transformer(keras.Model):
    def __init__(
        self,
        num_hid=32,
        num_head=2,
        num_feed_forward=64,
        target_maxlen=100,
        num_layers_enc=2,
        num_layers_dec=1,
        num_classes=10,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.sizes = {
            "num_hid": num_hid,
            "num_head": num_head,
            "num_feed_forward": num_feed_forward,
            "target_maxlen": target_maxlen,
            "num_layers_enc": num_layers_enc,
            "num_layers_dec": num_layers_dec,
            "num_classes": num_classes,
        }
        self.loss_metric = keras.metrics.Mean(name="loss")
        self.num_layers_dec = num_layers_dec
        self.num_classes = num_classes
        self.enc_input = SpeechFeatureEmbedding(num_hid=num_hid)
        self.dec_input = TokenEmbedding(num_classes, target_maxlen, num_hid)
        self.encoder = keras.Sequential(
            [self.enc_input]
            + [
                TransformerEncoder(num_hid, num_head, num_feed_forward)
                for _ in range(num_layers_enc)
            ]
        )
        for i in range(num_layers_dec):
            setattr(self, f"dec_layer_{i}", TransformerDecoder(num_hid, num_head, num_feed_forward))
        self.classifier = SpectralDense(num_classes)

    def decode(self, enc_out, target):
        y = self.dec_input(target)
        for i in range(self.num_layers_dec):
            y = getattr(self, f"dec_layer_{i}")(enc_out, y)
        return y

    def call(self, inputs):
        source = inputs[0]
        target = inputs[1]
        x = self.encoder(source)
        y = self.decode(x, target)
        return self.classifier(y)

    def get_config(self):
        return {**super().get_config(), **self.sizes}

    @property
    def metrics(self):
        return [self.loss_metric]

    def train_step(self, data):
        x, target, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            predictions = self(x, training=True)
            one_hot = tf.one_hot(target, depth=self.num_classes)
            mask = tf.math.logical_not(tf.math.equal(target, 0))
            loss = self.compute_loss(x, one_hot, predictions, sample_weight=mask)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        self.loss_metric.update_state(loss)
        return {"loss": self.loss_metric.result()}

    def test_step(self, data):
        x, target, _ = keras.utils.unpack_x_y_sample_weight(data)
        predictions = self(x)
        one_hot = tf.one_hot(target, depth=self.num_classes)
        mask = tf.math.logical_not(tf.math.equal(target, 0))
        loss = self.compute_loss(x, one_hot, predictions, sample_weight=mask)
        self.loss_metric.update_state(loss)
        return {"loss": self.loss_metric.result()}


def make_model():
    model = Transformer(target_maxlen=batches.TARGET_LENGTH, num_classes=batches.CHARACTERS)
    model.compile(
        optimizer=keras.optimizers.Adam(0.001),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
    )
    return model
