"""Where a training runs: on which device, and as which of the processes that `torchrun` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from onnxopt.errors import UsageError, one_line

__all__ = ["World", "world"]


@dataclass(frozen=True)
class World:
    """This process among `size`, and its device."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process evaluates and writes."""
        return self.rank == 0

    def wrapped(self, module: nn.Module) -> nn.Module:
        """The module on the device; of several processes, gradients become the mean over them."""
        module = module.to(self.device)
        if self.size == 1:
            return module
        ids = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids, find_unused_parameters=True)

    def seed(self, seed: int) -> None:
        """Set the generators that operators draw from; `torch.manual_seed` costs a millisecond."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

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


@contextmanager
def world(devices: str) -> Iterator[World]:
    """The device, and the group of processes where torchrun (or the caller) made several.

    Args:
        devices: "auto" (a GPU, else the CPU), or as torch calls them: cpu, cuda, cuda:1, mps; xla is
            experimental. Of several processes each has the GPU of its local rank.

    Raises:
        UsageError: the device is not there.
    """
    device = _device(devices)
    launched = dist.is_available() and (dist.is_torchelastic_launched() or dist.is_initialized())
    if not launched:
        yield World(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(device, dist.get_rank(), dist.get_world_size())
        dist.barrier()  # a process that leaves first can hang the others
    finally:
        if ours:
            dist.destroy_process_group()


def _device(devices: str) -> torch.device:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if devices == "auto" else devices
    try:
        if name.startswith("xla"):
            import torch_xla

            found: torch.device = torch_xla.device()
            return found
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:  # each backend has classes of its own
        raise UsageError(f"devices {devices!r}: cannot be used here: {one_line(error)}") from None
    return device
