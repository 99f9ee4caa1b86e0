"""Models whose outputs are the tensors one wants to see, in slices that fit the memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir

from onnxopt.data import Feeds
from onnxopt.errors import UsageError, did_you_mean
from onnxopt.graph import FLOATS, detach, subgraphs_of, value_names, walk
from onnxopt.inference import refine
from onnxopt.model import ModelLike, load, opener
from onnxopt.runtimes import open_session

__all__ = ["Slices", "cut", "exposable"]

Runner = Callable[[Feeds], Iterable[tuple[str, np.ndarray]]]


def exposable(model: ModelLike) -> tuple[str, ...]:
    """The names of the tensors that can be calibrated, graph inputs first.

    Those are the float ones (64, 32, 16 bits) of the main graph that are no constants. What lies in the
    bodies of If, Loop and Scan and in functions has no value outside of them.
    """
    return tuple(name for name, dtype in _tensors(load(model)).items() if dtype in FLOATS)


def _tensors(model: ir.Model) -> dict[str, ir.DataType | None]:
    """The tensors of the main graph that are no constants, and their types; None: not a tensor."""
    graph = model.graph
    values = [value for value in graph.inputs if not value.is_initializer()]
    for node in graph:
        if node.op_type == "Constant" and not node.domain:
            continue
        if any(value.type is None for value in node.outputs):
            refine(node, graph.opset_imports)
        values += [value for value in node.outputs if value.name]
    unknown = [value.name or "" for value in values if value.type is None]
    found = _asked(model, unknown) if unknown else {}
    return {value.name or "": value.dtype or found.get(value.name or "") for value in values}


def _asked(model: ir.Model, names: Sequence[str]) -> dict[str, ir.DataType]:
    """The types of tensors, as the runtime tells them."""
    with open_session(cut(model.clone(), names), level="none", arena=False) as session:
        return {
            info.name: ir.DataType.from_numpy(info.dtype)
            for info in session.outputs
            if info.type.startswith("tensor") and info.dtype != object
        }


def cut(model: ir.Model, names: Sequence[str], *, shapes_only: bool = False) -> ir.Model:
    """The caller's own model, now with these tensors, or their shapes, as its outputs and with no more."""
    graph, taken = model.graph, value_names(model)
    graph.opset_imports.setdefault("", 1)
    computed = {value.name: value for node in graph for value in node.outputs}
    tail: list[ir.Node] = []
    graph.outputs.clear()
    for name in names:
        value = computed[name]
        if shapes_only:
            shape = next(new for n in itertools.count() if (new := f"{name}/shape{n}") not in taken)
            value = ir.Value(name=shape, type=ir.TensorType(ir.DataType.INT64))
            tail.append(ir.Node("", "Shape", [computed[name]], outputs=[value]))
        value.shape = None  # what is recorded may hold for other sizes of the inputs
        graph.outputs.append(value)
    graph.extend(reversed(tail))  # the runtime goes from the last end node: it frees a tensor once measured
    needed = _needed(graph)
    unneeded = [node for node in graph if node not in needed]
    for inner in [inner for node in unneeded for body in subgraphs_of(node) for inner in walk(body)]:
        detach(inner)
    graph.remove(unneeded, safe=True)
    return model


def _needed(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that the outputs are computed from."""
    needed: set[ir.Node] = set()
    stack = [value.producer() for value in graph.outputs]
    while stack:
        node = stack.pop()
        if node is None or node in needed or node.graph is not graph:
            continue
        needed.add(node)
        readers = [node, *(inner for body in subgraphs_of(node) for inner in walk(body))]
        stack += [value.producer() for reader in readers for value in reader.inputs if value is not None]
        bodies = (value for body in subgraphs_of(node) for value in body.outputs)
        stack += [value.producer() for value in bodies]
    return needed


class Slices:
    """The tensors to see, in groups; the tensors of a group fit the memory at the sizes of one sample.

    Sessions run without graph optimizations: then the numbers do not depend on what else is exposed, and with
    everything exposed the runtime finds nothing to fuse anyway.
    """

    def __init__(self, model: ModelLike, names: Sequence[str] | None) -> None:
        self._open: Callable[[], ir.Model] = opener(model)
        first = self._open()
        types = _tensors(first)
        self.names = tuple(names if names is not None else (n for n, t in types.items() if t in FLOATS))
        for name in self.names:
            if types.get(name) not in FLOATS:
                raise UsageError(f"calibrate: tensor {name!r} {_why_not(name, types)}")
        given = {value.name for value in first.graph.inputs}
        self.inputs = tuple(name for name in self.names if name in given)
        self._computed = tuple(name for name in self.names if name not in given)
        self._bytes = {name: (types[name] or ir.DataType.FLOAT).itemsize for name in self._computed}

    def groups(self, sample: Feeds, memory: int) -> list[tuple[str, ...]]:
        """The tensors in groups of at most `memory` bytes at this sample; a larger one is alone.

        The first group is that of the graph inputs, if any: they need no run.
        """
        groups: list[list[str]] = [list(self.inputs), []]
        filled = 0.0
        for name, size in self._sizes(sample).items():
            if groups[-1] and filled + size > memory:
                groups.append([])
                filled = 0.0
            groups[-1].append(name)
            filled += size
        return [tuple(group) for group in groups if group]

    @contextmanager
    def runner(self, group: Sequence[str]) -> Iterator[Runner]:
        """A function that gives the tensors of a group for a sample, one by one."""
        if group[0] in self.inputs:
            yield lambda feeds: ((name, feeds[name]) for name in group)
            return
        with open_session(cut(self._open(), group), level="none", arena=False) as session:
            yield session.stream

    def _sizes(self, sample: Feeds) -> dict[str, float]:
        """Bytes of each tensor in a run on the sample."""
        if not self._computed:
            return {}
        with open_session(
            cut(self._open(), self._computed, shapes_only=True), level="none", arena=False
        ) as session:
            shapes: Iterator[np.ndarray] = iter(session.run(sample).values())
            sizes = {name: float(np.prod(shape)) for name, shape in zip(self._computed, shapes, strict=True)}
        return {name: size * self._bytes[name] for name, size in sizes.items()}


def _why_not(name: str, types: Mapping[str, ir.DataType | None]) -> str:
    if name not in types:
        return f"is not computed in the main graph{did_you_mean(name, types)}"
    kind = types[name]
    return f"is {'no tensor' if kind is None else kind.name.lower()}: only float tensors are calibrated"
