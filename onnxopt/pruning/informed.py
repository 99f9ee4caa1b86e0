"""Pruning that looks at what weights are multiplied with, in calibration samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
import onnx_ir as ir

from onnxopt.calibration.moments import MOST_SUMMANDS, layers_with_moments
from onnxopt.calibration.successive import in_turn
from onnxopt.calibration.windows import from_rows, has_rows, summands_of, weight_rows
from onnxopt.data import Feeds
from onnxopt.graph import constant_array, int_attr, read_once, set_constant
from onnxopt.pruning.cut import new_constant
from onnxopt.pruning.levels import Reader
from onnxopt.pruning.oneshot import prune_rows
from onnxopt.pruning.saliency import Score
from onnxopt.pruning.weights import StoredWeight
from onnxopt.quantization.branches import branches_of, samples_of, take_out
from onnxopt.scope import scopes

__all__ = ["Part", "among", "by_input_norm", "make_up_for", "parts_of", "why_unseen"]

_T = TypeVar("_T")


class Part(NamedTuple):
    """A graph that samples reach: as a model of its own, or the model of which it is the main graph."""

    graph: ir.Graph
    model: ir.Model
    samples: Sequence[Feeds]

    @property
    def twins(self) -> Mapping[ir.Node, ir.Node]:
        """The nodes of the model's main graph by those of the graph."""
        return dict(zip(self.graph, self.model.graph, strict=True))


@contextmanager
def parts_of(model: ir.Model, samples: Sequence[Feeds]) -> Iterator[list[Part]]:
    """The main graph, and the branches of If in it that samples run."""
    parts = [Part(model.graph, model, samples)]
    with ExitStack() as stack:
        for branch in branches_of(model) if samples else ():
            (own,) = stack.enter_context(samples_of(model, branch, samples))
            if own:
                parts.append(Part(branch.body_in(model), take_out(model, branch, own[0]), own))
        yield parts


def why_unseen(parts: Sequence[Part], weight: StoredWeight, *, whole: bool) -> str:
    """Why it cannot be told what a weight is multiplied with, in words that follow "the weight"; or nothing.

    whole: all second moments are needed, not the norms of single inputs alone.
    """
    if weight.levels is not None or not all(_is_seen(parts, reader) for reader in weight.readers):
        return "is no float second factor of a convolution, Gemm or MatMul that samples are known to reach"
    if not whole:
        return ""
    if len(weight.readers) > 1:
        return "is read more than once, and obs makes up for one reader's loss"
    node = weight.readers[0].node
    summands = summands_of(node)
    return f"adds up {summands} summands, more than {MOST_SUMMANDS}" if summands > MOST_SUMMANDS else ""


def _is_seen(parts: Sequence[Part], reader: Reader) -> bool:
    node, position, between = reader
    source = node.inputs[0]
    fed = source is not None and not source.is_initializer()
    inside = fed and any(node.graph is part.graph for part in parts) and position == 1 and not between
    return inside and has_rows(node) and not int_attr(node, "transA", 0)


def by_input_norm(parts: Sequence[Part], weights: Sequence[StoredWeight]) -> Score:
    """The score of Wanda: |w| times the norm of what it is multiplied with, over all samples."""
    seen: dict[str, list[tuple[ir.Node, np.ndarray]]] = {}
    for part, names in among(parts, {reader.node: one.name for one in weights for reader in one.readers}):
        for layer in layers_with_moments(part.model, list(names), part.samples, diagonal=True):
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
    parts: Sequence[Part], chosen: Mapping[StoredWeight, np.ndarray], pattern: tuple[int, int] | None
) -> None:
    """Give each weight as many zeros as were chosen, the rest making up for them, layer after layer.

    chosen: bool, the elements that go by magnitude.
    """
    for part, by_node in among(parts, {one.readers[0].node: one for one in chosen}):
        changed = set[ir.Value | None]()
        for turn in in_turn(part.model, list(by_node), part.samples):
            weight = by_node[turn.node]
            places = None if pattern is None else _stretches(turn.rows.shape[2], weight.shape, pattern[1])
            gone = weight_rows(turn.node, chosen[weight])
            target = np.where(turn.rows == 0, 0, turn.target)
            rows = prune_rows(target, turn.moments, gone, places, pattern[0] if pattern else 0)
            changed.update(turn.store(rows))
        for node, twin in part.twins.items():
            for place, (old, new) in enumerate(zip(node.inputs, twin.inputs, strict=True)):
                array = constant_array(new) if new in changed else None
                if old is None or old is new or array is None:
                    continue
                if read_once(old):
                    set_constant(old, array)
                else:  # of the graph outside, where others read it
                    scope = next(iter(scopes(parts[0].model)))
                    node.replace_input_with(place, new_constant(scope, node, array, old.name or ""))


def among(parts: Sequence[Part], found: Mapping[ir.Node, _T]) -> Iterator[tuple[Part, dict[ir.Node, _T]]]:
    """Of each part what is known of its nodes, by those of its model."""
    for part in parts:
        twins = part.twins
        inside = {twins[node]: one for node, one in found.items() if node in twins}
        if inside:
            yield part, inside


def _stretches(summands: int, shape: tuple[int, ...], length: int) -> np.ndarray:
    """The summands of each stretch of input channels, at each place of the kernel: [stretches, length]."""
    places = int(np.prod(shape[2:]))
    order = np.arange(summands).reshape(-1, places).T
    return np.pad(order, ((0, 0), (0, -order.shape[1] % length)), constant_values=-1).reshape(-1, length)
