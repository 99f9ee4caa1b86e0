"""Which constants of a model are trained, and under which names.

A state is a parameter or a buffer of the module. Its name is the ONNX name of the initializer, or of the
output of the Constant node, that holds it. See `State` for the integers of quantized models.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from onnxopt.graph import FLOATS, constant_array, constant_of, function_name, graphs, value_names, walk
from onnxopt.index import operator_of
from onnxopt.passes.shared.quantized import QUANTIZED
from onnxopt.training.interpreter.quantized import reading
from onnxopt.training.interpreter.statistics import readers

__all__ = [
    "INLINED",
    "MOVES",
    "NAME",
    "NUMBER",
    "Options",
    "Site",
    "State",
    "Tying",
    "collect",
    "constants",
    "is_constant_node",
    "nodes_of",
]

Tying = Literal["auto", "all", "none"]
"""What stays tied of what several nodes read: all but tensors of one number all over, which exporters share
because they are equal before training (auto), all, or nothing."""
Site = tuple[int, int]
"""A node, by its number in the model, and the position of an input."""

INLINED = "onnxopt.inlined"
"""Metadata of a prepared model that had functions, and of a constant in it that is not to be written."""
NAME, NUMBER = "onnxopt.training.name", "onnxopt.training.number"
"""In the `meta` of a prepared model: what a constant, and which one a node, is in the model as it was."""
_ANY = -1
_SCALARS_TOO: Mapping[str, tuple[int, ...]] = {
    "BatchNormalization": (1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (0, 1, 2),
    "GRU": (1, 2, 3),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LSTM": (1, 2, 3, 7),
    "LayerNormalization": (1, 2),
    "MatMul": (0, 1),
    "PRelu": (1,),
    "RMSNormalization": (1,),
    "RNN": (1, 2, 3),
    "DeformConv": (1, 3),
}
"""Inputs that are weights of whatever size."""
_WEIGHTS: Mapping[str, tuple[int, ...]] = {
    **_SCALARS_TOO,
    **dict.fromkeys(("Add", "Div", "Mul", "Sub", "Concat", "Einsum", "Sum"), (_ANY,)),
    "Gather": (0,),
    "Attention": (0, 1, 2),
    "BiasGelu": (1,),
    "FastGelu": (1,),
    "EmbedLayerNormalization": (2, 3, 4, 5, 6),
    "FusedMatMul": (0, 1),
    "FusedConv": (1, 2),
    "FusedGemm": (0, 1, 2),
    "MultiHeadAttention": (3,),
    "SkipLayerNormalization": (2, 3, 4),
    "SkipSimplifiedLayerNormalization": (2, 3),
    "SimplifiedLayerNormalization": (1,),
}
_QUANTIZED_WEIGHTS = {
    name.split("::")[-1]: (
        *(port.data for i, port in enumerate(row.inputs) if row.weight in (None, i)),
        row.bias,
    )
    for name, row in QUANTIZED.items()
    if row.float_op
}
"""Of operators on quantized data, by their own table: weight and bias."""
MOVES = frozenset(
    {
        *("Cast", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile"),
        *("Transpose", "Unsqueeze", "QuantizeLinear", "DequantizeLinear"),
    }
)
"""Operators behind which a weight is still one."""


@dataclass
class State:
    """A constant that the module holds.

    form: "float": as it is in the model. "integers": it is stored as integers behind DequantizeLinear; the
    module holds the floats they stand for, and rounds them as it runs. "bias": likewise, but of int32, which
    is not rounded. sites: where it is read, of a copy of its own of what the model shares; else empty.
    """

    name: str
    value: ir.Value
    form: Literal["float", "integers", "bias"] = "float"
    trainable: bool = False
    source: str = ""
    sites: tuple[Site, ...] = field(default=())


def is_constant_node(node: ir.Node) -> bool:
    """Whether the node is ONNX's own Constant."""
    return node.op_type == "Constant" and not node.domain


def constants(model: ir.Model) -> Iterator[tuple[str, ir.Value]]:
    """Every constant of graph, functions and the graphs in their nodes, under a name that no other has.

    Those of a function, which all its calls have in common, have its name in front.
    """
    found: list[tuple[str, ir.Value]] = []
    functions = {id(function.graph): function_name(key) for key, function in model.functions.items()}
    prefix = ""
    for graph in graphs(model):
        prefix = f"{functions[id(graph)]}/" if id(graph) in functions else prefix
        values = [*graph.initializers.values(), *(n.outputs[0] for n in graph if is_constant_node(n))]
        for value in values:
            if value.is_initializer() and value.const_value is None:
                continue
            if not value.is_initializer() and constant_of(value) is None:
                continue
            found.append((value.meta.get(NAME) or prefix + (value.name or "constant"), value))
    taken, numbers = {name for name, _ in found}, Counter[str]()
    for name, value in found:
        numbers[name] += 1
        yield (name if numbers[name] == 1 else _fresh(name, numbers[name] - 1, taken)), value


def _fresh(name: str, number: int, taken: set[str]) -> str:
    """The name with that number, or the next one that is not taken; it is from now on."""
    while f"{name}__{number}" in taken:
        number += 1
    taken.add(f"{name}__{number}")
    return f"{name}__{number}"


def nodes_of(model: ir.Model) -> list[ir.Node]:
    """The nodes of the main graph and of the graphs in its nodes, in the order that sites count them."""
    return list(walk(model.graph))


@dataclass(frozen=True)
class Options:
    """What `to_torch` was asked for, see there; `write_back` prepares the model in the same way."""

    trainable: tuple[str, ...] | None = None
    tied: Tying = "auto"
    outputs: tuple[str, ...] | None = None


def collect(model: ir.Model, options: Options) -> list[State]:
    """The constants of a model as states. What is un-shared becomes a value of its own in `model`."""
    tied: Tying = "all" if INLINED in model.metadata_props else options.tied
    states: list[State] = []
    held = list(constants(model))
    taken = {*value_names(model), *(name for name, _ in held)}
    for name, value in held:
        group = [State(name, value, _form(value), source=name)]
        if group[0].form == "float" and _unties(value, tied):
            group += _copies(group[0], model.graph, taken)
        for state in group:
            state.trainable = _is_trained(state, options.trainable)
            if not state.trainable and state.form == "integers":
                state.form = "float"
        states += group
    return states


def _is_trained(state: State, patterns: Sequence[str] | None) -> bool:
    floats = _dtype(state.value) in FLOATS or state.form != "float"
    producer = state.value.producer()
    called = producer is not None and INLINED in producer.metadata_props
    if not floats or called or is_statistic(state.value):
        return False
    if patterns is None:
        return is_weight(state.value)
    names = (state.name, state.source)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def is_statistic(value: ir.Value) -> bool:
    """Whether BatchNormalization reads the value, as it is, as the statistics that it has seen."""
    return any(user.op_type == "BatchNormalization" and position > 2 for user, position in readers(value))


def is_weight(value: ir.Value) -> bool:
    """Whether a node reads the value, moved or not, where its weights are."""
    tensor = constant_of(value)
    single = tensor is not None and tensor.size <= 1
    table = _SCALARS_TOO if single else _WEIGHTS
    work, seen = [value], {value}
    while work:
        for user, position in work.pop().uses():
            places = table.get(user.op_type, ())
            if position in places or _ANY in places:
                return True
            if position in _QUANTIZED_WEIGHTS.get(user.op_type, ()):
                return True
            if user.op_type in MOVES and position == 0:
                work += [one for one in user.outputs if one not in seen]
                seen.update(user.outputs)
    return False


def _form(value: ir.Value) -> Literal["float", "integers", "bias"]:
    """How a constant is held: integers that are only dequantized, always alike, as the floats they mean."""
    if _dtype(value) in FLOATS or reading(value) is None:
        return "float"
    return "bias" if _dtype(value) == ir.DataType.INT32 else "integers"


def _dtype(value: ir.Value) -> ir.DataType | None:
    """The element type; the output of a Constant may have none on record."""
    tensor = constant_of(value)
    return None if tensor is None else tensor.dtype


def _unties(value: ir.Value, tied: Tying) -> bool:
    if tied == "all" or len(tuple(value.uses())) < 2 or value.is_graph_output():
        return False
    if _dtype(value) not in FLOATS or not (is_weight(value) or is_statistic(value)):
        return False
    if any(operator_of(use.node) in QUANTIZED for use in value.uses()):
        return False
    if tied == "none":
        return True
    array = constant_array(value)
    return array is not None and array.size > 0 and bool((array == array.flat[0]).all())


def _copies(state: State, main: ir.Graph, taken: set[str]) -> list[State]:
    """Let each reader but the first read a value of its own."""
    copies = []
    uses = sorted(state.value.uses(), key=lambda use: (use.node.meta[NUMBER], use.idx))
    for number, (user, position) in enumerate(uses[1:], 1):
        own = ir.Value(
            name=_fresh(state.name, number, taken),
            type=state.value.type,
            shape=state.value.shape,
            const_value=constant_of(state.value),
        )
        main.register_initializer(own)
        user.replace_input_with(position, own)
        site = (user.meta[NUMBER], position)
        copies.append(State(own.name or "", own, source=state.source, sites=(site,)))
    return copies
