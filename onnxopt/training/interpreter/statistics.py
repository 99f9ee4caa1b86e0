"""BatchNormalization by the statistics of the batch, which those of the model follow.

Source: Ioffe & Szegedy, "Batch Normalization", 2015 (1502.03167). As in torch the variance that is kept has
Bessel's correction, the one that the batch is divided by has not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
import torch
from torch import Tensor, nn

from onnxopt.errors import UsageError
from onnxopt.graph import int_attr, walk

__all__ = ["Batches", "Follows", "followed", "readers"]

Follows = bool | Literal["union"]
"""Whether BatchNormalization goes by the batch, or by those of all processes as one."""


@dataclass(eq=False)
class Batches:
    """What all nodes of a module that go by the batch are told.

    on: whether they do; else by what the model has. union: of the batches of all processes of
    `torch.distributed`, as one. counts: whether the samples of this process are among them. measured: where
    statistics become the mean over batches, how many samples each mean is of so far; else they move by the
    nodes' momentum. size: of the batch, for that.
    """

    on: bool = True
    union: bool = False
    counts: bool = True
    measured: dict[int, float] | None = None
    size: float = 1.0

    def normalize(self, x: Tensor, parts: Sequence[Tensor], epsilon: float, momentum: float) -> Tensor:
        """The batch normalized by itself; of scale, bias, mean and variance, (C,), the latter two follow.

        Where a channel has one value in all, there is nothing to measure: it goes by what there is.
        """
        mean, var = parts[2:]
        scale, bias = (one.to(mean.dtype) for one in parts[:2])
        share = 1 - momentum
        if x.numel() == x.shape[1] and not self.union:
            return nn.functional.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)
        if self.measured is not None:
            self.measured[id(mean)] = seen = self.measured.get(id(mean), 0.0) + self.size
            share = self.size / seen
        if self.union:
            return self._normalize_union(x, (scale, bias, mean, var), epsilon, share)
        return nn.functional.batch_norm(x, mean, var, scale, bias, True, share, epsilon)

    def _normalize_union(self, x: Tensor, parts: Sequence[Tensor], epsilon: float, share: float) -> Tensor:
        """The same of the batches of all; their second sum is of squared distances from the mean of all."""
        scale, bias, mean, var = parts
        over, channels = (0, *range(2, x.dim())), (-1, *[1] * (x.dim() - 2))
        wide = x.to(torch.promote_types(mean.dtype, torch.float32))
        own = wide.new_full((1,), x.numel() // x.shape[1])
        sums = _sum(torch.cat([wide.sum(over), own]) * self.counts)
        count, single = sums[-1], sums[-1] < 2
        middle = torch.where(single, mean, sums[:-1] / count)
        off = wide - middle.reshape(channels)
        spread = torch.where(single, var, _sum(off.square().sum(over) * self.counts) / count)
        with torch.no_grad():
            mean.lerp_(middle.to(mean.dtype), share)
            var.lerp_((spread * (count / (count - 1).clamp(min=1))).to(var.dtype), share)
        y = off * (scale * (spread + epsilon).rsqrt()).reshape(channels) + bias.reshape(channels)
        return y.to(x.dtype)


@torch.library.custom_op("onnxopt::sum_of_processes", mutates_args=())
def _sum(x: Tensor) -> Tensor:
    """The sum over all processes, of gradients, too: what one has goes into the losses of all."""
    total = x.clone()
    torch.distributed.all_reduce(total)
    return total


_sum.register_fake(torch.empty_like)
_sum.register_autograd(lambda _, gradient: _sum(gradient))


def followed(model: ir.Model, constants: Iterable[ir.Value], union: bool) -> list[ir.Value]:
    """The means and variances among the constants of a prepared model, which are to follow the batches.

    Nodes that share them share them further on: they follow the batches of both.

    Raises:
        UsageError: a mean or variance that is none, or that something else reads; for `union` a node in the
            body of another, which processes may run more or less often.
    """
    found = {value: tuple(readers(value)) for value in constants}
    read = {site: value for value, sites in found.items() for site in sites}
    values = []
    for node in walk(model.graph):
        if node.op_type != "BatchNormalization" or node.domain or int_attr(node, "training_mode", 0):
            continue
        if union and node.graph is not model.graph:
            raise UsageError(f"statistics: {node.name!r} is in a body: take frozen ones, or one process")
        for place in (3, 4):
            value = read.get((node, place))
            if value is None or {(user.op_type, at) for user, at in found[value]} != {(node.op_type, place)}:
                raise UsageError(
                    f"statistics: those of {node.name!r} are computed, or read elsewhere: take frozen ones"
                )
            values.append(value)
    return values


def readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The nodes that read a value, and where, also behind Identity."""
    for user, position in value.uses():
        if user.op_type == "Identity":
            yield from readers(user.outputs[0])
        else:
            yield user, position
