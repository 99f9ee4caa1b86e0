"""How good a model is, as a number; and how much of it may be lost.

A metric is called with a function that runs one feed through the candidate, so that it can also feed a
recurrent model its own state back. Higher is better; errors are negated.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from onnxopt.data import Feeds, python_target
from onnxopt.data.python import told
from onnxopt.errors import OnnxoptError, UsageError, did_you_mean
from onnxopt.verification.distance import Distance

__all__ = ["BUILTIN", "Budget", "Metric", "NoRowsError", "Run", "Split", "load_metric", "parse_drop"]

Run = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Runs a complete feed (input name -> array) through a model; gives output name -> array."""

Split = Literal["search", "final"]
"""Samples that decisions are made on, and those kept unseen for the last word."""

_MOST_DB = 150.0
"""More than float32 resolves: the SQNR of equal outputs."""
_SLACK = 1e-9
"""Relative rounding error of a difference of two scores that is forgiven."""


class NoRowsError(UsageError):
    """Agreement says nothing of outputs without rows."""


@dataclass(frozen=True)
class Metric:
    """A number for a model; higher is better.

    has_split: whether "search" and "final" are measured on different samples; where they are not, the
    final figure is not of unseen data.
    """

    name: str
    function: Callable[..., Any]
    has_split: bool

    def __call__(self, run: Run, split: Split = "search") -> float:
        """The score of the model that `run` runs.

        Raises:
            UsageError: the metric fails, or gives no number. What `run` raises comes through.
        """
        try:
            found = self.function(run, split=split) if self.has_split else self.function(run)
            score = float(found)
        except OnnxoptError:
            raise
        except (Exception, SystemExit) as error:  # the user's own code may raise anything
            raise UsageError(f"metric {self.name}: it failed: {told(error)}") from error
        if math.isnan(score):
            raise UsageError(f"metric {self.name}: it gives NaN; expected a number, higher is better")
        return score


def load_metric(
    spec: str | Callable[..., Any] | Metric,
    original: Run | None = None,
    samples: Sequence[Feeds] = (),
    final: Sequence[Feeds] = (),
) -> Metric:
    """The metric of that name.

    Args:
        spec: ``file.py:function``, ``module:function`` or a callable, called as ``metric(run)``, or as
            ``metric(run, split=...)`` where it has a parameter of that name; or a built-in one, which
            compares with the original: ``agreement`` is the share of rows with the same largest element
            (of outputs of other types than floats the share of equal elements), ``mse`` the mean squared
            error over all float outputs, negated, ``sqnr`` that of the worst float output in dB, 150 at most.
        original: runs the original; for built-in metrics.
        samples, final: what built-in metrics are measured on; without `final`, both splits are `samples`.

    Raises:
        UsageError: there is none, or it is built in and lacks the original or samples.
    """
    if isinstance(spec, Metric):
        return spec
    if callable(spec):
        return Metric(getattr(spec, "__name__", "metric"), spec, _takes_split(spec))
    if ":" in spec:
        function = python_target(spec)
        return Metric(spec, function, _takes_split(function))
    if spec not in BUILTIN:
        hint = did_you_mean(spec, BUILTIN)
        raise UsageError(f"unknown metric {spec!r}{hint}; or give file.py:function or module:function")
    if original is None or not len(samples):
        raise UsageError(f"metric {spec}: it compares with the original on samples; give some with --data")
    return Metric(spec, _Compared(BUILTIN[spec], original, samples, final), bool(len(final)))


@dataclass(frozen=True)
class Budget:
    """How much of a score may be lost: in the metric's own unit, or as a share of the score before.

    An infinite drop allows any score.
    """

    drop: float
    relative: bool = False

    def allows(self, before: float, after: float) -> bool:
        """Whether `after` is within the budget; rounding of the difference is forgiven."""
        limit = self.drop * abs(before) if self.relative else self.drop
        drop, slack = before - after, _SLACK * max(abs(before), abs(after))
        return after >= before or math.isinf(self.drop) or (math.isfinite(drop) and drop <= limit + slack)

    def __str__(self) -> str:
        if math.isinf(self.drop):
            return "anything"
        return f"{self.drop * 100:g}%" if self.relative else f"{self.drop:g}"


def parse_drop(text: str | float) -> Budget:
    """``0.005`` is absolute, ``1%`` relative. Raises UsageError unless it is a number of at least 0."""
    share = isinstance(text, str) and text.strip().endswith("%")
    try:
        number = float(str(text).strip().removesuffix("%"))
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise UsageError(f"--max-drop {text!r}: expected a drop such as 0.005, or 1% of the score before")
    return Budget(number / 100 if share else number, share)


@dataclass
class _Compared:
    """A figure of the distances between the candidate's outputs and the original's, by output."""

    figure: Callable[[Mapping[str, Distance]], float]
    original: Run
    samples: Sequence[Feeds]
    final: Sequence[Feeds]

    def __post_init__(self) -> None:
        self._references: dict[Split, list[dict[str, Any]]] = {}

    def __call__(self, run: Run, split: Split = "search") -> float:
        samples = self.final if split == "final" else self.samples
        if split not in self._references:
            self._references[split] = [self.original(feed) for feed in samples]
        distances: dict[str, Distance] = {}
        for feed, reference in zip(samples, self._references[split], strict=True):
            outputs = run(feed)
            for name, expected in reference.items():
                distances.setdefault(name, Distance()).add(expected, outputs.get(name))
        problems = [f"{name!r}: {why}" for name, one in distances.items() for why in one.problems]
        if problems:
            raise UsageError(f"the outputs cannot be compared with the original's: {problems[0]}")
        return self.figure(distances)


def _agreement(distances: Mapping[str, Distance]) -> float:
    counts = [
        (one.agreeing_rows, one.rows) if one.float_type else (one.elements - one.unequal, one.elements)
        for one in distances.values()
    ]
    rows = sum(count for _, count in counts)
    if not rows:
        raise NoRowsError("metric agreement: no output has rows of scores or labels; take sqnr or mse")
    return sum(agreeing for agreeing, _ in counts) / rows


def _floats(distances: Mapping[str, Distance]) -> list[Distance]:
    floats = [one for one in distances.values() if one.float_type]
    if not floats:
        raise UsageError("metric: no output is of floats; take agreement")
    return floats


def _mse(distances: Mapping[str, Distance]) -> float:
    floats = _floats(distances)
    if any(one.strays for one in floats):
        return -math.inf
    return -sum(one.noise for one in floats) / max(sum(one.elements - one.odd for one in floats), 1)


def _sqnr(distances: Mapping[str, Distance]) -> float:
    floats = _floats(distances)
    return float(np.clip(min(-math.inf if one.strays else one.sqnr for one in floats), -_MOST_DB, _MOST_DB))


BUILTIN: Mapping[str, Callable[[Mapping[str, Distance]], float]] = {
    "agreement": _agreement,
    "mse": _mse,
    "sqnr": _sqnr,
}
"""The metrics that come with onnxopt."""


def _takes_split(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some functions of C have none
        return False
    return any(one.name == "split" or one.kind == one.VAR_KEYWORD for one in parameters)
