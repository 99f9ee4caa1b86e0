"""Weights that make up for channels that are gone, by least squares on samples, layer after layer.

Sources: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", 2017, section 3.1 (what
layers of the cut model read, what those of the whole one write); the steps from the weights that are there
instead of from zero are those of ridge regression with a mean that is not zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.calibration.exposing import Slices
from onnxopt.calibration.windows import from_rows, has_rows, operand_rows, result_rows, weight_rows
from onnxopt.data import Feeds
from onnxopt.graph import constant_array, int_attr, use_count
from onnxopt.quantization.segments import needed_from, part_of
from onnxopt.runtimes import open_session

__all__ = ["reconstruct"]

_SAMPLES = 64
_PER_SUMMAND, _LEAST = 8, 8192
_MEMORY = 256 << 20
_RIDGE = 0.01


def reconstruct(
    model: ir.Model, whole: ir.Model, kept: Mapping[str, np.ndarray], samples: Sequence[Feeds]
) -> None:
    """Change weights and biases in place, so that layers write what they wrote before, as well as they can.

    Args:
        model: with channels cut.
        whole: as it was, with the same names.
        kept: name of a value -> which of its channels are left, bool [channels before].
        samples: complete feeds.
    """
    samples = [samples[number] for number in range(min(len(samples), _SAMPLES))]
    layers = [node for node in model.graph if _can_learn(node)]
    targets = _targets(whole, layers, kept, samples)
    order, start = list(model.graph), 0
    states: list[Mapping[str, np.ndarray]] = [dict(feeds) for feeds in samples]
    for end, node in enumerate(order):
        if node not in layers:
            continue
        name = node.inputs[0].name
        made = {value.name for one in order[start:end] for value in one.outputs}
        needed = dict.fromkeys([*needed_from(order, end, model.graph.outputs)])
        wanted = [one for one in needed if one in made]
        if wanted:
            piece = part_of(model, start, end, wanted, states[0])
            with open_session(piece, level="none") as session:
                written = [session.run(state) for state in states]
            kept_states = [{key: state[key] for key in needed if key not in made} for state in states]
            states = [
                {**one, **old, **new} for one, old, new in zip(samples, kept_states, written, strict=True)
            ]
            start = end
        _learn(node, [state[name] for state in states], targets[node.outputs[0].name])


def _can_learn(node: ir.Node) -> bool:
    if not has_rows(node) or int_attr(node, "transA", 0) or use_count(node.inputs[1]) > 1:
        return False
    return True


def _most(node: ir.Node, samples: int) -> int:
    summands = weight_rows(node, constant_array(node.inputs[1])).shape[2]
    return -(-max(_LEAST, _PER_SUMMAND * summands) // samples)


def _targets(whole, layers, kept, samples):
    names = {node.outputs[0].name: node for node in layers}
    found = {name: [] for name in names}
    slices = Slices(whole, list(names))
    for group in slices.groups(samples[0], _MEMORY):
        with slices.runner(group) as run:
            for feeds in samples:
                for name, array in run(feeds):
                    rows = result_rows(names[name], array, _most(names[name], len(samples)))
                    if name in kept:
                        rows = rows[:, kept[name]]
                    found[name].append(rows)
    return found


def _learn(node: ir.Node, operands, targets) -> None:
    array = constant_array(node.inputs[1])
    weight = weight_rows(node, array).astype(np.float64)
    most = _most(node, len(operands))
    x = (
        np.concatenate([operand_rows(node, one, array.shape[2:], most) for one in operands])
        .swapaxes(0, 1)
        .astype(np.float64)
    )
    y = np.concatenate(targets).astype(np.float64)
    groups, outs, summands = weight.shape
    y = y.reshape(len(y), groups, outs).swapaxes(0, 1)
    bias = constant_array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    b = np.zeros(groups * outs) if bias is None else bias.astype(np.float64)
    rest = y - x @ weight.swapaxes(1, 2) - b.reshape(groups, 1, outs)
    mx, mr = x.mean(1, keepdims=True), rest.mean(1, keepdims=True)
    xc, rc = x - mx, rest - mr
    gram = xc.swapaxes(1, 2) @ xc
    damp = _RIDGE * np.diagonal(gram, axis1=1, axis2=2).mean(1) + 1e-12
    delta = np.linalg.solve(gram + damp[:, None, None] * np.eye(summands), xc.swapaxes(1, 2) @ rc).swapaxes(
        1, 2
    )
    new = from_rows(node, weight + delta, array.shape).astype(array.dtype)
    shift = (mr - mx @ delta.swapaxes(1, 2)).reshape(-1)
    node.inputs[1].const_value = ir.Tensor(new, name=node.inputs[1].name)
    if node.op_type in ("Conv", "Gemm"):
        if bias is not None:
            node.inputs[2].const_value = ir.Tensor((b + shift).astype(array.dtype), name=node.inputs[2].name)
