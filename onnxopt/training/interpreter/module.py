"""An ONNX graph as a torch module: same names, same numbers, and gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from onnxopt.errors import UsageError, did_you_mean
from onnxopt.model import ModelLike, load
from onnxopt.training.interpreter.build import Builder
from onnxopt.training.interpreter.frozen import frozen_part, unknown_nodes
from onnxopt.training.interpreter.logits import Logits, final_logits
from onnxopt.training.interpreter.preparation import initial, prepare
from onnxopt.training.interpreter.stages import Stage, hold_at, moved, run_stages, staged
from onnxopt.training.interpreter.state import Options, State, Tying, collect
from onnxopt.training.interpreter.statistics import Batches, Follows, followed
from onnxopt.training.interpreter.values import deliver, receive, whole

__all__ = ["GraphModule", "to_torch"]


def to_torch(
    model: ModelLike,
    *,
    trainable: Sequence[str] | None = None,
    expose: Sequence[str] = (),
    batch_statistics: Follows = False,
    tied: Tying = "auto",
    outputs: Sequence[str] | None = None,
) -> GraphModule:
    """The model as an ordinary `nn.Module`.

    Args:
        model: a path, bytes, `ModelProto` or `ir.Model`; it is not changed.
        trainable: patterns (`*`, `?`) of the names of constants to be parameters; by default all floats
            that an operator reads as its weights. Everything else is a buffer.
        expose: hidden tensors that are outputs as well.
        batch_statistics: BatchNormalization uses the statistics of the batch while the module is in training
            mode, and follows them with its own; by default its statistics are constants. "union": of the
            batches of all processes of `torch.distributed`, as SyncBatchNorm of torch.
        tied: what stays one parameter of what several nodes read: "auto" all but tensors that hold one
            number all over, which exporters share because they are equal before training; "all"; "none".
        outputs: the graph outputs that are computed; by default all.

    Raises:
        ModelError: not a model, or an operator that cannot be computed here.
        UsageError: an exposed tensor, or a pattern, that the model does not have, or statistics that cannot
            follow the batch.
    """
    chosen = None if outputs is None else tuple(outputs)
    options = Options(None if trainable is None else tuple(trainable), tied, chosen)
    module = GraphModule(prepare(load(model), options), options, batch_statistics, expose)
    module.expose(*expose)
    return module


class GraphModule(nn.Module):
    """An ONNX graph. Made by `to_torch`.

    The keys of `state_dict` are the ONNX names. Where one cannot be a torch name (an empty part between two
    dots, an attribute of `nn.Module`, the name of a parent of another) underscores are added; `keys` has the
    key of each name. Parameters of 16 bits are held in 32, and rounded as they are read: steps are too small.
    """

    def __init__(
        self, graph: ir.Model, options: Options, batch_statistics: Follows = False, shown: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.options = options
        states = collect(graph, options)
        self.stages: tuple[Stage, ...] = ()
        self._anchor: torch.Tensor
        self.register_buffer("_anchor", torch.empty(0), persistent=False)
        initializers = graph.graph.initializers
        self._inputs = tuple(
            (value.name or "", value.dtype) for value in graph.graph.inputs if value.name not in initializers
        )
        self._outputs = [(value.name or "", value.dtype) for value in graph.graph.outputs]
        by_value = {state.value: state for state in states}
        builder = Builder(graph.graph.opset_imports, by_value, shown=shown)
        trained = {state.value for state in states if state.trainable}
        part = frozen_part(graph, unknown_nodes(graph.graph), trained)
        if part is not None:
            builder.add_frozen(part)
        self._plan = builder.build(graph.graph)
        self._named = builder.named()
        self._logits = final_logits(graph.graph)
        self.keys: dict[str, str] = {}
        self._owners: list[tuple[int, nn.Module, str]] = []
        self.halves: dict[int, torch.dtype] = {}
        for state in states:
            if state.value in builder.needed:
                self._hold(state, builder.needed[state.value])
        self.batches = Batches(union=batch_statistics == "union")
        self._following: list[int] = []
        if batch_statistics:
            values = followed(graph, [state.value for state in states], self.batches.union)
            self._following = [builder.needed[one] for one in values if one in builder.needed]
            self._plan.follow(self.batches)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The graph inputs, in order."""
        return tuple(name for name, _ in self._inputs)

    @property
    def device(self) -> torch.device:
        """Where outputs are, and inputs are expected."""
        return self._anchor.device

    @property
    def states(self) -> tuple[tuple[int, nn.Module, str], ...]:
        """Position in the plan, owner and attribute of each parameter and buffer."""
        return tuple(self._owners)

    @property
    def output_names(self) -> tuple[str, ...]:
        """What `forward` gives: the graph outputs, then the exposed tensors."""
        return tuple(name for name, _ in self._outputs)

    @property
    def hidden(self) -> tuple[str, ...]:
        """The tensors that `expose` takes, in the order in which they are computed."""
        return tuple(self._named)

    def forward(self, feeds: Mapping[str, Any] | None = None, /, **named: Any) -> dict[str, Any]:
        """Compute the outputs by name. Feeds: tensors (or numpy arrays) by the names of the graph inputs.

        Raises:
            UsageError: an input is missing.
        """
        values = self._values({**(feeds or {}), **named})
        if self.stages:
            run_stages(self.stages, values)
            found = [moved(values[i], self.device) for i in self._plan.outputs]
        else:
            found = self._plan.run(values, self._anchor)
        outputs = zip(self._outputs, found, strict=True)
        return {name: deliver(value, dtype, self._anchor) for (name, dtype), value in outputs}

    def _values(self, given: Mapping[str, Any]) -> list[Any]:
        """What the plan starts with: constants, states and inputs at their positions."""
        values: list[Any] = [None] * self._plan.size
        for slot, constant in self._plan.constants:
            values[slot] = constant
        for slot, owner, attribute in self._owners:
            values[slot] = getattr(owner, attribute)
        for slot, half in self.halves.items():
            values[slot] = values[slot].to(half)
        for slot, (name, dtype) in zip(self._plan.inputs, self._inputs, strict=True):
            if name not in given:
                raise UsageError(f"training: input {name!r} is not fed{did_you_mean(name, given)}")
            value = receive(given[name], dtype)
            values[slot] = value if isinstance(given[name], torch.Tensor) else moved(value, self.device)
        return values

    def split(self, devices: Sequence[torch.device], feeds: Mapping[str, Any]) -> None:
        """Cut the graph into `stages`, one for each device; states stay where they are.

        feeds: one batch, which is run through once on the CPU, where the module has to be, to see how much
        there is.
        """
        mode = self.training
        self.eval()
        trained = {slot: isinstance(getattr(owner, name), nn.Parameter) for slot, owner, name in self.states}
        self.stages = tuple(staged(self._plan, self._values(feeds), trained, devices))
        self.train(mode)

    def place(self, devices: Sequence[torch.device | str], feeds: Mapping[str, Any]) -> None:
        """Split the graph over devices, see `split`, and put states where the stage is that reads them.

        What several stages read is on the first, and so are inputs and outputs.

        Raises:
            UsageError: statistics that follow the batches are of nodes on several devices.
        """
        targets = [torch.device(one) for one in devices]
        self.split(targets, feeds)
        if any(len({one.device for one in self.readers(i)}) > 1 for i in self._following):
            raise UsageError("devices: statistics that nodes on several share cannot follow the batches")
        self._anchor = self._anchor.to(targets[0])
        for slot, owner, name in self.states:
            readers = self.readers(slot)
            hold_at(owner, name, readers[0].device if len(readers) == 1 else targets[0])

    def readers(self, slot: int) -> list[Stage]:
        """The stages that read the value at a position."""
        return [one for one in self.stages if slot in one.inputs]

    def expose(self, *names: str) -> None:
        """Make hidden tensors outputs as well.

        Raises:
            UsageError: the main graph has no such tensor.
        """
        for name in names:
            if name not in self._named:
                raise UsageError(f"training: there is no tensor {name!r}{did_you_mean(name, self._named)}")
            if name not in self.output_names:
                self._outputs.append((name, self._named[name][1]))
                self._plan.outputs += (self._named[name][0],)
        self._plan.finish()
        for stage in self.stages:
            stage.connect(self._plan)

    def logits_of(self, output: str, operator: str = "") -> Logits | None:
        """What the Softmax, LogSoftmax or Sigmoid that gives an output reads, exposed; None without one.

        operator: Softmax, of which LogSoftmax is one, or Sigmoid; empty: any.
        """
        found = self._logits.get(output)
        if found is None or operator not in ("", found.activation.removeprefix("Log")):
            return None
        self.expose(found.name)
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by ONNX name, as they are now."""
        held = zip(self.keys, self._owners, strict=True)
        return {name: whole(getattr(owner, attribute).detach()) for name, (_, owner, attribute) in held}

    def derive(self, name: str, owner: nn.Module, attribute: str) -> None:
        """Let a constant be what an attribute of a module is each time; that module becomes a part of this.

        `write_back` also writes a constant that the graph reads without this module holding it.
        """
        if name in self.keys:
            number = list(self.keys).index(name)
            slot, before, last = self._owners[number]
            delattr(before, last)
            before.add_module(last, owner)
            self._owners[number] = (slot, owner, attribute)
            return
        self.keys[name] = last = _free(self, name.replace(".", "_"), inner=False)
        self.add_module(last, owner)
        self._owners.append((self._plan.size, owner, attribute))
        self._plan.size += 1

    def train(self, mode: bool = True) -> GraphModule:
        """As of `nn.Module`; it matters to BatchNormalization with batch statistics only."""
        super().train(mode)
        self.batches.on = mode
        return self

    def _hold(self, state: State, slot: int) -> None:
        """Register a state under its name, split at the dots as torch wants it."""
        tensor = initial(state)
        owner: nn.Module = self
        *path, last = state.name.split(".")
        taken: list[str] = []
        for part in path:
            part = _free(owner, part, inner=True)
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            inner = owner._modules[part]
            assert inner is not None
            owner = inner
            taken.append(part)
        last = _free(owner, last, inner=False)
        if state.trainable:
            if tensor.dtype in (torch.float16, torch.bfloat16):
                self.halves[slot], tensor = tensor.dtype, tensor.float()
            owner.register_parameter(last, nn.Parameter(tensor))
        else:
            owner.register_buffer(last, tensor, persistent=tensor.is_floating_point())
        self.keys[state.name] = ".".join((*taken, last))
        self._owners.append((slot, owner, last))


def _free(owner: nn.Module, part: str, *, inner: bool) -> str:
    """The part, or what comes next to it that torch takes and nothing else has."""
    while not part or (hasattr(owner, part) and not (inner and part in owner._modules)):
        part += "_"
    return part
