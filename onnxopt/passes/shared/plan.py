"""Which values can be had without a change of layout at their end, and what that saves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxopt.evaluation import Dims
from onnxopt.graph import constant_of
from onnxopt.passes.shared.layout import Layout, Shape
from onnxopt.passes.shared.moves import MOVABLE, Move, moves
from onnxopt.passes.shared.steps import Step, apply_steps, cost, layout_of, steps_for, take, weight_of
from onnxopt.rewrite import Declined, Edit
from onnxopt.scope import Scope

__all__ = ["DEEPEST", "Planner", "cheapest"]

Cost = tuple[int, int]
"""Ops, and the sum of their weights; negative: so many fewer."""

DEEPEST = 8
"""Ops in a row that are looked at."""
_MOST = 24
"""Ways to make one value that are kept in mind."""
_LARGE = 1 << 20
"""Bytes of a constant up to which a second one in another layout is made."""


@dataclass(frozen=True)
class Plan:
    """A value is `layout` of another: what making the other instead of it costs, and how it is made."""

    layout: Layout
    cost: Cost
    build: Callable[[Edit], ir.Value]


def _as_it_is(value: ir.Value, layout: Layout) -> Plan:
    return Plan(layout, (0, 0), lambda _: value)


@dataclass
class Planner:
    """Plans for what is above one node. through: ops may be crossed."""

    dims: Dims
    opset: int
    through: bool
    _known: dict[ir.Value, list[Plan]] = field(default_factory=dict)

    def ends(self, node: ir.Node) -> Iterator[Plan]:
        """Ways to make the result of a node: of a change of layout, or across another op."""
        last = layout_of(node, self.dims)
        if last is None:
            yield from self._across(node, DEEPEST) if self.through else ()
            return
        for plan in self._plans(node.inputs[0], node, DEEPEST):
            if (joined := plan.layout.then(last)) is not None:
                yield Plan(joined, _sum(plan.cost, (-1, -weight_of(node))), plan.build)

    def _plans(self, value: ir.Value | None, reader: ir.Node, depth: int) -> list[Plan]:
        """Ways to make a value, the cheapest for each layout; the first is the value as it is."""
        shape = self.dims.of(value)
        if value is None or shape is None or 0 in shape:
            return []
        if value not in self._known:
            as_it_is = _as_it_is(value, Layout.identity(shape))
            found = dict[Layout, Plan]()
            for plan in self._made(value, reader, depth) if depth else ():
                key = plan.layout.coarse()
                if key not in found or plan.cost < found[key].cost:
                    found[key] = plan
            others = sorted(found.values(), key=lambda plan: plan.cost)
            self._known[value] = [as_it_is, *others[:_MOST]]
        return self._known[value]

    def _made(self, value: ir.Value, reader: ir.Node, depth: int) -> Iterator[Plan]:
        """Ways to make a value that look at the node which makes it."""
        maker = value.producer()
        if maker is None:
            return
        layout = layout_of(maker, self.dims)
        alone = maker.graph is reader.graph and not value.is_graph_output()
        if not (alone and all(usage.node is reader for usage in value.uses())):
            yield from self._above(maker, depth)
        elif layout is None and self.through:
            yield from self._across(maker, depth)
        elif layout is not None:
            for plan in self._plans(maker.inputs[0], maker, depth - 1):
                if (joined := plan.layout.then(layout)) is not None:
                    yield Plan(joined, _sum(plan.cost, (-1, -weight_of(maker))), plan.build)

    def _above(self, maker: ir.Node | None, depth: int) -> Iterator[Plan]:
        """What stands in front of a row of changes of layout that stay, since they are read elsewhere too."""
        whole: Layout | None = None
        while depth and maker is not None and (layout := layout_of(maker, self.dims)) is not None:
            whole, source, depth = layout if whole is None else layout.then(whole), maker.inputs[0], depth - 1
            if whole is None or source is None:
                return
            yield _as_it_is(source, whole)
            maker = source.producer()

    def _across(self, node: ir.Node, depth: int) -> Iterator[Plan]:
        """Ways to make the result of an op from inputs that lack a change of layout at their end."""
        if node.op_type not in MOVABLE or node.domain or len(node.outputs) != 1:
            return
        for index, value in enumerate(node.inputs):
            for number, lead in enumerate(self._plans(value, node, depth - 1)):
                if number == 0 and not node.op_type.startswith("Reduce"):
                    continue  # only a Reduce has a choice, to keep its axes, where its input stays as it is
                for move in moves(node, index, lead.layout, self.dims, self.opset):
                    whole = self._in_line(node, index, lead, move, depth)
                    if whole is not None and (number or whole.layout.source != whole.layout.target):
                        yield whole

    def _in_line(self, node: ir.Node, index: int, lead: Plan, move: Move, depth: int) -> Plan | None:
        """The op before the change of layout of one input, the other inputs brought into line."""
        total, parts, done = lead.cost, {index: lead}, {node.inputs[index]: lead}
        for other, layout in move.inputs.items():
            value = node.inputs[other]
            if value is None or other == index:
                continue
            if value not in done:
                part = self._brought(value, layout, node, depth)
                if part is None:
                    return None
                total, done[value] = _sum(total, part.cost), part
            parts[other] = done[value]

        def build(edit: Edit) -> ir.Value:
            made = {value: part.build(edit) for value, part in done.items()}
            return move.build(node, edit, {other: made[node.inputs[other]] for other in parts})

        return Plan(move.output, total, build)

    def _brought(self, value: ir.Value, layout: Layout, reader: ir.Node, depth: int) -> Plan | None:
        """The cheapest way to make what `layout` makes the value of, up to ones in front."""
        tensor = constant_of(value)
        if tensor is not None:
            change = self._change(Layout.identity(tuple(tensor.shape.numpy())), layout)
            if change is None or (tensor.nbytes > _LARGE and len(value.uses()) > 1):
                return None
            return Plan(layout, (0, 0), lambda edit: _constant(edit, value, change))
        best: Plan | None = None
        for plan in self._plans(value, reader, depth - 1):
            steps = self._change(plan.layout, layout)
            total = plan.cost if steps is None else _sum(plan.cost, cost(steps))
            if steps is not None and (best is None or total < best.cost):
                best = Plan(layout, total, _taken(plan, steps, self.opset))
        return best

    def _change(self, made: Layout, needed: Layout) -> list[Step] | None:
        """What turns the source of `made` into the source of `needed`, both targets being alike."""
        padded = made.reshaped(needed.target_shape)
        change = None if padded is None else padded.then(needed.inverse)
        if change is None:
            return None
        return [] if not change.moves and _fits(made.source_shape, needed.source_shape) else steps_for(change)


def cheapest(planner: Planner, node: ir.Node, scope: Scope) -> Edit | None:
    """The cheapest way to make the result of a node, if it is cheaper than the present one.

    Raises:
        Declined: what would be cheaper takes a Reshape whose shape cannot be written down.
    """
    # Runtimes have DepthToSpace and SpaceToDepth for few other types.
    modes = ("DCR", "CRD")[: 1 + (scope.opset >= 11)] if node.outputs[0].dtype == ir.DataType.FLOAT else ()
    best: tuple[Cost, Plan, list[Step]] | None = None
    unwritten, readers = False, _changes_behind(planner, node)
    for plan in planner.ends(node):
        steps = steps_for(plan.layout, modes)
        if steps is None:
            unwritten |= plan.cost < (-1, 0)
            continue
        total = _sum(plan.cost, cost(steps))
        for reader, layout in readers:
            joined = plan.layout.then(layout)
            behind = steps_for(joined) if joined is not None else None
            saved = (0, 0) if behind is None else _sum(cost(behind), (-1, -weight_of(reader)))
            total = _sum(total, min(saved, (0, 0)))
        if total < (best[0] if best else (0, 0)):
            best = total, plan, steps
    if best is None:
        if unwritten:
            raise Declined("the shape of the Reshape that would be needed cannot be written down")
        return None
    edit = Edit(node, scope)
    return edit.replace(node.outputs[0], take(edit, best[1].build(edit), best[2], scope.opset))


def _changes_behind(planner: Planner, node: ir.Node) -> list[tuple[ir.Node, Layout]]:
    """The changes of layout that read the result of a node which is none, where others read it too."""
    users = [usage.node for usage in node.outputs[0].uses()]
    if len(users) < 2 or layout_of(node, planner.dims) is not None:
        return []
    return [(user, layout) for user in users if (layout := layout_of(user, planner.dims)) is not None]


def _fits(shape: Shape, wanted: Shape) -> bool:
    """Whether only ones in front are missing, which broadcasting puts there."""
    missing = len(wanted) - len(shape)
    return missing >= 0 and wanted == (1,) * missing + shape


def _sum(a: Cost, b: Cost) -> Cost:
    return a[0] + b[0], a[1] + b[1]


def _taken(plan: Plan, steps: list[Step], opset: int) -> Callable[[Edit], ir.Value]:
    return lambda edit: take(edit, plan.build(edit), steps, opset)


def _constant(edit: Edit, value: ir.Value, steps: Iterable[Step]) -> ir.Value:
    tensor = constant_of(value)
    assert tensor is not None  # as it was when planned
    return edit.constant(apply_steps(steps, tensor.numpy()), value.name) if steps else value
