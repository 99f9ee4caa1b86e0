"""The part of a graph that torch cannot compute and nothing trained is in front of: the runtime's.

It gives constants of a kind: no gradient goes into it. The runtime gets it once, when it first runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from onnxopt.calibration.exposing import cut
from onnxopt.errors import ModelError
from onnxopt.graph import constant_of, subgraphs_of, walk
from onnxopt.index import operator_of
from onnxopt.model import clone
from onnxopt.passes.shared.quantized import QUANTIZED
from onnxopt.protobuf import dump
from onnxopt.runtimes import Session, open_session
from onnxopt.training.interpreter.functions import label, operator_for
from onnxopt.training.interpreter.registry import Operator
from onnxopt.training.interpreter.values import Host, receive, to_device

__all__ = ["Frozen", "FrozenPart", "frozen_part", "unknown_nodes"]


class FrozenPart(NamedTuple):
    """A step that the runtime takes: in the place of which nodes, and from what to what."""

    operator: Operator
    nodes: set[ir.Node]
    inputs: list[ir.Value]
    results: list[ir.Value]


class Frozen:
    """Runs a model in the runtime: its inputs in order, its outputs in order."""

    def __init__(
        self, model: bytes, inputs: Sequence[str], outputs: Sequence[tuple[str, ir.DataType | None]]
    ):
        self.model, self.inputs, self.outputs = model, tuple(inputs), tuple(outputs)
        self._session: Session | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}

    def __call__(self, *values: Any) -> tuple[Any, ...]:
        return self._run(*values)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self, *values: Any) -> tuple[Any, ...]:
        if self._session is None:
            self._session = open_session(self.model, level="all")
        device = next((one.device for one in values if isinstance(one, Tensor)), torch.device("cpu"))
        given = [to_device(one) if isinstance(one, Host) else one for one in values]
        arrays = [one.detach().cpu().numpy() if isinstance(one, Tensor) else one for one in given]
        found = self._session.run(dict(zip(self.inputs, arrays, strict=True)))
        results = []
        for name, dtype in self.outputs:
            array = np.asarray(found[name])
            one = receive(array, dtype or ir.DataType.from_numpy(array.dtype))
            results.append(one.to(device) if isinstance(one, Tensor) else one)
        return tuple(results)


def unknown_nodes(graph: ir.Graph) -> list[tuple[ir.Node, str]]:
    """The nodes of a main graph that cannot be computed here, by themselves or for what is in them."""
    found = []
    for node in graph:
        for inner in (node, *(one for body in subgraphs_of(node) for one in walk(body))):
            version = graph.opset_imports.get(inner.domain, 1)
            values = [one for one in (*inner.inputs, *inner.outputs) if one is not None]
            text = any(getattr(constant_of(one), "dtype", one.dtype) == ir.DataType.STRING for one in values)
            if text or (operator_of(inner) not in QUANTIZED and operator_for(inner, version) is None):
                found.append((node, label(inner, version)))
    return found


def frozen_part(
    model: ir.Model, unknown: Iterable[tuple[ir.Node, str]], trained: set[ir.Value]
) -> FrozenPart | None:
    """The nodes to leave to the runtime: those that nothing is known of, and all that they are computed from.

    Args:
        model: the prepared model; nodes of its main graph only.
        unknown: nodes, with what messages call them.
        trained: constants that are trained.

    Raises:
        ModelError: something is trained in front of such a node.
    """
    nodes: set[ir.Node] = set()
    for node, called in unknown:
        stack: list[ir.Node | None] = [node]
        while stack:
            one = stack.pop()
            if one is None or one in nodes or one.graph is not model.graph:
                continue
            nodes.add(one)
            read = [value for value in _read(one) if value is not None]
            if trained.intersection(read):
                raise ModelError(
                    f"training: no function is known for {called}, and weights are trained in front of it; "
                    "leave out the outputs that need it (outputs=), or freeze those weights (trainable=)"
                )
            stack += [value.producer() for value in read]
    if not nodes:
        return None
    ordered = [node for node in model.graph if node in nodes]
    outside = {value for node in model.graph if node not in nodes for value in _read(node)}
    outside.update(model.graph.outputs)
    results = [value for node in ordered for value in node.outputs if value in outside]
    names = [value.name or "" for value in results]
    inputs = [value for value in model.graph.inputs if any(value in _read(node) for node in ordered)]
    part = cut(clone(model), names)
    part.graph.inputs[:] = [value for value in part.graph.inputs if value.uses()]
    data = dump(part).SerializeToString(deterministic=True)
    types = [(name, value.dtype) for name, value in zip(names, results, strict=True)]
    run = Frozen(data, [value.name or "" for value in inputs], types)
    return FrozenPart(Operator(run, raw=True, host=False), nodes, inputs, results)


def _read(node: ir.Node) -> list[ir.Value | None]:
    """What a node and the graphs in it read."""
    return [
        *node.inputs,
        *(one for body in subgraphs_of(node) for inner in walk(body) for one in inner.inputs),
    ]
