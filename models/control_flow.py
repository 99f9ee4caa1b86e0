"""If, Loop and Scan, nested, with values captured from every enclosing graph."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from models.builder import Builder


def control_flow(seed: int = 0) -> onnx.ModelProto:
    """A Loop that holds an If that holds a Scan.

    Inputs: ``x`` float32 (rows, 8); ``steps`` int64 scalar, the trips; ``flip`` bool scalar, the branch.
    Outputs: ``y`` float32 (rows, 8); ``trace`` float32 (steps, rows, 8), the state after each trip.
    """
    b = Builder(seed)
    weight = b.weight(8, 8, scale=0.3, name="weight")
    b.constant(b.rng.normal(0, 0.1, 8), name="bias")
    scaled = b.add("MatMul", "x", weight)
    b.add("Constant", outputs=["always"], value=onnx.numpy_helper.from_array(np.array(True)))
    b.add("Loop", "steps", "always", scaled, outputs=["final", "trace"], body=_loop_body())
    b.add("Add", "final", "bias", outputs=["y"])
    return b.model(
        "control_flow",
        [("x", ["rows", 8]), ("steps", []), ("flip", [])],
        [("y", ["rows", 8]), ("trace", ["steps", "rows", 8])],
        steps=int(TensorProto.INT64),
        flip=int(TensorProto.BOOL),
    )


def _loop_body() -> onnx.GraphProto:
    """Captures ``flip``; its If captures the state."""
    b = Builder(prefix="loop_")
    b.add("If", "flip", outputs=["chosen"], then_branch=_scan_branch(), else_branch=_plain_branch())
    b.add("Identity", "keep_going", outputs=["go_on"])
    b.add("Tanh", "chosen", outputs=["next"])
    b.add("Identity", "next", outputs=["row"])
    return b.graph(
        "loop_body",
        [("trip", []), ("keep_going", []), ("state", ["rows", 8])],
        [("go_on", []), ("next", ["rows", 8]), ("row", ["rows", 8])],
        trip=int(TensorProto.INT64),
        keep_going=int(TensorProto.BOOL),
        go_on=int(TensorProto.BOOL),
    )


def _scan_branch() -> onnx.GraphProto:
    """Running sums over the rows of the loop's state; the Scan's body captures the outermost ``bias``."""
    inner = Builder(prefix="scan_")
    inner.add("Add", "sum", "element", outputs=["more"])
    inner.add("Add", "more", "bias", outputs=["total"])
    inner.add("Identity", "total", outputs=["emitted"])
    body = inner.graph("scan_body", [("sum", [8]), ("element", [8])], [("total", [8]), ("emitted", [8])])
    b = Builder(prefix="then_")
    zero = b.constant(np.zeros(8), name="zero")
    b.add("Scan", zero, "state", outputs=["last_sum", "sums"], body=body, num_scan_inputs=1)
    b.add("Mul", "sums", "last_sum", outputs=["then_out"])
    return b.graph("then_branch", [], [("then_out", ["rows", 8])])


def _plain_branch() -> onnx.GraphProto:
    """Captures the loop's state and the outermost ``weight``."""
    b = Builder(prefix="else_")
    b.add("Add", b.add("MatMul", "state", "weight"), "state", outputs=["else_out"])
    return b.graph("else_branch", [], [("else_out", ["rows", 8])])
