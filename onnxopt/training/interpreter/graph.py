"""A graph as a list of steps over numbered values: built once, run as often as asked.

Each step is one node (or a few that torch has one function for). A value that no later step reads is let go
at once: autograd keeps what it needs by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from onnxopt.training.interpreter.registry import Context, Operator
from onnxopt.training.interpreter.statistics import Batches
from onnxopt.training.interpreter.values import Host, numbers_of, on_host, to_device

__all__ = ["Body", "Plan", "Step"]


class Step:
    """One operator on numbered values; number -1 stands for a missing input."""

    def __init__(
        self,
        operator: Operator,
        options: Mapping[str, Any],
        ctx: Context,
        inputs: Sequence[int],
        outputs: Sequence[int],
        captures: Sequence[int],
        maybe_host: bool,
        name: str,
    ) -> None:
        self.operator, self.options, self.ctx, self.name = operator, dict(options), ctx, name
        self.inputs, self.outputs, self.captures = tuple(inputs), tuple(outputs), tuple(captures)
        self.plain = not (operator.static or operator.either or maybe_host or captures or operator.raw)
        self.free: tuple[int, ...] = ()
        self.bodies = any(isinstance(one, Body) for one in options.values())
        self.bind()

    def bind(self) -> None:
        """Put function and options together."""
        options = dict(self.options)
        if self.operator.wants_context:
            options["ctx"] = self.ctx
        self.run = functools.partial(self.operator.run, **options) if options else self.operator.run
        self.run_on_host = on_host(self.run, self.operator.static)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("run")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.bind()

    def __call__(self, values: list[Any], anchor: torch.Tensor) -> Any:
        """The outputs, of inputs some of which may be on the host. `anchor` is on the device to use."""
        args = [values[i] if i >= 0 else None for i in self.inputs]
        if self.operator.raw:
            if self.bodies:
                return self.run(*args, outer=[values[i] for i in self.captures], anchor=anchor)
            return self.run(*args)
        operator, static = self.operator, self.operator.static
        if operator.host and all(one is None or isinstance(one, Host) for one in args):
            return _brought(self.run_on_host(*args), anchor.device)
        device = next((one.device for one in args if isinstance(one, torch.Tensor)), anchor.device)
        given = [
            numbers_of(one)
            if i in static
            else to_device(one, device)
            if isinstance(one, Host) and i not in operator.either
            else one
            for i, one in enumerate(args)
        ]
        found = self.run(*given)
        return found if any(isinstance(one, torch.Tensor) for one in given) else _brought(found, device)


def _brought(found: Any, device: torch.device) -> Any:
    """Results of numbers alone, which are computed on the CPU, on a device."""
    if type(found) is tuple:  # a `Host` is one, too
        return tuple([_brought(one, device) for one in found])
    return found.to(device) if isinstance(found, torch.Tensor) else found


@dataclass
class Plan:
    """The steps of a graph. All numbers are positions in the list of values.

    constants: host values to start with. inputs, outputs: of the graph. captured: what a body reads of the
    graphs around it, in the order of its node's captures.
    """

    size: int = 0
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    captured: tuple[int, ...] = ()
    constants: list[tuple[int, Host]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def run(self, values: list[Any], anchor: torch.Tensor) -> list[Any]:
        """Run all steps on values that hold the inputs and constants; the outputs."""
        for step in self.steps:
            if step.plain:
                found = step.run(*[values[i] if i >= 0 else None for i in step.inputs])
            else:
                found = step(values, anchor)
            if len(step.outputs) == 1:
                values[step.outputs[0]] = found[0] if type(found) is tuple else found
            else:
                for i, one in zip(step.outputs, found, strict=False):
                    if i >= 0:
                        values[i] = one
            for i in step.free:
                values[i] = None
        return [values[i] for i in self.outputs]

    def follow(self, batches: Batches) -> None:
        """Let BatchNormalization, also in bodies, go by the statistics of the batch where it is told to."""
        for step in self.steps:
            for one in step.options.values():
                if isinstance(one, Body):
                    one.plan.follow(batches)
            if step.operator.key == "BatchNormalization" and not step.options.get("training_mode"):
                step.options["batches"] = batches
                step.bind()

    def finish(self) -> None:
        """Note after which step each value is read no more."""
        kept = {-1, *self.outputs, *self.captured, *(i for i, _ in self.constants)}
        for step in reversed(self.steps):
            used = dict.fromkeys((*step.inputs, *step.captures, *step.outputs))
            step.free = tuple(i for i in used if i not in kept)
            kept.update(used)


@dataclass(frozen=True)
class Body:
    """A graph in a node: of If, Loop, Scan or an operator that is given as a function."""

    plan: Plan

    def __call__(self, args: Sequence[Any], outer: Sequence[Any], anchor: torch.Tensor) -> list[Any]:
        """The outputs of the body for its own inputs and what it reads of the graphs around it."""
        values: list[Any] = [None] * self.plan.size
        for i, one in self.plan.constants:
            values[i] = one
        for i, one in zip(self.plan.captured, outer, strict=True):
            values[i] = one
        for i, one in zip(self.plan.inputs, args, strict=False):
            values[i] = one
        return self.plan.run(values, anchor)
