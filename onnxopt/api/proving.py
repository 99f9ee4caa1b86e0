"""Whether the candidate of a `quantize` is its result: what it breaks, what it keeps and what it gains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from onnxopt.api.candidates import TRIAL_S
from onnxopt.api.checks import lint_findings, new_error
from onnxopt.api.work import Candidate, Proved, Work
from onnxopt.benchmarking import Timing
from onnxopt.benchmarking.settings import session_config
from onnxopt.graph import tensor_bytes
from onnxopt.quantization.static import Static

__all__ = ["prove"]

_SMALLER = 0.99
"""Less than this share of the bytes is smaller."""
_TIMED_S = (3.0, 10.0)
"""Seconds of measurement: the second where the first cannot tell the two apart."""


def prove(work: Work, candidate: Candidate) -> Proved:
    """Look at what the target refuses, at accuracy, then at speed or size, up to the first that says no."""
    job, model = work.job, candidate.model
    reason = _why_not(work, candidate)
    if reason or model is None:
        return Proved(candidate.judgement, reason)
    findings = lint_findings(model, work.target)
    reason = new_error(findings, job.model, work.target)
    if reason:
        return Proved(candidate.judgement, reason, findings)
    settings = job.settle(model, "lossy", work.samples, measure=work.measure)
    config = session_config(settings)
    job.progress("judging the result", None)
    judgement = work.judge(model, "final", config)
    judged = Proved(judgement, "", findings, settings)
    if not judgement.ok:
        return replace(judged, reason=f"the result does not keep the budget: {judgement.reason}")
    timing = _timed(work, model, config) if work.measure else None
    reason = _why_not_worth_it(work, model, timing) or _why_plain_does(work, model, timing, config)
    return replace(judged, timing=timing, reason=reason)


def _timed(work: Work, quantized: ir.Model, config: Mapping[str, str]) -> Timing | None:
    for seconds in _TIMED_S:
        timing = work.job.time(work.job.model, quantized, work.samples, config, seconds=seconds)
        if timing is None or timing.verdict != "no measurable difference":
            break
    return timing


def _why_not(work: Work, candidate: Candidate) -> str:
    """Why there is no result, before speed is looked at; empty where there is one."""
    judgement, found = candidate.judgement, candidate.found
    if judgement is not None:
        return "" if judgement.ok else f"no candidate keeps the budget; the nearest: {judgement.reason}"
    why = [f"{len(sites)} {reason}" for reason, sites in candidate.left.items()]
    why += [f"{one.name} is left out: {one.why}" for one in candidate.made.tried if one.sites]
    if isinstance(found, Static) and found.searched.unfused:
        why.append(f"{len(found.searched.unfused)} nodes that the runtime does not fuse")
    if not why:
        otherwise = "integers would not make it faster" if isinstance(found, Static) else ""
        why = [otherwise or f"there is nothing that {work.scheme.name} applies to"]
    return f"nothing was quantized: {'; '.join(why)}"


def _why_not_worth_it(work: Work, quantized: ir.Model, timing: Timing | None) -> str:
    if work.goal == "size":
        was, now = tensor_bytes(work.job.original), tensor_bytes(quantized)
        smaller = now < _SMALLER * was
        return "" if smaller else f"the result is not smaller: {now:,} bytes of tensors, it had {was:,}"
    if timing is None or timing.verdict == "faster":
        return ""
    return f"it is not faster: {timing.summary}"


def _why_plain_does(work: Work, quantized: ir.Model, timing: Timing | None, config: Mapping[str, str]) -> str:
    """What says that the gain in speed is that of the preparation alone; empty where nothing does."""
    if work.goal == "size" or timing is None or not work.prepared.changes:
        return ""
    gain = work.job.time(work.prepared.model, quantized, work.samples, config, seconds=TRIAL_S)
    if gain is None or gain.verdict == "faster":
        return ""
    return f"it is not faster than the float model is once it is optimized: {gain.summary}"
