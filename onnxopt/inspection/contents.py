"""What a model holds: nodes, tensors and parameters, quantization, and what no output depends on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnxopt.graph import graphs, nodes, subgraphs_of, walk

__all__ = [
    "Totals",
    "Unused",
    "Weight",
    "bytes_by_dtype",
    "dtype_name",
    "external_bytes",
    "op_name",
    "quantization",
    "totals",
    "unused",
    "weights",
]

Weight = tuple[ir.Value, ir.TensorProtocol]
"""A tensor of an initializer or a Constant node, with the value it gives."""


@dataclass(frozen=True)
class Totals:
    """The row of a before/after table.

    Attributes:
        nodes: in the main graph, in subgraphs and in functions.
        initializers: in the main graph and in subgraphs.
        bytes: of initializers and tensors of Constant nodes, each counted once however often it is used.
        parameters: elements of the same tensors as far as they are weights: of rank 1 or more, and of a
            floating-point type, of an integer type of 8 bits or less, or int32 that DequantizeLinear or
            QLinearConv's bias reads. Scales and zero points of quantization are none, nor are other integer
            tensors (shapes, indices). Statistics of BatchNormalization are weights at inference, and count.
    """

    nodes: int
    initializers: int
    bytes: int
    parameters: int


@dataclass(frozen=True)
class Unused:
    """Names of what no output depends on: ``nodes`` by name or first output, ``functions`` as domain.name."""

    nodes: tuple[str, ...]
    initializers: tuple[str, ...]
    inputs: tuple[str, ...]
    functions: tuple[str, ...]
    opset_imports: tuple[str, ...]


def op_name(node: ir.Node) -> str:
    """``Conv``, and with its domain where that is not the default one: ``com.microsoft.FusedConv``."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def dtype_name(dtype: ir.DataType | None) -> str:
    """As numpy and ml_dtypes name it where they do: ``float32``, ``bfloat16``, ``int4``, ``string``."""
    if dtype is None:
        return "unknown"
    return {ir.DataType.FLOAT: "float32", ir.DataType.DOUBLE: "float64"}.get(dtype, dtype.name.lower())


def weights(model: ir.Model) -> Iterator[Weight]:
    """Every tensor of an initializer or a Constant node; nothing is read."""
    for graph in graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value
        for node in graph:
            attr = node.attributes.get("value") if node.op_type == "Constant" else None
            if attr is not None and attr.type == ir.AttributeType.TENSOR and not attr.is_ref():
                yield node.outputs[0], attr.as_tensor()


def totals(model: ir.Model) -> Totals:
    """Count nodes, initializers, bytes and parameters; linear in the graph, no weight is read."""
    held = list(weights(model))
    return Totals(
        nodes=sum(1 for _ in nodes(model)),
        initializers=sum(len(graph.initializers) for graph in graphs(model)),
        bytes=sum(tensor.nbytes for _, tensor in held),
        parameters=sum(tensor.size for value, tensor in held if _is_parameter(value, tensor)),
    )


def _is_parameter(value: ir.Value, tensor: ir.TensorProtocol) -> bool:
    uses = [(use.node.op_type, use.idx) for use in value.uses()]
    if not len(tensor.shape) or any(_is_scale(op, index) for op, index in uses):
        return False
    dtype = tensor.dtype
    if dtype.is_floating_point():
        return True
    if dtype.is_integer() and dtype.bitwidth <= 8:
        return True
    return dtype == ir.DataType.INT32 and bool({("DequantizeLinear", 0), ("QLinearConv", 8)} & set(uses))


def _is_scale(op: str, index: int) -> bool:
    """Whether this input of a quantized op is a scale or a zero point."""
    if op in ("QuantizeLinear", "DequantizeLinear"):
        return index in (1, 2)
    if op in ("QLinearConv", "QLinearMatMul"):
        return index in (1, 2, 4, 5, 6, 7)
    return op in ("ConvInteger", "MatMulInteger") and index in (2, 3)


def bytes_by_dtype(model: ir.Model) -> dict[str, int]:
    """Bytes of weights by dtype name, most first."""
    sizes: Counter[str] = Counter()
    for _, tensor in weights(model):
        sizes[dtype_name(tensor.dtype)] += tensor.nbytes
    return dict(sizes.most_common())


def external_bytes(model: ir.Model) -> dict[Path, int]:
    """Bytes of weights by the external file they lie in."""
    sizes: Counter[Path] = Counter()
    for _, tensor in weights(model):
        if isinstance(tensor, ir.ExternalTensor):
            sizes[Path(tensor.path)] += tensor.nbytes
    return dict(sorted(sizes.items()))


def quantization(model: ir.Model) -> dict[str, int]:
    """Nodes by their form of quantization: ``qdq``, ``qoperator``, ``dynamic``, ``weight-only``."""
    found: Counter[str] = Counter()
    has_quantize = any(node.op_type == "QuantizeLinear" for node in nodes(model))
    for node in nodes(model):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            found["qdq" if has_quantize else "weight-only"] += 1
        elif node.op_type.startswith(("QLinear", "QGemm", "QAttention")):
            found["qoperator"] += 1
        elif node.op_type.startswith(("DynamicQuantize", "ConvInteger", "MatMulInteger")):
            found["dynamic"] += 1
        elif node.op_type in ("MatMulNBits", "GatherBlockQuantized") or _casts_weight(node):
            found["weight-only"] += 1
    return dict(sorted(found.items()))


def _casts_weight(node: ir.Node) -> bool:
    """Whether a matrix of 8 bits or less is stored, and cast to floating point before use."""
    value = node.inputs[0] if node.op_type == "Cast" and node.inputs else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or not tensor.dtype.is_integer() or tensor.dtype.bitwidth > 8 or len(tensor.shape) < 2:
        return False
    to = node.attributes.get("to")
    return to is not None and not to.is_ref() and ir.DataType(to.as_int()).is_floating_point()


def unused(model: ir.Model) -> Unused:
    """What can go without changing an output; uncalled functions are named as such, not node by node."""
    live = _live_nodes(model)
    called = {node.op_identifier() for node in live}
    functions = {key: function.graph for key, function in model.functions.items() if key in called}
    bodies = [model.graph, *functions.values()]
    dead = [node for body in bodies for node in walk(body) if node not in live]
    stored = [value for graph in graphs(model) for value in graph.initializers.values()]
    domains = {node.domain for node in nodes(model)} | {"", "ai.onnx"}

    def is_idle(value: ir.Value) -> bool:
        return not value.is_graph_output() and all(use.node not in live for use in value.uses())

    return Unused(
        nodes=tuple(node.name or node.outputs[0].name or op_name(node) for node in dead),
        initializers=tuple(value.name or "" for value in stored if is_idle(value)),
        inputs=tuple(v.name or "" for v in model.graph.inputs if not v.is_initializer() and is_idle(v)),
        functions=tuple(".".join(filter(None, key)) for key in model.functions if key not in functions),
        opset_imports=tuple(domain for domain in model.opset_imports if domain not in domains),
    )


def _live_nodes(model: ir.Model) -> set[ir.Node]:
    """The nodes that the model's outputs depend on, in subgraphs and called functions too."""
    live: set[ir.Node] = set()
    waiting = list(model.graph.outputs)
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in live:
            continue
        live.add(node)
        waiting += [value for value in node.inputs if value is not None]
        waiting += [value for body in subgraphs_of(node) for value in body.outputs]
        function = model.functions.get(node.op_identifier())
        if function is not None:
            waiting.extend(function.outputs)
    return live
