"""Compute in float16 or bfloat16, and stay in float32 where range or exactness demand it.

Before: y = Softmax(Conv(x, w)), all in float32
After:  y = Softmax(Cast<to = FLOAT>(Conv(Cast<to = FLOAT16>(x), w_float16)))
Declines: the operator sums or leaves the range (Softmax, LayerNormalization, Exp, Pow, ReduceSum and such),
    counts or places things (Range, NonMaxSuppression, RoiAlign), holds graphs, handles sequences, is of
    another domain or takes no such type in this opset; it is quantized already; a constant of it leaves the
    range or vanishes; what it reads or gives may be too large or too small, as `ranges` says or as what made
    it lets expect; its inputs are float32 and it contracts nothing; types are not known; it is a function:
    inline those first.

Products of matrices, convolutions and recurrent layers become 16 bits wide, and so does what follows them.
Each value is cast once, where it is made, and each constant is stored once in each type that is read. Bodies
are converted inside; what goes into them and comes out of them stays in float32. It gains speed where the
hardware has 16-bit arithmetic, as NVIDIA's has; on a CPU it only makes the file smaller.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.errors import UsageError
from onnxopt.graph import constant_of, function_name, nested, use_count, walk
from onnxopt.ledger import Ledger, site_of
from onnxopt.passes.infer_shapes import InferShapes
from onnxopt.passes.shared.halves import ANY, Choice, Half, Ranges, is_float32
from onnxopt.rewrite import Declined, NewerOpset
from onnxopt.scope import Scope, scopes
from onnxopt.streamed import is_on_disk, mapped

__all__ = ["QuantizeFloats"]

_FIRST_BFLOAT16 = 13
"""The first opset whose Cast knows bfloat16."""


@dataclass(frozen=True)
class QuantizeFloats(Pass):
    """Compute in float16 or bfloat16 where the range allows it.

    type: float16 or bfloat16. keep_io: graph inputs and outputs stay in float32; without it they become 16
        bits wide, too. ranges: what values were seen to hold, as name -> (smallest, largest), or a JSON file
        of that; what comes near the end of the range stays in float32.
    """

    name = "quantize-floats"
    kind = "lossy"
    example = """
agraph (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y) <float[2, 2, 1, 1] w = {1, 2, 3, 4}> {
    c = Conv(x, w)
    r = Relu(c)
    y = Softmax(r)
}
    """

    type: Literal["float16", "bfloat16"] = "float16"
    keep_io: bool = True
    ranges: str | Mapping[str, tuple[float, float]] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "keeps_signature", self.keep_io)
        self._ranges()

    def __str__(self) -> str:
        """Ranges that are no file have no spelling."""
        plain = dataclasses.replace(self, ranges=None) if isinstance(self.ranges, Mapping) else self
        return super(QuantizeFloats, plain).__str__()

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        rule, scope = f"to {self.type}", next(scopes(model))
        InferShapes().apply(model, ledger)
        for key in model.functions:
            ledger.decline(rule, function_name(key), "a function, whose types are not known: inline it first")
        if self.type == "bfloat16" and scope.opset < _FIRST_BFLOAT16:
            ledger.decline(rule, "", str(NewerOpset("Cast to bfloat16", _FIRST_BFLOAT16)))
            ledger.opsets_wanted.add(_FIRST_BFLOAT16)
            return
        half = Half(ir.DataType[self.type.upper()], self._ranges(), scope.graph.opset_imports)
        for value in () if self.keep_io else scope.graph.inputs:
            fits = is_float32(value) and not value.is_initializer() and not half.is_wide(value)
            if fits and ledger.claim(rule, value.name or ""):
                half.stored.add(value)
        choices = dict(_chosen(scope.graph, half, rule, ledger))
        if half.stored:
            _Rewriting(scope, half, choices, self.keep_io, ledger).run()

    def _ranges(self) -> Ranges:
        if not isinstance(self.ranges, str):
            return self.ranges or {}
        try:
            read = json.loads(Path(self.ranges).read_text(encoding="utf-8"))
            return {name: (float(low), float(high)) for name, (low, high) in read.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            what = f'expected JSON, {{"value": [smallest, largest], ...}}: {type(error).__name__}'
            raise UsageError(f"quantize-floats: ranges {self.ranges}: {what}") from error


def _chosen(graph: ir.Graph, half: Half, rule: str, ledger: Ledger) -> Iterator[tuple[ir.Node, Choice]]:
    """The nodes that become 16 bits wide, with leave of the ledger, and those that only read such."""
    for node in walk(graph):
        try:
            choice = half.choose(node)
        except Declined as reason:
            ledger.decline(rule, site_of(node), str(reason))
            if isinstance(reason, NewerOpset):
                ledger.opsets_wanted.add(reason.opset)
            half.keep(node)
            continue
        if choice is None:
            continue
        if choice.outputs and not ledger.claim(rule, site_of(node)):
            half.keep(node)
            continue
        half.stored.update(node.outputs[index] for index in choice.outputs)
        yield node, choice


@dataclass
class _Rewriting:
    """Gives values their types, and each reader the form of a value that it takes."""

    scope: Scope
    half: Half
    choices: Mapping[ir.Node, Choice]
    keep_io: bool
    ledger: Ledger

    def __post_init__(self) -> None:
        self._others: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        """Change the graph and all that is nested in it; types last, since they say what was float32."""
        graph = self.scope.graph
        for node in tuple(walk(graph)):
            self._connect(node)
        for one in (graph, *nested(graph)):
            narrow = one is graph and not self.keep_io
            for number, value in enumerate(one.outputs):
                fixed = value.is_graph_input() or value.is_initializer()
                if is_float32(value) and not fixed and (value in self.half.stored) != narrow:
                    other = self._other(value)
                    one.outputs[number] = other
                    value.name, other.name = other.name, value.name
        for value in self.half.stored:
            value.type = ir.TensorType(self.half.dtype)
        for node, choice in self.choices.items():
            if node.op_type == "Cast" and choice.outputs:
                node.attributes["to"] = ir.AttrInt64("to", self.half.dtype.value)
        self.ledger.touch(self.choices)
        for value in self._others:
            self._remove_unread(value)

    def _connect(self, node: ir.Node) -> None:
        """Let a node read each float32 input in the type that was chosen for it."""
        choice = self.choices.get(node)
        if node.op_type in ANY and not node.domain:
            return
        for index, value in enumerate(node.inputs):
            if value is None or not is_float32(value):
                continue
            narrow = choice is not None and index in choice.inputs
            if narrow != (value in self.half.stored):
                node.replace_input_with(index, self._other(value))
                self.ledger.touch([node])

    def _other(self, value: ir.Value) -> ir.Value:
        """A value in the other of the two types, made once, where the value itself is made."""
        if value not in self._others:
            self._others[value] = self._made(value)
        return self._others[value]

    def _made(self, value: ir.Value) -> ir.Value:
        dtype = ir.DataType.FLOAT if value in self.half.stored else self.half.dtype
        shape = None if value.shape is None else value.shape.copy()
        name = self.scope.fresh(f"{value.name}_{dtype.name.lower()}")
        other = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
        graph, producer, tensor = value.graph, value.producer(), constant_of(value)
        assert isinstance(graph, ir.Graph)
        if tensor is not None and producer is None:
            other.const_value = _narrowed(tensor, dtype)
            graph.register_initializer(other)
            return other
        if tensor is not None:
            constant = ir.AttrTensor("value", _narrowed(tensor, dtype))
            node = ir.Node("", "Constant", (), [constant], outputs=[other])
        else:
            node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype.value)], outputs=[other])
        if producer is None:
            graph.insert_before(graph[0], node)
        else:
            graph.insert_after(producer, node)
        self.ledger.touch([node])
        return other

    def _remove_unread(self, value: ir.Value) -> None:
        """Remove the float32 form of a constant that is read in 16 bits only."""
        graph, producer = value.graph, value.producer()
        if constant_of(value) is None or use_count(value) or value.is_graph_output():
            return
        assert isinstance(graph, ir.Graph)
        if producer is not None:
            graph.remove(producer, safe=True)
        elif value.name is not None:
            del graph.initializers[value.name]


def _narrowed(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """A constant in 16 bits, rounded to nearest; a large one on disk is rounded when it is read."""

    def rounded(array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return array.astype(dtype.numpy())

    if is_on_disk(tensor):
        return mapped(rounded, [tensor], dtype)
    return ir.Tensor(rounded(tensor.numpy()), dtype=dtype)
