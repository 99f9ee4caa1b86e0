"""Which quantized nodes the runtime really runs as integer kernels, read off the graph that it executes."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from onnxopt.model import clone
from onnxopt.runtimes import open_session

__all__ = ["INTEGER_KERNELS", "Fusion", "fusion_of", "kernels_of"]

INTEGER_KERNELS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QGemm",
    }
)
"""Operators that compute with integers, beside those whose names start with QLinear."""

_MARK = re.compile(r"onnxopt-unit-(\d+)-")
_BORDERS = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Fusion:
    """What runs.

    kernels: operators of the executed graph, and how many there are. fused: sites of quantized nodes that
    run as integer kernels. unfused: those that run in floating point between Q and DQ.
    """

    kernels: Mapping[str, int]
    fused: tuple[str, ...]
    unfused: tuple[str, ...]

    @property
    def integer(self) -> int:
        """How many integer kernels compute."""
        return sum(count for name, count in self.kernels.items() if is_integer(name))

    @property
    def borders(self) -> int:
        """How many QuantizeLinear and DequantizeLinear are left to run."""
        return sum(self.kernels.get(name, 0) for name in _BORDERS)


def is_integer(op_type: str) -> bool:
    """Whether an operator of the executed graph computes with integers."""
    return op_type.startswith("QLinear") or op_type in INTEGER_KERNELS


def kernels_of(model: ir.Model) -> Mapping[str, int]:
    """The operators that the CPU provider executes for a model, and how many there are of each."""
    return Counter(node.op_type for node in _all(_executed(model)))


def fusion_of(model: ir.Model, sites: Mapping[str, ir.Node]) -> Fusion:
    """Whether quantized nodes became integer kernels on the CPU provider.

    Args:
        model: quantized; not changed.
        sites: the quantized nodes by what they are called; the runtime keeps the names of nodes it fuses.

    A node that only moves numbers counts as fused where it moves integers.
    """
    own = clone(model)
    numbers = {node: number for number, node in enumerate(model.graph)}
    copies, names = list(own.graph), list(sites)
    for number, site in enumerate(names):
        copies[numbers[sites[site]]].name = f"onnxopt-unit-{number}-"
    graph = _executed(own)
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    fused = set()
    for node in graph.node:
        found = _MARK.match(node.name)
        reads_floats = any(made_by.get(name) == "DequantizeLinear" for name in node.input)
        if found and (is_integer(node.op_type) or not reads_floats):
            fused.add(names[int(found[1])])
    gone = {names[n] for n in range(len(names))} - {
        names[int(found[1])] for node in graph.node if (found := _MARK.match(node.name))
    }
    fused |= {site for site in gone if sites[site].op_type not in ("Conv", "Gemm", "MatMul")}
    return Fusion(
        Counter(node.op_type for node in graph.node),
        tuple(site for site in names if site in fused),
        tuple(site for site in names if site not in fused),
    )


def _all(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the bodies in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _all(attribute.g)


def _executed(model: ir.Model) -> onnx.GraphProto:
    with tempfile.TemporaryDirectory(prefix="onnxopt-") as folder:
        file = Path(folder) / "executed.onnx"
        open_session(model, graph_file=file).close()
        return onnx.load(file, load_external_data=False).graph
