"""What a proof says: frozen results that a report renders."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from onnxopt.claims import Kind

__all__ = ["Kind", "OutputVerdict", "Sight", "SliceVerdict", "Status", "Verdict", "margin"]

Status = Literal["proved", "measured", "failed", "unproved"]
Sight = Literal["compared", "constant", "zero", "empty", "not finite", "random"]


@dataclass(frozen=True)
class SliceVerdict:
    """The slice of an output that is nearest to its bound, in dB; inf is equal, or too little to judge."""

    name: str
    """As numpy writes it: ``[..., 5]`` or, along axis 1, ``[:, 5]``."""
    sqnr: float
    required: float

    @property
    def margin(self) -> float:
        return self.sqnr - self.required


@dataclass(frozen=True)
class OutputVerdict:
    """The comparison of one output over all samples, at the runtime's lowest optimization level.

    Of a lossy change, which has no bound here, at the default level, where it would run.

    `sqnr`, `floor` and `required` are in dB: inf is equal in every element, -inf not comparable. `floor` is
    what the runtime's own optimization levels make of the original; `required` is None for lossy changes and
    random outputs; `sqnr_default` is the SQNR at the runtime's default level, None where it was not measured.
    """

    name: str
    ok: bool
    sqnr: float
    floor: float
    required: float | None
    weakest: SliceVerdict | None
    """Along the last axis and axis 1, where a slice's error could drown in the whole."""
    sqnr_default: float | None
    max_error: float
    """Largest absolute error, relative to the largest absolute value of the original."""
    cosine: float | None
    top1: float | None
    """Rows with the same largest element, as a fraction; None where the output is no classifier's."""
    mismatch: float
    """Elements that are not equal, as a fraction."""
    sight: Sight
    """``compared``, or why equality says little: the same for all samples, all zero, and so on."""
    reason: str
    """What does not hold; empty when `ok`."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe: infinities and NaN are the strings ``"inf"``, ``"-inf"`` and ``"nan"``."""
        plain = {item.name: _plain(getattr(self, item.name)) for item in fields(self)}
        if self.weakest:
            plain["weakest"] = {key: _plain(value) for key, value in asdict(self.weakest).items()}
        return plain


@dataclass(frozen=True)
class Verdict:
    """The proof of one claim, `ok` when nothing speaks against it and something could have.

    `status` is *proved*; *measured* for a lossy change, which has a budget elsewhere; *failed*, where
    `reason` says what does not hold; or *unproved*, where `reason` says why nothing could be shown.
    """

    status: Status
    kind: Kind
    reason: str
    outputs: tuple[OutputVerdict, ...]
    runtime: str
    feeds: int
    """Samples that ran on both models; the one with large floats does not count."""
    shapes: int
    """Different sets of input shapes among them."""
    notes: tuple[str, ...]
    emulated: Verdict | None = None
    """The same claim on an emulated CPU, where that was asked for."""

    @property
    def ok(self) -> bool:
        return self.status in ("proved", "measured") and (self.emulated is None or self.emulated.ok)

    @property
    def worst(self) -> OutputVerdict | None:
        """The output nearest to its bound, or beyond it; outputs that are random do not count."""
        judged = [output for output in self.outputs if output.sight != "random"]
        return min(judged, key=margin, default=None)

    @property
    def sqnr(self) -> float | None:
        """dB of the worst output."""
        return self.worst.sqnr if self.worst else None

    @property
    def floor(self) -> float | None:
        """dB of the runtime's own noise on the worst output."""
        return self.worst.floor if self.worst else None

    @property
    def required(self) -> float | None:
        """dB that the worst output had to reach."""
        return self.worst.required if self.worst else None

    @property
    def summary(self) -> str:
        """One line: ``proved: SQNR 139 dB >= 100 dB on 6 feeds (2 shapes), onnxruntime 1.31.1 cpu``."""
        if self.reason:
            return f"{self.status}: {self.reason}"
        where = f"on {_count(self.feeds, 'feed')} ({_count(self.shapes, 'shape')}), {self.runtime}"
        return f"{self.status}: {self._figure()} {where}"

    def _figure(self) -> str:
        worst = self.worst
        if worst is None or worst.sqnr == math.inf:
            return "bit-equal"
        figure = f"SQNR {worst.sqnr:.0f} dB" if worst.sqnr > -math.inf else f"{worst.mismatch:.2%} differ"
        return figure if worst.required in (None, math.inf) else f"{figure} >= {worst.required:.0f} dB"

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe: infinities and NaN are the strings ``"inf"``, ``"-inf"`` and ``"nan"``."""
        return {
            "status": self.status,
            "ok": self.ok,
            "kind": self.kind,
            "reason": self.reason,
            "summary": self.summary,
            "sqnr": _plain(self.sqnr),
            "floor": _plain(self.floor),
            "required": _plain(self.required),
            "runtime": self.runtime,
            "feeds": self.feeds,
            "shapes": self.shapes,
            "outputs": [output.to_dict() for output in self.outputs],
            "notes": list(self.notes),
            "emulated": self.emulated and self.emulated.to_dict(),
        }


def margin(output: OutputVerdict) -> tuple[bool, float, float]:
    """Failed outputs first, then by the distance to the bound; equal outputs last."""
    if output.sqnr == math.inf or output.required in (None, math.inf):
        return output.ok, math.inf, output.sqnr
    return output.ok, output.sqnr - (output.required or 0.0), output.sqnr


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
