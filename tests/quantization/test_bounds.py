"""How near outputs have to stay where there is no metric."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxopt.quantization.bounds import SCORES_DB, SIGNALS_DB, required_db
from tests.support import execute, text_model


def required(text: str, **feeds: np.ndarray) -> dict[str, float]:
    proto = text_model(text)
    names = [output.name for output in proto.graph.output]
    found = dict(zip(names, execute(proto, feeds), strict=True))
    return required_db(ir.from_proto(proto), feeds, found)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Add(x, x)", SIGNALS_DB),
        ("y = Sigmoid(x)", SCORES_DB),
        ("s = Softmax(x) shape = Constant<value_ints = [4, 2]>() y = Reshape(s, shape)", SCORES_DB),
        ("s = Softmax(x) y = Mul(s, s)", SIGNALS_DB),
        ("y = ReduceSum(x)", SCORES_DB),
    ],
)
def test_what_is_as_large_as_the_input_is_a_signal_or_scores(body: str, expected: float) -> None:
    found = required(f"agraph (float[1, 8] x) => (float[M, N] y) {{ {body} }}", x=np.ones((1, 8), np.float32))
    assert found == {"y": expected}


def test_outputs_of_a_model_of_integers_are_scores() -> None:
    text = "agraph (int64[1, 8] ids) => (float[1, 8] y) { y = Cast<to = 1>(ids) }"
    assert required(text, ids=np.ones((1, 8), np.int64)) == {"y": SCORES_DB}


def test_what_a_model_with_state_gives_are_signals_beside_its_scores() -> None:
    text = """agraph (float[1, 16] x, float[1, 4] s) => (float[1, 1] level, float[1, 1] p, float[1, 4] next) {
        next = Add(s, s)
        level = ReduceSum<axes = [1]>(x)
        p = Sigmoid(level)
    }"""
    feeds = {"x": np.ones((1, 16), np.float32), "s": np.ones((1, 4), np.float32)}
    header = '<ir_version: 8, opset_import: ["": 12]>'
    assert required(header + text, **feeds) == {"level": SIGNALS_DB, "p": SCORES_DB, "next": SIGNALS_DB}
