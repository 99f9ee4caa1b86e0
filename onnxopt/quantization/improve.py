"""Try what keeps accuracy, and keep what helps on samples that are held out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from onnxopt.data import Feeds
from onnxopt.graph import constant_of
from onnxopt.quantization.draft import Draft
from onnxopt.quantization.judge import Judging
from onnxopt.quantization.keepers import KEEPERS, LAST
from onnxopt.quantization.plan import Plan
from onnxopt.quantization.search import Candidate, write
from onnxopt.quantization.sensitivity import Source, noise_between
from onnxopt.runtimes import open_session

__all__ = ["improve", "improve_choice", "unchanged"]

_MOST_SAMPLES = 16
"""Held-out samples that keepers are judged on."""
_DROWNED = 0.01
"""From here on noise hides what helps where there is less of it: 20 dB."""
_GAIN = 0.95
"""The noise that a keeper may leave of what there was, at most: less is chance, on so few samples."""


def improve(
    draft: Draft,
    choices: Iterable[Plan],
    keepers: Iterable[str],
    samples: Sequence[Feeds],
    held_out: Sequence[Feeds],
    session_config: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Draft, dict[str, tuple[float, float]]]:
    """The draft with each of the keepers that lowers the noise, and of those the noise before and after.

    Args:
        draft: whatever its plan chooses.
        choices: plans. The noise is that of the first whose noise does not drown the outputs, or of the last;
            without any the draft stays as it is.
        keepers: names.
        samples: for keepers. held_out: to judge by.
        session_config: that quantized models run with.
    """
    judged = [*held_out[:_MOST_SAMPLES]]
    with open_session(draft.model) as session:
        expected = [session.run(feeds) for feeds in judged]

    def noise_of(one: Draft) -> float:
        model, _ = write(one.model, one.placement, one.plan)
        with open_session(model, session_config=session_config) as session:
            return noise_between(expected, [session.run(feeds) for feeds in judged])

    before: float | None = None
    for plan in choices:
        draft = replace(draft, plan=plan)
        before = noise_of(draft)
        if before < _DROWNED:
            break
    if before is None:
        return draft, {}
    gains: dict[str, tuple[float, float]] = {}
    for name in keepers:
        changed = KEEPERS[name](draft, samples)
        after = noise_of(changed) if changed is not None else before
        if changed is not None and after < before * _GAIN:
            gains[name] = (before, after)
            draft, before = changed, after
    return draft, gains


def improve_choice(
    candidate: Candidate,
    draft: Draft,
    judge: Judging,
    samples: Sequence[Feeds],
    held_out: Sequence[Feeds],
    session_config: Mapping[str, str],
) -> Candidate:
    """A candidate with the keepers that hold for its units alone, if it is good enough with them."""
    chosen, gains = improve(draft, [candidate.plan], LAST, samples, held_out, session_config)
    if not gains:
        return candidate
    model, _ = write(chosen.model, chosen.placement, chosen.plan)
    judgement = judge(model)
    if not judgement.ok:
        return candidate
    return replace(candidate, model=model, plan=chosen.plan, judgement=judgement, keepers=gains)


def unchanged(before: Draft, after: Draft) -> frozenset[Source]:
    """The sources that keepers left as they were, so that their noise is what it was."""
    old, new = _numbers(before), _numbers(after)
    return frozenset(
        source
        for source in old.keys() & new.keys()
        if all(one is other for one, other in zip(old[source], new[source], strict=True))
    )


def _numbers(draft: Draft) -> dict[Source, tuple[object, ...]]:
    """Each source and what it is quantized with."""
    plan = draft.plan
    found: dict[Source, tuple[object, ...]] = {
        Source("tensor", name): (params,) for name, params in plan.params.items()
    }
    for unit in draft.units():
        if unit.weight is not None:
            weight = constant_of(unit.node.inputs[unit.weight])
            found[Source("weight", unit.site)] = (
                weight,
                plan.rounded.get(unit.site),
                plan.biases.get(unit.site),
            )
    return found
