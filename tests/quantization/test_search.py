"""The search for the fastest quantization that keeps a budget, on a chain of convolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
import pytest

from onnxopt.calibration import calibrate
from onnxopt.data import Feeds
from onnxopt.metric import Budget, Split
from onnxopt.quantization import search as module
from onnxopt.quantization.choose import Prices
from onnxopt.quantization.costs import NodeCost
from onnxopt.quantization.formats import find_format
from onnxopt.quantization.fusion import Fusion
from onnxopt.quantization.judge import Judge, Judgement
from onnxopt.quantization.plan import Plan, params_of_tensors
from onnxopt.quantization.search import Candidate, Search, Searched, judge_plan, write
from onnxopt.quantization.sensitivity import Noise, Source, measure_sensitivity, sources_of
from onnxopt.quantization.units import Unit, survey
from onnxopt.targets import PLACEMENTS
from tests.support import text_model

X86 = PLACEMENTS["x86"]
SITES = ("c0", "c1", "c2", "c3")
RNG = np.random.default_rng(5)
SAMPLES: list[Feeds] = [{"x": RNG.standard_normal((1, 8, 6, 6)).astype(np.float32)} for _ in range(4)]
GAIN = {"measure-biases": (0.1, 0.01)}
ALL = [Source("weight", site) for site in SITES]
PRICES = Prices(lambda _: NodeCost(10, 1), lambda _: 0.5, lambda _: 0.5, lambda _: 0.0)


def chain(spoiled: str = "") -> ir.Model:
    """Four convolutions. The weight of a spoiled one has rows of one large element and many small ones."""
    lines, weights, source = [], [], "x"
    for site in SITES:
        array = RNG.standard_normal((8, 8)) / 3
        if site == spoiled:
            array[:, 0] = 0
            array[:, 7] = 1000
        weights.append(
            f"float[8,8,1,1] w_{site} = {{{', '.join(f'{one:.5f}' for one in array.reshape(-1))}}}"
        )
        if site == spoiled:  # the channel that the large elements read is always zero
            lines.append(f"m_{site} = Mul({source}, mask)")
            source = f"m_{site}"
        lines.append(f"{site} = Conv({source}, w_{site})")
        source = site
    weights.append("float[1,8,1,1] mask = {1, 1, 1, 1, 1, 1, 1, 0}")
    text = (
        f"""agraph (float[1,8,6,6] x) => (float[1,8,6,6] c3) <{", ".join(weights)}> {{ {" ".join(lines)} }}"""
    )
    return ir.from_proto(text_model(text))


def prepared(model: ir.Model) -> tuple[list[Unit], Plan]:
    names = ["x", *(node.outputs[0].name or "" for node in model.graph)]
    statistics = calibrate(model, SAMPLES, names)
    units = [u for u in survey(model, X86, names).units if u.node.op_type == "Conv"]
    ranges = {name: (statistics[name].minimum, statistics[name].maximum) for name in names}
    return units, Plan(frozenset(), frozenset(), params_of_tensors(units, ranges, X86), find_format("int8"))


class Stub(Judge):
    """Judges by which layers read integers."""

    def __init__(self, allows: Callable[[frozenset[str]], bool]) -> None:
        self.allows, self.asked = allows, list[frozenset[str]]()
        self.nearly: Callable[[frozenset[str]], bool] = lambda _: False

    def __call__(
        self, model: ir.Model, split: Split = "search", more: Mapping[str, str] = MappingProxyType({})
    ) -> Judgement:
        integer = frozenset(
            (node.outputs[0].name or "").removesuffix("_float")
            for node in model.graph
            if node.op_type == "Conv"
            and (source := node.inputs[1]) is not None
            and source.producer() is not None
        )
        self.asked.append(integer)
        told = f"{len(integer)} in integers"
        ok, near = self.allows(integer), self.nearly(integer)
        return Judgement(ok, -float(len(integer)), None, told, near=near and not ok)


def noise_of(values: Mapping[str, float]) -> Noise:
    known = {Source("weight", site): value for site, value in values.items()}
    return Noise(known, lambda sources: {source: known[source] for source in sources})


def found(judge: Judge, noise: Noise, proves: bool = True, **options: object) -> Searched:
    model = chain()
    units, plan = prepared(model)
    return Search(model, units, X86, plan, noise, PRICES, judge, **options).run(proves=proves)  # type: ignore[arg-type]


def chosen(searched: Searched) -> list[str]:
    assert searched.best is not None
    return sorted(searched.best.plan.nodes)


def never(_: Sequence[Source]) -> Mapping[Source, float]:
    raise AssertionError("noise was measured")


def test_where_the_fastest_choice_is_good_enough_nothing_more_is_asked() -> None:
    judge = Stub(lambda _: True)
    searched = found(judge, Noise(ALL, never))
    assert chosen(searched) == list(SITES)
    assert [trial.units for trial in searched.trials] == [4]
    assert searched.best is not None
    assert searched.nearest is not None
    assert searched.best.model is searched.nearest.model
    assert searched.best.fusion is not None
    assert searched.best.fusion.fused == SITES
    assert searched.trials[0].ratio == pytest.approx((4 * 1 + 0.5 + 0.5) / 40)


@pytest.mark.parametrize("spoiled", SITES)
def test_the_one_sensitive_layer_stays_in_float(spoiled: str) -> None:
    judge = Stub(lambda integer: spoiled not in integer)
    searched = found(judge, noise_of({site: 1.0 if site == spoiled else 1e-4 for site in SITES}))
    assert chosen(searched) == [site for site in SITES if site != spoiled]
    assert len(judge.asked) == len(set(judge.asked)) <= 8
    assert searched.trials[0].units == 4
    assert not searched.trials[0].judgement.ok


@pytest.mark.parametrize("allowed", [0, 1, 2, 3])
def test_the_fastest_that_is_allowed_is_found(allowed: int) -> None:
    noise = {site: 10.0 ** (-place) for place, site in enumerate(SITES)}
    searched = found(Stub(lambda integer: len(integer) <= allowed), noise_of(noise))
    if allowed:
        assert chosen(searched) == list(SITES[4 - allowed :])
    else:
        assert searched.best is None
        assert searched.nearest is not None
        assert searched.nearest.judgement.summary == "1 in integers"


@pytest.mark.parametrize("allowed", [1, 2, 3])
def test_of_layers_that_no_price_tells_apart_as_many_as_may_be_are_taken(allowed: int) -> None:
    judge = Stub(lambda integer: len(integer) <= allowed)
    searched = found(judge, noise_of(dict.fromkeys(SITES, 1.0)))
    assert len(chosen(searched)) == allowed
    assert len(judge.asked) <= 4


@pytest.mark.parametrize("helps", [True, False])
def test_what_misses_the_budget_by_little_is_improved_before_it_is_given_up(helps: bool) -> None:
    judge, asked = Stub(lambda integer: len(integer) <= 2), list[int]()
    judge.nearly = lambda integer: len(integer) == 3

    def improve(one: Candidate) -> Candidate:
        asked.append(len(one.plan.nodes))
        return replace(one, judgement=Judgement(True, 0.0, None, "as told"), keepers=GAIN) if helps else one

    model = chain()
    units, plan = prepared(model)
    noise = noise_of({site: 10.0 ** (-place) for place, site in enumerate(SITES)})
    search = Search(model, units, X86, plan, noise, PRICES, judge)
    assert len(list(search.choices())) == 2
    assert not asked
    searched = search.run(improve=improve)
    assert asked == ([3] if helps else [3, 2])
    assert len(chosen(searched)) == (3 if helps else 2)
    assert searched.best is not None
    assert searched.best.keepers == (GAIN if helps else {})
    told = [trial.judgement.summary for trial in searched.trials]
    assert told.count("as told") == helps
    assert told.count("3 in integers") == 1


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20])
def test_noise_of_any_size_is_searched_through(scale: float) -> None:
    noise = {site: scale * 2.0 ** (-place) for place, site in enumerate(SITES)}
    searched = found(Stub(lambda integer: len(integer) <= 2), noise_of(noise))
    assert chosen(searched) == ["c2", "c3"]


def test_layers_that_break_the_outputs_are_out_whatever_the_price() -> None:
    noise = {"c0": 1e-3, "c1": np.inf, "c2": 1e-3, "c3": 1e-3}
    searched = found(Stub(lambda integer: "c1" not in integer), noise_of(noise))
    assert chosen(searched) == ["c0", "c2", "c3"]


def test_kept_layers_are_never_tried() -> None:
    judge = Stub(lambda integer: len(integer) < 3)
    searched = found(judge, noise_of(dict.fromkeys(SITES, 1.0)), kept=["c1"])
    assert all("c1" not in integer for integer in judge.asked)
    assert len(chosen(searched)) == 2
    nothing = found(judge, Noise(ALL, never), kept=SITES)
    assert (nothing.best, nothing.nearest, nothing.trials) == (None, None, ())


class FakeFusion:
    """A runtime that does not fuse some layers."""

    def __init__(self, stubborn: list[str]) -> None:
        self.stubborn, self.calls = stubborn, 0

    def __call__(self, _: ir.Model, sites: Mapping[str, ir.Node]) -> Fusion:
        self.calls += 1
        unfused = [site for site in self.stubborn if site in sites][:1]
        return Fusion({}, tuple(site for site in sites if site not in unfused), tuple(unfused))


def test_what_the_runtime_does_not_fuse_is_left_in_float_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeFusion(["c3", "c2", "c1", "c0"])
    monkeypatch.setattr(module, "fusion_of", fake)
    judge = Stub(lambda _: True)
    searched = found(judge, Noise(ALL, never))
    assert (searched.best, searched.unfused, fake.calls) == (None, ("c3", "c2", "c1", "c0"), 4)
    fake.stubborn = ["c1", "c3"]
    searched = found(judge, Noise(ALL, never))
    assert chosen(searched) == ["c0", "c2"]
    assert searched.unfused == ("c1", "c3")
    assert searched.best is not None
    assert searched.best.fusion is not None
    assert searched.best.fusion.unfused == ()
    unproved = found(judge, Noise(ALL, never), proves=False)
    assert chosen(unproved) == list(SITES)
    assert unproved.best is not None
    assert unproved.best.fusion is None


def test_a_plan_of_ones_own_is_judged_without_what_does_not_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fusion_of", FakeFusion(["c1"]))
    model = chain()
    units, plan = prepared(model)
    own = replace(plan, nodes=frozenset(["c0", "c1"]), tensors=frozenset(["x", "c0", "c1"]))
    searched = judge_plan(model, units, X86, own, Stub(lambda _: True))
    assert chosen(searched) == ["c0"]
    assert searched.best is not None
    assert searched.best.plan.tensors == {"x", "c0"}
    assert searched.unfused == ("c1",)
    refused = judge_plan(model, units, X86, own, Stub(lambda _: False))
    assert refused.best is None
    assert refused.nearest is not None
    assert judge_plan(model, units, X86, plan, Stub(lambda _: True)).trials == ()


def test_a_layer_that_is_really_sensitive_is_found_by_measurement() -> None:
    model = chain("c2")
    units, plan = prepared(model)
    noise = Noise(sources_of(units), lambda _: measure_sensitivity(model, X86, plan, SAMPLES))
    judge = Judge(model, SAMPLES, "sqnr", Budget(150 - 20))
    searched = Search(model, units, X86, plan, noise, PRICES, judge).run()
    assert "c2" not in chosen(searched)
    assert len(chosen(searched)) >= 2
    worst = max(noise.known, key=lambda source: noise.known[source])
    assert worst == Source("weight", "c2")
    assert searched.best is not None
    assert judge(write(model, X86, searched.best.plan)[0]).ok
