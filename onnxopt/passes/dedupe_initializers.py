"""Store equal initializers once.

Before: y = MatMul(x, w1); z = MatMul(y, w2), where w1 and w2 hold the same bytes
After:  z = MatMul(MatMul(x, w1), w1)
Declines: nothing. Initializers that are graph inputs (overridable) or graph outputs stay, and large
    products that are computed when they are written.

Equal means the same type, shape and bytes; -0.0 is not 0.0. An initializer of a body may give way to
one of a graph around it; bodies beside each other keep their own, since neither sees the other's.
Weights are read only where that can matter: the first bytes of those that share type and shape, and
the rest of those that agree in them, in pieces where they lie in an external file.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import graphs, pieces, roots, subgraphs_of
from onnxopt.ledger import Ledger

__all__ = ["DedupeInitializers"]

_HEAD = 4096
_CHUNK = 1 << 24

Keys = dict[ir.Value, Hashable]


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
        keys: Keys = {value: _kind(tensor) for value, tensor in _candidates(model)}
        for refine in (_head, _digest):
            keys = _shared(keys, refine)
        for root in roots(model):
            _merge(root, keys, {}, ledger)


def _candidates(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    for graph in graphs(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or value.is_graph_input() or value.is_graph_output():
                continue
            if not isinstance(tensor, ir.LazyTensor):
                yield value, tensor


def _shared(keys: Keys, refine: Callable[[ir.TensorProtocol], Hashable]) -> Keys:
    """Those whose key another one has too, with a finer key."""
    counts = Counter(keys.values())
    return {
        value: (key, refine(value.const_value))
        for value, key in keys.items()
        if counts[key] > 1 and value.const_value is not None
    }


def _kind(tensor: ir.TensorProtocol) -> Hashable:
    return tensor.dtype, tuple(tensor.shape)


def _head(tensor: ir.TensorProtocol) -> Hashable:
    return bytes(next(_bytes(tensor, _HEAD), b""))


def _digest(tensor: ir.TensorProtocol) -> Hashable:
    digest = hashlib.sha256()
    for piece in _bytes(tensor, _CHUNK):
        digest.update(piece)
    return digest.digest()


def _bytes(tensor: ir.TensorProtocol, size: int) -> Iterator[bytes | memoryview]:
    if isinstance(tensor, ir.StringTensor):
        for text in tensor.string_data():
            yield len(text).to_bytes(8, "little") + text
    else:
        yield from pieces(tensor, size)


def _merge(graph: ir.Graph, keys: Keys, first: dict[Hashable, ir.Value], ledger: Ledger) -> None:
    """Merge the initializers of a graph; `first` holds those of the graphs around it."""
    added: list[Hashable] = []
    for name, value in tuple(graph.initializers.items()):
        key = keys.get(value)
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
            _merge(body, keys, first, ledger)
    for key in added:
        del first[key]
