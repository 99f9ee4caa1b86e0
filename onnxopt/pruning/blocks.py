"""Residual blocks, y = x + f(x): which there are, and what the outputs lose without them.

Source: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024; here
it is not the similarity of x and y that counts but what comes out of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import onnx_ir as ir

from onnxopt.data import Feeds
from onnxopt.graph import FLOATS, constant_of, subgraphs_of, walk
from onnxopt.inspection.costs import multiplies
from onnxopt.inspection.sizes import Shapes, sized
from onnxopt.model import clone
from onnxopt.quantization.sensitivity import noise_between
from onnxopt.rewrite import Declined
from onnxopt.runtimes import open_session
from onnxopt.scope import Names

__all__ = ["Block", "Influence", "Sizes", "find_block", "require_flow"]

_SIZES = frozenset({"Shape", "Size"})


@dataclass(frozen=True)
class Block:
    """A residual block: the Add it ends in, and which operand of it is x."""

    add: ir.Node
    side: int

    @property
    def kept(self) -> ir.Value:
        """x, which takes the place of the block where that is dropped."""
        value = self.add.inputs[self.side]
        assert value is not None
        return value

    @property
    def output(self) -> ir.Value:
        """y."""
        return self.add.outputs[0]


def find_block(
    add: ir.Node, order: Sequence[ir.Node], places: dict[ir.Node, int], sizes: Sizes
) -> Block | None:
    """The block that ends in this Add; None where neither operand is computed from the other by a layer.

    Args:
        add: the node.
        order: the nodes of its graph, as they run.
        places: node -> its index in `order`.
        sizes: of the values.

    Raises:
        Declined: there is one, but it cannot be dropped.
    """
    operands = [value for value in add.inputs if value is not None and constant_of(value) is None]
    if len(operands) != 2 or operands[0] is operands[1]:
        return None
    starts = [places.get(p, -1) if (p := value.producer()) is not None else -1 for value in operands]
    side = starts.index(min(starts))
    kept, branch = operands[side], operands[1 - side]
    between = _between(kept, branch, order[min(starts) + 1 : max(starts) + 1])
    members = {one for node in between for one in (node, *_within(node))}
    if not any(map(multiplies, members)):
        return None
    for value in (value for node in between for value in node.outputs):
        users = (use.node for use in value.uses())
        others = [user for user in users if user not in members and user.op_type not in _SIZES]
        if value.is_graph_output() or others != [add] * (value is branch):
            raise Declined("a value of the branch is read elsewhere, too")
    if add.outputs[0].dtype not in FLOATS:
        raise Declined("the type is not known to be a float")
    if not sizes.alike(kept, add.outputs[0]) and not sizes.alike(kept, branch):
        raise Declined("the shapes of the block's input and output are not known to be the same")
    return Block(add, side)


def _between(start: ir.Value, end: ir.Value, order: Sequence[ir.Node]) -> list[ir.Node]:
    """Those of the nodes on the way from one value to another; what only has the size of a value is not."""
    computed = {start}
    for node in order:
        if node.op_type not in _SIZES and any(value in computed for value in _read(node)):
            computed.update(node.outputs)
    needed, found = {end} & computed, list[ir.Node]()
    for node in reversed(order):
        if not needed.isdisjoint(node.outputs) and not computed.isdisjoint(node.outputs):
            needed.update(_read(node))
            found.append(node)
    return found


@dataclass(frozen=True)
class Sizes:
    """Which values of a model have the same shape.

    symbolic: in the symbols of the graph inputs. sampled: at the sizes of a sample, or None; what has one
    element along an axis there may have more elsewhere.
    """

    symbolic: Shapes
    sampled: Shapes | None

    @classmethod
    def of(cls, model: ir.Model, samples: Sequence[Feeds]) -> Sizes:
        """Those of a model, which is not changed."""
        fed = {name: np.shape(array) for name, array in samples[0].items()} if samples else None
        return cls(sized(model).shapes, sized(model, fed).shapes if fed else None)

    def alike(self, one: ir.Value, other: ir.Value) -> bool:
        """Whether two values have the same shape, as far as known."""
        pairs = [self._pairs(self.symbolic, one, other)]
        pairs += [self._pairs(self.sampled, one, other)] if self.sampled is not None else []
        if not all(pairs) or len(set(map(len, pairs))) > 1:
            return False
        named = [a == b and a is not None for a, b in pairs[0]]
        seen = [a == b and isinstance(a, int) and a > 1 for a, b in pairs[-1]]
        return all(a or b for a, b in zip(named, seen, strict=True))

    @staticmethod
    def _pairs(at: Shapes, one: ir.Value, other: ir.Value) -> list[tuple[int | str | None, int | str | None]]:
        a, b = at.sizes(one), at.sizes(other)
        return list(zip(a, b, strict=True)) if a is not None and b is not None and len(a) == len(b) else []


def _within(node: ir.Node) -> Iterator[ir.Node]:
    return (inner for body in subgraphs_of(node) for inner in walk(body))


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, in its bodies too."""
    for one in (node, *_within(node)):
        yield from (value for value in one.inputs if value is not None)
    for body in subgraphs_of(node):
        yield from body.outputs


def require_flow(graph: ir.Graph, block: Block) -> None:
    """Raise `Declined` where without the block an output would be constant, or an input not read."""
    before = [_inputs_of(value, None) for value in graph.outputs]
    after = [_inputs_of(value, block) for value in graph.outputs]
    if any(bool(old) > bool(new) for old, new in zip(before, after, strict=True)):
        raise Declined("a graph output would be constant")
    if set().union(*before) > set().union(*after):
        raise Declined("a graph input would no longer be read")


def _inputs_of(output: ir.Value, without: Block | None) -> set[ir.Value]:
    """The graph inputs that an output of the main graph is computed from."""
    found, seen, work = set[ir.Value](), set[ir.Value](), [output]
    while work:
        value = work.pop()
        if without is not None and value is without.output:
            value = without.kept
        if value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if node is not None:
            work.extend(_read(node))
        elif value.is_graph_input() and not value.is_initializer() and value.graph is output.graph:
            found.add(value)
    return found


class Influence:
    """What the outputs lose where blocks are dropped, measured on samples.

    One session serves all choices: the branch of each block is multiplied by a number that is fed, 1 or 0.

    Args:
        model: in its main graph, or in bodies of it, are the blocks; not changed.
        blocks: all that may be dropped.
        samples: complete feeds.
    """

    def __init__(self, model: ir.Model, blocks: Sequence[Block], samples: Sequence[Feeds]) -> None:
        self._samples, self._count = samples, len(blocks)
        gated = clone(model)
        self._switch = Names(gated).fresh("keep")
        kind, shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([self._count])
        keep = ir.Value(name=self._switch, type=kind, shape=shape)
        gated.graph.inputs.append(keep)
        twins = dict(zip(walk(model.graph), walk(gated.graph), strict=True))
        for number, block in enumerate(blocks):
            _gate(twins[block.add], block, keep, number)
        self._session = open_session(gated)
        self._expected = [self._run(feeds, ()) for feeds in samples]

    def __call__(self, dropped: Collection[int]) -> float:
        """The noise in the outputs without these blocks, by number, as `noise_between` counts it."""
        return noise_between(self._expected, [self._run(feeds, dropped) for feeds in self._samples])

    def _run(self, feeds: Feeds, dropped: Collection[int]) -> dict[str, np.ndarray]:
        keep = np.ones(self._count, np.float32)
        keep[list(dropped)] = 0
        return self._session.run({**feeds, self._switch: keep})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()


def _gate(add: ir.Node, block: Block, keep: ir.Value, number: int) -> None:
    """Multiply the branch of a block by element `number` of `keep`."""
    branch, graph = add.inputs[1 - block.side], add.graph
    assert branch is not None
    assert isinstance(graph, ir.Graph)
    index = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.Tensor(np.array(number, np.int64)))])
    factor = ir.Node("", "Gather", [keep, index.outputs[0]])
    dtype = block.output.dtype or ir.DataType.FLOAT
    cast = ir.Node("", "Cast", [factor.outputs[0]], [ir.AttrInt64("to", dtype.value)])
    gated = ir.Node("", "Mul", [branch, cast.outputs[0]])
    for place, node in enumerate((index, factor, cast, gated)):
        node.outputs[0].name = f"{keep.name}/{number}/{place}"
    graph.insert_before(add, [index, factor, cast, gated])
    add.replace_input_with(1 - block.side, gated.outputs[0])
