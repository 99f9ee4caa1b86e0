"""Store equal initializers once.

Before: y = MatMul(x, w1); z = MatMul(y, w2), where w1 and w2 hold the same bytes
After:  z = MatMul(MatMul(x, w1), w1)
Declines: nothing. Initializers that are graph inputs (overridable) or graph outputs stay, and large
    products that are computed when they are written.

Equal means the same type, shape and bytes; -0.0 is not 0.0. An initializer of a body may give way to
one of a graph around it; bodies beside each other keep their own, since neither sees the other's.
Weights are read only where that can matter: those that share type and shape, side by side in pieces, and
each no further than to where it differs from all others.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import graphs, roots, subgraphs_of
from onnxopt.ledger import Ledger
from onnxopt.streamed import pieces

__all__ = ["DedupeInitializers"]

_HEAD = 1 << 12
_CHUNK = 1 << 18

Classes = dict[ir.Value, int]
"""The number of the class of equal ones, of each initializer that is in one with others."""


@dataclass(frozen=True)
class DedupeInitializers(Pass):
    """Let the readers of an initializer read an equal one, in the same graph or around it."""

    name = "dedupe-initializers"
    example = """
agraph (float[2] x) => (float[2] y) <float[2] v = {1, 2}, float[2] w = {1, 2}> {
    a = Mul(x, v)
    y = Add(a, w)
}
    """

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        alike: dict[Hashable, list[ir.Value]] = {}
        for value, tensor in _candidates(model):
            alike.setdefault((tensor.dtype, tuple(tensor.shape)), []).append(value)
        equal = (some for values in alike.values() if len(values) > 1 for some in _equal(values))
        classes = {value: number for number, some in enumerate(equal) for value in some}
        for root in roots(model):
            _merge(root, classes, {}, ledger)


def _candidates(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    for graph in graphs(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or value.is_graph_input() or value.is_graph_output():
                continue
            if not isinstance(tensor, ir.LazyTensor):
                yield value, tensor


def _equal(values: Sequence[ir.Value]) -> Iterator[list[ir.Value]]:
    """Those that hold the same bytes, two or more, of initializers of the same type and shape."""
    work = [[(value, _bytes(value.const_value)) for value in values if value.const_value is not None]]
    while work:
        parts: dict[bytes, list[tuple[ir.Value, Iterator[bytes | memoryview]]]] = {}
        for value, rest in work.pop():
            parts.setdefault(bytes(next(rest, b"")), []).append((value, rest))
        for piece, part in parts.items():
            if len(part) > 1 and piece:
                work.append(part)
            elif len(part) > 1:
                yield [value for value, _ in part]


def _bytes(tensor: ir.TensorProtocol) -> Iterator[bytes | memoryview]:
    if isinstance(tensor, ir.StringTensor):
        for text in tensor.string_data():
            yield len(text).to_bytes(8, "little") + text
        return
    for number, piece in enumerate(pieces(tensor, _CHUNK)):
        if number:
            yield piece
        else:
            yield piece[:_HEAD]
            yield piece[_HEAD:]


def _merge(graph: ir.Graph, classes: Classes, first: dict[int, ir.Value], ledger: Ledger) -> None:
    """Merge the initializers of a graph; `first` holds those of the graphs around it."""
    added: list[int] = []
    for name, value in tuple(graph.initializers.items()):
        key = classes.get(value)
        if key is None:
            continue
        if key not in first:
            first[key] = value
            added.append(key)
        elif ledger.claim("equal initializers", name):
            ledger.touch(value.consumers())
            value.replace_all_uses_with(first[key])
            graph.initializers.pop(name)
    for node in graph:
        for body in subgraphs_of(node):
            _merge(body, classes, first, ledger)
    for key in added:
        del first[key]
