"""An encoder-decoder Transformer that sorts digits, with a certificate: cross-attention included.

    python examples/encoder_decoder.py --out_dir=/tmp/sorted

The encoder reads a sequence of digits. The decoder writes them in ascending order, one after the
other, from what it wrote before and from the encoder. All attention is on bounded tokens, so the
whole model has a Lipschitz constant with respect to the embeddings of both sequences, which does
not depend on their lengths.
"""

import keras
import numpy as np
from absl import app, flags
from keras import layers

import keras_lipattn as kl

_EPOCHS = flags.DEFINE_integer("epochs", 20, "Number of epochs.", lower_bound=1)
_EXAMPLES = flags.DEFINE_integer("examples", 20_000, "Number of sequences.", lower_bound=64)
_LENGTH = flags.DEFINE_integer("length", 8, "Number of digits in a sequence.", lower_bound=2)
_WIDTH = flags.DEFINE_integer("width", 64, "Size of a token.", lower_bound=8)
_CAP = flags.DEFINE_float("cap", 4.0, "Cap of the constant of every attention layer.")
_OUT_DIR = flags.DEFINE_string("out_dir", None, "Folder for the SavedModel.", required=True)

START = 10
NORM = "token"


def digits(count: int, length: int, seed: int):
    """Sequences `(count, length)`, what the decoder has written before, and what is next."""
    rng = np.random.default_rng(seed)
    given = rng.integers(0, 10, (count, length), dtype="int32")
    ordered = np.sort(given, axis=1)
    before = np.concatenate([np.full((count, 1), START, "int32"), ordered[:, :-1]], axis=1)
    return (given, before), ordered


def attention(width: int, name: str) -> kl.BoundedMultiHeadAttention:
    # In the token norm the cap needs no length.
    return kl.BoundedMultiHeadAttention(
        4,
        width // 4,
        token_radius=2.0,
        lipschitz_bound=_CAP.value,
        lipschitz_norm=NORM,
        name=name,
    )


def perceptron(x, width: int, name: str):
    y = kl.SpectralDense(2 * width, name=f"{name}_in")(x)
    return kl.SpectralDense(width, name=f"{name}_out")(kl.MaxMin(name=f"{name}_sort")(y))


def plus(x, y, name: str):
    """Half of each: its constant is at most 1 if that of the branch is."""
    return kl.Residual(0.5, name=name)([x, y])


def sorter(length: int, width: int) -> keras.Model:
    """The model: logits of the next digit at every position of the decoder."""
    given = keras.Input((length,), dtype="int32", name="given")
    before = keras.Input((length,), dtype="int32", name="before")
    x = layers.Embedding(10, width, name="digits")(given)
    x = plus(x, attention(width, "encoder")(x), "encoder_add")
    memory = plus(x, perceptron(x, width, "encoder_mlp"), "memory")
    y = layers.Embedding(START + 1, width, name="written")(before)
    y = kl.PositionEmbedding(name="positions")(y)
    own = attention(width, "decoder")(y, use_causal_mask=True)
    y = plus(y, own, "decoder_add")
    y = plus(y, attention(width, "cross")(y, memory), "cross_add")
    y = plus(y, perceptron(y, width, "decoder_mlp"), "decoder_mlp_add")
    return keras.Model([given, before], layers.Dense(10, name="logits")(y), name="sorter")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    keras.utils.set_random_seed(0)
    length = _LENGTH.value
    x, y = digits(_EXAMPLES.value, length, seed=1)
    test_x, test_y = digits(1000, length, seed=2)
    model = sorter(length, _WIDTH.value)
    model.compile(
        keras.optimizers.Adam(2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    monitor = kl.LipschitzMonitor(norm=NORM)
    model.fit(x, y, batch_size=128, epochs=_EPOCHS.value, verbose=2, callbacks=[monitor])
    _, accuracy = model.evaluate(test_x, test_y, verbose=0)
    certificate, path = kl.export_saved_model(model, _OUT_DIR.value, norm=NORM, verbose=False)
    print(certificate)
    print(f"test accuracy {accuracy:.4f}, constant {certificate.total:.4g}, exported to {path}")


if __name__ == "__main__":
    app.run(main)
