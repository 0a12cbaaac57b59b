"""Attention and its neighbors on this backend: values, masks, caps, derivatives, files."""

import importlib.util
import math
import pkgutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import loop_attention
from helpers.layer_cases import CAPS, FEATURES, LENGTH, OPTIONS, Case, cases, kernels

import keras_lipattn as kl
from keras_lipattn.bounds import certified_layer_bound
from keras_lipattn.layers._masks import MaskClass

# Those of the same property on TensorFlow: rounding of the dtype, times the largest output.
TOLERANCE = {"float32": 1e-5, "mixed_bfloat16": 0.15, "mixed_float16": 0.02}


def _numpy(tensor):
    return keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32")).astype(np.float64)


def _close(found, expected, tolerance):
    size = max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(_numpy(found), expected, rtol=0, atol=tolerance * size)


def test_tensorflow_is_not_here_and_nothing_asks_for_it():
    assert importlib.util.find_spec("tensorflow") is None
    # The program that the export runs in a process of its own, under TensorFlow.
    program = "keras_lipattn.export._serving_program"
    walk = pkgutil.walk_packages(kl.__path__, "keras_lipattn.")
    names = [module.name for module in walk if module.name != program]
    code = f"import sys, {', '.join(names)}; print('tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert len(names) > 50


@pytest.mark.parametrize(
    "case",
    [
        *cases(options=("plain",), dtypes=("float32",)),
        *cases(
            options=[name for name in OPTIONS if name != "plain"],
            calls=("causal", "everything"),
            dtypes=("float32",),
        ),
        *cases(
            options=("plain",),
            calls=("no mask", "everything"),
            dtypes=("mixed_bfloat16", "mixed_float16"),
        ),
    ],
    ids=str,
)
def test_output_and_scores_equal_the_loops(case):
    layer, x = case.layer(), case.inputs()
    weights, bias = kernels(layer)
    rounded = _numpy(keras.ops.cast(x, layer.compute_dtype))
    expected, scores = loop_attention.attend_over_axes(
        rounded, weights, bias, **case.loop_arguments(), attend=case.with_biases(layer)
    )
    tolerance = TOLERANCE[case.dtype]
    _close(case.run(layer, x), expected, tolerance)
    both = case.run(layer, x, return_attention_scores=True)
    _close(both[0], expected, tolerance)
    _close(both[1], scores, tolerance)


@pytest.mark.parametrize("call", [{}, {"use_causal_mask": True}])
def test_not_a_number_in_padding_goes_nowhere(call):
    layer = Case(dtype="float32").layer()
    x = Case().inputs().astype("float32")
    keep = np.arange(LENGTH)[None] < np.array([[3], [LENGTH]])
    clean = _numpy(layer(x, query_mask=keep, **call))
    x[~keep] = np.nan
    np.testing.assert_array_equal(_numpy(layer(x, query_mask=keep, **call)), clean)
    assert (clean[~keep] == 0.0).all()


def test_a_later_token_does_not_reach_earlier_ones():
    layer = Case(dtype="float32").layer()
    x = Case().inputs().astype("float32")
    changed = x.copy()
    changed[:, -1] = 1e4
    first, second = (_numpy(layer(v, use_causal_mask=True))[:, :-1] for v in (x, changed))
    np.testing.assert_array_equal(first, second)


def test_the_layer_runs_in_a_jitted_function():
    if keras.backend.backend() != "jax":
        pytest.skip("JAX only")
    import jax  # pyright: ignore[reportMissingImports]

    for case in cases(options=("plain", "window"), calls=("everything",), dtypes=("float32",)):
        layer, x = case.layer(), case.inputs().astype("float32")
        jitted = jax.jit(lambda x, case=case, layer=layer: case.run(layer, x))
        _close(jitted(x), _numpy(case.run(layer, x)), TOLERANCE["float32"])


def _bound_of_what_runs(layer, norm, mask):
    weights = layer.effective_weights(MaskClass(mask))
    b, c = _numpy(weights.projection), _numpy(weights.output)
    heads, key_dim = layer.num_heads, layer.key_dim
    b = b.reshape(FEATURES, heads, key_dim).transpose(1, 0, 2)
    c = c.reshape(heads, key_dim, -1)
    return certified_layer_bound(b, c, norm=norm, tokens=LENGTH, mask=mask).value


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """A dtype, which JAX has only when asked for."""
    if keras.backend.backend() == "jax" and request.param == "float64":
        import jax  # pyright: ignore[reportMissingImports]

        with jax.enable_x64(True):
            yield request.param
    else:
        yield request.param


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
def test_a_cap_holds_right_after_weights_are_set(norm, scale, dtype):
    layer = Case(cap=norm, dtype=dtype).layer()
    cap = CAPS[norm]["lipschitz_bound"]
    # A model served before: what it remembers must not count for the weights that come next.
    layer.condense()
    rng = np.random.default_rng(3)
    layer.set_weights([rng.normal(size=w.shape) * scale for w in layer.weights])
    for condense in (False, True):
        if condense:
            layer.condense()
        for mask in ("full", "causal", "any"):
            # A cap aims a millionth below itself and its matrices are rounded to float32.
            assert _bound_of_what_runs(layer, norm, mask) <= cap * (1.0 + 1e-6)
            assert layer.lipschitz(norm=norm, mask=mask).value <= cap


@pytest.mark.parametrize(
    ("call", "norm", "cap"),
    [
        ("no mask", "l2", None),
        ("no mask", "token", "token"),
        ("causal", "linf", None),
        ("everything", "l2", "both"),
    ],
)
def test_attacks_stay_below_the_certificate(call, norm, cap):
    case = Case(call=call, cap=cap, dtype="float32")
    layer, x = case.layer(), case.inputs().astype("float32")

    def run(points):
        return case.run_copies(layer, points)

    lower = kl.estimate_lipschitz(run, np.repeat(x[:1], 2, axis=0), norm, steps=10, restarts=1)
    bound = layer.lipschitz(norm=norm, mask=case.visible())
    # The attack is evaluated in float32.
    assert lower.value <= bound.value * (1.0 + 1e-5)
    assert lower.value > 0.05 * bound.value


@pytest.mark.parametrize(
    "build",
    [
        lambda: kl.ScaledCosineAttention(2, 4),
        lambda: kl.SpectralDense(3),
        lambda: kl.OrthogonalDense(3),
        lambda: kl.NormalizedDense(3),
        lambda: kl.InvertibleResidual(kl.L2MultiHeadAttention(2, 4)),
        lambda: kl.ContinuousDepth(kl.L2MultiHeadAttention(2, 4), steps=2),
    ],
    ids=["cosine attention", "dense", "orthogonal", "normalized", "invertible", "continuous depth"],
)
def test_other_layers_train_and_are_certified(build):
    inputs = keras.Input((LENGTH, FEATURES))
    model = keras.Model(inputs, build()(inputs))
    x = Case().inputs().astype("float32")
    model.compile("sgd", "mse")
    monitor = kl.LipschitzMonitor(penalty=0.1, target=0.01)
    target = np.zeros(model.compute_output_shape(x.shape), "float32")
    losses = model.fit(x, target, epochs=2, verbose=0, callbacks=[monitor]).history["loss"]
    assert losses[1] < losses[0]
    lower = kl.estimate_lipschitz(model, x, steps=3, restarts=1).value
    # The attack is evaluated in float32.
    assert 0.0 < lower <= kl.certify(model).total * (1.0 + 1e-5)


@pytest.mark.parametrize("make", [kl.SpectralDense, kl.OrthogonalDense, kl.NormalizedDense])
def test_what_is_remembered_outlives_the_weights_it_was_made_of(make):
    layer = make(3)
    model = keras.Sequential([keras.Input((4,)), layer])
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    model.compile("sgd", "mse")
    for _ in range(2):
        layer.condense()
        assert layer.caps_are_exact()
        # JAX gives the memory of weights to the next step.
        outputs = model.predict(x, verbose=0)
        assert layer.caps_are_exact()
        with kl.condensed(model):
            # JAX compiled the first call with what was remembered then, and caps by upper bounds
            # for other weights.
            _close(_numpy(model(x)), outputs, 2e-3)
        model.fit(x, np.zeros((8, 3), "float32"), verbose=0)
        outputs = model.predict(x, verbose=0)
        layer.caps_are_exact()
        with kl.condensed(model):
            _close(_numpy(model(x)), outputs, 2e-3)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_images_pass_layers_that_keep_lengths(policy):
    keras.config.set_dtype_policy(policy)
    try:
        inputs = keras.Input((8, 8, 3))
        x = kl.SpaceToDepth(2)(kl.SpectralConv2D(4, 3, 2, "same")(inputs))
        x = kl.NormPooling()(kl.HalfAbs()(kl.OrthogonalDense(12)(x)))
        model = keras.Model(inputs, kl.NormalizedDense(3)(kl.OrthogonalDense(6)(x)))
    finally:
        keras.config.set_dtype_policy("float32")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 8, 8, 3)).astype("float32")
    model.compile("adam", "mse")
    monitor = kl.LipschitzMonitor(penalty=0.1)
    losses = model.fit(
        x, np.zeros((16, 3), "float32"), epochs=4, verbose=0, callbacks=[monitor]
    ).history["loss"]
    assert losses[-1] < losses[0]
    total = kl.certify(model).total
    if policy == "float32":
        lower = kl.estimate_lipschitz(model, x[:2], steps=3, restarts=1).value
        # The attack is evaluated in float32.
        assert 0.0 < lower <= total * (1.0 + 1e-5)
    for layer in model.layers:
        if isinstance(layer, kl.OrthogonalDense):
            assert abs(layer.lipschitz().value - 1.0) <= 1e-6
    assert math.isfinite(total)


@pytest.mark.parametrize("cap", [None, *CAPS])
def test_models_come_back_from_files(cap, tmp_path):
    inputs = keras.Input((LENGTH, FEATURES))
    case = Case(cap=cap, dtype="float32")
    x = kl.L2MultiHeadAttention(**case.constructor)(kl.CenterNormalization()(inputs))
    x = kl.Residual(0.5)([inputs, x])
    model = keras.Model(inputs, kl.SpectralDense(3)(kl.MaxMin()(x)))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    points = case.inputs().astype("float32")
    np.testing.assert_array_equal(_numpy(loaded(points)), _numpy(model(points)))
    assert kl.certify(loaded).total == kl.certify(model).total


def test_decoding_gives_what_the_full_pass_gives():
    layer = Case(dtype="float32").layer()
    x = Case().inputs().astype("float32")
    full = _numpy(layer(x, use_causal_mask=True))
    cache = layer.init_cache(len(x), LENGTH)
    parts = []
    for position in range(LENGTH):
        part, cache = layer.decode(x[:, position : position + 1], cache, position)
        parts.append(_numpy(part))
    _close(np.concatenate(parts, axis=1), full, 1e-5)


def test_condensed_models_give_what_the_model_gives():
    layer = Case(cap="both", dtype="float32").layer()
    x = Case().inputs().astype("float32")
    layer.condense()
    outside = _numpy(layer(x))
    with kl.condensed(layer):
        # The remembered norms carry an allowance of 1e-6, in a few factors.
        _close(layer(x), outside, 2e-5)
