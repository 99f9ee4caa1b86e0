"""Branches of If as models of their own: what they read from outside becomes their graph inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.calibration.exposing import cut
from onnxopt.data import Feeds, Samples
from onnxopt.graph import constant_of, detach, has_reference, nested, value_names, walk
from onnxopt.ledger import site_of
from onnxopt.model import clone
from onnxopt.runtimes import open_session
from onnxopt.scope import Names

__all__ = ["Branch", "branches_of", "name_values_apart", "put_back", "samples_of", "take_out"]

_SIDES = {"then_branch": True, "else_branch": False}


@dataclass(frozen=True)
class Branch:
    """Where a branch is: the site of an If of the main graph, and the attribute that holds the branch.

    reads: the names of the computed values and graph inputs outside that it reads, in their order there.
    """

    owner: str
    side: str
    reads: tuple[str, ...]

    def owner_in(self, model: ir.Model) -> ir.Node:
        """The If."""
        return next(node for node in model.graph if _is_if(node) and site_of(node) == self.owner)

    def body_in(self, model: ir.Model) -> ir.Graph:
        """The branch."""
        return self.owner_in(model).attributes[self.side].as_graph()


def branches_of(model: ir.Model) -> list[Branch]:
    """The branches of each If of the main graph."""
    ifs = [node for node in model.graph if _is_if(node) and not has_reference(node)]
    return [
        Branch(site_of(node), side, tuple(v.name or "" for v in _read(body) if constant_of(v) is None))
        for node in ifs
        for side in _SIDES
        for body in (node.attributes[side].as_graph(),)
    ]


def name_values_apart(model: ir.Model) -> None:
    """Rename values in bodies of the main graph, in place, so that no two have one name."""
    names, seen = Names(model), set[str]()
    for graph in (model.graph, *nested(model.graph)):
        for value in _values(graph):
            if value.name in seen:
                value.name = names.fresh(value.name)
            seen.add(value.name or "")


def take_out(model: ir.Model, branch: Branch, known: Feeds) -> ir.Model:
    """A branch as a model, whose graph inputs are what it reads, in that order; constants come with it.

    Args:
        model: not changed.
        branch: of it.
        known: an array for each graph input of the result, under its name there; it tells the type.
    """
    own = clone(model)
    node = branch.owner_in(own)
    body = branch.body_in(own)
    inside, fed = dict.fromkeys((body, *nested(body))), iter(known.items())
    for value in _read(body):
        tensor = constant_of(value)
        if tensor is None:
            name, array = next(fed)
            new = ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
            body.inputs.append(new)
        else:
            new = ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=tensor)
            body.register_initializer(new)
        for usage in value.uses():
            if usage.node.graph in inside:
                usage.node.replace_input_with(usage.idx, new)
    node.attributes.pop(branch.side)
    body.opset_imports.update(own.graph.opset_imports)
    return ir.Model(body, ir_version=own.ir_version, functions=list(own.functions.values()))


def put_back(model: ir.Model, branch: Branch, part: ir.Model) -> ir.Model:
    """A copy of a model with `part`, made of what `take_out` gave, in place of a branch.

    Names that the rest of the model has, too, become others.
    """
    whole, body = clone(model), clone(part).graph
    for inner in list(walk(branch.body_in(whole))):
        detach(inner)
    node = branch.owner_in(whole)
    node.attributes.pop(branch.side)
    outside = {value.name: value for value in _values(whole.graph)}
    for value, name in zip(body.inputs, branch.reads, strict=True):
        value.replace_all_uses_with(outside[name])
    body.inputs.clear()
    body.opset_imports.clear()
    taken = value_names(whole)
    node.attributes[branch.side] = ir.AttrGraph(branch.side, body)
    names = Names(whole)
    for value in (value for graph in (body, *nested(body)) for value in _values(graph)):
        if value.name in taken:
            value.name = names.fresh(value.name)
    whole.ir_version = max(whole.ir_version, part.ir_version)
    return whole


@contextmanager
def samples_of(model: ir.Model, branch: Branch, *parts: Sequence[Feeds]) -> Iterator[list[Samples]]:
    """Of each part of the samples of a model those that run a branch, as samples of that branch.

    They are computed when they are asked for, as long as the context lasts. Values that are no tensors, as
    sequences, cannot be fed: a branch that reads any has no samples.
    """
    switch = branch.owner_in(model).inputs[0]
    condition = switch.name or "" if switch is not None else ""
    wanted = dict.fromkeys([condition, *branch.reads])
    held = {name: value.const_value for name, value in model.graph.initializers.items() if name in wanted}
    given = {name: tensor.numpy() for name, tensor in held.items() if tensor is not None}
    computed = [v.name or "" for node in model.graph for v in node.outputs if v.name in wanted]
    prefix = f"{branch.owner}_{branch.side}_"

    with ExitStack() as stack:
        session = None
        if computed:  # the runtime takes no model without outputs
            session = stack.enter_context(open_session(cut(clone(model), computed), level="none"))

        def values(feeds: Feeds) -> dict[str, Any]:
            return {**given, **feeds, **(session.run(feeds) if session is not None else {})}

        def runs(feeds: Feeds) -> bool:
            found = values(feeds)
            tensors = all(isinstance(found[name], np.ndarray) for name in branch.reads)
            return tensors and bool(np.asarray(found[condition]).all()) == _SIDES[branch.side]

        def taken(samples: Sequence[Feeds]) -> Samples:
            those = [number for number in range(len(samples)) if runs(samples[number])]

            def read(index: int) -> Feeds:
                found = values(samples[those[index]])
                return {prefix + name: found[name] for name in branch.reads}

            return Samples(len(those), read)

        yield [taken(part) for part in parts]


def _is_if(node: ir.Node) -> bool:
    return node.op_type == "If" and node.domain == ""


def _values(graph: ir.Graph) -> list[ir.Value]:
    """The named values that a graph defines."""
    computed = (value for node in graph for value in node.outputs if value.name)
    return list(dict.fromkeys([*graph.inputs, *graph.initializers.values(), *computed]))


def _read(body: ir.Graph) -> list[ir.Value]:
    """The values from outside that the nodes in a body read, constants included."""
    inside = dict.fromkeys((body, *nested(body)))
    read = (value for node in walk(body) for value in node.inputs if value is not None)
    return list(dict.fromkeys(value for value in read if value.graph not in inside))
