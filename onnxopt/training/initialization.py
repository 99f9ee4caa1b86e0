"""New values for parameters, by name: layers that are to learn from nothing."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import torch
from torch import Tensor, nn

from onnxopt.errors import UsageError
from onnxopt.graph import int_attr, walk
from onnxopt.recipe import parse_spelled
from onnxopt.training.seeds import seed_of

__all__ = ["SCHEMES", "initialize"]


@dataclass(frozen=True)
class Scheme:
    """Fills a weight [out, in, ...] in place. axes: what it is for has so many at least."""

    axes: ClassVar[int] = 0

    def fill(self, weight: Tensor, random: torch.Generator) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Kaiming(Scheme):
    """Normal, of variance 2 / fan_in (1502.01852); where `uniform`, of the same variance."""

    axes = 2
    uniform: bool = False

    def fill(self, weight: Tensor, random: torch.Generator) -> None:
        draw = nn.init.kaiming_uniform_ if self.uniform else nn.init.kaiming_normal_
        draw(weight, nonlinearity="relu", generator=random)


@dataclass(frozen=True)
class Xavier(Scheme):
    """Normal, of variance 2 / (fan_in + fan_out) (Glorot 2010); where `uniform`, of the same variance."""

    axes = 2
    uniform: bool = False

    def fill(self, weight: Tensor, random: torch.Generator) -> None:
        draw = nn.init.xavier_uniform_ if self.uniform else nn.init.xavier_normal_
        draw(weight, generator=random)


@dataclass(frozen=True)
class Orthogonal(Scheme):
    """A (semi-)orthogonal matrix times `gain` (1312.6120)."""

    axes = 2
    gain: float = 1.0

    def fill(self, weight: Tensor, random: torch.Generator) -> None:
        nn.init.orthogonal_(weight, self.gain, generator=random)


@dataclass(frozen=True)
class Normal(Scheme):
    std: float = 0.02

    def fill(self, weight: Tensor, random: torch.Generator) -> None:
        weight.normal_(0, self.std, generator=random)


@dataclass(frozen=True)
class Constant(Scheme):
    value: float = 0.0

    def fill(self, weight: Tensor, random: torch.Generator) -> None:
        weight.fill_(self.value)


SCHEMES: Mapping[str, Callable[..., Scheme]] = {
    "constant": Constant,
    "kaiming": Kaiming,
    "normal": Normal,
    "ones": lambda: Constant(1.0),
    "orthogonal": Orthogonal,
    "xavier": Xavier,
    "zeros": Constant,
}


def initialize(module: nn.Module, model: ir.Model, specs: Sequence[str], seed: int) -> None:
    """Give parameters new values: "fc.*=kaiming" and the like, the last that fits counts.

    Vectors, such as biases, that a scheme is not for stay as they are where it fits other parameters, too.
    Weights that stand [in, out, ...] in the model are filled as their transpose. Each parameter has its own
    random numbers, of `seed` and its position.

    Raises:
        UsageError: it cannot be read, fits nothing, or a scheme needs more axes than a parameter has.
    """
    rules = []
    named = dict(module.named_parameters())
    for spec in specs:
        pattern, equals, text = spec.partition("=")
        if not equals:
            raise UsageError(f"init {spec!r}: expected PATTERN=SCHEME, such as fc.*=kaiming")
        fitting = [name for name in named if fnmatch.fnmatchcase(name, pattern)]
        if not fitting:
            raise UsageError(
                f"init: no parameter is called {pattern!r}; some are {', '.join(list(named)[:4])}"
            )
        scheme = parse_spelled(text, SCHEMES, "scheme")
        rules.append(([name for name in fitting if named[name].ndim >= scheme.axes] or fitting, scheme))
    turned = _turned(model) if rules else set()
    for number, (name, parameter) in enumerate(named.items()):
        schemes = [scheme for names, scheme in rules if name in names]
        if not schemes:
            continue
        random = torch.Generator(parameter.device).manual_seed(seed_of(seed, number))
        weight = parameter.detach()
        try:
            schemes[-1].fill(weight.transpose(0, 1) if name in turned else weight, random)
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"init: parameter {name!r} of shape {list(parameter.shape)}: {error}") from None


def _turned(model: ir.Model) -> set[str]:
    """Names of weights whose first axis is that of what goes in."""
    found = set()
    for node in walk(model.graph):
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        inner = node.op_type in ("MatMul", "ConvTranspose")
        inner = inner or (node.op_type == "Gemm" and not int_attr(node, "transB", 0))
        if inner and weight is not None and weight.name:
            found.add(weight.name)
    return found
