"""What replacing words by their synonyms can do to a classifier of sentences: bounds and attacks.

A sentence of n words is classified by the mean of the scores of its words,

    logits = (1/n) sum_i F(x_i, y_i),   y = attention(p),

where `x_i` and `p_i` are vectors of word i alone and y is its context. With the synonym c in place
of word j the margin between the logits of two classes falls by at most the sum over all replaced
words of

    cost_j(c) = (1/n) [ G(x_j, y_j) - G(x_c, y_j) + K C_j |p_c - p_j| ] ,

where G is the difference of the two scores, K its Lipschitz constant in the context and C_j bounds
how far all contexts together move when word j moves (`context_constants`). The first part, what the
word itself says, is exact. Proof: let x', y' be the vectors after all replacements. Then
`G(x_i, y_i) - G(x'_i, y'_i) = [G(x_i, y_i) - G(x'_i, y_i)] + [G(x'_i, y_i) - G(x'_i, y'_i)]`. The
second bracket is at most `K |y'_i - y_i|`, and `sum_i |y'_i - y_i| <= sum_j C_j |p'_j - p_j|`. All
words at once cost the sum over j of the largest `cost_j`, any k words the sum of the k largest.
Without attention `y = p` and only the first bracket is there, with `y_c` in it: the bound is exact
for two classes.

Length and mask are fixed: words are replaced, never added or dropped.
"""

import dataclasses
import typing

import numpy as np
import tensorflow as tf
from keras import ops

from sentences import Part

# Subtracted from every margin, for the rounding of sums of at most 60 scores in float32.
ALLOWANCE = 1e-5
# For the rounding of kernels and distances in float32.
_SAFETY = 1.0 + 1e-5
_BATCH = 256


class ContextNorms(typing.NamedTuple):
    """Operator norms of the kernels of attention.

    Attributes:
        score: Of `W_Q W_K^T / sqrt(key_dim)` of each head, `(heads,)`.
        value: Of `W_V` of each head, `(heads,)`.
        values: Of all `W_V` side by side.
        output: Of `W_O`.
    """

    score: typing.Any
    value: typing.Any
    values: typing.Any
    output: typing.Any


def context_constants(norms: ContextNorms, bias, mask, xp: typing.Any):
    """How far all contexts together move, per unit by which one token moves.

    For the attention of `BoundedMultiHeadAttention` without biases of its kernels, on tokens in the
    unit ball: `sum_i |y'_i - y_i| <= sum_j C_j |p'_j - p_j|` for all tokens in the ball. With
    `A_h = W_Q W_K^T / sqrt(key_dim)`, attention weights `P`, means `m_i = sum_j P_ij p_j`,

        dy_i = sum_h [ sum_j P_ij (dp_j + (p_j - m_i) (p_i A_h dp_j)) + Cov_i A_h^T dp_i ] W_V W_O.

    In the ball `|p_j - m_i| <= 2`, `|p_i A_h dp_j| <= |A_h| |dp_j|` and `|Cov_i| <= 1`; a score
    without its bias is between `-|A_h|` and `|A_h|`, which bounds `P_ij`. The values of the heads
    are side by side, so that the first term has the largest `P_ij` of all heads, and the squares of
    the others add. The ball is convex: what holds for derivatives holds for differences.

    Args:
        norms: Of the kernels.
        bias: Biases of the scores by position, `(heads, n, n)`.
        mask: 1 for words and 0 for padding, `(sentences, n)`.
        xp: Array namespace, `numpy` or `keras.ops`.

    Returns:
        `C`, of shape `(sentences, n)`.
    """
    score = xp.reshape(norms.score, (1, -1, 1, 1))
    seen = xp.expand_dims(xp.exp(bias), 0) * mask[:, None, None, :]
    others = xp.sum(seen, axis=-1, keepdims=True) - seen
    # 1e-30 only keeps a padded pair from being 0 / 0.
    weights = seen / (seen + xp.exp(-2.0 * score) * others + 1e-30) * mask[:, None, :, None]
    moved = score * xp.reshape(norms.value, (1, -1, 1, 1))
    by_keys = 2.0 * xp.sqrt(xp.sum(xp.square(weights * moved), axis=1) + 1e-30)
    by_values = xp.max(weights, axis=1) * norms.values
    by_query = xp.sqrt(xp.sum(xp.square(moved)))
    return norms.output * (xp.sum(by_values + by_keys, axis=1) + by_query)


def bias_at_positions(table, tokens, xp: typing.Any):
    """Biases `(heads, n, n)` of a table of relative positions `(heads, 2 R)`."""
    reach = table.shape[1] // 2
    own = xp.zeros_like(table[:, :1])
    table = xp.concatenate([table[:, :reach], own, table[:, reach:]], axis=1)
    places = xp.arange(tokens)
    lag = xp.clip(places[:, None] - places[None, :], -reach, reach) + reach
    return xp.take(table, lag, axis=1)


def constants_at_inference(attention, mask: np.ndarray) -> np.ndarray:
    """`context_constants` of the kernels used at inference, in float64."""
    weights = attention.effective_weights()
    projection, output, table = (
        np.asarray(ops.convert_to_numpy(each), np.float64)
        for each in (weights.projection, weights.output, weights.relative_bias)
    )
    heads, size = attention.num_heads, attention.key_dim
    query, key, value = (
        np.moveaxis(kernel.reshape(-1, heads, size), 1, 0)
        for kernel in np.split(projection, 3, axis=1)
    )
    norm = np.linalg.norm
    norms = ContextNorms(
        norm(query @ key.transpose(0, 2, 1) / np.sqrt(size), 2, axis=(1, 2)),
        norm(value, 2, axis=(1, 2)),
        norm(np.hstack(list(value)), 2),
        norm(output, 2),
    )
    bias = bias_at_positions(table, mask.shape[1], np)
    # Once for all sentences of a length.
    masks, rows = np.unique(mask, axis=0, return_inverse=True)
    return _SAFETY * context_constants(norms, bias, masks.astype(np.float64), np)[rows.reshape(-1)]


def score_costs(classifier, words, candidates, labels, found, constants, training=False):
    """Largest fall of each margin by replacing one word, for every word.

    Args:
        classifier: A `synonyms.Classifier`.
        words: Integers `(sentences, n)`.
        candidates: Integers `(sentences, n, 8)`, 0 for none.
        labels: Integers `(sentences,)`.
        found: What `classifier.parts` returned for these words.
        constants: `C`, `(sentences, n)`, times K; `None` without attention.
        training: Whether in training.

    Returns:
        Shape `(sentences, n, classes)`, not yet divided by the number of words; 0 for the class
        that is the label.
    """
    unique, rows = tf.unique(tf.reshape(candidates, (-1,)))
    places = tf.where(candidates > 0)
    sentence_and_word = places[:, :2]
    rows = tf.gather_nd(tf.reshape(rows, tf.shape(candidates)), places)
    x, p = (tf.gather(part, rows) for part in classifier.words(unique[:, None], training=training))
    if classifier.attention is None:
        contexts = p
    else:
        contexts = tf.gather_nd(found.contexts, sentence_and_word)[:, None]
    scores = classifier.scores([x, contexts], training=training)[:, 0]
    own = tf.gather_nd(found.scores, sentence_and_word)
    label = tf.gather(labels, places[:, 0])
    falls = label_margins(own, label) - label_margins(scores, label)
    if constants is not None:
        moves = p[:, 0] - tf.gather_nd(found.tokens, sentence_and_word)
        distances = tf.sqrt(tf.reduce_sum(tf.square(moves), axis=-1) + 1e-16)
        rival = 1.0 - tf.one_hot(label, scores.shape[-1])
        constant = tf.gather_nd(constants, sentence_and_word)
        falls += rival * (constant * distances)[:, None]
    shape = tf.concat([tf.shape(candidates), [scores.shape[-1]]], axis=0)
    falls = tf.scatter_nd(places, tf.nn.relu(falls), tf.cast(shape, "int64"))
    return tf.reduce_max(falls, axis=2)


def label_margins(scores, labels):
    """Score of the label minus each score, `(..., classes)`."""
    return tf.gather(scores, labels[..., None], axis=-1, batch_dims=1) - scores


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What is certified for some sentences.

    Attributes:
        margins: Logit of the label minus each logit, `(sentences, classes)`.
        falls: Largest falls of these margins by replacing word j, `(sentences, n, classes)`.
        labels: Integers `(sentences,)`.
    """

    margins: np.ndarray
    falls: np.ndarray
    labels: np.ndarray

    def holds(self, replaced: int | None) -> np.ndarray:
        """Whether each sentence keeps its label for all replacements of so many words.

        Args:
            replaced: Largest number of words that are replaced; `None` for all.
        """
        largest = -np.sort(-self.falls, axis=1)[:, :replaced]
        lowest = self.margins - largest.sum(axis=1) - ALLOWANCE
        rival = np.arange(lowest.shape[1]) != self.labels[:, None]
        return (lowest > 0.0).all(axis=1, where=rival)


def attack_greedily(predict, part: Part, counts: tuple[int | None, ...]) -> dict:
    """Replaces the most damaging words, one after the other, each by its worst synonym.

    Args:
        predict: Function from words `(sentences, n)` to logits.
        part: The sentences.
        counts: Numbers of words to replace; `None` for all.

    Returns:
        Maps each number to whether each sentence kept its label, `(sentences,)`.
    """
    words, labels = part.words.copy(), part.labels
    lowest = _lead(predict(words), labels)
    sentence, place, rank = np.nonzero(part.candidates)
    changed = words[sentence]
    changed[np.arange(len(changed)), place] = part.candidates[sentence, place, rank]
    damage = np.full(part.candidates.shape, np.inf)
    damage[sentence, place, rank] = _lead(predict(changed), labels[sentence])
    # The first replaced words are those that hurt most alone.
    order = damage.min(axis=2).argsort(axis=1)
    current, kept, rows = lowest.copy(), {}, np.arange(len(words))
    for step in range(words.shape[1] + 1):
        if step in counts:
            kept[step] = lowest > 0.0
        if step == words.shape[1]:
            break
        where = order[:, step]
        options = part.candidates[rows, where]
        sentence, rank = np.nonzero(options)
        if not len(sentence):
            break
        trials = words[sentence]
        trials[np.arange(len(trials)), where[sentence]] = options[sentence, rank]
        leads = np.full(options.shape, np.inf)
        leads[sentence, rank] = _lead(predict(trials), labels[sentence])
        best = leads.argmin(axis=1)
        better = leads[rows, best] < current
        words[rows[better], where[better]] = options[better, best[better]]
        current = np.minimum(current, leads[rows, best])
        lowest = np.minimum(lowest, current)
    return {count: kept.get(count, lowest > 0.0) for count in counts}


def attack_randomly(predict, part: Part, trials: int, seed: int) -> np.ndarray:
    """Whether each sentence keeps its label under random replacements of all words at once."""
    generator = np.random.default_rng(seed)
    options = np.concatenate([part.words[..., None], part.candidates], axis=-1)
    counts = (options != 0).sum(axis=-1)
    kept = _lead(predict(part.words), part.labels) > 0.0
    for _ in range(trials):
        choice = (generator.random(counts.shape) * counts).astype(int)
        words = np.take_along_axis(options, choice[..., None], axis=-1)[..., 0]
        kept &= _lead(predict(words), part.labels) > 0.0
    return kept


def _lead(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Logit of the label minus the largest other one."""
    rows = np.arange(len(labels))
    others = logits.copy()
    others[rows, labels] = -np.inf
    return logits[rows, labels] - others.max(axis=1)


def in_batches(function, *arrays: np.ndarray) -> list[np.ndarray]:
    """Applies a function that returns a tuple of tensors to batches, and joins what it returns."""
    found = [
        function(*(array[start : start + _BATCH] for array in arrays))
        for start in range(0, len(arrays[0]), _BATCH)
    ]
    return [
        np.concatenate([np.asarray(each) for each in parts]) for parts in zip(*found, strict=True)
    ]
