"""Which protobufs are refused as models, before a graph is built from them; each with one clear line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx

from onnxopt.errors import ModelError

__all__ = ["admit"]

_DEFAULT = ("", "ai.onnx")
"""The two names of ONNX's own domain."""


def admit(proto: onnx.ModelProto, who: str) -> None:
    """Refuse what has no meaning: no graph, no opset, one newer than onnx knows, names that nothing defines.

    Raises:
        ModelError: its message starts with `who`.
    """
    complaint = next(_complaints(proto), None)
    if complaint:
        raise ModelError(f"{who}: {complaint}")


def _complaints(proto: onnx.ModelProto) -> Iterator[str]:
    if proto.ir_version < 1 or not proto.HasField("graph"):
        yield "not an ONNX model: it has no IR version or no graph"
    if proto.ir_version > onnx.IR_VERSION:
        yield (
            f"IR version {proto.ir_version} is newer than onnx {onnx.__version__} knows "
            f"({onnx.IR_VERSION}); upgrade onnx"
        )
    yield from _opset_complaints(proto)
    if proto.training_info:
        yield "training info would be lost: only inference models are supported; remove it"
    yield from _graph_complaints(proto.graph, ())
    for function in proto.functions:
        for complaint in _body_complaints(function.node, function.output, (set(function.input),)):
            yield f"function {function.domain}.{function.name}: {complaint}"


def _opset_complaints(proto: onnx.ModelProto) -> Iterator[str]:
    if not proto.opset_import:
        yield (
            f"no opset import (IR version {proto.ir_version}), so its operators have no meaning; "
            "export it again, or raise it to IR version 4 with an opset"
        )
    versions = [entry.version for entry in proto.opset_import if entry.domain in _DEFAULT]
    newest = onnx.defs.onnx_opset_version()
    if len(set(versions)) > 1:
        yield f"opset {versions[0]} and opset {versions[1]} are both imported: one of them is meant"
    for version in versions:
        if version > newest:
            yield f"opset {version} is newer than onnx {onnx.__version__} knows ({newest}); upgrade onnx"
        if version < 1:
            yield f"opset {version} does not exist; export it again"
    if not versions and (node := next((n for n in proto.graph.node if n.domain in _DEFAULT), None)):
        yield f"no opset import for ONNX's own operators, such as {node.op_type}; export it again"


def _graph_complaints(graph: onnx.GraphProto, outer: tuple[set[str], ...]) -> Iterator[str]:
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        yield f"sparse initializer {name!r}: sparse weights are not supported; make it dense"
    for tensor in graph.initializer:
        if not tensor.name:
            yield "an initializer has no name"
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    yield from _body_complaints(graph.node, (value.name for value in graph.output), (*outer, own))


def _body_complaints(
    nodes: Iterable[onnx.NodeProto], outputs: Iterable[str], scopes: tuple[set[str], ...]
) -> Iterator[str]:
    """Names that nothing defines; `scopes` holds the names of each graph around, the last one its own."""
    own = scopes[-1]
    own.update(name for node in nodes for name in node.output if name)
    for node in nodes:
        for name in node.input:
            if name and not any(name in scope for scope in scopes):
                yield f"node {node.name!r} ({node.op_type}) reads {name!r}, which nothing defines"
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graph_complaints(body, scopes)
    for name in outputs:
        if name not in own:
            yield f"graph output {name!r} is defined nowhere"
