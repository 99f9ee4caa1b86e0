"""Each kernel against ONNX Runtime with its optimizations off, over dtypes, attributes and opsets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.evaluation import KERNELS, CannotEvaluateError, evaluate
from tests.support import execute

F4, F8, F2, I4, I8, U1, I1, B1 = (np.dtype(code) for code in ("f4", "f8", "f2", "i4", "i8", "u1", "i1", "?"))
RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Case:
    """One node on constants."""

    op: str
    inputs: Sequence[np.ndarray | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 17
    outputs: int = 1

    def __str__(self) -> str:
        kinds = "".join("-" if x is None else x.dtype.char for x in self.inputs)
        texts = [
            f"{key}={'tensor' if isinstance(v, onnx.TensorProto) else v}"
            for key, v in self.attributes.items()
        ]
        return f"{self.op}-{self.opset}-{kinds}-{','.join(texts)}"

    def model(self) -> onnx.ModelProto:
        names = ["" if x is None else f"i{i}" for i, x in enumerate(self.inputs)]
        made = [f"o{i}" for i in range(self.outputs)]
        node = onnx.helper.make_node(self.op, names, made, **self.attributes)
        constants = [
            ir.to_proto(ir.tensor(x, name=name))
            for name, x in zip(names, self.inputs, strict=True)
            if x is not None
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in made]
        graph = onnx.helper.make_graph([node], "g", [], outputs, constants)
        model = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", self.opset)], ir_version=8
        )
        return onnx.shape_inference.infer_shapes(model)

    def evaluate(self) -> tuple[np.ndarray, ...]:
        node = ir.from_proto(self.model()).graph[0]
        return evaluate(node, self.inputs, self.opset)


def check(case: Case) -> None:
    """Equal to the runtime: exactly, or within a few units in the last place for floats."""
    wanted = execute(case.model(), {})
    found = case.evaluate()
    for want, have in zip(wanted, found, strict=True):
        assert (want.dtype, want.shape) == (have.dtype, have.shape)
        if want.dtype.kind == "f":
            np.testing.assert_allclose(have, want, rtol=20 * np.finfo(want.dtype).eps, atol=1e-6)
        else:
            np.testing.assert_array_equal(have, want)


def floats(*shape: int, dtype: np.dtype = F4) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def ints(*values: int, dtype: np.dtype = I8) -> np.ndarray:
    return np.array(values, dtype)


HALVES = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.3, -0.7], F4)
POSITIVE = np.array([[0.5, 1.5, 2.0], [4.0, 0.1, 9.0]], F4)
SIGNED = ints(-7, 7, -8, 8, 5, -1, dtype=I4)
DIVISOR = ints(2, -2, 3, -3, 4, 5, dtype=I4)
GRID = np.arange(24, dtype=F4).reshape(2, 3, 4)

CASES = [
    *[
        Case(op, [HALVES.astype(t)])
        for op in ("Abs", "Neg", "Sign", "Relu")
        for t in (F4, F8, I4)
        if (op, t) != ("Relu", F8)
    ],
    *[Case(op, [HALVES.astype(t)]) for op in ("Ceil", "Floor", "Round") for t in (F4, F8)],
    *[
        Case(op, [POSITIVE.astype(t)])
        for op in ("Sqrt", "Reciprocal", "Exp", "Log", "Tanh", "Sigmoid")
        for t in (F4, F8)
    ],
    *[Case(op, [POSITIVE]) for op in ("Erf", "Sin", "Cos", "Identity")],
    Case("Exp", [POSITIVE.astype(F2)]),
    Case("Not", [np.array([True, False])]),
    Case("IsNaN", [np.array([1, np.nan, np.inf], F4)]),
    *[
        Case(op, [floats(2, 1, 3).astype(t), POSITIVE.astype(t)], opset=v)
        for op in ("Add", "Sub", "Mul", "Div")
        for t in (F4, F8)
        for v in (7, 13, 17)
    ],
    *[
        Case(op, [SIGNED.astype(t), DIVISOR.astype(t)])
        for op in ("Add", "Sub", "Mul", "Div", "Mod")
        for t in (I4, I8)
    ],
    Case("Mod", [SIGNED, DIVISOR], {"fmod": 1}),
    Case("Mod", [HALVES, np.array(0.7, F4)], {"fmod": 1}),
    Case("Div", [ints(200, 7, dtype=U1), ints(3, 2, dtype=U1)], opset=14),
    *[Case("Pow", [POSITIVE.astype(t), np.array([2, 3, 0], e)]) for t in (F4, F8, I4, I8) for e in (F4, I8)],
    *[Case(op, [np.array([True, False, True]), np.array([[True], [False]])]) for op in ("And", "Or", "Xor")],
    *[
        Case(op, [SIGNED.astype(t), DIVISOR.astype(t)])
        for op in ("Equal", "Less", "Greater")
        for t in (I4, I8, F4)
    ],
    *[Case(op, [HALVES, np.array(0.5, F4)]) for op in ("LessOrEqual", "GreaterOrEqual")],
    *[
        Case(op, [floats(2, 3), floats(3), floats(2, 1)], opset=v)
        for op in ("Min", "Max", "Sum", "Mean")
        for v in (8, 13)
    ],
    *[Case(op, [SIGNED, DIVISOR]) for op in ("Min", "Max")],
    Case("Max", [np.array([1, np.nan], F4), np.array([np.nan, 2], F4)]),
    *[
        Case("Where", [np.array([[True], [False]]), floats(3).astype(t), floats(2, 3).astype(t)])
        for t in (F4, I8)
    ],
    Case("Clip", [HALVES], {"min": -1.0}, 6),
    Case("Clip", [HALVES], {"min": -1.0, "max": 1.0}, 6),
    *[Case("Clip", [HALVES.astype(t), None, np.array(1, t)], opset=13) for t in (F4, F8, I8)],
    Case("Clip", [HALVES, np.array(2, F4), np.array(-1, F4)], opset=13),
    *[
        Case("Cast", [np.array([0, 1.7, -1.7, 100.5, 2.5]).astype(s)], {"to": t})
        for s in (F4, F8, F2, I4, I8, I1)
        for t in (1, 2, 3, 5, 6, 7, 9, 10, 11)
        if not (t == 2 and s.kind == "f")
    ],
    Case("Cast", [np.array([1e30, -1e30, np.nan, np.inf, 65520.0, 1e-8], F4)], {"to": 10}),
    Case("Cast", [np.array([np.nan, 0.0, -0.0, 0.4], F4)], {"to": 9}),
    Case("Cast", [np.array([300, -1, 2**40 + 5], I8)], {"to": 2}),
    Case("CastLike", [HALVES, ints(0)]),
    *[Case("Reshape", [GRID, ints(*shape)]) for shape in ([0, -1], [4, 6], [-1], [2, 0, 2, 2])],
    Case("Reshape", [np.zeros((0, 3), F4), ints(3, 0)], {"allowzero": 1}),
    *[Case("Flatten", [GRID], {"axis": axis}) for axis in (0, 1, 2, 3, -1)],
    *[Case("Squeeze", [GRID.reshape(1, 2, 3, 1, 4)], a, 11) for a in ({}, {"axes": [0]}, {"axes": [-2, 0]})],
    *[
        Case("Squeeze", [GRID.reshape(1, 2, 3, 1, 4), *axes], opset=13)
        for axes in ([], [ints(3)], [ints(-2, 0)])
    ],
    Case("Unsqueeze", [GRID], {"axes": [0, -1]}, 11),
    *[Case("Unsqueeze", [GRID, ints(*axes)], opset=13) for axes in ([0], [-1, 1], [4, 0])],
    *[Case("Transpose", [GRID], a) for a in ({}, {"perm": [1, 2, 0]})],
    *[Case("Concat", [GRID, GRID], {"axis": axis}) for axis in (0, 1, -1)],
    Case("Split", [GRID], {"axis": 2, "split": [1, 3]}, 11, 2),
    Case("Split", [GRID], {"axis": 2}, 11, 2),
    Case("Split", [GRID, ints(1, 0, 2)], {"axis": 1}, 13, 3),
    Case("Split", [GRID], {"axis": -2, "num_outputs": 2}, 18, 2),
    Case("Slice", [GRID], {"starts": [0, -2], "ends": [1, 100], "axes": [0, 2]}, 9),
    Case("Slice", [GRID], {"starts": [1], "ends": [2]}, 9),
    Case("Slice", [GRID, ints(1, 1), ints(2, 3)]),
    *[
        Case("Gather", [GRID, np.array([[0, -1]], t)], {"axis": axis})
        for axis in (0, 1, -1)
        for t in (I4, I8)
    ],
    Case("Gather", [ints(5, 6, 7), np.array(-1, I8)]),
    *[Case("GatherElements", [GRID, np.array([[[0, -1, 1, 0]]], I8)], {"axis": axis}) for axis in (0, 1, 2)],
    Case("GatherND", [GRID, np.array([[0, 1], [1, -1]], I8)]),
    Case("GatherND", [GRID, np.array([[[0]], [[2]]], I8)], {"batch_dims": 1}),
    Case("GatherND", [GRID, np.array([[[0, -1]], [[2, 1]]], I8)], {"batch_dims": 1}),
    Case("ScatterND", [GRID, np.array([[1], [0]], I8), GRID[::-1].copy()]),
    Case("ScatterND", [GRID, np.array([[0, 1, -1]], I8), floats(1)]),
    *[Case("Expand", [floats(3, 1), ints(*shape)]) for shape in ([2, 1, 4], [3, 4], [1], [3, 1])],
    Case("Tile", [GRID, ints(2, 1, 3)]),
    Case("Tile", [GRID, ints(0, 1, 1)]),
    Case("ConstantOfShape", [ints(2, 3)]),
    Case("ConstantOfShape", [ints(2, 0)], {"value": onnx.numpy_helper.from_array(ints(7))}),
    Case("ConstantOfShape", [np.zeros(0, I8)], {"value": onnx.numpy_helper.from_array(np.array([True]))}),
    *[
        Case("Range", [np.array(a, t), np.array(b, t), np.array(c, t)])
        for t in (I4, I8, F4)
        for a, b, c in ((0, 5, 1), (9, 0, -2), (3, 1, 1))
    ],
    *[Case("OneHot", [ints(0, -1, 2), np.array(3, I8), floats(2)], {"axis": axis}) for axis in (-1, 0)],
    *[Case("NonZero", [x]) for x in (np.array([[1, 0], [2, 3]], I8), np.array([0, 0], F4))],
    *[
        Case("Pad", [GRID], {"pads": [1, 0, 2, 0, 1, 0], "mode": m, "value": 3.0}, 9)
        for m in ("constant", "edge", "reflect")
    ],
    *[Case("Pad", [GRID, ints(0, 1, 2, 1, 0, 3)], {"mode": m}, 13) for m in ("constant", "edge", "reflect")],
    Case("Pad", [GRID, ints(-1, 1, 0, 0, 0, -2), np.array(5, F4)], {}, 13),
    Case("Pad", [GRID.astype(I8), ints(2, 1), None, ints(-1)], {}, 18),
    Case("Pad", [GRID, ints(2, 1), None, ints(2)], {"mode": "wrap"}, 19),
    Case("Dropout", [GRID], {"ratio": 0.3}, 11),
    Case("Dropout", [GRID, np.array(0.3, F4), np.array(False)], {}, 13, 2),
    *[
        Case("MatMul", [floats(*a).astype(t), floats(*b).astype(t)])
        for a, b in (((2, 3), (3, 4)), ((3,), (3,)), ((5, 2, 3), (3,)), ((1, 2, 3), (4, 3, 2)))
        for t in (F4, F8)
    ],
    *[
        Case(
            "Gemm",
            [floats(*((3, 2) if a else (2, 3))), floats(*((4, 3) if b else (3, 4))), floats(*c)],
            {"transA": a, "transB": b, "alpha": 0.5, "beta": 2.0},
        )
        for a in (0, 1)
        for b in (0, 1)
        for c in ((4,), (2, 1), (1,))
    ],
    Case("Gemm", [floats(2, 3), floats(3, 4)]),
    *[
        Case("CumSum", [GRID.astype(t), np.array(axis, I4)], {"exclusive": e, "reverse": r})
        for t in (F4, I8)
        for axis in (0, -1)
        for e in (0, 1)
        for r in (0, 1)
    ],
    *[
        Case(op, [np.round(floats(3, 4))], {"axis": x, "keepdims": k, "select_last_index": s}, 13)
        for op in ("ArgMax", "ArgMin")
        for x in (0, -1)
        for k in (0, 1)
        for s in (0, 1)
    ],
]
REDUCTIONS = sorted(op for op in KERNELS if op.startswith("Reduce"))
CASES += [
    Case(op, [np.abs(GRID) + 1], {"keepdims": keep, **axes}, opset)
    for op in REDUCTIONS
    for keep in (0, 1)
    for axes in ({}, {"axes": [1]}, {"axes": [-1, 0]})
    for opset in (11, 12)
]
CASES += [Case(op, [np.abs(GRID) + 1, ints(-1, 0)], {"keepdims": k}, 18) for op in REDUCTIONS for k in (0, 1)]
CASES += [
    Case("ReduceSum", [GRID, np.zeros(0, I8)], {"noop_with_empty_axes": noop}, opset)
    for noop in (0, 1)
    for opset in (13, 18)
]
CASES += [
    Case(op, [SIGNED.reshape(2, 3).astype(t)], {"axes": [1]}, 12)
    for op in ("ReduceMax", "ReduceMin", "ReduceSum")
    for t in (I4, I8)
]

BY_REFERENCE = [
    Case("Softmax", [floats(2, 3)], {"axis": -1}, 13),
    Case("LayerNormalization", [floats(2, 3), floats(3), floats(3)], {"axis": -1}),
    Case("Trilu", [floats(4, 4), np.array(1, I8)], {"upper": 0}),
    Case("Einsum", [floats(2, 3), floats(3, 2)], {"equation": "ij,jk->ik"}),
    Case("TopK", [floats(3, 5), ints(2)], {"axis": -1}, 13, 2),
    Case("ScatterElements", [floats(3, 3), ints(0, 2).reshape(1, 2), floats(1, 2)], {"axis": 0}, 18),
    Case("DepthToSpace", [floats(1, 8, 2, 2)], {"blocksize": 2, "mode": "CRD"}),
    Case("HardSigmoid", [floats(5)], {"alpha": 0.3}),
    Case("LeakyRelu", [floats(5)], {"alpha": 0.3}),
    Case("EyeLike", [floats(3, 3)], {"k": 1}),
    Case("IsInf", [np.array([1, np.inf, -np.inf], F4)], {"detect_negative": 0}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_agrees_with_the_runtime(case: Case) -> None:
    check(case)


def test_every_kernel_is_tested() -> None:
    assert {case.op for case in CASES} == set(KERNELS)


@pytest.mark.parametrize("case", BY_REFERENCE, ids=str)
def test_reference_evaluator_serves_the_rest(case: Case) -> None:
    assert case.op not in KERNELS
    check(case)


@pytest.mark.parametrize("op", ["Add", "Mul", "Sqrt", "Exp", "Sigmoid", "Max", "ReduceSum", "MatMul"])
def test_bfloat16_is_computed_in_float32_and_rounded_once(op: str) -> None:
    two = op in ("Add", "Mul", "Max", "MatMul")
    arrays = [np.abs(floats(3, 3)).astype(ml_dtypes.bfloat16) for _ in range(1 + two)]
    opset = 13
    (have,) = Case(op, arrays, opset=opset).evaluate()
    (want,) = Case(op, [array.astype(F4) for array in arrays], opset=opset).evaluate()
    assert have.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(have, want.astype(ml_dtypes.bfloat16))


def test_casts_to_and_from_bfloat16_round_to_even() -> None:
    x = np.array([1.00390625, 1.01171875, 3e38, 1e-40, -2.7], F4)
    (down,) = Case("Cast", [x], {"to": 16}).evaluate()
    (up,) = Case("Cast", [down], {"to": 1}).evaluate()
    assert down.dtype == ml_dtypes.bfloat16
    assert up[:2].tolist() == [1.0, 1.015625]
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 17]>'
        "g (float[n] x) => (float[n] y) { h = Cast<to=16>(x) y = Cast<to=1>(h) }"
    )
    np.testing.assert_array_equal(execute(model, {"x": x})[0], up)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("Cast", [np.array([np.nan], F4)], {"to": 7}), "outside the range"),
        (Case("Cast", [np.array([3e9], F4)], {"to": 6}), "outside the range"),
        (Case("Cast", [np.array([-2.0], F4)], {"to": 2}), "outside the range"),
        (Case("Cast", [np.array([1.0], F4)], {"to": 17}), "left to the runtime"),
        (Case("Div", [ints(1), ints(0)]), "divided by zero"),
        (Case("Mod", [ints(1), ints(0)]), "divided by zero"),
        (Case("Mod", [floats(1), floats(1)]), "fmod=1"),
        (Case("Pow", [ints(10), ints(18)]), "outside the range"),
        (Case("Pow", [ints(0), ints(-1)]), "outside the range"),
        (Case("Add", [floats(2, 3), floats(2)], {"axis": 0, "broadcast": 1}, 6), "before opset 7"),
        (Case("ReduceMean", [ints(1, 2)], {}, 13), "integers"),
        (Case("Gemm", [floats(2, 0), floats(0, 3), floats(3)], {"beta": 2.0}), "adds up nothing"),
        (Case("Slice", [ints(1, 2), ints(-1), ints(2**31 - 1), ints(0), ints(-2)]), "runtimes disagree"),
        (Case("Slice", [ints(1, 2), ints(-1), ints(2**63 - 1), ints(0), ints(-1)]), "runtimes disagree"),
        (Case("Dropout", [floats(3)], {}, 11, 2), "before opset 12"),
        (Case("MaxPool", [floats(1, 1, 3)], {"kernel_shape": [2], "pads": [0, 1]}), "left to the runtime"),
        (Case("ConvTranspose", [floats(1, 2, 3), floats(2, 1, 1)], {"group": 2}), "left to the runtime"),
        (Case("Softmax", [floats(2, 3, 4)], {}, 11), "meant something else in opset 11"),
        (Case("ConstantOfShape", [ints(1 << 20, 1 << 10)]), "would take 4,295 MB"),
        (Case("Expand", [floats(1), ints(1 << 30)]), "would take 4,295 MB"),
        (Case("Range", [np.array(0, I8), np.array(1 << 40, I8), np.array(1, I8)]), "would take"),
        (Case("Tile", [floats(4), ints(1 << 28)]), "would take"),
        (Case("Add", [floats(1 << 12, 1), floats(1, 1 << 12)]), "would take"),
        (Case("Gather", [floats(3), ints(3)]), "Gather fails: IndexError"),
        (Case("Reshape", [floats(3), ints(2)]), "Reshape fails: ValueError"),
        (Case("SequenceConstruct", [floats(3)]), "no plain tensor"),
        (Case("Split", [floats(3), ints(1, 1)], {}, 13, 2), "do not split"),
        (Case("Pad", [floats(3), ints(-2, -2)], {}, 13), "takes elements away"),
        (Case("Einsum", [floats(1 << 16), floats(1 << 16)], {"equation": "i,i->i"}), "too slow"),
    ],
    ids=str,
)
def test_what_is_not_evaluated_says_why(case: Case, reason: str) -> None:
    proto = case.model() if case.op not in ("Reshape", "Split", "Gather", "Pad") else None
    node = (
        ir.from_proto(proto).graph[0]
        if proto
        else ir.node(
            case.op,
            [ir.Value(name=f"i{i}") for i in range(len(case.inputs))],
            case.attributes,
            num_outputs=case.outputs,
        )
    )
    with pytest.raises(CannotEvaluateError, match=reason):
        evaluate(node, case.inputs, case.opset)


def test_a_result_that_contradicts_the_record_is_refused() -> None:
    node = ir.node("Neg", [ir.Value(name="x")])
    node.outputs[0].shape = ir.Shape([3])
    with pytest.raises(CannotEvaluateError, match="has shape"):
        evaluate(node, [floats(2)], 17)
    node.outputs[0].shape = ir.Shape([2])
    node.outputs[0].type = ir.TensorType(ir.DataType.DOUBLE)
    with pytest.raises(CannotEvaluateError, match="is DOUBLE on record"):
        evaluate(node, [floats(2)], 17)


SMALL = st.integers(-6, 6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(SMALL, SMALL, SMALL.filter(bool), st.booleans()), min_size=1, max_size=2))
def test_slice_over_all_starts_ends_and_steps(spans: list[tuple[int, int, int, bool]]) -> None:
    starts, ends, steps = (ints(*(span[i] for span in spans)) for i in range(3))
    axes = ints(*(axis - 3 * span[3] for axis, span in enumerate(spans)))
    check(Case("Slice", [GRID, starts, ends, axes, steps], opset=13))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_broadcasting_arithmetic_of_any_shape(data: st.DataObject) -> None:
    dims = data.draw(st.lists(st.integers(0, 3), max_size=3))
    shapes = [
        [dim if data.draw(st.booleans()) else 1 for dim in dims[data.draw(st.integers(0, len(dims))) :]]
        for _ in range(2)
    ]
    op = data.draw(st.sampled_from(["Add", "Sub", "Mul", "Div", "Mod", "Equal", "Less", "Max", "Where"]))
    dtype = data.draw(st.sampled_from([I4, I8] if op == "Mod" else [F4, I4, I8]))
    values = data.draw(st.lists(st.integers(-9, 9).filter(bool), min_size=27, max_size=27))
    arrays = [np.resize(np.array(values, dtype), shape) for shape in shapes]
    condition = [arrays[0] > 0] if op == "Where" else []
    check(Case(op, [*condition, *arrays]))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(-2, 3), min_size=6, max_size=6), st.sampled_from([11, 13, 18]))
def test_pad_with_any_amounts(pads: list[int], opset: int) -> None:
    kept = [size + before + after for size, before, after in zip((3, 4, 4), pads[:3], pads[3:], strict=True)]
    if min(kept) <= 0:
        return
    check(
        Case("Pad", [np.arange(48, dtype=F4).reshape(3, 4, 4), ints(*pads), np.array(0.5, F4)], opset=opset)
    )
