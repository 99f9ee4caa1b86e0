"""What quantization adds to a training: learned scales, where they and the weights begin, when they stay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor

from onnxopt.errors import UsageError
from onnxopt.graph import FLOATS
from onnxopt.passes.shared.quantized import quantized_kind
from onnxopt.quantization.formats import INTEGERS
from onnxopt.training.interpreter.minifloat import LARGEST
from onnxopt.training.interpreter.module import GraphModule, to_torch
from onnxopt.training.interpreter.quantized import integers_of, reading
from onnxopt.training.interpreter.state import constants
from onnxopt.training.interpreter.values import tensor_of
from onnxopt.training.kinds import QatRecipe
from onnxopt.training.loop.hooks import Hook
from onnxopt.training.loop.optimizers import role_of
from onnxopt.training.samples.sizes import parse_sizes
from onnxopt.training.scales import LogScale, activations_of, learn_scales, scale_groups
from onnxopt.training.schedules import parse_schedule

if TYPE_CHECKING:
    from onnxopt.training.loop.trainer import Trainer

__all__ = ["Quantizers"]

_MOMENTUM = 0.9
"""Of the moving averages of what activations reach."""
_SMALL = 2.0**-5
"""The size of weights below which they are trained at a smaller rate: steps of Adam have one size for all,
and that of integers is in proportion to their weights. Folded into a first layer that reads bytes, a norm
leaves weights of thousandths."""
_ALIKE = 0.5
"""The share of its integers that a float weight gives, at least, that is taken for what they were made of."""


class Quantizers(Hook):
    """Learned scales, and weights that begin as the floats that their integers were made of."""

    def __init__(self, model: ir.Model, floats: ir.Model | None) -> None:
        self._model, self._floats = model, floats
        self._fixed: dict[str, Tensor] | None = None
        self.scales: dict[str, LogScale] = {}

    def start(self, trainer: Trainer) -> None:
        module, recipe = trainer.module, trainer.recipe
        assert isinstance(module, GraphModule)
        assert isinstance(recipe, QatRecipe)
        groups = scale_groups(self._model)
        self.scales = learn_scales(module, groups)
        if not self.scales:
            raise UsageError("qat: nothing is dequantized by a constant scale that could be learned")
        if self._floats is not None:
            _adopt(module, self._model, self._floats)
        for one in module.parameters():
            if role_of(one) == "weights":
                one.rate = _rate(one)  # type: ignore[attr-defined]  # what make_optimizer asks for
        if recipe.observe:
            self._observe(trainer, groups, recipe.observe)

    def epoch(self, trainer: Trainer, epoch: int) -> None:
        assert isinstance(trainer.recipe, QatRecipe)
        if trainer.recipe.scale_epochs and epoch >= trainer.recipe.scale_epochs:
            self._fixed = {name: one.log.detach().clone() for name, one in self.scales.items()}

    def stepped(self, trainer: Trainer) -> None:
        for name, fixed in (self._fixed or {}).items():
            self.scales[name].log.copy_(fixed)

    def _observe(self, trainer: Trainer, groups: Mapping[str, str], batches: int) -> None:
        """Set the scales of activations by moving averages of the least and the most that they reach."""
        watched = {
            name: found
            for name, found in activations_of(self._model, groups).items()
            if name in self.scales and self.scales[name].start.numel() == 1
        }
        module = to_torch(self._model).to(trainer.world.device).requires_grad_(False)
        module.expose(*(_source(node) for found in watched.values() for node in found))
        sizes = parse_sizes(trainer.recipe.batch_size, parse_schedule("constant"), trainer.recipe.seed)
        ranges: dict[str, Tensor] = {}
        for number, (_, pieces) in enumerate(trainer.data.batches(sizes, 0, 1)):
            if number == batches:
                break
            outputs = module({name: pieces[0].arrays[name] for name in module.input_names})
            for name, found in watched.items():
                ends = [torch.stack(outputs[_source(node)].aminmax()).float() for node in found]
                new = torch.stack(ends)
                now = torch.stack([new[:, 0].min(), new[:, 1].max()])
                ranges[name] = _MOMENTUM * ranges[name] + (1 - _MOMENTUM) * now if name in ranges else now
        for name, (low, high) in ranges.items():
            self.scales[name].start.fill_(_covering(watched[name][0], float(low), float(high)))


def _rate(weight: Tensor) -> float:
    """A power of two, so that few groups have all rates."""
    size = float(weight.detach().square().mean().sqrt()) / _SMALL
    return 2.0 ** max(math.floor(math.log2(size)), -10) if 0 < size < 1 else 1.0


def _source(node: ir.Node) -> str:
    value = node.inputs[0]
    return (value.name if value is not None else None) or ""


def _covering(quantizer: ir.Node, low: float, high: float) -> float:
    """The scale with which integers, or small floats, reach from low to high; the zero point is as it is."""
    value = quantizer.inputs[2] if len(quantizer.inputs) > 2 else None
    dtype = quantized_kind(quantizer) or ir.DataType.UINT8
    tensor = value.const_value if value is not None else None
    zero = float(tensor.numpy().reshape(-1)[0]) if tensor is not None else 0.0
    least, most = INTEGERS[dtype] if dtype in INTEGERS else (-LARGEST[dtype], LARGEST[dtype])
    return max(
        high / (most - zero) if most > zero else 0.0,
        low / (least - zero) if least < zero else 0.0,
        2.0**-100,
    )


def _adopt(module: GraphModule, model: ir.Model, floats: ir.Model) -> None:
    """Let integer weights begin as those of the float model, where these give the same integers."""
    known: dict[tuple[int, ...], list[Tensor]] = {}
    for _, value in constants(floats):
        tensor = value.const_value
        if tensor is not None and tensor.dtype in FLOATS:
            found = tensor_of(tensor.numpy(), tensor.dtype)
            known.setdefault(tuple(found.shape), []).append(found)
    held = module.tensors()
    for name, value in constants(model):
        one, tensor = reading(value), value.const_value
        if one is None or tensor is None or name not in held or tensor.dtype == ir.DataType.INT32:
            continue
        stored = tensor_of(tensor.numpy(), tensor.dtype)
        shares = [
            (float((integers_of(each, tensor.dtype, one, one.scale()) == stored).float().mean()), each)
            for each in known.get(tuple(stored.shape), ())
        ]
        share, best = max(shares, key=lambda pair: pair[0], default=(0.0, stored))
        if share >= _ALIKE and held[name].is_floating_point():
            alike = integers_of(best, tensor.dtype, one, one.scale()) == stored
            held[name].copy_(torch.where(alike, best, held[name]))
