"""Layers one after the other, with what they read once the layers in front of them have changed.

Source: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", 2017, section 3.3: what a
layer of the changed model writes is held against what it wrote in the whole one, and in front of an Add the
sum; so that a layer makes up for the errors of those before it, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.calibration.compensation import damped
from onnxopt.calibration.moments import positions_of
from onnxopt.calibration.segments import needed_from, part_of
from onnxopt.calibration.windows import from_rows, operand_rows, result_rows, weight_rows
from onnxopt.data import Feeds
from onnxopt.graph import (
    constant_array,
    constant_of,
    float_attr,
    read_once,
    set_constant,
    sizes_of,
    sole_user,
)
from onnxopt.model import clone
from onnxopt.runtimes import open_session

__all__ = ["Front", "Turn", "beside_of", "in_turn", "is_plain"]

_SAMPLES = 128
_MEMORY = 1 << 30
"""Bytes that all samples together may need next; where they need more, fewer are looked at from there on."""
_DAMPING = 0.2
"""Share of its own second moment, and of the mean one, that each summand has in more."""


@dataclass(frozen=True)
class Turn:
    """A layer whose turn it is.

    node: Conv, ConvTranspose, Gemm or MatMul. bias: a constant of its own that is added to what it writes.
    rows: float64 [groups, rows, summands], its weight. moments: float64 [groups, summands, summands], of what
    it is multiplied with, about the mean where there is a bias; what samples lack is made up on the diagonal.
    missing: [groups, summands, rows], of the products of that with what its results lack. mean: of what it is
    multiplied with, [groups, summands, 1]. shift: of what its results lack, [groups, rows, 1].
    """

    node: ir.Node
    bias: ir.Value | None
    rows: np.ndarray
    moments: np.ndarray
    missing: np.ndarray
    mean: np.ndarray
    shift: np.ndarray

    @property
    def target(self) -> np.ndarray:
        """The weight, of the shape of `rows`, whose results are nearest to those of the whole model."""
        return np.asarray(
            self.rows + np.linalg.solve(damped(self.moments, _DAMPING), self.missing).swapaxes(1, 2)
        )

    def store(self, rows: np.ndarray) -> list[ir.Value | None]:
        """Give the layer this weight, and its bias the mean of what is missing then; the two constants."""
        value = self.node.inputs[1]
        old = constant_array(value)
        assert value is not None  # it has rows
        assert old is not None
        set_constant(value, from_rows(self.node, rows, old.shape))
        bias = constant_array(self.bias)
        if self.bias is not None and bias is not None:
            more = self.shift + (self.rows - rows) @ self.mean
            set_constant(self.bias, bias + more.reshape(bias.shape))
        return [value, self.bias]


def in_turn(
    model: ir.Model, nodes: Collection[ir.Node], samples: Sequence[Feeds], *, times: int = 1
) -> Iterator[Turn]:
    """The nodes in the order of the graph; the caller changes their weights as they come.

    Args:
        model: its main graph holds the nodes.
        nodes: with rows (`windows.has_rows`) of floats.
        samples: complete feeds.
        times: as many positions of each layer are looked at as `moments.positions_of` says.
    """
    samples = [samples[number] for number in range(min(len(samples), _SAMPLES))]
    fronts = Front(model, samples), Front(clone(model), samples)
    place = {node: number for number, node in enumerate(model.graph)}
    for node in sorted(nodes, key=place.__getitem__):
        now, was = (front.at(place[node]) for front in fronts)
        yield _turn(node, place, now, was, times)


@dataclass
class Front:
    """How far samples have come through a model: what is needed from `start` on."""

    model: ir.Model
    states: Sequence[Mapping[str, Any]]
    start: int = 0
    order: list[ir.Node] = field(init=False)

    def __post_init__(self) -> None:
        self.order = list(self.model.graph)

    def at(self, end: int) -> Sequence[Mapping[str, Any]]:
        """All that the nodes from there on need; where that is no tensor, it is computed anew next time."""
        made = {value.name for node in self.order[self.start : end] for value in node.outputs}
        needed = needed_from(self.order, end, self.model.graph.outputs)
        wanted = [name for name in needed if name in made]
        if not wanted:
            return self.states
        given = {value.name or "" for value in self.model.graph.inputs}
        part = part_of(self.model, self.start, end, wanted, self.states[0])
        with open_session(part, level="none") as session:
            left, states, room = given.union(needed), list[Mapping[str, Any]](), _MEMORY
            for state in self.states:
                kept = {name: state[name] for name in state if name in left}
                states.append({**kept, **session.run(state)})
                room -= sum(getattr(value, "nbytes", 0) for value in states[-1].values())
                if room < 0:
                    break
        if all(isinstance(value, np.ndarray) for value in states[0].values()):
            self.states, self.start = states, end
        return states


def _turn(
    node: ir.Node,
    place: Mapping[ir.Node, int],
    now: Sequence[Mapping[str, np.ndarray]],
    was: Sequence[Mapping[str, np.ndarray]],
    times: int,
) -> Turn:
    array, source = constant_array(node.inputs[1]), node.inputs[0]
    assert array is not None  # it has rows
    assert source is not None
    rows = weight_rows(node, array.astype(np.float64))
    groups, height, summands = rows.shape
    most = times * positions_of(summands, len(now))
    plain = rows.swapaxes(1, 2).astype(np.float32)
    beside = beside_of(node, place)
    squares, products = np.zeros((groups, summands, summands)), np.zeros((groups, summands, height))
    mean, shift, positions = np.zeros((groups, summands, 1)), np.zeros((groups, height, 1)), 0
    bias, center = _bias(node, groups * height), np.zeros((groups, summands), np.float32)
    for states in zip(now, was, strict=True):
        here, there = (
            operand_rows(node, state[source.name or ""], array.shape[2:], most).astype(np.float32, copy=False)
            for state in states
        )
        if bias is not None and not positions and len(here):
            center = here.mean(0)  # about zero, the squares of what hardly varies are less than their errors
        read, lacks = (here - center).swapaxes(0, 1), (there - here).swapaxes(0, 1) @ plain
        if beside:
            added, wanted = (result_rows(node, state[beside], most) for state in states)
            lacks += (wanted - added).reshape(-1, groups, height).swapaxes(0, 1)
        squares += read.swapaxes(1, 2) @ read
        products += read.swapaxes(1, 2) @ lacks
        mean += read.sum(1, dtype=np.float64)[:, :, None]
        shift += lacks.sum(1, dtype=np.float64)[:, :, None]
        positions += read.shape[1]
    mean /= max(positions, 1)
    shift /= max(positions, 1)
    if bias is not None:
        squares -= positions * mean @ mean.swapaxes(1, 2)
        products -= positions * mean @ shift.swapaxes(1, 2)
    mean += center[:, :, None]
    own = squares * np.eye(summands)
    return Turn(node, bias, rows, squares + _DAMPING * own, products, mean, shift)


def is_plain(node: ir.Node) -> bool:
    """Whether what a layer writes is what it adds up, and its bias."""
    return node.op_type != "Gemm" or float_attr(node, "alpha", 1.0) == float_attr(node, "beta", 1.0) == 1


def _bias(node: ir.Node, size: int) -> ir.Value | None:
    """A bias that nobody else reads, of so many elements."""
    found = node.inputs[2] if len(node.inputs) > 2 else None
    if node.op_type == "MatMul":
        reader = sole_user(node.outputs[0])
        found = None
        if reader is not None and reader.op_type == "Add" and not reader.domain:
            found = next((one for one in reader.inputs if one is not node.outputs[0]), None)
    tensor = constant_of(found)
    if found is None or tensor is None or tensor.size != size or sizes_of(tensor)[-1:] != (size,):
        return None
    return found if read_once(found) and is_plain(node) else None


def beside_of(node: ir.Node, place: Mapping[ir.Node, int]) -> str:
    """The name of what is added to all that a layer writes, where that is known before; or nothing."""
    output = node.outputs[0]
    reader = sole_user(output)
    if reader is None or reader.op_type != "Add" or reader.domain or not is_plain(node):
        return ""
    other = next((value for value in reader.inputs if value is not output), None)
    maker = other.producer() if other is not None else None
    before = maker is not None and place.get(maker, len(place)) < place[node] and constant_of(other) is None
    known = other is not None and other.shape is not None and other.shape == output.shape
    return (other.name or "") if before and known and other is not None else ""
