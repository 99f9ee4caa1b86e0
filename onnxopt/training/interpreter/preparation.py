"""What a model needs before it is trained, done on a copy; `write_back` finds the originals by name."""

from __future__ import annotations

import onnx_ir as ir
import torch

from onnxopt.calibration.exposing import cut
from onnxopt.errors import UsageError, did_you_mean
from onnxopt.graph import constant_of, walk
from onnxopt.ledger import Ledger
from onnxopt.passes.freeze_initializers import FreezeInitializers
from onnxopt.passes.inline_functions import InlineFunctions
from onnxopt.training.interpreter.quantized import floats_of, reading
from onnxopt.training.interpreter.state import (
    INLINED,
    NAME,
    NUMBER,
    Options,
    State,
    constants,
    is_constant_node,
    nodes_of,
)
from onnxopt.training.interpreter.values import tensor_of

__all__ = ["initial", "prepare"]


def prepare(model: ir.Model, options: Options) -> ir.Model:
    """Bring a model that is the caller's own to the form that is trained.

    Initializers that could be fed are constants, functions are put in place, with what they hold as
    initializers that all calls share, and what the outputs that are asked for do not need is gone.

    Raises:
        UsageError: there is no such output.
    """
    for name in options.outputs or ():
        known = [value.name or "" for value in model.graph.outputs]
        if name not in known:
            raise UsageError(f"training: there is no output {name!r}{did_you_mean(name, known)}")
    for number, node in enumerate(nodes_of(model)):
        node.meta[NUMBER] = number
    for own, value in constants(model):
        value.meta[NAME] = own
    if options.outputs is not None:
        cut(model, options.outputs)
    called = {value.producer(): name for name, value in constants(model)} if model.functions else {}
    for function in model.functions.values():
        model.metadata_props[INLINED] = ""
        for node in filter(is_constant_node, walk(function.graph)):
            node.metadata_props[INLINED] = called.get(node, "")
    for one in (FreezeInitializers(), InlineFunctions()):
        one.apply(model, Ledger(pass_name=one.name))
    for node in nodes_of(model):
        shared = node.metadata_props.get(INLINED)
        if shared and is_constant_node(node):
            _share(node, shared, model.graph)
    return model


def _share(node: ir.Node, name: str, graph: ir.Graph) -> None:
    """Let an initializer of the main graph stand for a Constant node, and for others of that name."""
    value = node.outputs[0]
    if name not in graph.initializers:
        own = ir.Value(name=name, type=value.type, shape=value.shape, const_value=constant_of(value))
        graph.register_initializer(own)
    value.replace_all_uses_with(graph.initializers[name], replace_graph_outputs=True)
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def initial(state: State) -> torch.Tensor:
    """What a state holds before training."""
    tensor = constant_of(state.value)
    assert tensor is not None
    one = None if state.form == "float" else reading(state.value)
    if one is not None:
        return floats_of(tensor, one)
    return tensor_of(tensor.numpy(), tensor.dtype)
