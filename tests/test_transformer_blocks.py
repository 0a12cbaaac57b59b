"""Transformer blocks: their formula, their constants, masks, saving and export."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_lipattn as kl

KINDS = ["l2", "cosine", "bounded"]
TOKENS, FEATURES = 6, 8
RNG = np.random.default_rng(5)


def tokens(*shape):
    return RNG.normal(size=shape).astype("float32")


def stack(kind, norm="l2", depth=2, decoder=False, **options):
    make = kl.TransformerDecoder if decoder else kl.TransformerEncoder
    inputs = keras.Input((TOKENS, FEATURES))
    x = inputs
    for _ in range(depth):
        x = make(12, 2, attention=kind, lipschitz_norm=norm, **options)(x)
    return keras.Model(inputs, x)


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_is_its_formula(kind):
    block = kl.TransformerEncoder(12, 2, attention=kind, branch_weight=0.4)
    x = ops.convert_to_tensor(tokens(3, TOKENS, FEATURES))
    found = block(x)
    after = 0.6 * x + 0.4 * block._self_attention(x)
    branch = block._contract(kl.MaxMin()(block._expand(after)))
    np.testing.assert_allclose(found, 0.6 * after + 0.4 * branch, atol=1e-6)


@pytest.mark.parametrize("norm", ["l2", "token"])
@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_with_caps_of_one_has_a_constant_of_at_most_one(kind, decoder, norm):
    model = stack(kind, norm, decoder=decoder, dropout=0.3)
    for layer in model.layers[1:]:
        # Far from the initial weights, so that caps act.
        for variable in layer._self_attention.trainable_variables:
            variable.assign(5.0 * variable)
    certificate = kl.certify(model, norm)
    assert certificate.total <= 1.0 + 1e-6
    # Attacked: differences of the output over those of the input.
    size = (lambda x: np.sqrt((x**2).sum((1, 2)))) if norm == "l2" else _largest_token
    x = tokens(200, TOKENS, FEATURES)
    for step in (1e-2, 1.0, 10.0):
        moved = x + step * tokens(200, TOKENS, FEATURES)
        change = model.predict(moved, verbose=0) - model.predict(x, verbose=0)
        # Float32 outputs of size 1 or so.
        assert (size(change) <= certificate.total * size(moved - x) + 1e-5).all()


def _largest_token(x):
    return np.sqrt((x**2).sum(2)).max(1)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_other_token(kind):
    block = kl.TransformerEncoder(12, 2, attention=kind)
    x = tokens(2, TOKENS, FEATURES)
    padding = np.ones((2, TOKENS), bool)
    padding[:, 4:] = False
    other = x.copy()
    other[:, 4:] = 7.0
    expected, found = (ops.convert_to_numpy(block(each, padding)) for each in (x, other))
    np.testing.assert_array_equal(expected[:, :4], found[:, :4])
    # A Keras mask of the inputs counts as well.
    masked = ops.convert_to_tensor(other)
    keras.src.backend.set_keras_mask(masked, ops.convert_to_tensor(padding))
    np.testing.assert_allclose(block(masked)[:, :4], expected[:, :4], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_attention_mask_and_the_order_of_a_decoder_are_kept(kind):
    x = tokens(2, TOKENS, FEATURES)
    other = x.copy()
    other[:, 3:] += 1.0
    causal = np.tril(np.ones((2, TOKENS, TOKENS), bool))
    encoder = kl.TransformerEncoder(12, 2, attention=kind)
    decoder = kl.TransformerDecoder(12, 2, attention=kind)
    for call in (lambda x: encoder(x, attention_mask=causal), decoder):
        np.testing.assert_allclose(call(x)[:, :3], call(other)[:, :3], atol=1e-6)
        assert np.abs(call(x)[:, 3:] - call(other)[:, 3:]).max() > 1e-3


@pytest.mark.parametrize(
    "width, options",
    [(5, dict(attention="bounded")), (FEATURES, dict(attention="l2", token_radius=1.5))],
)
def test_a_decoder_hears_the_encoder_and_is_certified_in_both(width, options):
    decoder_input = keras.Input((TOKENS, FEATURES))
    encoder_input = keras.Input((7, width))
    block = kl.TransformerDecoder(12, 2, lipschitz_norm="token", **options)
    model = keras.Model([encoder_input, decoder_input], block(decoder_input, encoder_input))
    certificate = kl.certify(model, "token")
    assert certificate.is_finite
    memory, x = tokens(100, 7, width), tokens(100, TOKENS, FEATURES)
    moved = [memory + tokens(100, 7, width), x + 0.1 * tokens(100, TOKENS, FEATURES)]
    change = model.predict(moved, verbose=0) - model.predict([memory, x], verbose=0)
    both = np.maximum(_largest_token(moved[0] - memory), _largest_token(moved[1] - x))
    assert (_largest_token(change) <= certificate.total * both + 1e-5).all()
    padding = np.arange(7) < 4
    padding = np.tile(padding, (100, 1))
    hidden = np.where(padding[..., None], memory, 9.0)
    found = [block(x, each, encoder_padding_mask=padding) for each in (memory, hidden)]
    np.testing.assert_allclose(*found, atol=1e-6)


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_train_save_load_and_clone(kind, decoder, tmp_path):
    inputs = keras.Input((TOKENS, FEATURES))
    body = stack(kind, decoder=decoder, dropout=0.2, branch_weight=0.3)
    pooled = keras.layers.GlobalAveragePooling1D()(body(inputs))
    model = keras.Model(inputs, kl.OrthogonalDense(3)(pooled))
    x, y = tokens(32, TOKENS, FEATURES), RNG.integers(0, 3, 32)
    model.compile("adam", kl.losses.MarginCrossentropy(0.1))
    before = [variable.numpy() for variable in model.trainable_variables]
    monitor = kl.LipschitzMonitor()
    history = model.fit(x, y, epochs=2, verbose=0, callbacks=[monitor])
    assert history.history["lipschitz_total"][-1] <= 1.0 + 1e-6
    moved = [
        np.abs(variable - start).max() > 0.0
        for variable, start in zip(model.trainable_variables, before, strict=True)
    ]
    assert all(moved)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))
    assert kl.certify(again).matches(model)
    block = body.layers[1]
    clone = type(block).from_config(block.get_config())
    assert clone.get_config() == block.get_config()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64"])
def test_the_policy_reaches_the_layers_inside(policy):
    block = kl.TransformerEncoder(12, 2, dtype=policy)
    y = block(tokens(2, TOKENS, FEATURES))
    assert keras.backend.standardize_dtype(y.dtype) == block.compute_dtype
    assert {layer.dtype_policy.name for layer in block._flatten_layers()} == {policy}


def test_blocks_are_exported_with_their_certificate(tmp_path):
    inputs = keras.Input((TOKENS, FEATURES))
    x = kl.TransformerEncoder(12, 2)(inputs)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, kl.OrthogonalDense(3)(x))
    certificate, path = kl.export_saved_model(model, tmp_path, verbose=False)
    assert certificate.matches(model) and (path / "saved_model.pb").exists()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: kl.TransformerEncoder(7, 2), "even"),
        (lambda: kl.TransformerEncoder(0, 2), "intermediate_dim"),
        (lambda: kl.TransformerEncoder(8, 2, attention="dot"), "one of"),
        (lambda: kl.TransformerEncoder(8, 2, attention="cosine", token_radius=1.0), "cosine"),
        (lambda: kl.TransformerEncoder(8, 3)(tokens(1, 4, 8)), "multiple of `num_heads`"),
        (lambda: kl.TransformerEncoder(8, 2)(keras.Input((None, 8))), "max_sequence_length"),
        (lambda: kl.TransformerDecoder(8, 2)(tokens(1, 4, 8), tokens(1, 4, 8)), "bounded"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_decoder_that_was_built_without_an_encoder_takes_none_later():
    block = kl.TransformerDecoder(8, 2, attention="bounded")
    block(tokens(1, 4, 8))
    with pytest.raises(ValueError, match="always or never"):
        block(tokens(1, 4, 8), tokens(1, 4, 8))
