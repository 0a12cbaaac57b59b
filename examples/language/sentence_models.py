"""Classifiers of sentences with bounds of what synonyms can do: attention, and a bag of words."""

import functools
import typing

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import keras_lipattn
from keras_lipattn import BoundedMultiHeadAttention, MaxMin, OrthogonalDense, TokenProjection
from sentences import Part
from substitutions import (
    ALLOWANCE,
    Bounds,
    ContextNorms,
    bias_at_positions,
    constants_at_inference,
    context_constants,
    in_batches,
    label_margins,
    score_costs,
)

CONTEXT_WIDTH = 16
_WIDTH, _HEADS, _REACH = 64, 2, 4


class Found(typing.NamedTuple):
    """What a classifier computes for sentences of n words.

    Attributes:
        logits: `(sentences, classes)`.
        scores: `(sentences, n, classes)`.
        contexts: What `scores` sees of other words, `(sentences, n, 16)`.
        tokens: What other words see, `(sentences, n, 16)`.
        mask: 1 for words, 0 for padding, `(sentences, n)`.
    """

    logits: typing.Any
    scores: typing.Any
    contexts: typing.Any
    tokens: typing.Any
    mask: typing.Any


class RobustModel(keras.Model):
    """What training and evaluation need of a classifier.

    Call arguments:
        inputs: Words `(sentences, n)`, candidates `(sentences, n, 8)`, labels `(sentences,)`.

    Returns:
        The margin of the label to each class, and a lower bound of it for all replacements of all
        words, `(sentences, 2, classes)`.
    """

    def call(self, inputs, training=False):
        margins, lowest = self.margins(*inputs, training=training)
        return ops.stack([margins, lowest], axis=1)

    def margins(self, words, candidates, labels, training):
        raise NotImplementedError

    def logits(self, words):
        raise NotImplementedError

    def holds(self, part: Part, counts: tuple[int | None, ...]) -> dict:
        """Maps numbers of words to whether each sentence provably keeps its label."""
        raise NotImplementedError


class Classifier(RobustModel):
    """A mean of scores of words, which see their context through attention.

    Args:
        table: Word vectors at the start, `(words, features)`.
        contexts: What other words see of a word, at the start, `(words, 16)`.
        classes: Number of classes.
        attention: Whether there is attention; without it the context of a word is itself.
        weight: Factor of the context of a word next to the word itself.
    """

    def __init__(self, table, contexts, classes, attention, weight=0.3):
        super().__init__()
        self.weight = weight
        ids = keras.Input((None,), dtype="int32")
        both = np.concatenate([table, contexts], axis=1)
        start = keras.initializers.Constant(both)
        self.vectors = keras.layers.Embedding(*both.shape, embeddings_initializer=start)
        x, p = ops.split(self.vectors(ids), [table.shape[1]], axis=-1)
        x = OrthogonalDense(_WIDTH)(TokenProjection(1.0)(x))
        p = TokenProjection(1.0)(p)
        if not attention:
            p = keras.layers.Rescaling(weight)(p)
        self.words = keras.Model(ids, [x, p], name="words")
        inputs = [keras.Input((None, _WIDTH)), keras.Input((None, CONTEXT_WIDTH))]
        y = keras.layers.Concatenate()(inputs)
        for _ in range(2):
            y = MaxMin()(OrthogonalDense(_WIDTH)(y))
        self.scores = keras.Model(inputs, OrthogonalDense(classes)(y), name="scores")
        self.attention: typing.Any = None
        if attention:
            layer: typing.Any = BoundedMultiHeadAttention(
                _HEADS,
                CONTEXT_WIDTH // _HEADS,
                token_radius=1.0,
                max_relative_position=_REACH,
                spectral_norm=1.0,
                use_bias=False,
                kernel_initializer="orthogonal",
                name="attention",
            )
            layer.build((None, None, CONTEXT_WIDTH))
            # Heads begin with the neighbors on the right and on the left.
            biases = np.zeros((_HEADS, 2 * _REACH), np.float32)
            biases[np.arange(_HEADS), _REACH - 1 + np.arange(_HEADS) % 2] = 3.0
            layer.relative_bias.assign(biases)
            self.attention = layer

    def parts(self, words, training=False) -> Found:
        """Everything that a forward pass computes."""
        mask = ops.not_equal(words, 0)
        x, p = self.words(words, training=training)
        contexts = p
        if self.attention is not None:
            contexts = self.weight * self.attention(p, query_mask=mask, training=training)
        scores = self.scores([x, contexts], training=training)
        mask = ops.cast(mask, scores.dtype)
        total = ops.sum(scores * mask[..., None], axis=1)
        return Found(total / ops.sum(mask, axis=1)[:, None], scores, contexts, p, mask)

    def margins(self, words, candidates, labels, training):
        found = self.parts(words, training)
        constants = None
        if self.attention is not None:
            constants = np.sqrt(2.0) * self.weight * self._constants_in_training(found.mask)
        falls = score_costs(self, words, candidates, labels, found, constants, training)
        lengths = ops.sum(found.mask, axis=1)[:, None]
        margins = label_margins(found.logits, labels)
        return margins, margins - ops.sum(falls, axis=1) / lengths

    def _constants_in_training(self, mask):
        """`context_constants` of the kernels with their caps, with a gradient."""
        layer: typing.Any = self.attention
        kernels = layer.query_kernel, layer.key_kernel, layer.value_kernel
        kernels = [ops.convert_to_tensor(kernel) for kernel in kernels]
        flat = [ops.reshape(kernel, (CONTEXT_WIDTH, -1)) for kernel in kernels]
        flat.append(ops.reshape(ops.convert_to_tensor(layer.output_kernel), (-1, CONTEXT_WIDTH)))
        *flat, output = [kernel / ops.maximum(1.0, _norm(kernel)) for kernel in flat]
        shape = (CONTEXT_WIDTH, _HEADS, CONTEXT_WIDTH // _HEADS)
        query, key, value = [ops.transpose(ops.reshape(k, shape), (1, 0, 2)) for k in flat]
        score = ops.matmul(query, ops.transpose(key, (0, 2, 1))) / np.sqrt(shape[-1])
        norms = ContextNorms(_norm(score), _norm(value), _norm(flat[2]), _norm(output))
        bias = bias_at_positions(
            ops.convert_to_tensor(layer.relative_bias), ops.shape(mask)[1], ops
        )
        return context_constants(norms, bias, mask, ops)

    def logits(self, words):
        return self.parts(words).logits

    def logits_without_context(self, words):
        """The logits with 0 in place of what words see of each other."""
        found = self.parts(words)
        scores = self.scores([self.words(words)[0], 0.0 * found.contexts])
        return ops.sum(scores * found.mask[..., None], axis=1)

    def holds(self, part, counts):
        bounds = self.bounds(part)
        return {count: bounds.holds(count) for count in counts}

    def bounds(self, part: Part) -> Bounds:
        """Margins, and how far they can fall; constants in float64 for the weights that run."""
        constants = np.zeros(part.words.shape)
        if self.attention is not None:
            pair = self._pairwise_constant()
            constants = pair * self.weight * constants_at_inference(self.attention, part.mask)
        arrays = part.words, part.candidates, part.labels, constants.astype(np.float32)
        margins, falls = in_batches(self._compiled_falls, *arrays)
        return Bounds(margins, falls, part.labels)

    @functools.cached_property
    def _compiled_falls(self):
        @tf.function(reduce_retracing=True)
        def falls(words, candidates, labels, constants):
            found = self.parts(words)
            constants = None if self.attention is None else constants
            fall = score_costs(self, words, candidates, labels, found, constants)
            lengths = ops.sum(found.mask, axis=1)[:, None, None]
            return label_margins(found.logits, labels), fall / lengths

        return falls

    def _pairwise_constant(self) -> float:
        """Lipschitz constant of the difference of two scores of a word."""
        inputs = [keras.Input((1, _WIDTH)), keras.Input((1, CONTEXT_WIDTH))]
        scores = keras.layers.Flatten()(self.scores(inputs))
        return float(np.max(keras_lipattn.certify(keras.Model(inputs, scores)).pairwise_constants))

    def of_length(self, length: int) -> keras.Model:
        """The same classifier for sentences of one length, for `certify`."""
        ids = keras.Input((length,), dtype="int32")
        x, contexts = self.words(ids)
        if self.attention is not None:
            contexts = keras.layers.Rescaling(self.weight)(self.attention(contexts))
        scores = self.scores([x, contexts])
        return keras.Model(ids, keras.layers.GlobalAveragePooling1D()(scores))


class BagOfWords(RobustModel):
    """A perceptron of the mean of words, with interval bounds.

    Intervals hold what the first layer gives for all candidates of a word, one after the other.

    Args:
        table: Word vectors at the start, `(words, features)`.
        classes: Number of classes.
    """

    def __init__(self, table, classes):
        super().__init__()
        ids = keras.Input((None,), dtype="int32")
        start = keras.initializers.Constant(table)
        vectors = keras.layers.Embedding(*table.shape, embeddings_initializer=start)(ids)
        features = keras.layers.Dense(_WIDTH, "relu")(vectors)
        self.words = keras.Model(ids, features, name="words")
        self.hidden = keras.layers.Dense(_WIDTH)
        self.last = keras.layers.Dense(classes)
        self.hidden.build((None, _WIDTH))
        self.last.build((None, _WIDTH))

    def logits(self, words):
        return self.last(ops.relu(self.hidden(self._mean(words)[0])))

    def _mean(self, words, training=False):
        mask = ops.cast(ops.not_equal(words, 0), "float32")
        features = self.words(words, training=training)
        lengths = ops.sum(mask, axis=1)[:, None]
        return ops.sum(features * mask[..., None], axis=1) / lengths, features, lengths

    def margins(self, words, candidates, labels, training, replaced=None):
        mean, features, lengths = self._mean(words, training)
        unique, rows = tf.unique(tf.reshape(candidates, (-1,)))
        others = tf.gather(self.words(unique[:, None], training=training)[:, 0], rows)
        others = ops.reshape(others, (*ops.shape(candidates), _WIDTH))
        present = (candidates > 0)[..., None]
        moves = ops.where(present, others - features[:, :, None], 0.0)
        # A word may stay: neither is below 0.
        up, down = (ops.relu(ops.max(each, axis=2)) for each in (moves, -moves))
        up, down = (_sum_of_largest(each, replaced) / lengths for each in (up, down))
        kernel = ops.convert_to_tensor(self.hidden.kernel)
        center = self.hidden(mean + 0.5 * (up - down))
        radius = ops.matmul(0.5 * (up + down), ops.abs(kernel))
        low, high = ops.relu(center - radius), ops.relu(center + radius)
        columns = ops.transpose(ops.convert_to_tensor(self.last.kernel))
        kernels = ops.take(columns, labels, axis=0)[:, None] - columns
        biases = label_margins(ops.broadcast_to(self.last.bias, ops.shape(kernels)[:2]), labels)
        middle, half = 0.5 * (low + high), 0.5 * (high - low)
        lowest = ops.sum(kernels * middle[:, None] - ops.abs(kernels) * half[:, None], axis=-1)
        exact = self.last(ops.relu(self.hidden(mean)))
        return label_margins(exact, labels), lowest + biases

    def holds(self, part, counts):
        found = {}
        for count in counts:
            _, lowest = in_batches(
                functools.partial(self.margins, training=False, replaced=count),
                *(part.words, part.candidates, part.labels),
            )
            rival = np.arange(lowest.shape[1]) != part.labels[:, None]
            found[count] = (lowest > ALLOWANCE).all(axis=1, where=rival)
        return found


def _sum_of_largest(values, count):
    if count is None:
        return ops.sum(values, axis=1)
    largest, _ = ops.top_k(ops.transpose(values, (0, 2, 1)), count)
    return ops.sum(largest, axis=-1)


def _norm(kernel):
    """Operator norms of small matrices, with a gradient."""
    gram = ops.matmul(ops.swapaxes(kernel, -1, -2), kernel)
    # 1e-12 keeps the infinite slope of the root at 0 out of the gradient.
    return ops.sqrt(ops.max(tf.linalg.eigvalsh(gram), axis=-1) + 1e-12)
