"""A plan in stages, each a run of consecutive steps: on a device of its own, or sharded as a group.

A node is never split: what is inside of If, Loop or a function goes with it. Stages follow one another, so
that several devices make room, not speed. They are balanced by what a training keeps for them: four times
their weights (gradient and two moments with them) and what they compute. Of cuts that are about as good,
those that the fewest bytes cross are taken.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from onnxopt.training.interpreter.graph import Plan, Step

__all__ = ["Stage", "cuts", "hold_at", "moved", "run_stages", "staged"]

_SLACK = 1.1
"""How much more than necessary the largest stage may hold where fewer bytes cross then."""
_KEPT = 4
"""Copies of a weight that a training holds: itself, its gradient, two moments of the optimizer."""


class Stage(nn.Module):
    """The steps `begin` to `end` of a plan, from the values they read to those that are read after them.

    kept: bytes that a training keeps for it. held: position -> attribute of this module, of states that no
    other stage reads and that it holds itself. halves: the type that it reads some of those as.
    """

    def __init__(self, plan: Plan, begin: int, end: int, device: torch.device, kept: int = 0) -> None:
        super().__init__()
        self.begin, self.end, self.device, self.kept = begin, end, device, kept
        self.held: dict[int, str] = {}
        self.halves: dict[int, torch.dtype] = {}
        self._anchor = torch.empty(0, device=device)
        self.connect(plan)

    def connect(self, plan: Plan) -> None:
        """Find what comes in and goes out, also after other outputs were asked of the plan."""
        steps, constants = plan.steps[self.begin : self.end], dict(plan.constants)
        later = {i for step in plan.steps[self.end :] for i in _reads(step)} | set(plan.outputs)
        read = dict.fromkeys(i for step in steps for i in _reads(step))
        made = dict.fromkeys(i for step in steps for i in step.outputs if i >= 0)
        self.names = tuple(step.name for step in steps)
        self.inputs = tuple(i for i in read if i not in made and i not in constants)
        self.spent = tuple(i for i in self.inputs if i not in later)
        known = [(i, constants[i]) for i in read if i in constants]
        outputs = tuple(i for i in made if i in later)
        self.plan = Plan(plan.size, self.inputs, outputs, constants=known, steps=steps)

    @property
    def summary(self) -> str:
        """``cuda:0: 120 steps to 'conv_7', about 45.2 MB; 2 tensors go on``"""
        size = f"{self.end - self.begin} steps to {self.names[-1]!r}, about {self.kept / 1e6:.3g} MB"
        return f"{self.device}: {size}; {len(self.plan.outputs)} tensors go on"

    def forward(self, given: Mapping[int, Any]) -> dict[int, Any]:
        """What later stages or the graph read, by position, of the inputs by position."""
        values: list[Any] = [None] * self.plan.size
        for i, one in self.plan.constants:
            values[i] = one
        for i, one in given.items():
            values[i] = moved(one, self.device)
        for i, name in self.held.items():
            one = getattr(self, name)
            values[i] = one.to(self.halves.get(i, one.dtype))
        return dict(zip(self.plan.outputs, self.plan.run(values, self._anchor), strict=True))


def run_stages(stages: Sequence[Stage], values: list[Any]) -> None:
    """Run all stages on values that hold the inputs and states; what is read no more is let go."""
    for stage in stages:
        found = stage({i: values[i] for i in stage.inputs if i not in stage.held})
        for i in stage.spent:
            values[i] = None
        for i, one in found.items():
            values[i] = one


def hold_at(owner: nn.Module, name: str, device: torch.device) -> None:
    """Bring a parameter, a buffer or what is computed in a module to a device."""
    if name in owner._parameters:
        parameter = owner._parameters[name]
        assert parameter is not None
        owner._parameters[name] = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
    elif name in owner._buffers:
        owner._buffers[name] = getattr(owner, name).to(device)
    else:
        owner.to(device)


def moved(value: Any, device: torch.device) -> Any:
    """A value on that device; what is on the host stays there."""
    if isinstance(value, list):
        return [moved(one, device) for one in value]
    return value.to(device) if isinstance(value, Tensor) else value


def staged(
    plan: Plan, values: list[Any], states: Mapping[int, bool], devices: Sequence[torch.device]
) -> list[Stage]:
    """As many stages as there are devices, or as many as there are steps.

    Args:
        plan: of the whole graph.
        values: of one batch, as `Plan.run` takes them; it is run through once, on the CPU.
        states: positions of what the module holds, and whether it is trained.
        devices: of the stages, in order.
    """
    size = {i: _bytes(one) for i, one in enumerate(values)}
    count, anchor = len(plan.steps), torch.empty(0)
    costs = []
    with torch.no_grad():
        for step in plan.steps:
            made = tuple(i for i in step.outputs if i >= 0)
            found = Plan(outputs=made, steps=[step]).run(values, anchor)
            size |= {i: _bytes(one) for i, one in zip(made, found, strict=True)}
            costs.append(sum(size[i] for i in made))
    first, last = dict[int, int](), dict[int, int]()
    for at, step in enumerate(plan.steps):
        for i in _reads(step):
            first.setdefault(i, at if i in states else -1)
            last[i] = at
        first |= dict.fromkeys(step.outputs, at)
    crossing = [0] * (count + 1)
    for i, at in last.items():
        crossing[first[i] + 1] += size.get(i, 0)
        crossing[at + 1] -= size.get(i, 0)
        if i in states:
            costs[first[i]] += size[i] * (_KEPT if states[i] else 1)
    starts = cuts(costs, list(accumulate(crossing)), len(devices))
    ends = pairwise((0, *starts, count))
    pairs = zip(ends, devices, strict=False)
    return [Stage(plan, a, b, device, sum(costs[a:b])) for (a, b), device in pairs]


def cuts(costs: Sequence[int], crossing: Sequence[int], count: int) -> list[int]:
    """Where `count` stages begin, but for the first: fewer where there are fewer steps.

    No stage costs more than 1.1 times what the largest one has to; of such cuts, those with the least sum of
    `crossing` (at each step, what is computed before it and read from it on).
    """
    total, steps = [0, *accumulate(costs)], len(costs)
    count = min(count, steps)
    limit = math.floor(_bottleneck(total, count) * _SLACK)
    least: list[float] = [0.0] + [math.inf] * steps  # by the steps so far: the bytes that cross
    begins: list[list[int]] = []
    for _ in range(count):
        heap: list[tuple[float, int]] = []
        now, begin = [math.inf] * (steps + 1), [0] * (steps + 1)
        for end in range(1, steps + 1):
            if least[end - 1] < math.inf:
                heapq.heappush(heap, (least[end - 1] + (crossing[end - 1] if end > 1 else 0), end - 1))
            while heap and total[end] - total[heap[0][1]] > limit:
                heapq.heappop(heap)
            if heap:
                now[end], begin[end] = heap[0]
        least = now
        begins.append(begin)
    found = [steps]
    for begin in reversed(begins):
        found.insert(0, begin[found[0]])
    return found[1:-1]


def _bottleneck(total: Sequence[int], count: int) -> int:
    """The least that the largest of `count` runs of costs can be, by the sums of costs so far."""
    low, high = 0, total[-1]
    while low < high:
        limit, at = (low + high) // 2, 0
        for _ in range(count):
            at = bisect_right(total, total[at] + limit) - 1
        low, high = (low, limit) if at == len(total) - 1 else (limit + 1, high)
    return low


def _reads(step: Step) -> list[int]:
    return [i for i in (*step.inputs, *step.captures) if i >= 0]


def _bytes(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_bytes, value))
    return value.nbytes if isinstance(value, Tensor) else 0
