"""Control flow, sequences and optional values. Sequences are lists; an empty optional is None."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from onnxopt.training.interpreter.graph import Body
from onnxopt.training.interpreter.registry import Operator, Table, op
from onnxopt.training.interpreter.values import Host, numbers_of, to_device

__all__ = ["TABLE"]


def _true(value: Any) -> bool:
    numbers = numbers_of(value)
    return numbers is None or bool(numbers[0])


def _tensor(value: Any, anchor: Tensor) -> Tensor:
    found = to_device(value, anchor.device) if isinstance(value, Host) else value
    assert isinstance(found, Tensor)
    return found


def _if(condition: Any, *, then_branch: Body, else_branch: Body, outer: Sequence[Any], anchor: Tensor) -> Any:
    return tuple((then_branch if _true(condition) else else_branch)((), outer, anchor))


def _loop(
    count: Any, condition: Any, *carried: Any, body: Body, outer: Sequence[Any], anchor: Tensor
) -> tuple[Any, ...]:
    most = numbers_of(count)
    going, number = _true(condition), 0
    state: Sequence[Any] = carried
    scans: list[list[Any]] = [[] for _ in body.plan.outputs[1 + len(carried) :]]
    while going and (most is None or number < most[0]):
        flags = (Host(torch.int64, (), (number,)), Host(torch.bool, (), (True,)))
        again, *found = body((*flags, *state), outer, anchor)
        state, going, number = found[: len(carried)], _true(again), number + 1
        for scan, one in zip(scans, found[len(carried) :], strict=True):
            scan.append(_tensor(one, anchor))
    stacked = (torch.stack(scan) if scan else torch.empty(0, device=anchor.device) for scan in scans)
    return (*state, *stacked)


def _scan(
    *values: Any,
    body: Body,
    num_scan_inputs: int,
    scan_input_axes: Sequence[int] | None = None,
    scan_input_directions: Sequence[int] | None = None,
    scan_output_axes: Sequence[int] | None = None,
    scan_output_directions: Sequence[int] | None = None,
    outer: Sequence[Any],
    anchor: Tensor,
) -> tuple[Any, ...]:
    kept = len(values) - num_scan_inputs
    state: Sequence[Any] = values[:kept]
    rows = []
    for i, one in enumerate(values[kept:]):
        slices = _tensor(one, anchor).unbind(scan_input_axes[i] if scan_input_axes else 0)
        rows.append(slices[::-1] if scan_input_directions and scan_input_directions[i] else slices)
    scans: list[list[Tensor]] = [[] for _ in body.plan.outputs[kept:]]
    for row in zip(*rows, strict=True):
        found = body((*state, *row), outer, anchor)
        state = found[:kept]
        for scan, one in zip(scans, found[kept:], strict=True):
            scan.append(_tensor(one, anchor))
    stacked = []
    for i, scan in enumerate(scans):
        backwards = scan_output_directions and scan_output_directions[i]
        axis = scan_output_axes[i] if scan_output_axes else 0
        stacked.append(torch.stack(scan[::-1] if backwards else scan, axis))
    return (*state, *stacked)


def _scan_batches(
    lengths: Any,
    *values: Any,
    body: Body,
    num_scan_inputs: int,
    directions: Sequence[int] | None = None,
    **near: Any,
) -> tuple[Any, ...]:
    """Before version 9 there was a batch axis in front, scanned one by one."""
    assert lengths is None, "lengths of sequences"
    anchor = near["anchor"]
    rows = zip(*[_tensor(one, anchor).unbind(0) for one in values], strict=True)
    found = [
        _scan(*row, body=body, num_scan_inputs=num_scan_inputs, scan_input_directions=directions, **near)
        for row in rows
    ]
    return tuple(torch.stack([_tensor(one, anchor) for one in group]) for group in zip(*found, strict=True))


def _insert(values: list[Any], one: Any, at: Any = None) -> list[Any]:
    found = list(values)
    found.insert(len(found) if at is None else int(_place(at, len(found) + 1)), one)
    return found


def _place(at: Any, size: int) -> int:
    numbers = numbers_of(at)
    assert numbers is not None
    return int(numbers[0]) % size


def _erase(values: list[Any], at: Any = None) -> list[Any]:
    gone = len(values) - 1 if at is None else _place(at, len(values))
    return [one for i, one in enumerate(values) if i != gone]


def _split_to_sequence(x: Any, split: Any = None, *, axis: int = 0, keepdims: int = 1) -> list[Tensor]:
    x = to_device(x) if isinstance(x, Host) else x
    sizes = numbers_of(split)
    if sizes is None:
        return [one if keepdims else one.squeeze(axis) for one in x.split(1, axis)]
    scalar = isinstance(split, Host | Tensor) and not tuple(split.shape)
    return list(x.split(int(sizes[0]) if scalar else [int(n) for n in sizes], axis))


def _concat_from_sequence(values: list[Any], *, axis: int, new_axis: int = 0) -> Tensor:
    tensors = [to_device(one) if isinstance(one, Host) else one for one in values]
    return torch.stack(tensors, axis) if new_axis else torch.cat(tensors, axis)


def _control(run: Any, since: int = 1) -> Operator:
    return op(run, raw=True, since=since)


def _has(value: Any = None) -> Host:
    return Host(torch.bool, (), (value is not None,))


def _map(first: list[Any], *others: Any, body: Body, outer: Sequence[Any], anchor: Tensor) -> tuple[Any, ...]:
    rows = []
    for i, one in enumerate(first):
        args = [one, *(other[i] if isinstance(other, list) else other for other in others)]
        rows.append(body(args, outer, anchor))
    return tuple(map(list, zip(*rows, strict=True)))


TABLE: Table = {
    "ConcatFromSequence": _control(_concat_from_sequence),
    "If": _control(_if),
    "Loop": _control(_loop),
    "Optional": _control(lambda value=None: value),
    "OptionalGetElement": _control(lambda value: value),
    "OptionalHasElement": _control(_has),
    "Scan": (_control(_scan_batches), _control(_scan, since=9)),
    "SequenceAt": _control(lambda values, at: values[_place(at, len(values))]),
    "SequenceConstruct": _control(lambda *values: list(values)),
    "SequenceEmpty": _control(list),
    "SequenceErase": _control(_erase),
    "SequenceInsert": _control(_insert),
    "SequenceLength": _control(lambda values: Host(torch.int64, (), (len(values),))),
    "SequenceMap": _control(_map),
    "SplitToSequence": _control(_split_to_sequence),
}
