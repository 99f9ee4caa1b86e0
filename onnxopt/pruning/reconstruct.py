"""Weights that make up for channels that are gone, by least squares on samples, layer after layer.

Source: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", 2017, sections 3.1 and 3.3:
what a layer of the cut model reads is fitted to what it wrote in the whole one, and in front of an Add to
what the sum is to become. Ridge regression starts from the weights that are there, not from zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxopt.calibration.exposing import Slices
from onnxopt.calibration.moments import positions_of
from onnxopt.calibration.successive import Front, beside_of, is_plain
from onnxopt.calibration.windows import from_rows, has_rows, operand_rows, result_rows, weight_rows
from onnxopt.data import Feeds
from onnxopt.graph import (
    FLOATS,
    constant_array,
    constant_of,
    int_attr,
    read_once,
    set_constant,
    sizes_of,
    sole_user,
)
from onnxopt.pruning.cut import new_constant
from onnxopt.scope import scopes

__all__ = ["reconstruct"]

_SAMPLES = 64
"""Samples that are looked at."""
_MEMORY = 256 << 20
"""Bytes of what layers wrote that are exposed at once."""
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the mean square of what a layer reads; which, each layer tells by half of the samples."""


@dataclass(frozen=True)
class _Layer:
    """node: of the cut model. target: the value of the whole one that it is fitted to.

    beside: the value that is added to what the layer writes; empty where it is fitted to that itself.
    most: positions that are looked at in each sample.
    """

    node: ir.Node
    target: str
    beside: str
    most: int

    @property
    def source(self) -> str:
        """The name of what it reads."""
        value = self.node.inputs[0]
        return (value.name if value is not None else None) or ""


def reconstruct(
    model: ir.Model, whole: ir.Model, kept: Mapping[str, np.ndarray], samples: Sequence[Feeds]
) -> list[ir.Node]:
    """Change weights and biases in place, so that layers write what they wrote before, as well as they can.

    A Conv or Gemm without a bias gets one. Gives the nodes whose constants are others.

    Args:
        model: with channels cut.
        whole: as it was, with the same names.
        kept: name of what a layer writes -> which of its channels are left, bool [channels before].
        samples: complete feeds.
    """
    samples = [samples[number] for number in range(min(len(samples), _SAMPLES))]
    _add_biases(model, kept)
    place = {node: number for number, node in enumerate(model.graph)}
    layers = {node: _layer(node, place, len(samples)) for node in model.graph if _can_learn(node, kept)}
    targets, front = _targets(whole, list(layers.values()), kept, samples), Front(model, samples)
    for node, layer in layers.items():
        _learn(layer, front.at(place[node]), targets.pop(node.outputs[0].name or ""))
    return list(layers)


def _add_biases(model: ir.Model, kept: Mapping[str, np.ndarray]) -> None:
    scope = next(iter(scopes(model)))
    for node in list(model.graph):
        has_one = node.op_type == "MatMul" or (len(node.inputs) > 2 and node.inputs[2] is not None)
        weight = constant_array(node.inputs[1]) if not has_one and _can_learn(node, kept) else None
        if weight is not None:
            name = node.outputs[0].name or ""
            zeros = np.zeros(int(kept[name].sum()), weight.dtype)
            node.resize_inputs(3)
            node.replace_input_with(2, new_constant(scope, node, zeros, f"{name}/bias"))


def _can_learn(node: ir.Node, kept: Mapping[str, np.ndarray]) -> bool:
    """Whether a weight of the layer's own, in floating point, is summed up over all channels, and no more."""
    if not has_rows(node) or int_attr(node, "transA", 0) or int_attr(node, "group", 1) != 1:
        return False
    weight = node.inputs[1]
    if weight is None or not read_once(weight) or weight.dtype not in FLOATS or not is_plain(node):
        return False
    return (node.outputs[0].name or "") in kept


def _layer(node: ir.Node, place: Mapping[ir.Node, int], samples: int) -> _Layer:
    array = constant_array(node.inputs[1])
    assert array is not None
    most = positions_of(weight_rows(node, array).shape[2], samples)
    beside, reader = beside_of(node, place), sole_user(node.outputs[0])
    target = reader.outputs[0] if beside and reader is not None else node.outputs[0]
    return _Layer(node, target.name or "", beside, most)


def _targets(
    whole: ir.Model, layers: Sequence[_Layer], kept: Mapping[str, np.ndarray], samples: Sequence[Feeds]
) -> dict[str, list[np.ndarray]]:
    """What the layers are fitted to, by the name of their outputs: [positions, channels] of each sample."""
    wanted: dict[str, list[_Layer]] = {}
    for layer in layers:
        wanted.setdefault(layer.target, []).append(layer)
    found: dict[str, list[np.ndarray]] = {layer.node.outputs[0].name or "": [] for layer in layers}
    slices = Slices(whole, list(wanted))
    for group in slices.groups(samples[0], _MEMORY):
        with slices.runner(group) as run:
            for feeds in samples:
                for name, array in run(feeds):
                    for layer in wanted[name]:
                        written = layer.node.outputs[0].name or ""
                        rows = result_rows(layer.node, array, layer.most)
                        found[written].append(rows[:, kept[written]])
    return found


def _learn(layer: _Layer, states: Sequence[Mapping[str, np.ndarray]], targets: Sequence[np.ndarray]) -> None:
    """Give a layer the weight, and the bias if it has one, that fit the targets best."""
    node, name = layer.node, layer.source
    value = node.inputs[1]
    array = constant_array(value)
    assert value is not None  # it has rows
    assert array is not None
    weight = weight_rows(node, array)[0].astype(np.float64)
    read = [operand_rows(node, one[name], array.shape[2:], layer.most)[:, 0] for one in states]
    x, y = np.concatenate(read), np.concatenate(targets[: len(states)])
    if layer.beside:
        y = y - np.concatenate([result_rows(node, one[layer.beside], layer.most) for one in states])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    held = constant_of(bias)
    own = bias is not None and read_once(bias)
    has_bias = own and held is not None and held.size == y.shape[1]
    mean, goal = (has_bias * rows.mean(0, dtype=np.float64) for rows in (x, y))
    x = x - mean.astype(x.dtype)
    missing = y - goal.astype(y.dtype) - x @ weight.T.astype(x.dtype)
    new = weight + _ridge(x, missing).T
    set_constant(value, from_rows(node, new[None], array.shape))
    if bias is not None and held is not None and has_bias:
        set_constant(bias, (goal - new @ mean).reshape(sizes_of(held)))


def _ridge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The solution of x @ solution = y, as regular as the second half of the rows asks for."""
    half = len(x) // 2
    seen, unseen = (_moments(x[part], y[part]) for part in (slice(half), slice(half, None)))
    values, vectors = np.linalg.eigh(seen[0])
    turned, best, chosen = vectors.T @ seen[1], 0.0, None
    for ridge in _RIDGES:
        delta = vectors @ (turned / (values.clip(0) + ridge * values.mean() + 1e-12)[:, None])
        gain = 2 * float((delta * unseen[1]).sum()) - float((delta * (unseen[0] @ delta)).sum())
        if gain > best:
            best, chosen = gain, ridge
    if chosen is None:
        return np.zeros((x.shape[1], y.shape[1]))
    gram, cross = seen[0] + unseen[0], seen[1] + unseen[1]
    return np.asarray(np.linalg.solve(gram + chosen * np.trace(gram) / len(gram) * np.eye(len(gram)), cross))


def _moments(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (x.T @ x).astype(np.float64), (x.T @ y).astype(np.float64)
