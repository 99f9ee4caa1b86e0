"""fuse-groupnorm against the runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxopt.passes.fuse.fuse_groupnorm import FuseGroupnorm
from onnxopt.passes.merge.merge_normalization import MergeNormalization
from tests.support import assert_equivalent, run_pass, text_model

FORM = (
    "g = Reshape(x, grouped) n = InstanceNormalization<epsilon = 0.01>(g, ones, zeros) y = Reshape(n, shape)"
)


def grouped(
    body: str = FORM,
    *,
    shape: str = "N,6,4,5",
    groups: tuple[int, ...] = (0, 3, -1),
    opset: int = 21,
    scale: float = 1,
    outputs: str = "",
) -> onnx.ModelProto:
    """x in groups of channels, normalized, and back."""
    model = text_model(f"""<ir_version: 10, opset_import: ["" : {opset}]>
        agraph (float[{shape}] x) => (float[{shape}] y{outputs}) {{ shape = Shape(x) {body} }}""")
    count = max(groups[1], 1)
    arrays: dict[str, np.ndarray] = {
        "grouped": np.array(groups, np.int64),
        "ones": np.full(count, scale, np.float32),
        "zeros": np.zeros(count, np.float32),
        "gamma": np.linspace(1, 2, 6, dtype=np.float32).reshape(6, 1, 1),
    }
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize(
    ("shape", "groups"), [("N,6,4,5", (0, 3, -1)), ("2,6,4", (2, 2, 12)), ("N,6,2,2,2", (0, 1, -1))]
)
def test_groups(shape: str, groups: tuple[int, ...]) -> None:
    model = grouped(shape=shape, groups=groups)
    done = run_pass(model, FuseGroupnorm())
    assert (done.op_types, done.declined) == (["GroupNormalization"], ())
    assert_equivalent(model, done.model, kind="reorder")


def test_scale_and_bias_follow() -> None:
    model = grouped(FORM.replace("y =", "t =") + " u = Mul(t, gamma) y = Add(u, gamma)")
    done = run_pass(model, FuseGroupnorm())
    merged = run_pass(onnx.shape_inference.infer_shapes(_proto(done.model)), MergeNormalization())
    assert merged.op_types == ["GroupNormalization"]
    assert_equivalent(model, merged.model, kind="reorder")


def _proto(model: object) -> onnx.ModelProto:
    import onnx_ir as ir

    assert isinstance(model, ir.Model)
    return ir.to_proto(model)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"opset": 20}, "came with opset 21"),
        ({"scale": 2}, "scale or bias of its own"),
        ({"shape": "N,C,4,5"}, "number of channels, are not known"),
        ({"groups": (-1, 3, 40)}, "does not group the channels"),
        ({"shape": "N,6,4,3", "groups": (0, 4, -1)}, "does not group the channels"),
        (
            {"body": FORM.replace("y = Reshape(n, shape)", "t = Reshape(n, grouped) y = Reshape(t, shape)")},
            "have the shape of",
        ),
        ({"outputs": ", float[A,B,C] n"}, "is also a graph output"),
    ],
)
def test_refusals(changes: dict[str, object], reason: str) -> None:
    model = grouped(**changes)  # type: ignore[arg-type]
    done = run_pass(model, FuseGroupnorm())
    assert done.changes == 0
    assert len(done.declined) == 1
    assert reason in done.declined[0]


def test_subgraphs() -> None:
    model = text_model("""<ir_version: 10, opset_import: ["" : 21]>
        agraph (float[2,4,3] x, bool c) => (float[2,4,3] y)
            <int64[3] grouped = {0, 2, -1}, float[2] ones = {1.0, 1.0}, float[2] zeros = {0.0, 0.0}> {
            y = If (c) < then_branch = a () => (float[2,4,3] p) {
                shape = Shape(x) g = Reshape(x, grouped) n = InstanceNormalization(g, ones, zeros)
                p = Reshape(n, shape) },
              else_branch = b () => (float[2,4,3] q) { q = Neg(x) } >
        }""")
    done = run_pass(model, FuseGroupnorm())
    assert done.count("GroupNormalization") == 1
    x = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)
    assert_equivalent(model, done.model, {"x": x, "c": np.array(True)}, kind="reorder")


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    groups=st.sampled_from([1, 2, 3, 4, 6]),
    rank=st.integers(3, 5),
    batch=st.sampled_from(["N", "2"]),
    copies=st.booleans(),
)
def test_any_groups(groups: int, rank: int, batch: str, copies: bool) -> None:
    shape = ",".join([batch, "6", "4", "2", "1"][:rank])
    model = grouped(shape=shape, groups=(0 if copies else 2, groups, -1))
    if groups == 4 and rank < 4:
        return  # 6 channels by 4 elements in 4 groups: the groups cut through channels
    done = run_pass(model, FuseGroupnorm())
    assert done.count("GroupNormalization") == (6 % groups == 0 and (copies or batch == "2"))
    assert_equivalent(model, done.model, kind="reorder")
