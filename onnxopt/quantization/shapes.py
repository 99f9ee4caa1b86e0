"""The sizes that a graph's tensors have on a sample."""

from __future__ import annotations

import onnx_ir as ir

from onnxopt.data import Feeds
from onnxopt.model import clone
from onnxopt.runtimes import open_session
from onnxopt.scope import Names

__all__ = ["measure_shapes"]


def measure_shapes(model: ir.Model, feeds: Feeds) -> dict[str, tuple[int, ...]]:
    """Name -> sizes of each tensor of the main graph, as a run on `feeds` makes them.

    Only the sizes leave the run, so that no tensor is kept longer than it would be.
    """
    own = clone(model)
    graph, names = own.graph, Names(own)
    inputs = [value for value in graph.inputs if value.name in feeds]
    computed = [value for node in graph for value in node.outputs if value.name]
    shapes: dict[str, str] = {}
    for value in (*inputs, *computed):
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            continue
        kind = ir.TensorType(ir.DataType.INT64)
        sizes = ir.Value(name=names.fresh(f"{value.name}_shape"), type=kind)
        graph.append(ir.Node("", "Shape", [value], outputs=[sizes], name=sizes.name))
        shapes[sizes.name or ""] = value.name or ""
        graph.outputs.append(sizes)
    with open_session(own, level="basic") as session:
        found = session.run(feeds)
    read = {name: tuple(map(int, found[sizes])) for sizes, name in shapes.items()}
    held = {name: tuple(value.const_value.shape.numpy()) for name, value in graph.initializers.items()}  # type: ignore[union-attr]
    return {**held, **read}
