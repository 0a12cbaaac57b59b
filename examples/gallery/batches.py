"""Small batches of made-up data, the same in every run, for the models of the gallery."""

import numpy as np

BATCH = 8
IMAGE_SHAPE = (16, 16, 3)
CLASSES = 5
VOCABULARY = 200
TEXT_LENGTH = 20
SENTENCE_LENGTH = 12
SERIES_SHAPE = (32, 1)
# Frames and their features.
VIDEO_SHAPE = (10, 24)
TAGS = 7
# Frames and frequencies of a spectrogram.
SOUND_SHAPE = (64, 10)
TARGET_LENGTH = 12
CHARACTERS = 30
NUMERIC_FEATURES = ("age", "capital_gain", "hours_per_week")
CATEGORICAL_FEATURES = {
    "workclass": ["private", "public", "self-employed"],
    "education": ["primary", "secondary", "bachelor", "master", "doctor"],
    "relationship": ["single", "married", "widowed"],
    "country": ["north", "south"],
}


def images():
    """Images in [0, 1] and their classes."""
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(BATCH, *IMAGE_SHAPE)).astype("float32")
    return x, rng.integers(CLASSES, size=BATCH)


def pixels():
    """Images in [0, 255] and their classes."""
    x, y = images()
    return 255.0 * x, y


def boxes():
    """Images in [0, 1] and the corners of a box, relative to the size of the image."""
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(BATCH, *IMAGE_SHAPE)).astype("float32")
    corners = np.sort(rng.uniform(size=(BATCH, 2, 2)), axis=1)
    return x, corners.reshape(BATCH, 4).astype("float32")


def texts():
    """Token ids, padded with 0 at the end, and one of two classes."""
    rng = np.random.default_rng(0)
    return _padded(rng, VOCABULARY, TEXT_LENGTH), rng.integers(2, size=BATCH)


def next_tokens():
    """Token ids without padding, and the same one token later."""
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, size=(BATCH, TEXT_LENGTH + 1))
    return tokens[:, :-1].astype("int32"), tokens[:, 1:].astype("int32")


def tagged_texts():
    """Token ids and a tag for each of them, both padded with 0."""
    rng = np.random.default_rng(0)
    tokens = _padded(rng, VOCABULARY, TEXT_LENGTH)
    return tokens, np.where(tokens > 0, rng.integers(1, TAGS, size=tokens.shape), 0)


def series():
    """One-dimensional series and one of two classes."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, *SERIES_SHAPE)).astype("float32")
    return x, rng.integers(2, size=BATCH)


def videos():
    """Features of frames, zero after the end of the video, and its class."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, *VIDEO_SHAPE)).astype("float32")
    lengths = rng.integers(VIDEO_SHAPE[0] // 2, VIDEO_SHAPE[0] + 1, size=BATCH)
    x[np.arange(VIDEO_SHAPE[0]) >= lengths[:, None]] = 0.0
    return x, rng.integers(CLASSES, size=BATCH)


def people():
    """A column of strings or numbers per feature, and one of two classes."""
    rng = np.random.default_rng(0)
    x = {name: rng.normal(size=BATCH).astype("float32") for name in NUMERIC_FEATURES}
    for name, words in CATEGORICAL_FEATURES.items():
        # Keras takes strings from arrays of objects only.
        x[name] = rng.choice(words, size=BATCH).astype(object)
    return x, rng.integers(2, size=(BATCH, 1)).astype("float32")


def speech():
    """Spectrograms with the characters before each character, and the characters."""
    rng = np.random.default_rng(0)
    sound = rng.normal(size=(BATCH, *SOUND_SHAPE)).astype("float32")
    text = _padded(rng, CHARACTERS, TARGET_LENGTH + 1)
    return [sound, text[:, :-1]], text[:, 1:]


def sentences():
    """Sentences in two languages, the second without its last token, and without its first."""
    rng = np.random.default_rng(0)
    source = _padded(rng, VOCABULARY, SENTENCE_LENGTH).astype("int64")
    target = _padded(rng, VOCABULARY, SENTENCE_LENGTH + 1).astype("int64")
    return {"encoder_inputs": source, "decoder_inputs": target[:, :-1]}, target[:, 1:]


def _padded(rng, vocabulary, length):
    tokens = rng.integers(1, vocabulary, size=(BATCH, length))
    lengths = rng.integers(length // 2, length + 1, size=BATCH)
    return np.where(np.arange(length) < lengths[:, None], tokens, 0).astype("int32")
