"""Which keepers are kept: by the noise of the units that are chosen, and those of the choice at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from onnxopt.metric import Split
from onnxopt.quantization import improve as module
from onnxopt.quantization.draft import Draft
from onnxopt.quantization.improve import improve, improve_choice, unchanged
from onnxopt.quantization.judge import Judge, Judgement
from onnxopt.quantization.keepers import FIRST, KEEPERS, LAST
from onnxopt.quantization.search import Candidate, write
from onnxopt.quantization.sensitivity import Source
from tests.quantization.test_keepers import (
    chain,
    convolutions,
    draft_of,
    few_bits,
    noise_of,
    samples_of,
    smooth_images,
)

PLAIN = {"session.disable_quant_qdq": "1"}


def coarse() -> Draft:
    return few_bits(draft_of(chain(), smooth_images(12)))


def of_units(draft: Draft, sites: set[str]) -> Draft:
    """With these units only."""
    units = [unit for unit in draft.units() if unit.site in sites]
    names = frozenset(value.name or "" for unit in units for value in (*unit.sources, unit.output))
    return replace(draft, plan=replace(draft.plan, nodes=frozenset(sites), tensors=names))


def test_keepers_are_judged_by_the_units_that_are_chosen() -> None:
    samples, unseen = smooth_images(12), smooth_images(12, seed=99)
    draft = of_units(coarse(), {"a", "d"})
    improved, gains = improve(coarse(), [draft.plan], FIRST, samples, unseen, PLAIN)
    assert "round-weights" in gains
    assert improved.plan.nodes == {"a", "d"}
    before = [10 * np.log10(before) for before, _ in gains.values()]
    after = [10 * np.log10(after) for _, after in gains.values()]
    assert before[0] == pytest.approx(noise_of(draft, unseen, draft.model), abs=0.2)
    assert after[-1] == pytest.approx(noise_of(improved, unseen, draft.model), abs=0.2)
    assert before[1:] == after[:-1]
    assert before[0] < noise_of(coarse(), unseen, draft.model) - 1


def test_what_gains_little_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    draft, samples = coarse(), smooth_images(3)
    made = replace(draft, plan=replace(draft.plan, biases={}))
    for ratio, kept in ((0.96, []), (0.94, ["one"])):
        noises = iter([1.0, ratio])
        monkeypatch.setattr(module, "KEEPERS", {"one": lambda *_: made, "none": lambda *_: None})
        monkeypatch.setattr(module, "noise_between", lambda *_, n=noises: next(n))
        improved, gains = improve(draft, [draft.plan], ["one", "none"], samples, samples)
        assert list(gains) == kept
        assert (improved is made) is bool(kept)


def test_what_keepers_leave_alone_need_not_be_measured_again() -> None:
    model, samples = convolutions("z = Relu(a)"), samples_of(1, 3, 12, 12)
    draft = draft_of(model, samples)
    everything = {Source("tensor", name) for name in "xyz"} | {Source("weight", site) for site in "ay"}
    assert unchanged(draft, draft) >= everything
    equalized = KEEPERS["equalize-layers"](draft, samples)
    assert equalized is not None
    assert unchanged(draft, equalized) & everything == {Source("tensor", "x"), Source("tensor", "y")}
    rounded = KEEPERS["round-weights"](draft, samples)
    assert rounded is not None
    assert unchanged(draft, rounded) & everything == {Source("tensor", name) for name in "xyz"}
    one = replace(draft, plan=replace(draft.plan, biases={"a": np.zeros(16, np.float32)}))
    assert everything - unchanged(draft, one) == {Source("weight", "a")}


class Fixed(Judge):
    """Always of one opinion."""

    def __init__(self, within: bool) -> None:
        self.within = within

    def __call__(
        self, model: Any, split: Split = "search", more: Mapping[str, str] = MappingProxyType({})
    ) -> Judgement:
        return Judgement(self.within, 1.0, None, "as told")


@pytest.mark.parametrize("within", [True, False])
def test_biases_are_measured_of_the_best_candidate_and_left_out_where_the_budget_is_broken(
    within: bool,
) -> None:
    samples, unseen = smooth_images(12), smooth_images(12, seed=99)
    chosen = of_units(coarse(), {"a", "d", "g"})
    best = Candidate(write(chosen.model, chosen.placement, chosen.plan)[0], chosen.plan, Fixed(True)(None))
    found = improve_choice(best, coarse(), Fixed(within), samples, unseen, PLAIN)
    assert tuple(found.keepers) == (LAST if within else ())
    assert (found is best) is not within
    assert found.plan.nodes == {"a", "d", "g"}
    assert set(found.plan.biases) == ({"a", "d", "g"} if within else set())


def test_a_choice_that_noise_drowns_is_not_judged_by(monkeypatch: pytest.MonkeyPatch) -> None:
    draft, samples = coarse(), smooth_images(3)
    plans = [replace(draft.plan, biases={str(number): np.zeros(1)}) for number in range(3)]
    for noises, expected in (([0.1, 0.002], 1), ([0.002], 0), ([0.1, 0.1, 0.1], 2)):
        left = iter(noises)
        monkeypatch.setattr(module, "noise_between", lambda *_, left=left: next(left))
        improved, gains = improve(draft, iter(plans), [], samples, samples)
        assert improved.plan is plans[expected]
        assert gains == {}
        assert next(left, None) is None
    assert improve(draft, [], FIRST, samples, samples) == (draft, {})
