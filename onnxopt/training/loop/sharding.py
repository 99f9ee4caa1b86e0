"""A module whose parameters several processes share: each keeps a part of every one (FSDP2 of torch).

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2019
(1910.02054). The graph is cut into stages of about equal size; the parameters of a stage are put together
when it runs and let go after it, so that those of the next are on their way while it computes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from onnxopt.training.interpreter.module import GraphModule

__all__ = ["like_parts", "shard"]

_GROUPS = 8
"""Stages of a sharded graph: what is whole at a time is about two of them."""


class _Sharded(nn.Module):
    """What is called in the place of the module; it knows the stages, too."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__()
        self.module, self.stages = module, nn.ModuleList(module.stages)

    def forward(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        outputs: dict[str, Any] = self.module(feeds)
        return outputs


def shard(module: GraphModule, device: torch.device, feeds: Mapping[str, Any]) -> nn.Module:
    """Shard a module that is on the CPU; it keeps its names, its parameters become `DTensor` parts.

    What several stages read is put together for the whole step; numbers alone are not shared.

    Args:
        feeds: one batch of inputs.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # no operator writes in place
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    module.split([device] * _GROUPS, feeds)
    homes = []
    taken: set[nn.Parameter] = set()
    for slot, owner, name in module.states:
        readers, parameter = module.readers(slot), owner._parameters.get(name)
        if len(readers) == 1 and parameter is not None and parameter.ndim:
            stage, own = readers[0], f"state_{slot}"
            stage.register_parameter(own, parameter)
            stage.held[slot], stage.halves = own, module.halves
            homes.append((owner, name, stage, own))
    for stage in module.stages:
        fully_shard(stage, mesh=mesh)
    for owner, name, stage, own in homes:
        part = stage._parameters[own]
        assert part is not None
        owner._parameters[name] = part
        taken.add(part)
    for parameter in module.parameters():
        if not parameter.ndim:  # nothing to share
            parameter.data = parameter.data.to(device)
            taken.add(parameter)
    root = _Sharded(module)
    fully_shard(root, mesh=mesh, ignored_params=taken)
    return root


def like_parts(value: Any, like: Any) -> Any:
    """A whole tensor as the part of it that this process has of `like`; anything else as it is."""
    if not hasattr(like, "full_tensor") or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
