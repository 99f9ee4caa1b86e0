"""Control flow, and functions of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from onnx import helper

from tests.random_graphs.growing import SAMPLES, Attributes, Graph, Known, element


def make_body(graph: Graph, name: str, inner: Graph, outputs: Sequence[Known]) -> onnx.GraphProto:
    return helper.make_graph(
        inner.nodes,
        name,
        inner.inputs,
        [helper.make_tensor_value_info(v.name, element(v.arrays[0]), None) for v in outputs],
        inner.initializers,
    )


def captured(graph: Graph, *bodies: onnx.GraphProto) -> list[Known]:
    """What bodies read of the graphs around them."""
    outer: dict[str, Known] = {}
    level: Graph | None = graph
    while level is not None:
        outer = {**{v.name: v for v in (*level.known, *level.stored)}, **outer}
        level = level.parent
    names = [name for body in bodies for name in names_in(body)]
    return [outer[name] for name in dict.fromkeys(names) if name in outer]


def names_in(body: onnx.GraphProto) -> Iterator[str]:
    yield from (port.name for port in body.output)
    for node in body.node:
        yield from node.input
        for attr in node.attribute:
            if attr.HasField("g"):
                yield from names_in(attr.g)


def if_step(graph: Graph) -> None:
    rng, model = graph.rng, graph.model
    condition = graph.pick(lambda v: v.arrays[0].dtype == bool and v.arrays[0].size == 1 and v.rank < 2)
    if condition is None or rng.random() < 0.3:
        condition = graph.constant(np.array(rng.random() < 0.5))
    if graph.parent is not None and rng.random() < 0.3:
        around = [v for v in graph.parent.visible() if v.arrays[0].dtype == bool and v.arrays[0].size == 1]
        condition = around[0] if around and around[0].rank < 2 else condition
    bodies, shapes, exact = [], [], []
    for _ in range(2):
        inner = Graph(model, graph)
        inner.grow(rng.randint(1, 4), nested=rng.random() < 0.7)
        results = [v for v in inner.known if v.is_float and not v.stored]
        kind = [v for v in results if v.arrays[0].dtype == model.dtype]
        if not kind:
            return
        bodies.append(make_body(graph, model.fresh("branch"), inner, kind[-1:]))
        shapes.append([array.shape for array in kind[-1].arrays])
        exact.append(kind[-1].exact)
    if model.opset < 11 and shapes[0] != shapes[1]:
        return  # the runtime takes one branch's shape for the other's
    node = helper.make_node(
        "If", [condition.name], [model.fresh("v")], then_branch=bodies[0], else_branch=bodies[1]
    )
    graph.append(node, [condition, *captured(graph, *bodies)], exact=all(exact))


def loop_step(graph: Graph) -> None:
    """A Loop that carries one value, whose shape may change on the way, and may collect another."""
    rng, model = graph.rng, graph.model
    state = graph.pick(lambda v: v.is_float and v.rank > 0)
    if state is None:
        return
    inner = Graph(model, graph)
    ports = [model.fresh("b") for _ in range(3)]
    firsts: tuple[np.ndarray | None, ...] = (np.array(0, np.int64), np.array(True), None)
    for name, first in zip(ports, firsts, strict=True):
        arrays = state.arrays if first is None else (first,) * (2 * SAMPLES)
        shape: list[int] | None = None if first is None else []
        inner.inputs.append(helper.make_tensor_value_info(name, element(arrays[0]), shape))
        inner.add(Known(name, arrays, exact=False))
    number, going, carried = inner.known
    inner.grow(rng.randint(1, 4), nested=rng.random() < 0.7)
    if rng.random() < 0.3:
        inner.op("Concat", [carried, carried], axis=0)
    results = [
        v
        for v in inner.known
        if v.arrays[0].dtype == state.arrays[0].dtype and v.name != carried.name and not v.stored
    ]
    go = _goes_on(inner, number, going)
    if not results or go is None:
        return
    outputs = [go, results[-1], *results[-1:0:-1][:1]] if rng.random() < 0.4 else [go, results[-1]]
    if len({v.name for v in outputs}) < len(outputs):
        return
    kept = all(
        a.shape == b.shape == state.shape for a, b in zip(outputs[1].arrays, state.arrays, strict=True)
    )
    if kept and rng.random() < 0.5:
        inner.inputs[2] = helper.make_tensor_value_info(ports[2], element(state.arrays[0]), state.shape)
    body = make_body(graph, model.fresh("body"), inner, outputs)
    counts = [
        v for v in graph.visible() if v.rank == 0 and v.arrays[0].dtype == np.int64 and 0 <= max(v.arrays) < 5
    ]
    trips = graph.constant(np.array(rng.choice((0, 1, 1, 2, 3)), np.int64))
    trips = rng.choice(counts) if counts and rng.random() < 0.4 else trips
    runs = graph.constant(np.array(rng.random() < 0.8)) if rng.random() < 0.4 else None
    node = helper.make_node(
        "Loop",
        [trips.name, runs.name if runs else "", state.name],
        [model.fresh("v") for _ in outputs[1:]],
        body=body,
    )
    graph.append(node, [trips, *([runs] if runs else []), state, *captured(graph, body)], exact=False)


def _goes_on(inner: Graph, number: Known, going: Known) -> Known | None:
    """What says whether a loop goes on: what came in, always, never, or up to some trip."""
    rng = inner.rng
    match rng.randrange(6):
        case 0:
            return inner.constant(np.array(True))
        case 1:
            return inner.constant(np.array(rng.random() < 0.3))
        case 2:
            trip = inner.op("Cast", [Known(number.name, number.arrays, exact=True)], to=1)
            limit = inner.constant(np.array(rng.choice((0.5, 1.5)), np.float32))
            return inner.op("Less", [Known(trip.name, trip.arrays, exact=True), limit]) if trip else None
        case _:
            return inner.op("Identity", [going])


def function(graph: Graph) -> None:
    """Define a function of two values, or call one that there is."""
    rng, model = graph.rng, graph.model
    x = graph.tensor()
    y = graph.pick(lambda v: v.is_float and x is not None and v.arrays[0].dtype == x.arrays[0].dtype)
    if x is None or y is None or model.ir_version < 8:
        return
    if not model.functions or rng.random() < 0.4:
        inner = Graph(model, None, holds_initializers=False)
        names = [model.fresh("a"), model.fresh("b")]
        inner.known = [Known(names[0], x.arrays, False), Known(names[1], y.arrays, False)]
        inner.grow(rng.randint(1, 4), nested=True)
        made = [v for v in inner.known if v.name not in names and v.is_float and not v.stored]
        if not made:
            return
        leaky = [node for node in inner.nodes if node.op_type == "LeakyRelu"]
        for node in leaky:
            node.attribute.append(
                onnx.AttributeProto(name="alpha", ref_attr_name="alpha", type=onnx.AttributeProto.FLOAT)
            )
        if not any(imported.domain == "d" for imported in model.imports):
            model.imports.append(helper.make_opsetid("d", 1))
        model.functions.append(
            helper.make_function(
                "d",
                model.fresh("f"),
                names,
                [v.name for v in made[-rng.randint(1, 2) :]],
                inner.nodes,
                [
                    i
                    for i in model.imports
                    if not (i.domain == "d" and not any(n.domain == "d" for n in inner.nodes))
                ],
                ["alpha"] if leaky else [],
            )
        )
    called = rng.choice(model.functions)
    given: Attributes = {"alpha": 0.25} if called.attribute else {}
    node = helper.make_node(
        called.name, [x.name, y.name], [model.fresh("v") for _ in called.output], domain="d", **given
    )
    graph.append(node, [x, y], exact=False)
