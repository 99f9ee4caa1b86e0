"""Moments of what a layer is multiplied with, held against numpy."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxopt.calibration.moments import layers_with_moments
from onnxopt.graph import nodes
from tests.support import text_model


def test_mean_and_covariance_are_of_all_positions_of_all_samples() -> None:
    proto = text_model("""m (float[N, 3] x) => (float[N, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
        h = Abs(x)
        y = MatMul(h, w)
    }""")
    model = ir.from_proto(proto)
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((count, 3)).astype(np.float32) + 2} for count in (40, 300, 7)]
    [layer] = layers_with_moments(model, list(nodes(model)), samples)
    rows = np.abs(np.concatenate([feeds["x"] for feeds in samples]).astype(np.float64))
    assert int(layer.positions) == 347
    np.testing.assert_allclose(layer.mean, rows.mean(0)[None], rtol=1e-6)
    np.testing.assert_allclose(layer.covariance, np.cov(rows.T, bias=True)[None] * 347, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(layer.moments, (rows.T @ rows)[None], rtol=1e-6)
