"""Try what keeps accuracy, and keep what helps on samples that are held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from onnxopt.data import Feeds
from onnxopt.quantization.draft import Draft
from onnxopt.quantization.keepers import KEEPERS
from onnxopt.quantization.search import write
from onnxopt.quantization.sensitivity import noise_between
from onnxopt.runtimes import open_session

__all__ = ["improve"]

_MOST_SAMPLES = 16
"""Held-out samples that keepers are judged on."""
_GAIN = 0.98
"""The noise that a keeper may leave of what there was, at most."""


def improve(
    draft: Draft,
    samples: Sequence[Feeds],
    held_out: Sequence[Feeds],
    session_config: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Draft, dict[str, tuple[float, float]]]:
    """The draft with every keeper that lowers the noise, and of those the noise before and after.

    Quantized models run with `session_config`.
    """
    judged = [*held_out[:_MOST_SAMPLES]]
    with open_session(draft.model) as session:
        expected = [session.run(feeds) for feeds in judged]

    def noise_of(one: Draft) -> float:
        sites = frozenset(unit.site for unit in one.units())
        plan = replace(one.plan, nodes=sites, tensors=frozenset(one.plan.params))
        model, _ = write(one.model, one.placement, plan)
        with open_session(model, session_config=session_config) as session:
            return noise_between(expected, [session.run(feeds) for feeds in judged])

    before, gains = noise_of(draft), {}
    for name, keeper in KEEPERS.items():
        changed = keeper(draft, samples)
        after = noise_of(changed) if changed is not None else before
        if changed is not None and after < before * _GAIN:
            gains[name] = (before, after)
            draft, before = changed, after
    return draft, gains
