"""From the graph of a model to the steps that compute it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from onnxopt.errors import ModelError
from onnxopt.graph import (
    FLOATS,
    NONDETERMINISTIC,
    constant_of,
    ints_attr,
    sizes_of,
    sole_user,
)
from onnxopt.inference import refine
from onnxopt.training.interpreter import registry
from onnxopt.training.interpreter.frozen import FrozenPart
from onnxopt.training.interpreter.functions import label, operator_for
from onnxopt.training.interpreter.graph import Body, Plan, Step
from onnxopt.training.interpreter.quantized import add_quantized, called
from onnxopt.training.interpreter.registry import Context, Operator
from onnxopt.training.interpreter.state import State, is_statistic
from onnxopt.training.interpreter.values import HOST_LIMIT, Host, host_of, tensor_of

__all__ = ["Builder"]

_SHAPES = ("Shape", "Size")
_GRAPH = ir.AttributeType.GRAPH


class Builder:
    """Builds the plan of one graph; that of a body knows the builder of the graph around it.

    states: constants that are held by the module, as parameter or buffer, by value; what the plan needs of
    them is noted in `needed`, in the root's builder. shown: names of values that are not to be fused away.
    """

    def __init__(
        self,
        opsets: Mapping[str, int],
        states: Mapping[ir.Value, State],
        outer: Builder | None = None,
        shown: Sequence[str] = (),
    ) -> None:
        self.opsets, self.states, self.outer, self.shown = opsets, states, outer, frozenset(shown)
        self.plan = Plan()
        self.slots: dict[tuple[ir.Value, bool], int] = {}
        self.needed: dict[ir.Value, int] = {}
        self.captures: list[tuple[ir.Value, bool]] = []
        self._host: set[ir.Value] = set()
        self.done: set[ir.Node] = set()

    def add_frozen(self, part: FrozenPart) -> None:
        """Let the runtime compute a part; it comes first."""
        inputs = [self._new(value) for value in part.inputs]
        outputs = [self._new(value) for value in part.results]
        ctx = Context(1, len(outputs), (None,) * len(inputs), (None,) * len(outputs))
        self.plan.steps.append(Step(part.operator, {}, ctx, inputs, outputs, (), False, "frozen part"))
        self.done.update(part.nodes)

    def build(self, graph: ir.Graph | ir.Function) -> Plan:
        """The plan of a graph; its inputs are given in order.

        Raises:
            ModelError: an operator that nothing is known of.
        """
        body = graph.graph if isinstance(graph, ir.Function) else graph
        self.plan.inputs = tuple(
            self.slots[value, False] if (value, False) in self.slots else self._new(value)
            for value in body.inputs
        )
        if self.outer is not None or body is not graph:  # what calls a function may give numbers, too
            self._host.update(body.inputs)
        for node in body:
            if node.op_type == "Constant" and not node.domain and node.outputs[0] in self.states:
                continue
            if node not in self.done and not add_quantized(self, node) and not self._add_linear(node):
                self._add(node)
        self.plan.outputs = tuple(self.slot(value, False) for value in body.outputs)
        self.plan.captured = tuple(self.slots[key] for key in self.captures)
        self.plan.finish()
        return self.plan

    def slot(self, value: ir.Value | None, host: bool) -> int:
        """The number of a value; of a constant there may be two, one on the host."""
        if value is None:
            return -1
        if (value, False) in self.slots and value not in self.states:
            return self.slots[value, False]
        constant = constant_of(value)
        host = host and constant is not None and self._small(value) and not self.is_held(value)
        if (value, host) in self.slots:
            return self.slots[value, host]
        if host and constant is not None:
            number = self.slots[value, True] = self._next()
            tensor = tensor_of(constant.numpy(), constant.dtype)
            self.plan.constants.append((number, host_of(tensor)))
            return number
        number = self.slots[value, host] = self._next()
        if self.outer is not None:
            self.captures.append((value, host))
            if self.outer._is_host(value):
                self._host.add(value)
        elif value in self.states:
            self.needed[value] = number
        else:
            raise ModelError(f"training: value {value.name!r} is read and nothing computes it")
        return number

    def _next(self) -> int:
        self.plan.size += 1
        return self.plan.size - 1

    def _new(self, value: ir.Value) -> int:
        number = self.slots[value, False] = self._next()
        return number

    def _small(self, value: ir.Value) -> bool:
        tensor = constant_of(value)
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            return False
        return tensor.size <= HOST_LIMIT

    def _is_host(self, value: ir.Value | None) -> bool:
        """Whether the value may be on the host when the step runs."""
        if value is None or value in self._host:
            return True
        if (value, False) in self.slots and value not in self.states:
            return False
        if constant_of(value) is not None:
            return self._small(value) and not self.is_held(value)
        return self.outer is not None and self.outer._is_host(value)

    def is_held(self, value: ir.Value) -> bool:
        """Whether training may change a constant, so that it is no number that stays."""
        return value in self.states and (self.states[value].trainable or is_statistic(value))

    def named(self) -> dict[str, tuple[int, ir.DataType | None]]:
        """Number and type of what the nodes of the graph give, by name."""
        made = ((value, slot) for (value, _), slot in self.slots.items() if value not in self.states)
        return {value.name: (slot, value.dtype) for value, slot in made if value.name}

    def emit(
        self,
        domain: str,
        op_type: str,
        inputs: Sequence[int],
        options: Mapping[str, Any],
        node: ir.Node,
        result: ir.DataType | None = None,
    ) -> int:
        """Add a step that is part of a node; the number of its result."""
        version = self.opsets.get(domain, 1)
        operator = registry.find(domain, op_type, version)
        assert operator is not None
        known = operator.attributes or ()
        kept = {name: value for name, value in options.items() if name in known}
        ctx, output = Context(version, 1, (None,) * len(inputs), (result,), called(node)), self._next()
        self.plan.steps.append(Step(operator, kept, ctx, inputs, (output,), (), False, node.name or ""))
        return output

    def attributes(self, node: ir.Node) -> dict[str, Any]:
        """The attributes of a node without bodies, by name."""
        return {name: _plain(attr) for name, attr in node.attributes.items()}

    def _add_linear(self, node: ir.Node) -> bool:
        """MatMul by a matrix whose only reader adds a vector to it: one product for torch."""
        add, value = sole_user(node.outputs[0]), node.outputs[0]
        if node.op_type != "MatMul" or node.domain or add is None or add.op_type != "Add" or add.domain:
            return False
        x, weight = node.inputs
        turn = weight.producer() if weight is not None else None
        turned = turn is not None and turn.op_type == "Transpose" and ints_attr(turn, "perm") != (0, 1)
        weight = turn.inputs[0] if turn is not None and turned else weight
        bias = add.inputs[1] if add.inputs[0] is value else add.inputs[0]
        known = [one for one in map(constant_of, (weight, bias)) if one is not None]
        sizes = [sizes_of(one) for one in known]
        if len(known) < 2 or known[0].dtype not in FLOATS or value.name in self.shown:
            return False
        if len(sizes[0]) != 2 or sizes[1] != sizes[0][:1] if turned else sizes[1] != sizes[0][1:]:
            return False
        inputs = [self.slot(one, False) for one in (x, weight, bias)]
        options = {"turned": turned}
        self.slots[add.outputs[0], False] = self.emit("onnxopt", "Linear", inputs, options, node)
        self.done.add(add)
        return True

    def _add(self, node: ir.Node) -> None:
        version = self.opsets.get(node.domain, 1)
        operator = operator_for(node, version)
        if operator is None:
            raise ModelError(
                f"training: no function is known for {label(node, version)}, and it has no body of others"
            )
        if any(value.dtype is None for value in node.outputs):
            refine(node, self.opsets)
        options, captured = self._options(node, operator)
        ctx = Context(
            version,
            max((i + 1 for i, value in enumerate(node.outputs) if value.name), default=0),
            tuple(value.dtype if value is not None else None for value in node.inputs),
            tuple(value.dtype for value in node.outputs),
            called(node),
        )
        maybe = [self._is_host(value) for value in node.inputs]
        all_host = operator.host and all(maybe) and node.op_type not in NONDETERMINISTIC
        inputs = [
            self.slot(value, all_host or operator.raw or i in (*operator.static, *operator.either))
            for i, value in enumerate(node.inputs)
        ]
        outputs = [self._new(value) if value.name else -1 for value in node.outputs]
        if all_host or operator.raw:
            self._host.update(node.outputs)
        if all_host and self._folded(operator, options, ctx, inputs, outputs):
            return
        computed = any(m and value in self._host for m, value in zip(maybe, node.inputs, strict=True))
        self.plan.steps.append(
            Step(operator, options, ctx, inputs, outputs, captured, all_host or computed, node.name or "")
        )

    def _folded(
        self,
        operator: Operator,
        options: Mapping[str, Any],
        ctx: Context,
        inputs: Sequence[int],
        outputs: Sequence[int],
    ) -> bool:
        """Compute now what depends on numbers alone."""
        known = dict(self.plan.constants)
        if not all(i < 0 or i in known for i in inputs):
            return False
        step = Step(operator, options, ctx, inputs, outputs, (), True, "")
        found = step.run_on_host(*[known.get(i) for i in inputs])
        if not all(isinstance(one, Host) for one in found):
            return False
        self.plan.constants += [(i, one) for i, one in zip(outputs, found, strict=False) if i >= 0]
        return True

    def _options(self, node: ir.Node, operator: Operator) -> tuple[dict[str, Any], list[int]]:
        """Attributes by name, graphs among them as bodies, and what those read of this graph."""
        options: dict[str, Any] = {}
        inner: list[Builder] = []
        known = operator.attributes
        for name, attr in node.attributes.items():
            if known is not None and name not in known:
                continue
            if attr.type == _GRAPH:
                inner.append(Builder(self.opsets, self.states, self))
                options[name] = Body(inner[-1].build(attr.as_graph()))
            else:
                options[name] = _plain(attr)
        keys = list(dict.fromkeys(key for builder in inner for key in builder.captures))
        for builder in inner:  # all bodies of a node read the same list
            builder.captures = keys
            builder.plan.captured = tuple(
                builder.slots[key] if key in builder.slots else builder._next() for key in keys
            )
        return options, [self.slot(value, host) for value, host in keys]


def _plain(attr: ir.Attr) -> Any:
    if attr.type == ir.AttributeType.TENSOR:
        tensor = attr.as_tensor()
        return host_of(tensor_of(tensor.numpy(), tensor.dtype)) if tensor.size <= HOST_LIMIT else tensor
    if attr.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
        return tuple(attr.value)
    return attr.value
