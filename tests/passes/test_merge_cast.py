"""merge-cast against the runtime: all values of the 8 and 16-bit types, edges and samples of the others."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxopt.passes.merge.merge_cast import MergeCast, is_lossless
from onnxopt.protobuf import dump
from tests.support import assert_equivalent, run_pass, text_model

SHARED = "the value in between is read elsewhere too"
LOSSY = "the first Cast does not keep every value"
OPEN = "integers out of the last type's range, which a float in between leaves open"
ODD = "a type whose Cast is no plain conversion"

INTEGERS = ("INT8", "UINT8", "INT16", "UINT16", "INT32", "UINT32", "INT64", "UINT64")
FLOATS = ("FLOAT16", "BFLOAT16", "FLOAT", "DOUBLE")
TYPES = tuple(ir.DataType[name] for name in ("BOOL", *INTEGERS, *FLOATS))


def every_value(dtype: ir.DataType) -> np.ndarray:
    """All values up to 16 bits; else powers of two and their neighbours, small numbers and random bits."""
    kind = dtype.numpy()
    if dtype is ir.DataType.BOOL:
        return np.array([False, True] * 40)
    if kind.itemsize <= 2:
        bits = np.arange(2 ** (8 * kind.itemsize)).astype(np.uint8 if kind.itemsize == 1 else np.uint16)
        return bits.view(kind)
    bits = np.random.default_rng(0).integers(0, 256, 20000 * kind.itemsize, np.uint8)
    powers = [
        sign * 2.0**power + off for power in range(52) for off in (-1, -0.5, 0, 0.5, 1) for sign in (1, -1)
    ]
    with np.errstate(all="ignore"):
        edges = np.array(powers).astype(kind)
        limits = np.array(
            [np.iinfo(kind).min, np.iinfo(kind).max] if kind.kind in "iu" else [np.inf, np.nan, -0.0], kind
        )
    return np.concatenate([bits.view(kind), edges, limits])


def casts(source: ir.DataType, *targets: ir.DataType) -> onnx.ModelProto:
    """Casts, then a Reshape, and a Cast to float32 where the result is of a type that numpy lacks."""
    last = targets[-1] if targets else source
    nodes = [helper.make_node("Cast", [f"v{i}"], [f"v{i + 1}"], to=to.value) for i, to in enumerate(targets)]
    nodes.append(helper.make_node("Reshape", [f"v{len(targets)}", "all"], ["z"]))
    if last is ir.DataType.BFLOAT16:
        nodes[-1].output[0] = "y"
        nodes.append(helper.make_node("Cast", ["y"], ["z"], to=TensorProto.FLOAT))
        last = ir.DataType.FLOAT
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("v0", source.value, ["n"])],
        [helper.make_tensor_value_info("z", last.value, None)],
        initializer=[helper.make_tensor("all", TensorProto.INT64, [1], [-1])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def result_of(model: onnx.ModelProto, values: np.ndarray) -> np.ndarray:
    """The output; goes round numpy's missing bfloat16 on the way in."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    source = model.graph.input[0].type.tensor_type.elem_type
    binding = session.io_binding()
    binding.bind_ortvalue_input("v0", ort.OrtValue.ortvalue_from_numpy_with_onnx_type(values, source))
    binding.bind_output("z")
    session.run_with_iobinding(binding)
    result: np.ndarray = binding.copy_outputs_to_cpu()[0]
    return result


@pytest.mark.parametrize("source", TYPES, ids=lambda dtype: dtype.name)
def test_every_merge_gives_every_value(source: ir.DataType) -> None:
    """A chain is merged only where the one Cast gives what the two give, for all values."""
    values = every_value(source)
    middles = [middle for middle in TYPES if middle is not source and is_lossless(source, middle)]
    merged = 0
    for target in TYPES:
        for middle in middles:
            if target is middle:
                continue
            model = casts(source, middle, target)
            after = run_pass(model, MergeCast())
            if not after.changes:
                assert after.declined == (OPEN,)
                continue
            merged += 1
            assert after.count("Cast") == (target is not source) + (target is ir.DataType.BFLOAT16)
            np.testing.assert_array_equal(result_of(dump(after.model), values), result_of(model, values))
    assert merged or not middles


@pytest.mark.parametrize("source", TYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("middle", TYPES, ids=lambda dtype: dtype.name)
def test_lossless_means_there_and_back(source: ir.DataType, middle: ir.DataType) -> None:
    """numpy agrees with the table: every value comes back, and some value does not where it says so."""
    values = every_value(source)
    with np.errstate(all="ignore"):
        back = values.astype(middle.numpy()).astype(source.numpy())
        wide = values.astype(middle.numpy()).astype(np.float64)
        same = np.array_equal(back.astype(np.float64), values.astype(np.float64), equal_nan=True)
        same = same and np.array_equal(wide, values.astype(np.float64), equal_nan=True)
        if source.is_integer() and middle.is_integer():
            same = bool((values.astype(middle.numpy()).astype(object) == values.astype(object)).all())
        elif source.is_integer() and source.bitwidth == 64 and middle is not source:
            same = False
    assert is_lossless(source, middle) == same


@pytest.mark.parametrize(
    ("types", "reason"),
    [
        (("FLOAT", "INT64", "FLOAT"), LOSSY),
        (("FLOAT", "INT64", "BOOL"), LOSSY),
        (("FLOAT", "FLOAT16", "FLOAT"), LOSSY),
        (("INT64", "DOUBLE", "INT64"), LOSSY),
        (("INT32", "FLOAT", "INT64"), LOSSY),
        (("INT16", "FLOAT16", "FLOAT"), LOSSY),
        (("UINT8", "INT8", "INT32"), LOSSY),
        (("FLOAT", "BOOL", "FLOAT"), LOSSY),
        (("INT8", "FLOAT", "UINT8"), OPEN),
        (("UINT16", "DOUBLE", "INT8"), OPEN),
        (("FLOAT16", "FLOAT", "FLOAT8E4M3FN"), ODD),
        (("FLOAT16", "STRING", "FLOAT16"), ODD),
    ],
)
def test_declines(types: tuple[str, str, str], reason: str) -> None:
    source, *targets = (ir.DataType[name] for name in types)
    model = casts(source, *targets)
    model.opset_import[0].version = 19
    after = run_pass(model, MergeCast())
    assert (after.changes, after.declined) == (0, (reason,))


def test_unknown_type() -> None:
    text = """agraph ({} x) => (bool[n] z) {{
      y = Cast <to = 1> (x)
      w = Cast <to = {}> (y)
      v = Cast <to = 9> (w)
      z = Not (v)
    }}"""
    model = text_model(text.format("float16[n]", 11))
    model.graph.node[0].op_type, model.graph.node[0].domain = "Widen", "custom"
    model.opset_import.append(helper.make_opsetid("custom", 1))
    del model.graph.node[0].attribute[:]
    after = run_pass(model, MergeCast())
    assert (after.changes, after.declined) == (0, ("the type before the first Cast is unknown",))
    same = text_model(text.format("float16[n]", 1))
    after = run_pass(same, MergeCast())
    assert after.op_types == ["Cast", "Not"]
    assert_equivalent(same, after.model)


@pytest.mark.parametrize(("to", "dtype", "left"), [(10, "float16", 1), (1, "float", 1), (11, "double", 2)])
def test_shared_value_goes_only_if_both_do(to: int, dtype: str, left: int) -> None:
    model = text_model(
        f"""agraph (float16[n] x) => (float[n] y, {dtype}[n] z) {{
          y = Cast <to = 1> (x)
          w = Cast <to = {to}> (y)
          z = Neg (w)
        }}"""
    )
    after = run_pass(model, MergeCast())
    assert after.count("Cast") == left
    assert after.declined == (() if left == 1 else (SHARED,))
    assert_equivalent(model, after.model)


@pytest.mark.parametrize("reference", [False, True])
def test_inside_a_function(reference: bool) -> None:
    to = "to : int = @t" if reference else "to = 11"
    model = text_model(
        f"""<ir_version: 10, opset_import: ["" : 17, "local" : 1]>
        agraph (float[n] x) => (float[n] z) {{ z = local.f <t = 11> (x) }}
        <domain: "local", opset_import: ["" : 17]>
        f <t> (x) => (z) {{
          h = Cast <to = 10> (x)
          y = Cast <to = 1> (h)
          w = Cast <{to}> (y)
          z = Cast <to = 1> (w)
        }}"""
    )
    after = run_pass(model, MergeCast())
    assert "an attribute refers to one of the enclosing function" in after.declined or not reference
    assert after.changes == 0
    assert_equivalent(model, after.model)


def test_inside_a_branch() -> None:
    model = text_model(
        """agraph (bool c, uint8[n] x) => (float[n] z) {
          z = If (c) <
            then_branch = yes () => (float[n] t) { y = Cast <to = 6> (x) t = Cast <to = 1> (y) },
            else_branch = no () => (float[n] e) { e = Cast <to = 1> (x) }
          >
        }"""
    )
    after = run_pass(model, MergeCast())
    assert after.op_types == ["If", "Cast", "Cast"]
    assert_equivalent(model, after.model, {"c": np.array(True), "x": np.arange(5, dtype=np.uint8)})


@given(targets=st.lists(st.sampled_from(TYPES), min_size=3, max_size=6), source=st.sampled_from(TYPES))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_random_chains(source: ir.DataType, targets: list[ir.DataType]) -> None:
    """Small whole numbers are in every type, so that no conversion is undefined."""
    model, values = casts(source, *targets), np.array([0, 1, 2, 3, 100], np.int64).astype(source.numpy())
    after = run_pass(model, MergeCast())
    assert after.count("Cast") <= len(targets) + 1
    np.testing.assert_array_equal(result_of(dump(after.model), values), result_of(model, values))
