"""Pruning that looks at what weights are multiplied with, in calibration samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.calibration.moments import MOST_SUMMANDS, layers_with_moments
from onnxopt.calibration.windows import from_rows, has_rows, weight_rows
from onnxopt.data import Feeds
from onnxopt.graph import constant_of, int_attr
from onnxopt.pruning.levels import Reader
from onnxopt.pruning.oneshot import prune_rows
from onnxopt.pruning.saliency import Score
from onnxopt.pruning.successive import in_turn
from onnxopt.pruning.weights import StoredWeight

__all__ = ["by_input_norm", "make_up_for", "why_unseen"]


def why_unseen(model: ir.Model, weight: StoredWeight, *, whole: bool) -> str:
    """Why it cannot be told what a weight is multiplied with, in words that follow "the weight"; or nothing.

    whole: all second moments are needed, not the norms of single inputs alone.
    """
    if weight.levels is not None or not all(_is_seen(model, reader) for reader in weight.readers):
        return (
            "is not the second factor of a convolution, Gemm or MatMul of the main graph, in floating point"
        )
    if not whole:
        return ""
    if len(weight.readers) > 1:
        return "is read more than once, and obs makes up for one reader's loss"
    node = weight.readers[0].node
    summands = weight_rows(node, np.broadcast_to(np.float32(0), weight.shape)).shape[2]
    return f"adds up {summands} summands, more than {MOST_SUMMANDS}" if summands > MOST_SUMMANDS else ""


def _is_seen(model: ir.Model, reader: Reader) -> bool:
    node, position, between = reader
    source = node.inputs[0]
    fed = source is not None and constant_of(source) is None and not source.is_initializer()
    inside = fed and node.graph is model.graph and position == 1 and not between
    return inside and has_rows(node) and not int_attr(node, "transA", 0)


def by_input_norm(model: ir.Model, weights: Sequence[StoredWeight], samples: Sequence[Feeds]) -> Score:
    """The score of Wanda: |w| times the norm of what it is multiplied with, over all samples."""
    names = {reader.node: one.name for one in weights for reader in one.readers}
    seen: dict[str, list[tuple[ir.Node, np.ndarray]]] = {}
    for layer in layers_with_moments(model, list(names), samples, diagonal=True):
        seen.setdefault(names[layer.node], []).append((layer.node, layer.moments))

    def score(name: str, numbers: np.ndarray) -> np.ndarray:
        squares = np.zeros(numbers.shape, np.float32)
        for node, moments in seen[name]:
            groups, rows, summands = weight_rows(node, numbers).shape
            spread = np.broadcast_to(moments[:, None].astype(np.float32), (groups, rows, summands))
            squares += from_rows(node, spread, numbers.shape)
        return np.asarray(np.abs(numbers) * np.sqrt(squares))

    return score


def make_up_for(
    model: ir.Model,
    chosen: Mapping[StoredWeight, np.ndarray],
    samples: Sequence[Feeds],
    pattern: tuple[int, int] | None,
) -> None:
    """Give each weight as many zeros as were chosen, the rest making up for them, layer after layer.

    chosen: bool, the elements that go by magnitude.
    """
    by_node = {one.readers[0].node: one for one in chosen}
    for turn in in_turn(model, list(by_node), samples):
        weight = by_node[turn.node]
        places = None if pattern is None else _stretches(turn.rows.shape[2], weight.shape, pattern[1])
        gone = weight_rows(turn.node, chosen[weight])
        target = np.where(turn.rows == 0, 0, turn.target)
        turn.store(prune_rows(target, turn.moments, gone, places, pattern[0] if pattern else 0))


def _stretches(summands: int, shape: tuple[int, ...], length: int) -> np.ndarray:
    """The summands of each stretch of input channels, at each place of the kernel: [stretches, length]."""
    places = int(np.prod(shape[2:]))
    order = np.arange(summands).reshape(-1, places).T
    return np.pad(order, ((0, 0), (0, -order.shape[1] % length)), constant_values=-1).reshape(-1, length)
