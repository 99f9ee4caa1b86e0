"""Bounds, and what does not hold by them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxopt.verification.distance import Distance
from onnxopt.verification.verdict import Kind, OutputVerdict, Sight, SliceVerdict, Status, margin

__all__ = ["Noise", "blindness", "conclude", "is_noise", "judge", "notes_on"]

_ENOUGH = 100.0
_SLACK = 6.0
_LEAST_FLOOR = 20.0
_MOST_MISMATCH = 0.05
_SLICE_ENOUGH = 60.0
_SLICE_SLACK = 20.0
"""The noise of a few numbers is a sample of few: twice as large or a third says little, ten times much."""


@dataclass(frozen=True)
class Noise:
    """What rounding makes of one output of the original, on one group of samples.

    `levels`: the runtime's default optimization level against its lowest. `nudges`: inputs moved by a
    rounding against the inputs as they are.
    """

    levels: Distance
    nudges: Distance


def is_noise(floor: Distance) -> bool:
    """Whether a difference the original makes of itself can be rounding, and so serve as a tolerance.

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
    noise: Noise,
    low: Distance,
    high: Distance | None,
    *,
    rough: bool = False,
    stretched: bool = False,
    quantized: bool = False,
) -> OutputVerdict:
    """Judge one output by its distances at the runtime's lowest and default level (None: not measured).

    `strict` demands bit-equality at the lowest level. At the default level the runtime fuses two different
    graphs, each in its own way, so that no more than the bound of a reorder can be asked there, and nothing
    where it computes something else than at its lowest level (`is_noise`), nor of a `quantized` model: there
    the two differ in which nodes became integer kernels, and one flipped rounding spreads. On `rough` ground
    the nudges count for the whole as they do for slices: with large inputs a function may be ill-conditioned,
    a sine of thousands, and 16-bit floats are rounded where the runtime puts its Casts.
    """
    floor = noise.levels
    tolerated = [floor] if is_noise(floor) else []
    nudges = [noise.nudges] if rough and is_noise(noise.nudges) else []
    bound = min([_ENOUGH, *(one.sqnr - _SLACK for one in tolerated + nudges)])
    required = math.inf if strict else bound
    judged = kind != "lossy" and sight != "random" and (not stretched or is_noise(noise.nudges))
    slices = _weakest(low, [*tolerated, noise.nudges])
    reason = next(iter(low.problems + (high.problems if high else [])), "")
    if judged and not reason:
        reason = _fault(low, required, [] if strict else tolerated + nudges) or _slice_fault(name, slices)
    if judged and not reason and high and is_noise(floor) and not quantized:
        reason = _fault(high, bound, tolerated + nudges) or _slice_fault(
            name, _weakest(high, [*tolerated, noise.nudges])
        )
        reason += " at the runtime's default level" if reason else ""
    return OutputVerdict(
        name=name,
        ok=not reason,
        sqnr=low.sqnr,
        floor=floor.sqnr,
        required=required if judged else None,
        weakest=slices,
        sqnr_default=high.sqnr if high else None,
        max_error=low.max_error,
        cosine=low.cosine,
        top1=low.top1,
        mismatch=low.mismatch,
        sight=sight,
        reason=reason,
    )


def _fault(found: Distance, required: float, floors: Sequence[Distance]) -> str:
    """What is wrong with a distance; types without SQNR may differ as often as the floors do."""
    if found.strays > max((floor.strays for floor in floors), default=0):
        return f"{found.strays} elements are NaN or infinite where the original's are not, or the reverse"
    if not found.float_type:
        tolerated = max((floor.mismatch for floor in floors), default=0.0)
        return f"{found.mismatch:.2%} of the elements differ" if found.mismatch > tolerated else ""
    if found.sqnr >= required:
        return ""
    needed = "bit-equality" if required == math.inf else f"{required:.0f} dB"
    return f"SQNR {found.sqnr:.1f} dB where {needed} is needed"


def _weakest(found: Distance, floors: Sequence[Distance]) -> SliceVerdict | None:
    """The slice nearest to its bound, or furthest beyond it; None where there are no slices."""
    worst = None
    for axis, slices in found.slices.items():
        levels = slices.sqnr
        if not len(levels):  # nothing finite, or nothing at all
            continue
        bounds = np.full(len(levels), _SLICE_ENOUGH)
        for floor in floors:
            own = floor.slices[axis].sqnr[: len(bounds)] if axis in floor.slices else bounds[:0]
            bounds[: len(own)] = np.minimum(bounds[: len(own)], own - _SLICE_SLACK)
        index = int(np.argmin(levels - bounds))
        one = SliceVerdict(slices.name(index), float(levels[index]), float(bounds[index]))
        if worst is None or one.margin < worst.margin:
            worst = one
    return worst


def _slice_fault(name: str, found: SliceVerdict | None) -> str:
    if found is None or found.margin >= 0:
        return ""
    return f"SQNR {found.sqnr:.1f} dB in {name!r}{found.name} where {found.required:.0f} dB is needed"


def blindness(sights: Mapping[str, Sight]) -> str:
    """Why no output shows what the model does; empty where one does."""
    if any(sight == "compared" for sight in sights.values()):
        return ""
    shown = ", ".join(f"{name!r} is {sight}" for name, sight in list(sights.items())[:3])
    return f"no output shows what the model does on these samples: {shown}"


def conclude(kind: Kind, outputs: Sequence[OutputVerdict]) -> tuple[Status, str]:
    """The status of a whole comparison and its reason."""
    failed = [output for output in outputs if not output.ok]
    if failed:
        first = min(failed, key=margin)
        more = f" (and {len(failed) - 1} more outputs)" if len(failed) > 1 else ""
        return "failed", f"output {first.name!r}: {first.reason}{more}"
    blind = blindness({output.name: output.sight for output in outputs})
    if blind:
        return "unproved", blind
    return ("measured" if kind == "lossy" else "proved"), ""


def notes_on(outputs: Sequence[OutputVerdict]) -> list[str]:
    """What passed and still must be said: elements that differ and have no SQNR."""
    return [
        f"output {output.name!r}: {output.mismatch:.2%} of the elements differ, no more than between the "
        "runtime's own levels"
        for output in outputs
        if output.ok and output.required is not None and output.mismatch and output.sqnr == -math.inf
    ]
