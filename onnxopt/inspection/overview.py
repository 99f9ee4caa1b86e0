"""What a model is: ops, parameters, bytes, MACs, activation memory, quantization, unused things."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxopt.graph import nodes, subgraphs_of, walk
from onnxopt.inspection.amounts import Amount
from onnxopt.inspection.contents import (
    Totals,
    Unused,
    bytes_by_dtype,
    dtype_name,
    external_bytes,
    op_name,
    quantization,
    totals,
    unused,
)
from onnxopt.inspection.costs import NodeCost, costs, has_cost, macs_of, sizes_read
from onnxopt.inspection.sizes import sized
from onnxopt.model import ModelLike, load

__all__ = ["Cost", "Inspection", "Port", "inspect", "macs"]

Size = int | str
"""A number, or text in the dimension symbols of the graph inputs: ``'4816*batch + 32'``; ``?`` is unknown."""


@dataclass(frozen=True)
class Port:
    """A graph input or output; ``shape`` holds ints, symbol names and None; itself None where unknown."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Cost:
    """One node: MACs, bytes of its outputs, bytes of all live activations while it runs.

    ``scope`` names the control-flow nodes around it; such a node's own MACs include its body's.
    """

    name: str
    op: str
    scope: str
    macs: Size
    output_bytes: Size
    live_bytes: Size


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        ops: op name (with its domain where that is not the default one) to number of nodes of the main graph.
        subgraph_ops, function_ops: the same for nodes in subgraphs and in functions.
        bytes_by_dtype: of initializers and Constant tensors.
        file_bytes: of the model file and its external data, or None if the model was no file.
        macs, peak_activation_bytes: of one run; text where they are dynamic, see `Size`.
        peak_node: where the peak is, with its scope.
        costs: node by node, functions inlined.
        uncounted_ops: ops of other domains whose MACs are not known; they add nothing to `macs`, but for
            calls of the model's own functions that could not be inlined, which add ``?`` if they may cost.
        quantization: ``qdq``, ``qoperator``, ``dynamic``, ``weight-only`` to number of nodes, where present.
        external_data: file, relative to the model's folder if it lies in there, to bytes of its tensors.
        overridable_initializers: initializers that are graph inputs too, so that the user may override them.
        shape_inference_failure: why onnx's inliner or shape inference gave up, or None.
    """

    producer: str
    ir_version: int
    opsets: Mapping[str, int]
    metadata_props: Mapping[str, str]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    overridable_initializers: tuple[str, ...]
    totals: Totals
    ops: Mapping[str, int]
    subgraph_ops: Mapping[str, int]
    function_ops: Mapping[str, int]
    subgraphs: int
    functions: int
    bytes_by_dtype: Mapping[str, int]
    file_bytes: int | None
    external_data: Mapping[str, int]
    macs: Size
    peak_activation_bytes: Size
    peak_node: str | None
    costs: tuple[Cost, ...]
    uncounted_ops: Mapping[str, int]
    quantization: Mapping[str, int]
    unused: Unused
    shape_inference_failure: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, ready for JSON."""
        return asdict(self)


def inspect(source: ModelLike, *, shapes: Mapping[str, Sequence[int]] | None = None) -> Inspection:
    """Look at a model without changing it or loading its weights.

    Args:
        source: a path, bytes, a binary file, a `ModelProto` or an `ir.Model`.
        shapes: static shapes for dynamic graph inputs, so that costs are numbers.

    Raises:
        ModelError: not a usable model.
        UsageError: `shapes` name no graph input, or contradict its rank or each other.
    """
    model = load(source)
    found = sized(model, shapes)
    rows = list(costs(found.graph, found.shapes))
    peak = max(rows, key=lambda row: row.live_bytes.weight, default=None)
    external = external_bytes(model)
    main = set(model.graph)
    in_functions = [node for function in model.functions.values() for node in walk(function.graph)]
    return Inspection(
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        ir_version=model.ir_version,
        opsets=dict(model.opset_imports),
        metadata_props=dict(model.metadata_props),
        inputs=tuple(_port(value) for value in model.graph.inputs if not value.is_initializer()),
        outputs=tuple(_port(value) for value in model.graph.outputs),
        overridable_initializers=tuple(v.name or "" for v in model.graph.inputs if v.is_initializer()),
        totals=totals(model),
        ops=_histogram(model.graph),
        subgraph_ops=_histogram(node for node in walk(model.graph) if node not in main),
        function_ops=_histogram(in_functions),
        subgraphs=sum(1 for node in nodes(model) for _ in subgraphs_of(node)),
        functions=len(model.functions),
        bytes_by_dtype=bytes_by_dtype(model),
        file_bytes=_file_bytes(source, external),
        external_data={_beside(file, source): number for file, number in external.items()},
        macs=Amount.total(row.macs for row in rows if not row.scope).value(),
        peak_activation_bytes=0 if peak is None else peak.live_bytes.value(),
        peak_node=None if peak is None else "/".join(filter(None, (peak.scope, peak.name))),
        costs=tuple(_cost(row) for row in rows),
        uncounted_ops=_histogram(node for node in walk(found.graph) if not has_cost(node)),
        quantization=quantization(model),
        unused=unused(model),
        shape_inference_failure=found.failure,
    )


def macs(model: ir.Model, shapes: Mapping[str, Sequence[int]] | None = None) -> Size:
    """Multiply-accumulates of one run; text in the dimension symbols where the model is dynamic.

    Raises:
        UsageError: `shapes` name no graph input, or contradict its rank or each other.
    """
    found = sized(model, shapes, needed=sizes_read)
    return macs_of(found.graph, found.shapes).value()


def _cost(row: NodeCost) -> Cost:
    sizes = (row.macs.value(), row.output_bytes.value(), row.live_bytes.value())
    return Cost(row.name, row.op, row.scope, *sizes)


def _port(value: ir.Value) -> Port:
    dims = None
    if value.shape is not None:
        dims = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
    kind = value.type
    if kind is not None and not isinstance(kind, ir.TensorType):
        return Port(
            value.name or "", f"{type(kind).__name__.removesuffix('Type').lower()}({kind.elem_type})", dims
        )
    return Port(value.name or "", dtype_name(value.dtype), dims)


def _histogram(found: Iterable[ir.Node]) -> dict[str, int]:
    return dict(sorted(Counter(map(op_name, found)).items(), key=lambda item: (-item[1], item[0])))


def _file_bytes(source: ModelLike, external: Iterable[Path]) -> int | None:
    if isinstance(source, bytes):
        return len(source)
    if not isinstance(source, str | os.PathLike):
        return None
    return sum(file.stat().st_size for file in (Path(source), *external))


def _beside(file: Path, source: ModelLike) -> str:
    """The file's name, seen from the folder of the model where it lies in there."""
    folder = Path(source).resolve().parent if isinstance(source, str | os.PathLike) else None
    return str(file.relative_to(folder) if folder and file.is_relative_to(folder) else file)
