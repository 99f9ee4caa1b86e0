"""Samples for a graph: together, if it takes them so; what was traced with one has that size in Reshapes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onnxopt.errors import OnnxoptError
from onnxopt.training.interpreter.module import GraphModule
from onnxopt.training.interpreter.values import array_tensor
from onnxopt.training.samples.dataset import Batch, Dataset

__all__ = ["takes_batches", "tensors_of"]


def takes_batches(module: nn.Module, data: Dataset) -> bool:
    """Whether two samples at once give what they give one by one; asked of graphs made for one alone."""
    sizes = [item.dims[0] for item in data.contract.required if item.dims]
    if not data.stacks or 1 not in sizes or (data.length or 2) < 2:
        return True
    batch = next(data.evaluated(2))
    if batch.size < 2:
        return False  # they are of different sizes
    arrays = batch.arrays
    feeds = {name: array_tensor(arrays[name]) for name in module.input_names}  # type: ignore[union-attr]
    parts = [{name: one[i : i + 1] if one.ndim else one for name, one in feeds.items()} for i in range(2)]
    mode = module.training
    try:
        with torch.no_grad():
            both, *each = (module.eval()(one) for one in (feeds, *parts))
        return all(_alike(one, torch.cat([other[name] for other in each])) for name, one in both.items())
    except (OnnxoptError, RuntimeError, IndexError, TypeError, ValueError):
        return False
    finally:
        module.train(mode)


def tensors_of(piece: Batch, module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """What the module is going to run; a piece that does not count is in no statistics."""
    if isinstance(module, GraphModule):
        module.batches.counts = piece.size > 0
    return {name: array_tensor(array).to(device) for name, array in piece.arrays.items()}


def _alike(both: Tensor, each: Tensor) -> bool:
    """Up to the rounding of other orders of sums; integers may flip with that."""
    floats = both.shape == each.shape and both.is_floating_point()
    return bool((both - each).norm() <= 1e-2 * each.norm() + 1e-6) if floats else both.shape == each.shape
