"""What TensorRT 10's ONNX parser does not take: operators, types, attributes, control flow.

What it takes stands in ``tensorrt.toml``. Sources: onnx-tensorrt (docs/operators.md and the changelog of
10.15, the checks in the parser of 10.1 and 10.15) and NVIDIA's documents.
"""

from __future__ import annotations

import functools
import importlib.resources
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from onnxopt.graph import subgraphs_of
from onnxopt.inspection.contents import dtype_name, op_name
from onnxopt.inspection.lints.sight import Sight, constant, numbers, ops, rule

__all__ = ["DOCUMENTS", "RULES", "SOURCE"]

SOURCE = "TensorRT 10.1 to 10.15: the parser's source"
DOCUMENTS = "TensorRT 10: NVIDIA's documents"
_TABLE = "TensorRT 10.15: the parser's table of operators"

_ON_INTEGERS = ("QLinear", "QGemm", "QAttention", "ConvInteger", "MatMulInteger", "MatMulNBits", "DynamicQ")
"""How the names of operators begin that compute on integers themselves."""

_LACKING = frozenset(
    kind
    for kind in ir.DataType
    if kind.name.startswith(("STRING", "COMPLEX", "UINT", "INT16", "INT2", "FLOAT8E5", "FLOAT8E4M3FNUZ"))
    and kind != ir.DataType.UINT8
)


@functools.cache
def _table() -> Mapping[str, Any]:
    text = (importlib.resources.files(__package__) / "tensorrt.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@functools.cache
def _types() -> Mapping[str, frozenset[ir.DataType]]:
    """Operator -> the types that it is listed with; none where they are not checked."""
    kinds = {
        name: frozenset(ir.DataType[kind] for kind in kinds) for name, kinds in _table()["types"].items()
    }
    return {op: kinds[name] for name, listed in _table()["operators"].items() for op in listed}


@rule("unsupported-operator", "error", _TABLE, ops())
def _operator(node: ir.Node, seen: Sight) -> str | None:
    own = node.op_identifier() in seen.model.functions or "TRT" in node.op_type
    if own or node.op_type in _types() or node.op_type.startswith(_ON_INTEGERS):
        return None
    return f"the parser has no {op_name(node)}; fold or replace it, or bring a plugin of its name"


@rule("qoperator", "error", _TABLE, ops())
def _qoperator(node: ir.Node, seen: Sight) -> str | None:
    own = node.op_identifier() in seen.model.functions
    if own or not node.op_type.startswith(_ON_INTEGERS):
        return None
    return f"{op_name(node)} computes on integers itself; write QuantizeLinear and DequantizeLinear instead"


@rule("unsupported-attribute", "error", SOURCE, ops())
def _attribute(node: ir.Node, _: Sight) -> str | None:
    for name, allowed in _table()["attributes"].get(node.op_type, {}).items():
        attr = node.attributes.get(name)
        if attr is None or attr.is_ref():
            continue
        given = attr.value if isinstance(attr.value, Sequence) and allowed else (attr.value,)
        if attr.value not in allowed and any(one not in allowed for one in given):
            taken = f" = {attr.value}, the parser takes {', '.join(map(str, allowed))}" if allowed else ""
            return f"{node.op_type} with {name}{taken}; export it another way"
    return None


@rule("unsupported-output", "error", SOURCE, ops())
def _output(node: ir.Node, _: Sight) -> str | None:
    most = _table()["outputs"].get(node.op_type, len(node.outputs))
    names = [value.name for value in node.outputs[most:] if value.name]
    return f"{node.op_type} also gives {', '.join(names)}; remove what nothing needs" if names else None


@rule("unsupported-rank", "error", _TABLE, ops())
def _rank(node: ir.Node, seen: Sight) -> str | None:
    most = _table()["ranks"].get(node.op_type)
    rank = len(seen.dims(_at(node, 0)) or ()) if most else 0
    return f"{node.op_type} on {rank} dimensions; reshape to {most} or less" if rank > (most or 0) else None


@rule("input-not-constant", "error", SOURCE, ops())
def _constant(node: ir.Node, seen: Sight) -> str | None:
    index = _table()["constants"].get(node.op_type, len(node.inputs))
    value = node.inputs[index] if index < len(node.inputs) else None
    argument = value is not None and value.is_graph_input() and value.graph is not seen.model.graph
    if value is None or argument or constant(value) is not None:
        return None
    return f"input {index} of {node.op_type} is computed; fold constants (onnxopt optimize)"


@rule("dropout-training", "error", SOURCE, ops("Dropout"))
def _training(node: ir.Node, _: Sight) -> str | None:
    return "a Dropout in training mode; export for inference" if numbers(_at(node, 2)).any() else None


@rule("unsupported-type", "error", SOURCE, Sight.values)
def _type(value: ir.Value, seen: Sight) -> str | None:
    kind = seen.dtype(value)
    return f"{dtype_name(kind)}, which TensorRT does not have; use another type" if kind in _LACKING else None


@rule("double", "warning", _TABLE, Sight.values)
def _double(value: ir.Value, seen: Sight) -> str | None:
    if seen.dtype(value) != ir.DataType.DOUBLE:
        return None
    return "float64, which TensorRT computes in float32; convert it, and see what that costs"


@rule("uint8-data", "error", SOURCE, ops())
def _uint8(node: ir.Node, seen: Sight) -> str | None:
    if _odd_type(node, seen) != ir.DataType.UINT8 or constant(node.inputs[0]) is not None:
        return None
    return f"{node.op_type} of uint8, which is for inputs and outputs of the model alone; cast it first"


@rule("unlisted-type", "warning", _TABLE, ops())
def _unlisted(node: ir.Node, seen: Sight) -> str | None:
    kind = _odd_type(node, seen)
    if kind is None or kind in _LACKING or kind in (ir.DataType.UINT8, ir.DataType.DOUBLE):
        return None
    advice = "cast it" if kind.bitwidth > 8 else "dequantize it"
    return f"{node.op_type} of {dtype_name(kind)}, which the parser's table does not list; {advice}"


def _odd_type(node: ir.Node, seen: Sight) -> ir.DataType | None:
    """The type of a node's data, where the table lists the operator's types, and not this one."""
    kinds = _types().get(node.op_type)
    kind = seen.dtype(_at(node, 0)) if kinds and node.op_type != "DequantizeLinear" else None
    return None if kinds is None or kind in kinds else kind


@rule("branch-rank", "error", _TABLE, ops("If"))
def _branches(node: ir.Node, seen: Sight) -> str | None:
    for values in zip(*(body.outputs for body in subgraphs_of(node)), strict=False):
        ranks = [len(dims) for dims in map(seen.dims, values) if dims is not None]
        if len(set(ranks)) > 1 and constant(node.inputs[0]) is None:
            return f"branches of {ranks[0]} and {ranks[1]} dimensions; fold its condition, or reshape in one"
    return None


@rule("loop-carried-shape", "error", _TABLE, ops("Loop"))
def _carried(node: ir.Node, seen: Sight) -> str | None:
    body = subgraphs_of(node)[0]
    for before, after in zip(node.inputs[2:], body.outputs[1:], strict=False):
        have, want = seen.dims(before), seen.dims(after)
        pairs = zip(have or (), want or (), strict=False)
        differ = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
        if have is not None and want is not None and (differ or len(have) != len(want)):
            return f"{after.name} goes from {list(have)} to {list(want)}; keep its shape, or unroll the loop"
    return None


@rule("newer-operator", "warning", "TensorRT 10.1 to 10.15: the parser's changelog", ops())
def _newer(node: ir.Node, _: Sight) -> str | None:
    for version, listed in _table()["since"].items():
        if node.op_type in listed:
            return f"{node.op_type} is taken from TensorRT {version} on; earlier ones refuse it"
    return None


@rule("opset", "warning", _TABLE, lambda seen: [seen.model.graph])
def _opset(_: ir.Graph, seen: Sight) -> str | None:
    (first, last), version = _table()["opsets"], seen.model.opset_imports.get("", 9)
    return None if first <= version <= last else f"opset {version}; the parser takes {first} to {last}"


@rule("data-dependent-shape", "warning", DOCUMENTS, ops("NonZero", "NonMaxSuppression"))
def _data_dependent(node: ir.Node, seen: Sight) -> str | None:
    text = f"the size of what {node.op_type} gives depends on the data; it needs an output allocator"
    return None if seen.is_settled(node.inputs[0]) else text


def _at(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


RULES = (
    *(_operator, _qoperator, _attribute, _output, _rank, _constant, _training, _type, _uint8, _branches),
    *(_carried, _newer, _opset, _double, _unlisted, _data_dependent),
)
