"""What layers lose when channels that they read go, and the others make up for them as well as they can.

Source: Kurtic et al., "ZipLM: Inference-Aware Structured Pruning of Language Models", 2023, section 3.1:
optimal brain surgery for whole structures, one after the other, so that of two channels that can stand in for
each other only one goes for nothing. Covariances are shrunk to their diagonals where positions are few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxopt.calibration.moments import layers_with_moments
from onnxopt.calibration.windows import has_rows
from onnxopt.data import Feeds
from onnxopt.graph import int_attr
from onnxopt.pruning.structure import Group, Structure

__all__ = ["Reader", "damage", "readers_of"]

_DAMPING = 0.01
_STEPS = 64
"""Times that channels are chosen anew; with more channels than this, several go at a time."""


@dataclass
class Reader:
    """A layer that sums up over channels.

    weight: float64 [rows, summands], changed as channels go. inverse: of the damped covariance of what it is
    multiplied with, float64 [summands, summands]. energy: the variance of what it writes, over all rows.
    blocks: the summands of each channel, int64 [channels, width].
    """

    weight: np.ndarray
    inverse: np.ndarray
    energy: float
    blocks: np.ndarray

    def losses(self, channels: np.ndarray) -> np.ndarray:
        """The share of the energy that is lost with each of these channels alone."""
        blocks = self.blocks[channels]
        rows = self.weight[:, blocks].transpose(1, 2, 0)
        corners = self.inverse[blocks[:, :, None], blocks[:, None, :]]
        lost = (rows * np.linalg.solve(corners, rows)).sum((1, 2))
        return np.asarray(lost / self.energy)

    def remove(self, channels: np.ndarray) -> None:
        """Let channels go: the others make up for them."""
        gone = self.blocks[channels].ravel()
        across = self.inverse[gone]
        change = np.linalg.solve(across[:, gone], across)
        self.weight -= self.weight[:, gone] @ change
        self.inverse -= across.T @ change


def damage(readers: Sequence[Reader], count: int) -> np.ndarray:
    """What each channel costs when it goes after all cheaper ones, never less than those: float64 [channels].

    Args:
        readers: of the channels of a group, at least one; changed.
        count: the number of channels.
    """
    left, cost, least = np.arange(count), np.zeros(count), 0.0
    while len(left) > 1:
        losses = np.sum([reader.losses(left) for reader in readers], 0)
        order = np.argsort(losses, kind="stable")[: min(-(-count // _STEPS), len(left) - 1)]
        cost[left[order]] = np.maximum.accumulate(np.maximum(losses[order], least))
        least = float(cost[left[order[-1]]])
        for reader in readers:
            reader.remove(left[order])
        left = np.delete(left, order)
    cost[left] = 2 * max(least, 1.0)
    return cost


def readers_of(model: ir.Model, structure: Structure, samples: Sequence[Feeds]) -> Mapping[str, list[Reader]]:
    """Name of a group -> the layers that sum up over its channels."""
    by_node = {one.node: one for one in structure.elements.layers if one.weight == 1}
    nodes = [
        node
        for node in by_node
        if node.graph is model.graph
        and has_rows(node)
        and int_attr(node, "group", 1) == 1
        and not int_attr(node, "transA", 0)
    ]
    found: dict[str, list[Reader]] = {}
    for layer in layers_with_moments(model, nodes, samples):
        channels = structure.channels_of(layer.node.inputs[1], by_node[layer.node].reads)
        covariance = layer.covariance[0]
        energy = float(((layer.weight[0] @ covariance) * layer.weight[0]).sum())
        spread = np.diagonal(covariance)
        if energy <= 0 or spread.max() <= 0:
            continue
        unsure = len(spread) / (len(spread) + int(layer.positions))
        shrunk = (1 - unsure) * covariance + np.diag(unsure * spread + _DAMPING * spread.mean())
        inverse = np.linalg.inv(shrunk)
        for number in np.unique(structure.group_of[channels]).tolist():
            if number >= 0:
                group = structure.groups[number]
                blocks = _blocks(group, channels, len(covariance) // len(channels))
                reader = Reader(layer.weight[0].copy(), inverse.copy(), energy, blocks)
                found.setdefault(group.name, []).append(reader)
    return found


def _blocks(group: Group, channels: np.ndarray, places: int) -> np.ndarray:
    """The summands of each channel of a group in a layer that reads these channels."""
    order = np.argsort(channels, kind="stable")
    first = np.searchsorted(channels[order], group.channels)
    width = int((channels == group.channels[0]).sum())
    elements = order[first[:, None] + np.arange(width)]
    return np.asarray((elements[:, :, None] * places + np.arange(places)).reshape(len(elements), -1))
