"""Bounds, and what does not hold by them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnxopt.verification.distance import Distance
from onnxopt.verification.verdict import Kind, OutputVerdict, Sight, Status, margin

__all__ = ["conclude", "is_noise", "judge", "notes_on"]

_ENOUGH = 100.0
_SLACK = 6.0
_LEAST_FLOOR = 20.0
_MOST_MISMATCH = 0.05


def is_noise(floor: Distance) -> bool:
    """Whether the difference between the runtime's levels can be rounding, and so serve as a tolerance.

    Beyond 10 % of the signal, or 5 % of the elements of a type without SQNR, a level of the runtime computes
    something else: that forgives nothing.
    """
    if floor.problems:
        return False
    return floor.sqnr >= _LEAST_FLOOR if floor.float_type else floor.mismatch <= _MOST_MISMATCH


def judge(
    name: str,
    sight: Sight,
    kind: Kind,
    strict: bool,
    floor: Distance,
    low: Distance,
    high: Distance | None,
) -> OutputVerdict:
    """Judge one output by its distances at the runtime's lowest and default level (None: not measured).

    `strict` demands bit-equality at the lowest level. At the default level the runtime fuses two different
    graphs, each in its own way, so that no more than the bound of a reorder can be asked there, and nothing
    where it computes something else than at its lowest level (`is_noise`).
    """
    tolerated = floor if is_noise(floor) else Distance()
    bound = min(_ENOUGH, tolerated.sqnr - _SLACK)
    required = math.inf if strict else bound
    judged = kind != "lossy" and sight != "random"
    reason = next(iter(low.problems + (high.problems if high else [])), "")
    if judged and not reason:
        reason = _fault(low, required, Distance() if strict else tolerated)
    if judged and not reason and high and is_noise(floor):
        reason = _fault(high, bound, floor)
        reason += " at the runtime's default level" if reason else ""
    return OutputVerdict(
        name=name,
        ok=not reason,
        sqnr=low.sqnr,
        floor=floor.sqnr,
        required=required if judged else None,
        sqnr_default=high.sqnr if high else None,
        max_error=low.max_error,
        cosine=low.cosine,
        top1=low.top1,
        mismatch=low.mismatch,
        sight=sight,
        reason=reason,
    )


def _fault(found: Distance, required: float, floor: Distance) -> str:
    """What is wrong with a distance; types without SQNR may differ as often as the floor does."""
    if found.strays > floor.strays:
        return f"{found.strays} elements are NaN or infinite where the original's are not, or the reverse"
    if not found.float_type:
        return f"{found.mismatch:.2%} of the elements differ" if found.mismatch > floor.mismatch else ""
    if found.sqnr >= required:
        return ""
    needed = "bit-equality" if required == math.inf else f"{required:.0f} dB"
    return f"SQNR {found.sqnr:.1f} dB where {needed} is needed"


def conclude(kind: Kind, outputs: Sequence[OutputVerdict]) -> tuple[Status, str]:
    """The status of a whole comparison and its reason."""
    failed = [output for output in outputs if not output.ok]
    if failed:
        first = min(failed, key=margin)
        more = f" (and {len(failed) - 1} more outputs)" if len(failed) > 1 else ""
        return "failed", f"output {first.name!r}: {first.reason}{more}"
    if all(output.sight != "compared" for output in outputs):
        shown = ", ".join(f"{output.name!r} is {output.sight}" for output in outputs[:3])
        return "unproved", f"no output shows what the model does on these samples: {shown}"
    return ("measured" if kind == "lossy" else "proved"), ""


def notes_on(outputs: Sequence[OutputVerdict]) -> list[str]:
    """What passed and still must be said: elements that differ and have no SQNR."""
    return [
        f"output {output.name!r}: {output.mismatch:.2%} of the elements differ, no more than between the "
        "runtime's own levels"
        for output in outputs
        if output.ok and output.required is not None and output.mismatch and output.sqnr == -math.inf
    ]
