"""Training and testing one character-level model, and a file of what is done already."""

import json
import math
import pathlib
import time
import typing

import char_model
import keras
import numpy as np
import tensorflow as tf

from keras_lipattn import (
    BoundedMultiHeadAttention,
    InvertibleResidual,
    L2MultiHeadAttention,
    certify,
)
from keras_lipattn.bounds import published_layer_bound

# Points of a learning curve, each a mean over as many steps.
POINTS = 40


class Plan(typing.NamedTuple):
    """How a model is trained.

    Attributes:
        batch: number of sequences in a step.
        steps: number of steps.
        warm_up: number of steps of linear warm-up, after which the rate falls like the square root
            of the step, as in the paper; 0 for a fixed rate.
    """

    batch: int
    steps: int
    warm_up: int


@keras.saving.register_keras_serializable(package="char_lm")
class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """`rate * min(t / warm_up, sqrt(warm_up / t))` in step `t`, from 1 on."""

    def __init__(self, rate, warm_up):
        self.rate = rate
        self.warm_up = warm_up

    def __call__(self, step):
        ratio = (tf.cast(step, "float32") + 1.0) / self.warm_up
        return self.rate * tf.minimum(ratio, tf.math.rsqrt(ratio))

    def get_config(self):
        return {"rate": self.rate, "warm_up": self.warm_up}


def train(variant, size, corpus, plan, rate, seed):
    """A trained model and its learning curve, in nats per character.

    The sequences are drawn from `seed` alone: all variants see the same ones, in the same order.
    """
    keras.utils.set_random_seed(seed)
    model = char_model.build(variant, size, len(corpus.symbols))
    schedule = WarmUp(rate, plan.warm_up) if plan.warm_up else rate
    optimizer = keras.optimizers.Adam(schedule, clipnorm=1.0 if plan.warm_up else None)
    optimizer.build(model.trainable_variables)

    def step(windows):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(losses(model, windows, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    step = tf.function(step, autograph=False)
    rng, curve = np.random.default_rng(seed), []
    for _ in range(plan.steps):
        starts = rng.integers(0, len(corpus.train) - size.context, plan.batch)
        windows = corpus.train[starts[:, None] + np.arange(size.context + 1)]
        curve.append(float(step(tf.constant(windows))))
    points = min(POINTS, plan.steps)
    return model, [float(np.mean(part)) for part in np.array_split(curve, points)]


def losses(model, windows, training=False):
    """Nats of each character but the first, given those before it in its window."""
    logits = model(windows[:, :-1], training=training)
    return keras.losses.sparse_categorical_crossentropy(windows[:, 1:], logits, from_logits=True)


def nats_per_character(model, text, batch=64):
    """Mean over windows one after the other; each begins anew, with one character given."""
    context = model.input_shape[1]
    starts = np.arange(0, len(text) - context, context)
    windows = text[starts[:, None] + np.arange(context + 1)]
    test = tf.function(
        lambda rows: tf.reduce_sum(losses(model, rows)),
        autograph=False,
        # The last batch is smaller.
        input_signature=[tf.TensorSpec((None, context + 1), "int32")],
    )
    total = sum(
        float(test(tf.constant(windows[start : start + batch])))
        for start in range(0, len(windows), batch)
    )
    return total / (len(windows) * context)


def certificates(model):
    """What is certified of a model from embeddings to logits, for its context.

    `log10` is about the 2-norm, `token` about the token norm, for a model without normalization.
    """
    length = model.input_shape[1]
    found = certify(model, sequence_length=length)
    result = {
        "log10": found.log10 if found.is_finite else None,
        "reason": "; ".join(dict.fromkeys(found.reasons)),
        "attention": [],
    }
    if not any(isinstance(layer, keras.layers.LayerNormalization) for layer in model.layers):
        result["token"] = certify(model, norm="token", sequence_length=length).total
    for layer in model.layers:
        branch = getattr(layer, "branch", layer)
        if not isinstance(branch, (BoundedMultiHeadAttention, L2MultiHeadAttention)):
            continue
        norm = getattr(layer, "norm", "l2")
        bound = branch.lipschitz(sequence_length=length, mask="causal", norm=norm)
        # It is about L2 attention and knows of no biases.
        published = None
        if branch.relative_bias is None:
            kernels = [np.asarray(branch.query_kernel), np.asarray(branch.value_kernel)]
            kernels = [np.swapaxes(kernel, 0, 1) for kernel in kernels]
            kernels.append(np.asarray(branch.output_kernel))
            published = {
                norm: published_layer_bound(*kernels, norm=norm, tokens=length)
                for norm in ("l2", "linf")
            }
        row = {"ours": bound.value, "published": published}
        if isinstance(layer, InvertibleResidual):
            row["scale"] = float(
                layer.coefficient
                / branch.graph_bound(norm=norm, sequence_length=length, mask="causal")
            )
            row["contraction"] = layer.lipschitz(norm=norm).value - 1.0
        result["attention"].append(row)
    return result


class Kept:
    """Results of runs in a file, so that an interruption loses one run at most.

    Args:
        path: The file; what it holds is used if it is of the same `settings`.
        settings: Anything fit for JSON that the runs depend on.
    """

    def __init__(self, path: pathlib.Path, settings):
        self.path = path
        self._settings = json.loads(json.dumps(settings))
        self._runs = {}
        if path.is_file():
            kept = json.loads(path.read_text())
            if kept["settings"] == self._settings:
                self._runs = kept["runs"]

    def run(self, name: str, function, *arguments):
        """The kept result of that name, or that of the function, which is kept then."""
        if name not in self._runs:
            start = time.monotonic()
            result = function(*arguments)
            result["seconds"] = time.monotonic() - start
            self._runs[name] = result
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Renamed when complete: an interruption leaves the old file or the new one.
            partial = self.path.with_suffix(".part")
            partial.write_text(json.dumps({"settings": self._settings, "runs": self._runs}))
            partial.replace(self.path)
        return self._runs[name]


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
