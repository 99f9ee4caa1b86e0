"""Optimizers, which parameters they train at which rate, their averages, and what keeps weights small."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from onnxopt.errors import UsageError
from onnxopt.recipe import parse_spelled
from onnxopt.training.interpreter.values import whole

__all__ = ["OPTIMIZERS", "Group", "averaged", "frozen", "make_optimizer", "penalize", "role_of"]


@dataclass(frozen=True)
class Optimizer:
    """The options of an optimizer of torch, under torch's names."""

    torch_class: ClassVar[Callable[..., torch.optim.Optimizer]]

    def over(self, groups: Sequence[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """The optimizer of these parameter groups."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return type(self).torch_class(groups, lr=lr, **options)


@dataclass(frozen=True)
class Sgd(Optimizer):
    torch_class = torch.optim.SGD
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False


@dataclass(frozen=True)
class Adagrad(Optimizer):
    torch_class = torch.optim.Adagrad
    lr_decay: float = 0.0
    eps: float = 1e-10


@dataclass(frozen=True)
class RmsProp(Optimizer):
    torch_class = torch.optim.RMSprop
    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False


@dataclass(frozen=True)
class Adam(Optimizer):
    torch_class = torch.optim.Adam
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False


@dataclass(frozen=True)
class AdamW(Optimizer):
    torch_class = torch.optim.AdamW
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False


OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {
    "adagrad": Adagrad,
    "adam": Adam,
    "adamw": AdamW,
    "rmsprop": RmsProp,
    "sgd": Sgd,
}


@dataclass(frozen=True)
class Group:
    """lr: times the learning rate. weight_decay: instead of the recipe's. relative: rates are shares.

    Relative rates are times the root mean square of each tensor at the start, as in Adafactor (1804.04235):
    once a BatchNormalization is folded, weights differ in size by orders of magnitude; steps of Adam do not.
    """

    lr: float = 1.0
    weight_decay: float | None = None
    relative: bool = False

    def __post_init__(self) -> None:
        if min(self.lr, self.weight_decay or 0) < 0:
            raise UsageError("groups: lr and weight_decay are at least 0")


_ROLES = ("weights", "norm-bias", "scales")


def role_of(parameter: nn.Parameter) -> str:
    """The group a parameter is in by itself: scales (which say so in `role`), weights, or norm-bias."""
    return str(getattr(parameter, "role", "weights" if parameter.ndim > 1 else "norm-bias"))


def frozen(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that one of the patterns fits. Raises UsageError for a pattern that fits none."""
    names = list(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UsageError(f"freeze: no parameter is called {pattern!r}; some are {', '.join(names[:4])}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    spec: str,
    *,
    lr: float,
    weight_decay: float,
    groups: Sequence[str],
) -> torch.optim.Optimizer:
    """The optimizer of that spelling over named parameters.

    Weight decay is for the role "weights" alone. `groups` change that, the first that fits counts: a role or
    a pattern of names, and the options of `Group`: "scales{lr=0.1}", "*.bias{lr=2,weight_decay=1e-4}".
    Each group of the optimizer has its factor of the learning rate as "factor"; a parameter that has a
    `rate` is trained at so much of it, unless rates are relative.

    Raises:
        UsageError: an unknown optimizer or option, or a group that nothing fits.
    """
    optimizer = parse_spelled(spec, OPTIMIZERS, "optimizer")
    asked = [_group(text) for text in groups]
    taken, found = dict[str, str](), dict[Group, list[nn.Parameter]]()
    for name, parameter in parameters.items():
        role = role_of(parameter)
        fits = (one for one in asked if one[0] == role or fnmatch.fnmatchcase(name, one[0]))
        taken[name], own = next(fits, ("", Group()))
        decay = own.weight_decay if own.weight_decay is not None else weight_decay * (role == "weights")
        size = float(whole(parameter.detach()).square().mean().sqrt()) if own.relative else 0.0
        rate = own.lr * (size or getattr(parameter, "rate", 1.0))
        found.setdefault(Group(rate, decay), []).append(parameter)
    for who, _ in asked:
        if who in taken.values() or who in _ROLES:
            continue
        fitting = [name for name in parameters if fnmatch.fnmatchcase(name, who)]
        if fitting:
            raise UsageError(f"groups: {taken[fitting[0]]!r} has taken all that {who!r} fits: put it behind")
        raise UsageError(f"groups: {who!r} is neither a role ({', '.join(_ROLES)}) nor fits a name")
    if not found:
        raise UsageError("train: nothing is left to train: every parameter is frozen, or there is none")
    try:
        return optimizer.over(
            [
                {"params": members, "weight_decay": group.weight_decay, "factor": group.lr}
                for group, members in found.items()
            ],
            lr,
        )
    except ValueError as error:
        raise UsageError(f"optimizer {spec}: {error}") from None


def _group(text: str) -> tuple[str, Group]:
    who, brace, options = text.partition("{")
    return who.strip(), parse_spelled(f"group{brace}{options}", {"group": Group}, "group")


@contextlib.contextmanager
def averaged(parameters: Iterable[nn.Parameter], ema: AveragedModel | None) -> Iterator[None]:
    """The moving averages in place of the parameters; without any nothing changes."""
    if ema is None:
        yield
        return
    members = list(parameters)
    own = [one.detach().clone() for one in members]
    with torch.no_grad():
        for one, mean in zip(members, ema.module.parameters(), strict=True):
            one.copy_(mean)
        yield
        for one, mine in zip(members, own, strict=True):
            one.copy_(mine)


@torch.no_grad()
def penalize(parameters: Iterable[nn.Parameter], l1: float, l2: float, device: torch.device) -> Tensor:
    """l1 sum |w| + l2/2 sum w^2 over the weights, on a device; its gradients are added to theirs."""
    total = torch.zeros((), device=device)
    for weight in parameters if l1 or l2 else ():
        if role_of(weight) != "weights":
            continue
        slope = l1 * weight.sign() + l2 * weight
        weight.grad = slope if weight.grad is None else weight.grad.add_(slope)
        value = l1 * weight.abs().sum() + l2 / 2 * weight.square().sum()
        total = total + whole(value).to(device)
    return total
