"""Where a training that went wrong did so: the first tensor that is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from onnxopt.errors import DivergedError

__all__ = ["diverged"]


def diverged(
    module: nn.Module,
    forward: nn.Module,
    step: int,
    loss: float,
    trained: Mapping[str, nn.Parameter],
    arrays: Mapping[str, Tensor],
) -> DivergedError:
    """The error that names the step and the culprit; the module is not to be used any more.

    forward: what is called in its place. trained: parameters, with the gradients of the step. arrays: inputs
    and labels of its last piece.
    """
    where = _first(dict(module.named_parameters())) or _first(arrays)
    if where is None:
        where = _hidden(module, forward, arrays)
    if where is None:
        where = _first(
            {f"gradient of {name}": one.grad for name, one in trained.items() if one.grad is not None}
        )
    where = where or ("the norm of the gradients" if math.isfinite(loss) else "the loss")
    hint = "take a lower lr, or clip_norm" if step > 1 else "look at the data and the weights"
    return DivergedError(f"train: step {step}: the loss is {loss:g}; first not finite: {where}; {hint}")


def _hidden(module: nn.Module, forward: nn.Module, arrays: Mapping[str, Tensor]) -> str | None:
    """The first tensor in the order of the graph, or the first output of a module that shows no others."""
    names: list[str] = list(getattr(module, "hidden", ()))
    if names:
        module.expose(*names)  # type: ignore[operator]
    with torch.no_grad():
        outputs = forward({name: arrays[name] for name in module.input_names})  # type: ignore[union-attr]
    return _first({name: outputs[name] for name in (*names, *outputs)})


def _first(tensors: Mapping[str, Tensor]) -> str | None:
    for name, one in tensors.items():
        if isinstance(one, Tensor) and one.is_floating_point() and not one.isfinite().all():
            return repr(name)
    return None
