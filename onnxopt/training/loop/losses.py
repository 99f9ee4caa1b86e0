"""What is minimized: a weighted sum of losses, each of one output and one label.

    cross-entropy
    0.7*kl{temperature=4}@logits=teacher+0.3*cross-entropy=y
    loss.py:focal

`@` names the output, by default the model's only float one; `=` the label, by default the only one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as nf
from torch import Tensor

from onnxopt.data import python_target
from onnxopt.data.python import names_target, told
from onnxopt.errors import OnnxoptError, UsageError, did_you_mean, one_line
from onnxopt.recipe import parse_spelled

__all__ = ["LOSSES", "Loss", "Objective", "Term", "parse_loss"]

_TERM = re.compile(
    r"(?:(?P<weight>[-+.\deE]+)\*)?(?P<loss>[\w-]+(?:\{[^}]*\})?)(?:@(?P<output>[^=]+))?(?:=(?P<label>.+))?"
)


@dataclass(frozen=True)
class Loss:
    """Called with an output of shape (N, ...) and its label; gives a loss for each sample, of shape (N,).

    looks_through: the operator at the end of a graph whose input is wanted in place of its output.
    """

    looks_through: ClassVar[str] = ""

    def __call__(self, y: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Of logits; the target is class indices, classes being the last axis or axis 1, or their probabilities.

    Elements of class `ignore` do not count. smoothing: the probability that is spread over all classes.
    """

    looks_through = "Softmax"
    smoothing: float = 0.0
    ignore: int = -100

    def __call__(self, y: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():
            _same("cross-entropy of probabilities (class indices are integers)", target.shape, y.shape)
            axis = 1 if y.ndim == 2 else y.ndim - 1
            y, target = y.movedim(axis, 1), target.to(y.dtype).movedim(axis, 1)
            return _rows(nf.cross_entropy(y, target, reduction="none", label_smoothing=self.smoothing))
        target = target.long()
        if target.shape == y.shape[:-1]:
            y = y.movedim(-1, 1)
        _same("cross-entropy", target.shape, (*y.shape[:1], *y.shape[2:]))
        each = nf.cross_entropy(
            y, target, ignore_index=self.ignore, reduction="none", label_smoothing=self.smoothing
        )
        counts = (target != self.ignore).reshape(len(y), -1).sum(1)
        return each.reshape(len(y), -1).sum(1) / counts.clamp(min=1)


@dataclass(frozen=True)
class Kl(Loss):
    """T^2 KL(target || output), both logits divided by the temperature T (1503.02531).

    target: "logits", or "probabilities" that are taken as they are. The last axis is that of the classes.
    """

    looks_through = "Softmax"
    temperature: float = 1.0
    target: Literal["logits", "probabilities"] = "logits"

    def __call__(self, y: Tensor, target: Tensor) -> Tensor:
        _same("kl", target.shape, y.shape)
        wanted = target if self.target == "probabilities" else (target / self.temperature).softmax(-1)
        found = (y / self.temperature).log_softmax(-1)
        return _rows(nf.kl_div(found, wanted, reduction="none").sum(-1)) * self.temperature**2


@dataclass(frozen=True)
class Bce(Loss):
    """Binary cross-entropy of logits; the target is probabilities of the same shape."""

    looks_through = "Sigmoid"

    def __call__(self, y: Tensor, target: Tensor) -> Tensor:
        target = target.to(y.dtype).reshape(y.shape) if target.numel() == y.numel() else target
        _same("bce", target.shape, y.shape)
        return _rows(nf.binary_cross_entropy_with_logits(y, target, reduction="none"))


@dataclass(frozen=True)
class Ctc(Loss):
    """Connectionist temporal classification: logits (N, time, classes), target (N, length), -1 where it ends.

    Divided by the length of the target, which takes a step in time for each class and one more between equal
    ones.
    """

    looks_through = "Softmax"
    blank: int = 0

    def __call__(self, y: Tensor, target: Tensor) -> Tensor:
        if y.ndim != 3 or target.ndim != 2 or target.is_floating_point():
            raise UsageError(
                "loss ctc: it takes outputs of samples, time and classes, and rows of integers as labels"
            )
        there = target >= 0
        if not ((target < y.shape[2]) & (target != self.blank)).all() or (there[:, 1:] > there[:, :-1]).any():
            raise UsageError(
                f"loss ctc: labels are classes from 0 to {y.shape[2] - 1} but the blank, {self.blank}, and "
                f"-1 after the last one; found {int(target.min())} to {int(target.max())}"
            )
        lengths = there.sum(1)
        least = lengths + (there & (target == target.roll(1, 1)))[:, 1:].sum(1)
        if (least > y.shape[1]).any():
            raise UsageError(
                f"loss ctc: a label of {int(lengths[least.argmax()])} classes takes {int(least.max())} steps "
                f"in time, the output has {y.shape[1]}: leave such samples out"
            )
        times = torch.full_like(lengths, y.shape[1])
        odds = y.log_softmax(-1).transpose(0, 1)
        each = nf.ctc_loss(odds, target.long().clamp(min=0), times, lengths, self.blank, reduction="none")
        return each / lengths.clamp(min=1)


@dataclass(frozen=True)
class Cosine(Loss):
    """1 - cos(output, target), all axes but the first in one vector."""

    def __call__(self, y: Tensor, target: Tensor) -> Tensor:
        _same("cosine", target.shape, y.shape)
        return 1 - nf.cosine_similarity(y.flatten(1), target.to(y.dtype).flatten(1), dim=1)


@dataclass(frozen=True)
class Elementwise(Loss):
    """The mean over the elements of a sample; the target has the output's shape."""

    function: ClassVar[Callable[..., Tensor]]

    def __call__(self, y: Tensor, target: Tensor) -> Tensor:
        target = target.to(y.dtype).reshape(y.shape) if target.numel() == y.numel() else target
        _same(type(self).__name__.lower(), target.shape, y.shape)
        return _rows(type(self).function(y, target, reduction="none"))


class Mse(Elementwise):
    """(output - target)^2"""

    function = nf.mse_loss


class L1(Elementwise):
    """|output - target|"""

    function = nf.l1_loss


LOSSES: Mapping[str, Callable[..., Loss]] = {
    "bce": Bce,
    "cosine": Cosine,
    "cross-entropy": CrossEntropy,
    "ctc": Ctc,
    "kl": Kl,
    "l1": L1,
    "mse": Mse,
}


@dataclass(frozen=True)
class Term:
    """One summand: a loss of an output, by its label; empty names stand for the only one."""

    weight: float
    loss: Loss
    output: str
    label: str


@dataclass(frozen=True)
class Objective:
    """The sum of terms, or a function of the user that is called with the outputs and all arrays by name."""

    terms: tuple[Term, ...]
    function: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor] | None = None

    def bound(self, outputs: Sequence[str], labels: Sequence[str], known: Sequence[str]) -> Objective:
        """The same with all names filled in: `outputs` are the float ones, `known` all arrays of the data."""
        return Objective(
            tuple(
                Term(
                    term.weight,
                    term.loss,
                    _only("output", term.output, outputs, outputs, "loss=cross-entropy@NAME names it"),
                    _only("label", term.label, labels, known, "labels=NAME says which array it is"),
                )
                for term in self.terms
            ),
            self.function,
        )

    def __call__(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        """The loss of each sample, (N,), or one for all of them."""
        if self.function is not None:
            return _asked(self.function, outputs, arrays)
        return torch.stack([_worked_out(term, outputs, arrays) for term in self.terms]).sum(0)


def _asked(
    function: Callable[..., Any], outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]
) -> Tensor:
    try:
        found = function(outputs, arrays)
    except Exception as error:  # the user's own code may raise anything
        raise UsageError(f"loss: the function failed: {told(error)}") from error
    if not isinstance(found, Tensor):
        raise UsageError(f"loss: the function gives a {type(found).__name__}; expected a tensor")
    return found


def _worked_out(term: Term, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
    y, target = outputs[term.output], arrays[term.label]
    try:
        return term.weight * term.loss(_float(y), target)
    except OnnxoptError:
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        shown = [f"{'x'.join(map(str, one.shape))} {one.dtype}".replace("torch.", "") for one in (y, target)]
        raise UsageError(
            f"loss: output {term.output!r} ({shown[0]}) and label {term.label!r} ({shown[1]}) do not go "
            f"together: {one_line(error)}"
        ) from error


def parse_loss(spec: str | Callable[..., Any]) -> Objective:
    """The objective of that spelling, or of a function: `file.py:function`, `module:function`, a callable.

    Raises:
        UsageError: it cannot be read, or names an unknown loss or option.
    """
    if callable(spec):
        return Objective((), spec)
    if names_target(spec):
        return Objective((), python_target(spec))
    terms = []
    for part in re.split(r"(?<!\d[eE])\+(?![^{]*\})", spec.replace(" ", "")):
        match = _TERM.fullmatch(part)
        if match is None:
            raise UsageError(f"loss {spec!r}: cannot read {part!r}: expected [weight*]name[@output][=label]")
        loss = parse_spelled(match["loss"], LOSSES, "loss")
        try:
            weight = float(match["weight"] or 1)
        except ValueError:
            raise UsageError(f"loss {spec!r}: {match['weight']!r} is no number") from None
        terms.append(Term(weight, loss, match["output"] or "", match["label"] or ""))
    return Objective(tuple(terms))


def _only(what: str, name: str, some: Sequence[str], known: Sequence[str], hint: str) -> str:
    if not name and len(some) == 1:
        return some[0]
    if what == "output" and not some:
        raise UsageError("loss: the model has no float output to learn with: cut what turns it into integers")
    if not name:
        raise UsageError(f"loss: {len(some)} possible {what}s ({', '.join(some) or 'none'}): {hint}")
    if name not in known:
        raise UsageError(f"loss: there is no {what} {name!r}{did_you_mean(name, known)}")
    return name


def _float(y: Tensor) -> Tensor:
    """Losses are worked out in 32 bits at least."""
    return y.float() if y.dtype in (torch.float16, torch.bfloat16) else y


def _rows(each: Tensor) -> Tensor:
    return each.reshape(len(each), -1).mean(1)


def _same(who: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(found) != tuple(wanted):
        shown = " x ".join(map(str, found)), " x ".join(map(str, wanted))
        raise UsageError(
            f"loss {who}: the label is {shown[0] or 'scalar'} where {shown[1]} goes with the output"
        )
