"""Certificates of attention on bounded tokens are attacked: statements, layers and models."""

# The annotations of TensorFlow and numpy do not cover what is passed and returned here.
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportArgumentType=false

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import jacobians
from helpers.layer_cases import CAPS, FEATURES, Case, cases, randomize

import keras_lipattn as kl
from keras_lipattn.bounds.bounded_tokens import distance_terms
from tools.soundness.statements.__main__ import ALLOWED, all_statements, attack

NORMS = ("l2", "token", "linf")
# float64 gradients of a softmax lose a few digits; the norms of Jacobians another one.
SLACK = 1.0 + 1e-9
KINDS = (kl.BoundedMultiHeadAttention, kl.L2MultiHeadAttention)
ONE_CAP = [cap for cap in CAPS if cap != "both"]


@pytest.mark.parametrize("statement", all_statements(), ids=lambda one: one.name)
def test_no_attack_refutes_a_statement(statement):
    count, worst = attack(statement, 400, seed=1)
    assert count >= 400
    assert 0.2 <= worst <= ALLOWED


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_constants_on_a_ball_are_the_largest_values_of_theorem_4_2(dtype):
    square = np.array([0.25, 0.3, 0.49, 1.0, 4.0, 100.0, 1e6])[:, None]
    t = np.linspace(0.0, 1.0, 20001)
    squares = 1.0 + 4.0 * square * (1.0 - t**2) * (2.0 * square * (1.0 + t) - 1.0)
    joint = (2.0 * square * np.sqrt(1.0 - t**2) + np.sqrt(squares)).max(axis=1)
    terms = distance_terms(np.sqrt(square[:, 0]).astype(dtype), np)
    rounding = 10.0 * np.finfo(dtype).eps
    for found, largest in ((terms.joint, joint), (terms.shared, np.sqrt(squares.max(axis=1)))):
        assert (found >= largest * (1.0 - rounding)).all()
        # `joint` is approached from above, `largest` on a grid from below.
        np.testing.assert_allclose(found, largest, rtol=3e-4)


def test_constants_on_a_ball_grow_with_it_and_start_from_an_average():
    radius = np.concatenate([[0.0], np.exp(np.linspace(-5.0, 5.0, 400))])
    for found in distance_terms(radius, np):
        assert np.isfinite(found).all() and (np.diff(found) >= 0.0).all()
    assert distance_terms(radius, np).joint[0] == 1.0


def test_long_sequences_in_a_ball_need_no_length_in_the_2_norm():
    case = Case("ball", kind=kl.L2MultiHeadAttention)
    layer = case.layer(scale=0.3)
    bounds = [layer.lipschitz(count, norm="l2").value for count in (10**3, 10**6, 10**9)]
    assert bounds[0] == bounds[1] == bounds[2]
    # Biases of keys break the symmetry that the theorem needs.
    biased = Case("ball, relative", kind=kl.L2MultiHeadAttention).layer(scale=0.3)
    assert biased.lipschitz(10**9).value > biased.lipschitz(10).value


def _points(case, layer):
    """Examples in the ball, at its edge and far outside, structured and random."""
    rng = np.random.default_rng(0)
    shape = (*case.sides, FEATURES)
    for scale in (0.2, 0.6, 5.0):
        yield rng.normal(size=shape) * scale * layer.token_radius
    # Two clusters of tokens on opposite sides, along the steepest direction of the first scores.
    kernel = np.asarray(layer.query_kernel)[:, 0]
    direction = np.linalg.svd(kernel)[0][:, 0] * layer.token_radius
    signs = np.where(np.arange(np.prod(case.sides)) % 2, 1.0, -1.0).reshape(*case.sides, 1)
    for size in (0.7, 0.999, 1.5):
        yield signs * direction * size + 1e-3 * rng.normal(size=shape)
    yield np.full(shape, 7.0)


def _bounded_cases():
    plain = functools.partial(cases, kind=kl.BoundedMultiHeadAttention)
    return [
        *plain(options=("plain",)),
        *plain(options=("relative", "shared heads", "window"), calls=("no mask", "everything")),
        *plain(options=("two axes", "one head", "output shapes"), calls=("causal",)),
        *plain(options=("one shared head",), calls=("causal",), caps=ONE_CAP),
        *plain(options=("relative",), calls=("no mask",), caps=ONE_CAP),
        *cases(
            options=("ball", "ball, relative", "ball, axes"),
            calls=("no mask", "everything"),
            caps=(None, "token"),
        ),
        *cases(options=("ball, relative",), calls=("causal",), caps=("l2", "linf", "both")),
    ]


@pytest.mark.parametrize("case", _bounded_cases(), ids=lambda c: f"{c.kind.__name__}, {c}")
def test_no_jacobian_exceeds_the_bound(case):
    layer = case.layer(scale=1.0)
    if layer.relative_bias is not None:
        rng = np.random.default_rng(5)
        layer.relative_bias.assign(rng.choice([-50.0, 0.0, 50.0], layer.relative_bias.shape))
    layer.condense()
    bounds = {norm: layer.lipschitz(norm=norm, mask=case.visible()).value for norm in NORMS}
    for x in _points(case, layer):
        run = functools.partial(case.run_copies, layer)
        found = jacobians.norms(jacobians.jacobian(run, x))
        for norm in NORMS:
            assert found[norm] <= bounds[norm] * SLACK, (norm, found[norm], bounds[norm])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_ascent_climbs_over_the_bound(kind, norm):
    worst = 0.0
    for options, call in (("ball", "no mask"), ("ball, relative", "causal"), ("ball", "pairs")):
        case = Case(options, call, kind=kind)
        for scale in (0.4, 1.2):
            layer = case.layer(scale=scale)
            bound = layer.lipschitz(norm=norm, mask=case.visible()).value
            run = functools.partial(case.run_copies, layer)
            for x in list(_points(case, layer))[1:5:3]:
                best = jacobians.ascend(run, x, norm)
                assert best <= bound * SLACK
                worst = max(worst, best / bound)
    # The attack comes close enough to find a constant that is too small by a factor of a few.
    assert worst >= 0.2


def _looking_at_distances(kind, *, heads=4, tokens=9, scores=1e-3):
    """Attention whose head `h` sees the token `h + 1` places before, reading its own features."""
    own = {"value_dim": 2} if kind is kl.BoundedMultiHeadAttention else {}
    layer = kind(heads, 2, token_radius=1.0, max_relative_position=6, dtype="float64", **own)
    layer.build((1, tokens, 2 * heads))
    table = np.full((heads, 12), -12.0)
    table[np.arange(heads), 6 + np.arange(heads)] = 12.0
    assert layer.relative_bias is not None
    layer.relative_bias.assign(table)
    features = np.eye(2 * heads).reshape(2 * heads, heads, 2)
    if kind is kl.BoundedMultiHeadAttention:
        layer.query_kernel.assign(scores * np.asarray(layer.query_kernel))
        layer.value_kernel.assign(features)
    else:
        layer.query_kernel.assign(scores * features)
    layer.output_kernel.assign(np.eye(2 * heads).reshape(heads, 2, 2 * heads))
    return layer


@pytest.mark.parametrize("padding", [False, True])
def test_heads_that_look_at_one_distance_have_a_constant_near_the_largest_found(padding):
    layer = _looking_at_distances(kl.BoundedMultiHeadAttention)
    mask = "causal"
    certified = layer.lipschitz(norm="l2", mask=mask, sequence_length=9).value
    graph = float(layer.graph_bound(norm="l2", mask=mask, sequence_length=9))
    valid = np.ones((1, 9), bool)
    valid[0, [1, 6]] = not padding

    def run(x):
        rows = np.repeat(valid, len(x), axis=0)
        return layer(x, use_causal_mask=True, query_mask=rows)

    found = 0.0
    for x in np.random.default_rng(0).normal(size=(3, 9, 8)) * 0.3:
        found = max(found, jacobians.norms(jacobians.jacobian(run, x))["l2"])
    assert found <= certified * SLACK
    # The float32 margins of a graph.
    assert certified <= graph <= 1.01 * certified
    # Token 0 is seen by its own row and by the one that looks at it.
    assert padding or certified <= 1.02 * found
    # Without the positions of biases, 9 rows could see one token, in each of 4 heads.
    assert certified < 1.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_masses_by_distance_never_make_a_bound_larger_or_a_graph_smaller(kind, mask):
    for seed in range(4):
        layer = kind(2, 3, token_radius=0.8, max_relative_position=3, dtype="float64")
        layer.build((1, 6, 4))
        randomize(layer, scale=0.5, seed=seed)
        values = []
        for size in (0.0, 1.0, 8.0):
            layer.relative_bias.assign(np.full((2, 6), -size))
            certified = layer.lipschitz(norm="l2", mask=mask, sequence_length=6).value
            graph = float(layer.graph_bound(norm="l2", mask=mask, sequence_length=6))
            assert certified <= graph
            values.append(certified)
        # A head that sees its own token alone is close to a linear map.
        assert values[-1] <= values[0] * SLACK


def _sections(x, lengths):
    return tf.split(x, lengths, axis=1)


CROSS_MASKS = {
    "no mask": lambda t, s: {},
    "causal": lambda t, s: {"use_causal_mask": True},
    "pairs": lambda t, s: {"attention_mask": np.random.default_rng(1).random((t, s)) < 0.6},
    "keys": lambda t, s: {"attention_mask": np.arange(s)[None] < 2},
    "value mask": lambda t, s: {"value_mask": np.arange(s)[None] < 2},
    "query mask": lambda t, s: {"query_mask": np.arange(t)[None] < 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", CROSS_MASKS)
@pytest.mark.parametrize("cap", [None, *ONE_CAP[1:]])
def test_no_jacobian_between_tensors_exceeds_the_bound(kind, mask, cap):
    queries, keys = 4, 3
    arguments = CROSS_MASKS[mask](queries, keys)
    for tensors, more in ((2, {}), (3, {"max_relative_position": 2})):
        layer = kind(2, 3, token_radius=1.1, dtype="float64", **(CAPS[cap] if cap else {}), **more)
        lengths = [queries] + [keys] * (tensors - 1)
        shapes = [(1, length, FEATURES) for length in lengths]
        layer.build(*shapes)
        randomize(layer, scale=1.0)
        layer.condense()

        def run(x, layer=layer, lengths=lengths):
            given = {
                # One mask of pairs serves all examples.
                name: np.repeat(value, x.shape[0], axis=0)
                if name in ("query_mask", "value_mask")
                else value
                for name, value in arguments.items()
            }
            return layer(*_sections(x, lengths), **given)

        inputs = [keras.Input(shape[1:], dtype="float64") for shape in shapes]
        rng = np.random.default_rng(2)
        for norm in NORMS:
            parts = layer.cross_lipschitz(norm=norm, separate_key=tensors == 3)
            joint = kl.certify(keras.Model(inputs, layer(*inputs)), norm=norm).total
            if cap is not None and CAPS[cap].get("lipschitz_norm", "l2") == norm:
                assert joint <= CAPS[cap]["lipschitz_bound"]
            for scale in (0.3, 1.0, 4.0):
                x = rng.normal(size=(sum(lengths), FEATURES)) * scale
                jac = jacobians.jacobian(run, x)
                assert jacobians.norms(jac)[norm] <= joint * SLACK
                start = 0
                for name, length in zip(("query", "value", "key"), lengths, strict=False):
                    columns = jac[:, :, start : start + length]
                    start += length
                    assert jacobians.norms(columns)[norm] <= parts[name].value * SLACK


@pytest.mark.parametrize("norm", NORMS)
def test_models_with_a_projection_and_other_tensors_are_bounded(norm):
    rng = np.random.default_rng(4)
    inputs = [keras.Input((4, 3), dtype="float64"), keras.Input((5, 2), dtype="float64")]
    tokens = kl.TokenProjection(0.8, dtype="float64")(inputs[0])
    memory = keras.layers.Dense(3, "tanh", dtype="float64")(inputs[1])
    own = kl.BoundedMultiHeadAttention(2, 2, token_radius=2.0, dtype="float64")(tokens)
    cross = kl.L2MultiHeadAttention(2, 2, token_radius=1.0, dtype="float64")(own, memory)
    model = keras.Model(inputs, kl.Residual(dtype="float64")([tokens, cross]))
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    total = kl.certify(model, norm=norm, check=True).total
    size = {
        "l2": np.linalg.norm,
        "token": lambda x: np.linalg.norm(x, axis=-1).max(),
        "linf": lambda x: np.abs(x).max(),
    }[norm]
    for scale in (0.1, 1.0, 5.0):
        for step in (1e-3, 1.0):
            x = [rng.normal(size=(1, *one.shape[1:])) * scale for one in inputs]
            y = [one + step * rng.normal(size=one.shape) for one in x]
            moved = size(np.asarray(model(x) - model(y))[0])
            parts = [size((one - other)[0]) for one, other in zip(x, y, strict=True)]
            change = np.hypot(*parts) if norm == "l2" else max(parts)
            assert moved <= total * change * SLACK


# Local certificates -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kl.BoundedMultiHeadAttention, kl.L2MultiHeadAttention, None])
@pytest.mark.parametrize("norm", ["l2", "token"])
@pytest.mark.parametrize("options", [{}, {"lipschitz_bound": 0.9}, {"max_relative_position": 2}])
def test_local_certificates_hold_around_their_center(kind, norm, options):
    rng = np.random.default_rng(7)
    inputs = keras.Input((4, 3), dtype="float64")
    x = kl.TokenProjection(1.0, dtype="float64")(inputs)
    if kind is not None:
        x = kind(2, 2, token_radius=0.8, dtype="float64", **options)(x, use_causal_mask=True)
    x = keras.layers.Dense(3, "tanh", dtype="float64")(x)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling1D(dtype="float64")(x))
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    with kl.condensed(model):
        everywhere = kl.certify(model, norm=norm)
        for scale in (0.2, 1.0):
            center = rng.normal(size=(4, 3)) * scale
            radius = 0.05
            local = kl.certify(model, norm=norm, center=center, radius=radius, check=True)
            assert local.total <= everywhere.total * (1.0 + 1e-9)
            assert not any("values are not known" in line for line in str(local).splitlines())
            steps = rng.normal(size=(50, 4, 3))
            axis = (1, 2) if norm == "l2" else 2
            steps /= np.linalg.norm(steps, axis=axis, keepdims=True).max(axis=1, keepdims=True)
            near = center + radius * steps * rng.uniform(0.1, 1.0, (50, 1, 1))
            moved = np.linalg.norm(np.asarray(model(near) - model(center[None])), axis=-1)
            away = np.linalg.norm(near - center, axis=axis).reshape(50, -1).max(axis=1)
            assert (moved <= local.total * away * SLACK).all()
