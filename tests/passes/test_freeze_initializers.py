"""freeze-initializers: overridable initializers become constants."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxopt.graph import constant_array
from onnxopt.passes.freeze_initializers import FreezeInitializers
from tests.support import assert_equivalent, run_pass


@pytest.mark.parametrize(("ir_version", "opset"), [(3, 8), (4, 9), (10, 17)])
def test_initializers_leave_the_inputs(ir_version: int, opset: int) -> None:
    proto = onnx.parser.parse_model(
        f"""<ir_version: {ir_version}, opset_import: ["" : {opset}]>
        g (float[2] w, float[2] x, float[2] v) => (float[2] y)
        <float[2] w = {{1, 2}}, float[2] v = {{3, 4}}> {{ y = Sum(x, w, v) }}"""
    )
    result = run_pass(proto, FreezeInitializers())
    model = result.model
    assert result.changes == 2
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert list(model.graph.initializers) == ["w", "v"]
    assert model.ir_version == max(ir_version, 4)
    np.testing.assert_array_equal(constant_array(model.graph.initializers["v"]), [3, 4])
    assert_equivalent(proto, model)


def test_nothing_to_freeze_keeps_the_version() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 3, opset_import: ["" : 8]> g (float[2] x) => (float[2] y) { y = Relu(x) }"""
    )
    result = run_pass(proto, FreezeInitializers())
    assert (result.changes, result.model.ir_version) == (0, 3)
