"""What is asked of a rewrite of a quantized model."""

from __future__ import annotations

import numpy as np
import pytest

from onnxopt.verification.distance import distance
from onnxopt.verification.judge import Noise, judge

X = np.linspace(-1, 1, 64, dtype=np.float32).reshape(4, 16)


@pytest.mark.parametrize(("quantized", "ok"), [(True, True), (False, False)])
def test_the_default_level_fuses_quantized_graphs_in_its_own_way(quantized: bool, ok: bool) -> None:
    same, flipped = distance(X, X), distance(X, X * np.float32(0.9))
    noise = Noise(levels=same, nudges=same)
    verdict = judge("y", "compared", "exact", True, noise, same, flipped, quantized=quantized)
    assert verdict.ok is ok
    assert "default level" in verdict.reason or ok


def test_the_lowest_level_must_be_bit_equal() -> None:
    same, other = distance(X, X), distance(X, np.nextafter(X, np.float32(2)))
    verdict = judge("y", "compared", "exact", True, Noise(same, same), other, same, quantized=True)
    assert "bit-equality is needed" in verdict.reason
