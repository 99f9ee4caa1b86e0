"""Models in ONNX text syntax: how passes show themselves."""

from __future__ import annotations

import re

import onnx
import onnx.parser
import onnx.printer
import onnx_ir as ir

from onnxopt.pipeline import Pipeline
from onnxopt.protobuf import dump

__all__ = ["model_text", "rewritten", "text_model"]


def text_model(text: str) -> onnx.ModelProto:
    """A model from ONNX text syntax; IR version 10 and opset 17 unless it says otherwise."""
    if not text.lstrip().startswith("<"):
        text = '<ir_version: 10, opset_import: ["" : 17]>\n' + text
    return onnx.parser.parse_model(text)


def model_text(model: ir.Model) -> str:
    """The graph and functions of a small model as text: no names of nodes, no constants that nobody reads."""
    held = model.graph.initializers.values()
    read = {value.name for value in held if value.uses() or value.is_graph_output()}
    proto = dump(model)
    graph, names = proto.graph, set(model.graph.initializers)
    constants = [tensor for tensor in graph.initializer if tensor.name in read]
    typed = [info for info in graph.value_info if info.name not in names]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(constants)
    graph.value_info.extend(typed)
    for node in [*graph.node, *(node for function in proto.functions for node in function.node)]:
        node.ClearField("name")
    text = "\n".join(map(onnx.printer.to_text, [graph, *proto.functions]))
    return re.sub(r"(\w+): \w+ = ", r"\1 = ", text.replace("=  {", "= {")).strip()


def rewritten(one: ir.passes.PassBase, model: onnx.ModelProto) -> ir.Model:
    """What a pass makes of a model, run alone until it changes nothing more."""
    return Pipeline((one,)).run(lambda: ir.from_proto(model)).model
