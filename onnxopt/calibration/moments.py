"""Second moments of what layers multiply their weights with, in one pass over the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxopt.calibration.exposing import Slices
from onnxopt.calibration.windows import has_rows, operand_rows, weight_rows
from onnxopt.data import Feeds
from onnxopt.graph import constant_of, sizes_of
from onnxopt.model import reusable

__all__ = ["MOST_SUMMANDS", "Layer", "layers_with_moments", "positions_of"]

MOST_SUMMANDS = 2048
"""Layers that add up more have no moments: solving with them takes time by the third power."""
_MEMORY = 256 << 20
"""Bytes of moments that are gathered in one run of the samples, and of tensors exposed at once."""
_PER_SUMMAND, _LEAST = 4, 4096
"""Positions of a layer that are looked at, in all samples together."""
_TOGETHER = 256
"""Positions whose moments are added up in float32."""


@dataclass(frozen=True)
class Layer:
    """A Conv, Gemm or MatMul with a constant weight, and what it is multiplied with.

    weight: float64 [groups, channels of a group, summands]. shape: of the weight as it is stored. moments:
    float64 [groups, summands, summands], the sum of the outer products of what the weight is multiplied with;
    only the diagonals [groups, summands] where `diagonal`. sums: float64 [groups, summands], the sum of it.
    positions: int64 [], how many were added up.
    waiting: float32 [groups, positions, summands] of samples, whose moments are still to be added.
    """

    node: ir.Node
    weight: np.ndarray
    shape: tuple[int, ...]
    diagonal: bool = False
    moments: np.ndarray = field(init=False)
    sums: np.ndarray = field(init=False)
    positions: np.ndarray = field(init=False)
    waiting: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        groups, _, summands = self.weight.shape
        object.__setattr__(self, "moments", np.zeros((groups, summands) + (summands,) * (not self.diagonal)))
        object.__setattr__(self, "sums", np.zeros((groups, summands)))
        object.__setattr__(self, "positions", np.zeros((), np.int64))

    @property
    def mean(self) -> np.ndarray:
        """Of what the weight is multiplied with: float64 [groups, summands]."""
        mean: np.ndarray = self.sums / max(int(self.positions), 1)
        return mean

    @property
    def covariance(self) -> np.ndarray:
        """Of the same, times the positions: float64 [groups, summands, summands]."""
        covariance: np.ndarray = self.moments - self.sums[:, :, None] * self.mean[:, None]
        return covariance

    @property
    def source(self) -> str:
        """The name of the first operand."""
        operand = self.node.inputs[0]
        return (operand.name if operand is not None else None) or ""


def layers_with_moments(
    model: ir.Model,
    nodes: Sequence[ir.Node],
    samples: Sequence[Feeds],
    seen: Callable[[str, np.ndarray], np.ndarray] | None = None,
    *,
    diagonal: bool = False,
) -> Iterator[Layer]:
    """Those of the nodes that have rows (`windows.has_rows`) of at most 2048 floats, with their moments.

    Args:
        model: its main graph holds the nodes; not changed.
        nodes: which of them.
        samples: complete feeds.
        seen: what a layer sees of its first operand: from its name and float32 rows to rows; None: the rows.
        diagonal: only the mean squares of the summands, of layers of any size.

    Moments of at most 256 MB are held at once, and the samples run once for each such batch.
    """
    for batch in _batches(nodes, diagonal):
        layers = [_layer(node, diagonal) for node in batch]
        _add_moments(model, layers, samples, seen)
        yield from layers


def positions_of(summands: int, samples: int) -> int:
    """How many positions of each sample are looked at for a layer with so many summands."""
    return -(-max(_LEAST, _PER_SUMMAND * summands) // samples)


def _batches(nodes: Sequence[ir.Node], diagonal: bool) -> list[list[ir.Node]]:
    """The layers in batches whose moments fit the memory."""
    batches: list[list[ir.Node]] = [[]]
    filled = 0
    for node in nodes:
        weight = constant_of(node.inputs[1]) if has_rows(node) else None
        if weight is None or not weight.dtype.is_floating_point():
            continue
        groups, _, summands = weight_rows(node, np.broadcast_to(np.float32(0), sizes_of(weight))).shape
        if summands > MOST_SUMMANDS and not diagonal:
            continue
        size = weight.size * 8 if diagonal else groups * summands**2 * 8
        if batches[-1] and filled + size > _MEMORY:
            batches.append([])
            filled = 0
        batches[-1].append(node)
        filled += size
    return [batch for batch in batches if batch]


def _layer(node: ir.Node, diagonal: bool) -> Layer:
    tensor = constant_of(node.inputs[1])
    assert tensor is not None  # it has rows
    array = tensor.numpy().astype(np.float64)
    return Layer(node, weight_rows(node, array), array.shape, diagonal)


def _add_moments(
    model: ir.Model,
    layers: Sequence[Layer],
    samples: Sequence[Feeds],
    seen: Callable[[str, np.ndarray], np.ndarray] | None,
) -> None:
    readers: dict[str, list[Layer]] = {}
    for layer in layers:
        readers.setdefault(layer.source, []).append(layer)
    slices = Slices(reusable(model), list(readers))
    for group in slices.groups(samples[0], _MEMORY):
        with slices.runner(group) as run:
            for feeds in samples:
                for name, array in run(feeds):
                    for layer in readers[name]:
                        most = positions_of(layer.weight.shape[2], len(samples))
                        rows = operand_rows(layer.node, array, layer.shape[2:], most)
                        _add(layer, seen(name, rows) if seen else rows)
    for layer in layers:
        _add_waiting(layer)


def _add(layer: Layer, rows: np.ndarray) -> None:
    layer.waiting.append(rows.swapaxes(0, 1))
    if sum(one.shape[1] for one in layer.waiting) >= _TOGETHER:
        _add_waiting(layer)


def _add_waiting(layer: Layer) -> None:
    """Many rows at once take a fraction of the time of a sample's few."""
    if layer.waiting:
        rows = np.concatenate(layer.waiting, axis=1)
        squares = np.einsum("gps,gps->gs", rows, rows) if layer.diagonal else rows.swapaxes(1, 2) @ rows
        layer.moments[...] += squares
        layer.sums[...] += rows.sum(axis=1, dtype=np.float64)
        layer.positions[...] += rows.shape[1]
        layer.waiting.clear()
