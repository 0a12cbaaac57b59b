"""Every rule is an upper bound of what its layer does, and attained where it says so."""

import numpy as np
import pytest
from helpers.certify_cases import (
    jacobian_norm,
    jacobians,
    layer_cases,
    model_of,
    points_of,
    snapshot,
)

from keras_lipattn.certification import certify
from keras_lipattn.certification.options import Options
from keras_lipattn.certification.propagation import Propagation
from keras_lipattn.certification.traced_model import TracedModel

RADIUS = 2.0
CASES = {case.name: case for case in layer_cases()}


@pytest.mark.parametrize("name", CASES)
def test_rule_dominates_the_jacobian_and_is_attained_where_exact(name):
    case = CASES[name]
    model = model_of(case)
    points = points_of(case).astype(case.dtype)
    measured = jacobians(lambda x: model(x, training=False), points)
    shape = model.output_shape[1:]
    widths = case.shape[-1], shape[-1] if shape else 1
    before = snapshot(model)
    for norm in ("l2", "token", "linf"):
        certificate = certify(model, norm=norm, **dict(case.options))
        if norm in case.skip_norms:
            assert not certificate.is_finite
            continue
        assert certificate.is_finite, certificate.reasons
        found = max(jacobian_norm(jacobian, norm, widths) for jacobian in measured)
        # Nothing but the rounding of the measurement may separate them.
        rounding = 1e-9 if case.dtype == "float64" else 1e-5
        assert found <= certificate.total * (1.0 + rounding), (norm, found, certificate.total)
        if norm in case.attained:
            assert found >= 0.99 * certificate.total, (norm, found, certificate.total)
    # Not one bit of the layer changed on the way.
    assert snapshot(model) == before


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_where_the_range_says(name, norm):
    case = CASES[name]
    model = model_of(case)
    options = {**dict(input_radius=RADIUS), **dict(case.options)}
    traced = TracedModel(model, None, None)
    propagation = Propagation(traced.trace, traced.comparison, Options(norm=norm, **options))
    (state,) = propagation.run(traced.names)
    rng = np.random.default_rng(0)
    points = rng.normal(size=(60, *case.shape))
    points[::3] = np.sign(points[::3])
    # All tokens alike, where averages go farthest.
    if points.ndim > 2:
        points[1::3] = points[1::3, ..., :1, :]
    points *= RADIUS / np.linalg.norm(points, axis=-1, keepdims=True)
    outputs = np.asarray(model(points.astype(case.dtype), training=False), np.float64)
    tokens = outputs if outputs.ndim > 1 else outputs[:, None]
    center = 0.0 if state.range.center is None else state.range.center
    rounding = 1.0 + (1e-9 if case.dtype == "float64" else 1e-5)
    assert np.linalg.norm(tokens - center, axis=-1).max() <= state.range.radius * rounding + 1e-9
    assert np.abs(outputs).max() <= state.range.largest * rounding + 1e-9
    assert state.range.bounded
