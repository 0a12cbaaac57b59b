"""Every rule is an upper bound of what its layer does, and attained where it says so."""

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
