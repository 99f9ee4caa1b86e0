"""Where a training runs: on which devices, and as which of the processes that `torchrun` started."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from onnxopt.errors import UsageError, one_line
from onnxopt.training.interpreter.module import GraphModule
from onnxopt.training.loop.sharding import shard
from onnxopt.training.seeds import seed_of

__all__ = ["World", "world"]

_PATIENCE = timedelta(days=1)
"""How long processes wait for the first one, which alone evaluates: torch gives up after 10 minutes (nccl) or
30 (gloo). Where a process ends, torchrun ends the others."""
Sample = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True)
class World:
    """This process among `size`, and its device.

    stages: devices that the graph is spread over, `device` first; empty: all is on `device`. sharded: each
    process keeps a part of every parameter only.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    stages: tuple[torch.device, ...] = ()
    sharded: bool = False

    @property
    def first(self) -> bool:
        """Whether this process evaluates and writes."""
        return self.rank == 0

    def place(self, module: nn.Module, sample: Sample) -> None:
        """Bring a module to where it runs; what is to be sharded waits on the CPU for that.

        sample: gives a batch of inputs.
        """
        if self.stages and isinstance(module, GraphModule):
            module.place(self.stages, sample())
        elif not self.sharded:
            module.to(self.device)

    def wrapped(self, module: nn.Module, sample: Sample) -> nn.Module:
        """The module that is called: of several processes, gradients become the mean over them."""
        if self.sharded and isinstance(module, GraphModule):
            return shard(module, self.device, sample())
        if self.size == 1:
            return module
        ids = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids, find_unused_parameters=True)

    def joined(self, forward: Any, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around a piece of a step: processes share gradients after the last one only."""
        if self.sharded:
            forward.set_requires_gradient_sync(last)
        alone = self.size == 1 or self.sharded or last
        return contextlib.nullcontext() if alone else forward.no_sync()

    def seed(self, *numbers: int) -> None:
        """Set the generators that operators draw from; `torch.manual_seed` costs a millisecond."""
        seed = seed_of(*numbers)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed_all(seed)

    def agreed(self, value: Any) -> Any:
        """What the first process has, in all of them."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def share(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gradients of what each process has whole, though others are sharded, become the mean."""
        for one in parameters if self.sharded else ():
            if one.grad is not None and not hasattr(one.grad, "full_tensor"):
                self.mean(one.grad)

    def __str__(self) -> str:
        return ",".join(map(str, self.stages or (self.device,)))


@contextmanager
def world(devices: str, sharded: bool = False) -> Iterator[World]:
    """The device, and the group of processes where torchrun (or the caller) made several.

    Args:
        devices: "auto" (a GPU, else the CPU), or as torch calls them: cpu, cuda, cuda:1, mps; xla is
            experimental. Several, as "cuda:0,cuda:1", share the graph of one process between them. Of several
            processes each has the GPU of its local rank.
        sharded: whether each of several processes keeps a part of every parameter only.

    Raises:
        UsageError: a device is not there, or the devices do not go with the processes.
    """
    found = [_device(one.strip()) for one in devices.split(",")]
    device = found[0]
    launched = dist.is_available() and (dist.is_torchelastic_launched() or dist.is_initialized())
    if sharded and (not launched or len(found) > 1):
        raise UsageError("shard: it takes several processes, of a device each: start them with torchrun")
    if not launched:
        yield World(device, stages=tuple(found) if len(found) > 1 else ())
        return
    if len(found) > 1 or device.type not in ("cpu", "cuda"):
        raise UsageError(f"devices {devices!r}: of several processes each takes cpu or cuda")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield World(device, dist.get_rank(), dist.get_world_size(), sharded=sharded)
        dist.barrier()  # a process that leaves first can hang the others
    finally:
        if ours:
            gc.collect()  # DDP: its reducer would end threads of gloo later, which wait for Python meanwhile
            dist.destroy_process_group()


def _device(name: str) -> torch.device:
    try:
        if name.startswith("xla"):
            import torch_xla

            found: torch.device = torch_xla.device()
            return found
        available = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(available if name == "auto" else name)
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # each backend has classes of its own
        raise UsageError(f"devices {name!r}: cannot be used here: {one_line(error)}") from None
    return device
