"""Trained weights back into the graph they came from."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from onnxopt.errors import UsageError
from onnxopt.graph import constant_of
from onnxopt.model import ModelLike, load
from onnxopt.scope import Names
from onnxopt.training.interpreter.module import GraphModule
from onnxopt.training.interpreter.preparation import initial, prepare
from onnxopt.training.interpreter.quantized import bias_scale, integers_of, reading
from onnxopt.training.interpreter.state import State, collect, constants, is_constant_node, nodes_of
from onnxopt.training.interpreter.values import tensor_of

__all__ = ["write_back"]

_Changes = dict[ir.Value, Tensor]


def write_back(module: GraphModule, model: ModelLike) -> ir.Model:
    """The model, with those constants replaced that training changed: same graph, same names.

    What is stored as integers is rounded with the scales as they are now; the scale of an int32 bias follows
    those of its operands. A tensor whose readers training has drawn apart gets an initializer for each.

    Raises:
        UsageError: the module was not made of this model.
    """
    target, prepared = load(model), prepare(load(model), module.options)
    sources, states = dict(constants(target)), collect(prepared, module.options)
    changes = _changes(module.tensors(), states, sources)
    for state in states:
        own = bias_scale(state.value) if state.form == "bias" else None
        if own is not None and any(one in changes for one in own.factors):
            changes[own.scale] = own.product(changes)
    by_name, names = {state.name: state for state in states}, Names(target)
    for state in states:
        new = _new(state, by_name, changes)
        if new is not None:
            _store(sources[state.source], new, state, target, names)
    return target


def _changes(held: Mapping[str, Tensor], states: list[State], sources: Mapping[str, ir.Value]) -> _Changes:
    """What the module holds of prepared values, where that is not what it began with."""
    changes: _Changes = {}
    known = {state.name: state for state in states}
    for name, tensor in held.items():
        state = known.get(name)
        if state is not None and not state.trainable and state.source not in sources:
            continue  # a function computes it of what it is called with
        old = initial(state) if state is not None and state.source in sources else None
        if state is None or old is None or old.shape != tensor.shape:
            raise UsageError(f"write_back: the model has no {name!r} as the module has it: it is another one")
        now = tensor.cpu().to(old.dtype)
        if not torch.equal(old, now):
            changes[state.value] = now
    return changes


def _new(state: State, states: Mapping[str, State], changes: _Changes) -> Tensor | None:
    """What is to be stored in the place of a state; None: it is as it was."""
    tensor = constant_of(state.value)
    one = None if state.form == "float" else reading(state.value)
    assert tensor is not None
    if one is not None:
        if state.value not in changes and not any(scale in changes for scale in one.scales):
            return None
        floats = changes[state.value] if state.value in changes else initial(state)
        integers = integers_of(floats, tensor.dtype, one, one.scale(changes))
        return None if torch.equal(integers, tensor_of(tensor.numpy(), tensor.dtype)) else integers
    if not state.sites:
        return changes.get(state.value)
    source = states[state.source]
    now = changes[state.value] if state.value in changes else initial(state)
    shared = changes[source.value] if source.value in changes else initial(source)
    return None if torch.equal(now, shared) else now


def _store(value: ir.Value, new: Tensor, state: State, model: ir.Model, names: Names) -> None:
    old = value.const_value if value.is_initializer() else constant_of(value)  # of a graph input the default
    assert old is not None
    array = (new.float() if new.dtype == torch.bfloat16 else new).numpy()
    tensor = ir.Tensor(array.astype(old.dtype.numpy()), dtype=old.dtype, name=old.name)
    if state.sites:
        tensor.name = names.fresh(state.name)
        own = ir.Value(name=tensor.name, type=value.type, shape=value.shape, const_value=tensor)
        model.graph.register_initializer(own)
        nodes = nodes_of(model)
        for node, position in state.sites:
            nodes[node].replace_input_with(position, own)
    elif value.is_initializer():
        value.const_value = tensor
    else:
        producer = value.producer()
        assert producer is not None
        assert is_constant_node(producer)
        producer.attributes.clear()
        producer.attributes["value"] = ir.AttrTensor("value", tensor)
