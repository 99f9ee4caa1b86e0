"""Trained weights back into the graph they came from."""

from __future__ import annotations

import onnx_ir as ir
import torch

from onnxopt.errors import UsageError
from onnxopt.graph import constant_of
from onnxopt.model import ModelLike, load
from onnxopt.training.module import GraphModule
from onnxopt.training.preparation import initial, prepare
from onnxopt.training.state import State, collect, constants, is_constant_node, nodes_of

__all__ = ["write_back"]


def write_back(module: GraphModule, model: ModelLike) -> ir.Model:
    """The model, with those constants replaced that training changed: same graph, same names.

    A tensor that training has drawn apart gets an initializer for each of its readers.

    Raises:
        UsageError: the module was not made of this model.
    """
    target, prepared = load(model), prepare(load(model))
    sources, held = dict(constants(target)), module.tensors()
    for state in collect(prepared, module.trainable, module.tied):
        if state.name not in held:
            continue
        trained, old = held[state.name].cpu(), initial(state)
        if state.source not in sources or old.shape != trained.shape:
            raise UsageError(
                f"write_back: {state.name!r} of the module is not in the model: it is another one"
            )
        reference = held.get(state.source, old) if state.sites else old
        if not torch.equal(reference.cpu().to(old.dtype), trained.to(old.dtype)):
            _store(sources[state.source], trained, state, target)
    return target


def _store(value: ir.Value, trained: torch.Tensor, state: State, model: ir.Model) -> None:
    old = constant_of(value)
    assert old is not None
    array = trained.to(torch.float32 if trained.dtype == torch.bfloat16 else trained.dtype).numpy()
    new = ir.Tensor(array.astype(old.dtype.numpy()), dtype=old.dtype, name=old.name)
    if state.sites:
        own = ir.Value(name=state.name, type=value.type, shape=value.shape, const_value=new)
        model.graph.register_initializer(own)
        nodes = nodes_of(model)
        for node, position in state.sites:
            nodes[node].replace_input_with(position, own)
    elif value.is_initializer():
        value.const_value = new
    else:
        producer = value.producer()
        assert producer is not None
        assert is_constant_node(producer)
        producer.attributes.clear()
        producer.attributes["value"] = ir.AttrTensor("value", new)
