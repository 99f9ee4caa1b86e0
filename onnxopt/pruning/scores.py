"""How much each channel matters: the larger its score, the more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.calibration.moments import layers_with_moments
from onnxopt.data import Feeds
from onnxopt.errors import UsageError, did_you_mean
from onnxopt.evaluation import known_array
from onnxopt.graph import constant_array, int_attr, walk
from onnxopt.pruning.damage import damage, readers_of
from onnxopt.pruning.structure import Group, Structure

__all__ = ["SCORES", "Score", "score_channels"]

Score = Callable[[Structure, Group], np.ndarray]
"""A number for each channel of a group, in its order: float [channels]; -inf: it goes before all others."""

_LARGEST = 1 << 31
"""Bytes of a weight that is looked at."""


def score_channels(
    structure: Structure,
    score: str | Score,
    *,
    seed: int = 0,
    model: ir.Model | None = None,
    samples: Sequence[Feeds] = (),
    fixed: Sequence[bool] | None = None,
) -> tuple[np.ndarray, ...]:
    """The scores of each group's channels, float64; all groups are compared by them but those that are fixed.

    Norms of weights, and scales, are divided by their mean in the group: weights of a layer can be scaled at
    will where a normalisation or the next layer scales back, so that they only say what channels are to
    others of their group; so is the energy of activations. `obs` and `energy` need a model and samples: the
    share of what its readers write that is lost with a channel, over the root of its multiply-accumulates;
    the mean square of what its readers multiply with.

    Raises:
        UsageError: there is no such score, it needs samples, or a function gives none for some channel.
    """
    of = _prepared(structure, score, seed, model, samples)
    found = []
    for group, stays in zip(structure.groups, fixed or [False] * len(structure.groups), strict=True):
        numbers = np.zeros(len(group.channels)) if stays else np.asarray(of(group), np.float64)
        if numbers.shape != group.channels.shape or not (numbers < np.inf).all():
            raise UsageError(
                f"prune-channels: group {group.name!r}: expected {len(group.channels)} finite scores, "
                f"found shape {numbers.shape}, {int((numbers < np.inf).sum())} of them such"
            )
        found.append(numbers)
    return tuple(found)


def _prepared(
    structure: Structure, score: str | Score, seed: int, model: ir.Model | None, samples: Sequence[Feeds]
) -> Callable[[Group], np.ndarray]:
    """What scores a group."""
    if not isinstance(score, str):
        return lambda group: score(structure, group)
    if score in SCORES:
        return SCORES[score](structure, seed)
    every = (*SCORES, *_ON_SAMPLES)
    if score not in _ON_SAMPLES:
        raise UsageError(f"prune-channels: unknown score {score!r}{did_you_mean(score, every)}")
    if model is None or not len(samples):
        raise UsageError(f"prune-channels: {score} looks at what channels carry: give samples")
    return _ON_SAMPLES[score](structure, model, samples)


def _relative(numbers: np.ndarray) -> np.ndarray:
    mean = numbers.mean() if numbers.size else 0.0
    return np.asarray(numbers / mean if mean > 0 else np.ones_like(numbers))


def _by_norm(order: int) -> Callable[[Structure, int], Callable[[Group], np.ndarray]]:
    """The norm of all weights that write a channel; of several layers, of each by its own mean, added."""

    def prepare(structure: Structure, _: int) -> Callable[[Group], np.ndarray]:
        count, opset = len(structure.solution.pinned), structure.scope.opset
        total = np.zeros(count)
        for layer in structure.elements.layers:
            value = layer.node.inputs[layer.weight]
            channels = structure.channels_of(value, layer.writes)
            array = known_array(value, opset, _LARGEST)
            if array is None or not len(channels):
                continue
            rest = tuple(axis for axis in range(array.ndim) if axis != layer.writes % array.ndim)
            powers = (np.abs(array.astype(np.float64)) ** order).sum(rest)
            norms = np.bincount(channels, powers, count) ** (1 / order)
            mean = norms[np.unique(channels)].mean()
            total += norms / mean if mean > 0 else norms
        return lambda group: _relative(total[group.channels])

    return prepare


def _by_gamma(structure: Structure, _: int) -> Callable[[Group], np.ndarray]:
    """The scale that BatchNormalization gives a channel."""
    total = np.zeros(len(structure.solution.pinned))
    for node in walk(structure.scope.graph):
        if node.op_type == "BatchNormalization" and not node.domain:
            channels, scale = structure.channels_of(node.inputs[1], 0), constant_array(node.inputs[1])
            if scale is not None and len(channels):
                total += np.bincount(channels, np.abs(scale.astype(np.float64)), len(total))

    def of(group: Group) -> np.ndarray:
        found = total[group.channels]
        if not found.any():
            raise UsageError(
                f"prune-channels: group {group.name!r} has no BatchNormalization to score by; "
                "take another score, keep its layers, or prune before they are folded"
            )
        return _relative(found)

    return of


def _by_chance(_: Structure, seed: int) -> Callable[[Group], np.ndarray]:
    rng = np.random.default_rng(seed)
    return lambda group: rng.random(len(group.channels))


def _by_damage(
    structure: Structure, model: ir.Model, samples: Sequence[Feeds]
) -> Callable[[Group], np.ndarray]:
    """What the readers of a channel lose with it, over the root of what it costs.

    Where no reader can tell, its share of the squares of the weights that write the group.
    """
    readers, macs, norms = readers_of(model, structure, samples), structure.macs(), _by_norm(2)(structure, 0)

    def of(group: Group) -> np.ndarray:
        squares = norms(group) ** 2
        known = readers.get(group.name)
        found = damage(known, len(squares)) if known else squares / squares.sum()
        gone = np.zeros(len(structure.solution.pinned), bool)
        gone[group.channels[0]] = True
        saved = max(1 - structure.macs(gone) / macs, 1e-12) if macs else 1.0
        return np.asarray(found / saved**0.5)

    return of


def _by_energy(
    structure: Structure, model: ir.Model, samples: Sequence[Feeds]
) -> Callable[[Group], np.ndarray]:
    """The mean square of a channel where layers read it; of several, of each by its own mean, added."""
    total = np.zeros(len(structure.solution.pinned))
    reads = {one.node: one for one in structure.elements.contractions if one.index == 0}
    nodes = [node for node in reads if node.graph is model.graph and not int_attr(node, "transA", 0)]
    for layer in layers_with_moments(model, nodes, samples, diagonal=True):
        channels = structure.channels_of(layer.node.inputs[0], reads[layer.node].axis)
        if len(channels):
            squares = layer.moments.reshape(len(channels), -1).sum(1)
            total += np.bincount(channels, _relative(squares), len(total))
    return lambda group: _relative(total[group.channels])


SCORES: dict[str, Callable[[Structure, int], Callable[[Group], np.ndarray]]] = {
    "bn-gamma": _by_gamma,
    "l1": _by_norm(1),
    "l2": _by_norm(2),
    "random": _by_chance,
}
"""Name -> what scores the groups of a model, given a seed."""

_ON_SAMPLES = {"energy": _by_energy, "obs": _by_damage}
"""Name -> the same, given the model and samples of what it reads."""
