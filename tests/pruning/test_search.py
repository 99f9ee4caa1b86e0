"""How much a budget allows: strengths, their search, and what the parts of a model matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

import onnxopt
from onnxopt.claims import Pass, unspelled
from onnxopt.data import Feeds
from onnxopt.errors import UsageError
from onnxopt.inspection import macs
from onnxopt.job import Job
from onnxopt.metric import Run
from onnxopt.passes.factorize.factorize_weights import FactorizeWeights
from onnxopt.passes.prune.prune_weights import PruneWeights
from onnxopt.pipeline import Step
from onnxopt.pruning.search import Candidate, Passes, fast_enough, strongest, weaker
from onnxopt.quantization.judge import Judgement
from onnxopt.recipe import parse_pass
from tests.pruning.small import net, prune, residual, samples, zeros


def test_the_budget_finds_the_strongest_pruning_that_keeps_it() -> None:
    asked = PruneWeights(sparsity=0.99, small=0, scope="global")
    whole = onnxopt.prune(net(), [asked], data=samples(), bench=False)
    assert whole.report.searched.best.judgement.score < 0.9
    held = onnxopt.prune(net(), [asked], data=samples(), max_drop=0.1, bench=False)
    report = held.report
    assert report.ok
    assert report.searched.best.judgement.score >= 0.9
    assert 0 < report.zeros < whole.report.zeros
    assert set(report.searched.sensitivity) == {"u", "v"}
    assert not report.searched.trials[0].ok
    tried = [trial.share for trial in report.searched.trials[1:]]
    assert tried[0] == 1.0  # at the full strength, with what the layers matter
    assert all(0 < share < 1 for share in tried[1:])


def test_without_a_strength_that_keeps_the_budget_nothing_is_changed() -> None:
    def metric(run: Run) -> float:
        return float(np.abs(run(samples(1)[0])["y"]).sum() == whole)

    whole = float(np.abs(onnxopt_run(net(), samples(1)[0])).sum())
    result = onnxopt.prune(
        net(), "prune-weights{sparsity=0.9,small=0}", data=samples(), metric=metric, max_drop=0.5, bench=False
    )
    assert not result.report.ok
    assert "no strength keeps the budget" in result.report.reason
    assert zeros(result.model, "u") == 0


def onnxopt_run(model: onnx.ModelProto, feeds: Feeds) -> np.ndarray:
    from onnxopt.runtimes import open_session

    with open_session(model) as session:
        return np.asarray(session.run(feeds)["y"])


@pytest.mark.parametrize(
    ("spelled", "share", "expected"),
    [
        ("prune-weights{sparsity=0.8}", 0.5, "prune-weights{sparsity=0.4}"),
        ("prune-weights{threshold=0.5}", 0.5, "prune-weights{threshold=0.25}"),
        ("prune-weights{threshold=1e-7}", 0.5, "prune-weights{threshold=5e-08}"),
        ("prune-weights{nm=2:4}", 0.5, "prune-weights{nm=2:4}"),
        ("prune-channels{macs=0.5}", 0.5, "prune-channels{macs=0.75}"),
        ("prune-channels{ratio=0.5}", 0.5, "prune-channels{ratio=0.25}"),
        ("shrink-kernels{energy=0.9}", 0.5, "shrink-kernels{energy=0.95}"),
        ("cluster-weights{bits=4}", 0.5, "cluster-weights{bits=6}"),
        ("cluster-weights{bits=2,groups=4}", 0.0, "cluster-weights{bits=6,groups=4}"),
        ("shrink-kernels", 0.5, "shrink-kernels"),
        ("factorize-weights{energy=0.8}", 0.5, "factorize-weights{energy=0.9}"),
        ("drop-layers{number=4}", 0.5, "drop-layers{number=2}"),
        ("drop-layers", 0.25, "drop-layers{number=0}"),
    ],
)
def test_a_share_of_the_strength(spelled: str, share: float, expected: str) -> None:
    assert str(weaker(parse_pass(spelled), share)) == expected


@dataclass(frozen=True)
class Loses(Pass):
    """Of which so much can be kept."""

    name = "loses"
    kind = "lossy"
    ratio: float | None = 1.0


def test_the_search_bisects_five_times() -> None:
    shares: list[float] = []

    def make(passes: Passes) -> Candidate:
        (one,) = passes
        assert isinstance(one, Loses)
        shares.append(one.ratio or 0.0)
        ok = (one.ratio or 0.0) <= 0.4
        return Candidate(
            passes, ir.Model(ir.Graph([], [], nodes=[]), ir_version=8), (), Judgement(ok, 0, None, "")
        )

    found = strongest(
        (Loses(),), ir.Model(ir.Graph([], [], nodes=[]), ir_version=8), make, lambda _: 0.0, guarded=True
    )
    assert shares == [1.0, 0.5, 0.25, 0.375, 0.4375, 0.40625]
    assert found.best.passes == (Loses(0.375),)


def test_the_least_pruning_that_is_fast_enough_is_bisected() -> None:
    shares: list[float] = []

    def make(passes: Passes) -> Candidate:
        (one,) = passes
        assert isinstance(one, Loses)
        shares.append(one.ratio or 0.0)
        time = 1 - (one.ratio or 0.0) / 2
        judged = Judgement(True, 0, None, "")
        steps = (Step("loses", "lossy", int(shares[-1] < 1.0), {}, 0.0, 0, 0),)
        return Candidate(passes, ir.Model(ir.Graph([], [], nodes=[]), ir_version=8), steps, judged, time)

    found = fast_enough((Loses(),), make, 0.7)
    assert shares == [1.0, 0.5, 0.75, 0.625, 0.5625, 0.59375]
    assert found.best.passes == (Loses(0.625),)
    assert [trial.ok for trial in found.trials] == [False, False, True, True, False, False]
    assert [trial.time for trial in found.trials[:2]] == [0.5, 0.75]
    nothing = fast_enough((Loses(0.9),), make, 0.4)
    assert [(trial.ok, trial.time) for trial in nothing.trials] == [(False, 0.55)]


@dataclass(frozen=True)
class LosesByParts(Loses):
    """Of which less can be kept where it goes by its parts."""

    name = "loses-by-parts"
    importance: Mapping[str, float] | None = unspelled(None)
    only: tuple[str, ...] | None = unspelled(None)

    def parts(self, _model: ir.Model) -> Mapping[str, ir.passes.PassBase]:
        return {"a": self, "b": self}


def test_what_parts_do_not_allow_is_tried_without_them() -> None:
    tried: list[tuple[float, bool]] = []

    def make(passes: Passes) -> Candidate:
        (one,) = passes
        assert isinstance(one, LosesByParts)
        tried.append((one.ratio or 0.0, one.importance is not None))
        ok = tried[-1] <= (0.4, False)
        judged = Judgement(ok, 0, None, "")
        return Candidate(passes, ir.Model(ir.Graph([], [], nodes=[]), ir_version=8), (), judged)

    nothing = ir.Model(ir.Graph([], [], nodes=[]), ir_version=8)
    found = strongest((LosesByParts(),), nothing, make, lambda _: 0.5, guarded=True)
    assert found.sensitivity == {"a": 0.5, "b": 0.5}
    assert tried[:5] == [(1.0, False), (1.0, True), (0.5, True), (0.5, False), (0.25, True)]
    assert found.best.passes == (LosesByParts(0.375),)
    assert [trial.weighted for trial in found.trials[:3]] == [False, True, True]


@pytest.mark.parametrize("asked", ["", ",score=l2", ",score=wanda", ",score=obs", ",scope=global"])
def test_layers_give_a_share_together_by_what_they_matter(asked: str) -> None:
    one = parse_pass(f"prune-weights{{sparsity=0.5,small=0{asked}}}")
    assert isinstance(one, PruneWeights)
    done = onnxopt.prune(
        net(), [replace(one, importance={"u": 0.2, "v": 5.0})], data=samples(), bench=False
    ).model
    u, v = zeros(done, "u"), zeros(done, "v")
    assert v < 0.2 < 0.5 < u
    assert (u * 512 + v * 320) / 832 == pytest.approx(0.5, abs=0.02)  # rows round


def test_what_is_zero_already_is_on_top_of_what_layers_give_together() -> None:
    model = net()
    sparse = numpy_helper.to_array(model.graph.initializer[0]).copy()
    sparse[:, :30] = 0
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(sparse, "u"))
    one = PruneWeights(sparsity=0.5, small=0, importance={"u": 1.0, "v": 1.0})
    done = prune(model, [one]).model
    assert zeros(done, "u") * 512 + zeros(done, "v") * 320 == 480 + 160


def test_a_budget_leaves_out_layers_where_the_pattern_has_no_strength() -> None:
    held = prune(net(), "prune-weights{nm=1:4,small=0}", max_drop=0.3)
    report = held.report
    assert report.ok
    assert set(report.searched.sensitivity) == {"u", "v"}
    assert sorted((one.share > 0.7, one.share < 0.1) for one in report.layers) == [
        (False, True),
        (True, False),
    ]


def test_what_has_no_strength_is_told() -> None:
    masks = {"u": np.zeros((16, 32), bool)}
    report = prune(net(), "prune-weights", masks=masks, max_drop=0.01).report
    assert not report.ok
    assert len(report.searched.trials) == 1
    assert any("prune-weights has no strength to look for" in note for note in report.notes)


def test_layers_that_matter_keep_more_of_their_energy() -> None:
    found = FactorizeWeights(energy=0.9, multiple=1)
    model = onnxopt.load(net())
    assert set(found.parts(model)) == {"a", "y"}
    ranks = []
    for importance in ({"a": 1.0}, {"a": 4.0}):
        done = prune(net(), [replace(found, importance=importance, only=("a",))]).model
        ranks.append(min(min(one.dims) for one in done.graph.initializer))
    assert ranks[0] < ranks[1]


@dataclass(frozen=True)
class Clock:
    """A measurement that says this and no more."""

    ratio: float

    @property
    def interval(self) -> tuple[float, float]:
        return self.ratio, self.ratio

    def to_dict(self) -> dict[str, Any]:
        return {"ratio": self.ratio}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run takes as long as its multiply-accumulates."""

    def time(_: Job, before: Any, after: ir.Model, *rest: Any, **options: Any) -> Clock:
        of = [macs(onnxopt.load(one), {"x": (8, 16)}) for one in (before, after)]
        return Clock(float(of[1]) / float(of[0]))

    monkeypatch.setattr(Job, "time", time)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("spelled", ["prune-channels{multiple=1}", "prune-channels{multiple=1,macs=0.2}"])
def test_as_fast_as_is_asked_and_no_more(spelled: str) -> None:
    report = onnxopt.prune(net(), spelled, data=samples(), latency=0.7).report
    assert report.ok
    assert isinstance(report.before.macs, int)
    assert isinstance(report.after.macs, int)
    assert 0.6 < report.after.macs / report.before.macs <= 0.7
    held = report.to_dict()
    assert len(held["trials"]) == 6
    assert all((trial["time"] <= 0.7) == trial["ok"] for trial in held["trials"])


@pytest.mark.usefixtures("clock")
def test_time_that_is_not_reached_is_told_with_the_best() -> None:
    result = onnxopt.prune(net(), "prune-channels{macs=0.5,multiple=1}", data=samples(), latency=0.3)
    assert result.report.reason == "0.3 of the time is not reached: 0.500 at best"
    assert len(result.report.searched.trials) == 1


@pytest.mark.usefixtures("clock")
def test_time_and_accuracy_both_have_to_hold() -> None:
    asked = "prune-channels{macs=0.2,multiple=1}"
    both = onnxopt.prune(net(), asked, data=samples(), latency=0.7, max_drop=0.5)
    assert both.report.ok
    none = onnxopt.prune(net(), asked, data=samples(), latency=0.3, max_drop=0.0)
    assert "no strength keeps the budget" in none.report.reason


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"latency": 0.5, "bench": False}, "latency is measured, and measuring is switched off"),
        ({"latency": 1.5}, "latency is 1.5; expected a share"),
    ],
)
def test_latency_that_cannot_be_asked_for(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        onnxopt.prune(net(), "prune-channels", **options)


def test_blocks_are_dropped_as_far_as_the_budget_allows() -> None:
    held = prune(residual(), "drop-layers{number=2}", max_drop=0.1)
    assert held.report.ok
    assert [str(one) for one in held.report.searched.best.passes] == ["drop-layers"]
    left = prune(residual(), "drop-layers{number=2}", metric="sqnr", max_drop=1)
    assert "no strength that changes anything keeps the budget: sqnr 150 before" in left.report.reason
    assert left.report.savings == ()


def test_an_amount_that_nobody_names_is_searched_from_too() -> None:
    held = prune(net(), "prune-weights{small=0}", max_drop=0.05)
    assert len(held.report.searched.trials) > 1
    assert held.report.ok
    assert 0 < held.report.zeros <= 0.5
    assert "nothing was pruned" in prune(net(), "prune-weights{sparsity=0,small=0}").report.reason
