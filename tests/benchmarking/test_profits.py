"""Guarded passes: what they gain is recorded, read or measured, and what does not pay is left out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import onnx_ir as ir
import pytest

import onnxopt
from onnxopt.benchmarking import profits
from onnxopt.benchmarking.profits import Guard, Profit, find_profit, pattern_of, shipped_profits, sizes_of
from onnxopt.errors import ProviderError, RuntimeMissingError
from onnxopt.examples import rewritten
from onnxopt.job import Job
from onnxopt.passes.eliminate.eliminate_dead import EliminateDead
from onnxopt.passes.merge.merge_matmul import MergeMatmul
from onnxopt.pipeline import Pipeline
from onnxopt.recipe import known_passes
from onnxopt.runtimes import runtime_version
from tests.support import text_model

PATTERN = """
agraph (float[rows_64, 256] x) => (float[rows_64, 256] y)
    <float[256, 256] v, float[256, 256] w, float[1] b = {3}> {
    a = MatMul(x, v)
    c = MatMul(a, w)
    y = Add(c, b)
}
"""
RUNTIME = runtime_version().split()[1]


@dataclass(frozen=True)
class Guarded(MergeMatmul):
    """MergeMatmul, believed only where it is measured."""

    name = "guarded-matmul"
    pattern = PATTERN
    width: int = 1


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "onnxopt" / "profits.json"


def measured(monkeypatch: pytest.MonkeyPatch, ratio: float) -> list[str]:
    """Let each measurement find this ratio; the providers that were measured."""
    calls: list[str] = []

    def bench(*_: object, provider: str, **__: object) -> Any:
        calls.append(provider)
        return SimpleNamespace(ratio=ratio, interval=(ratio * 0.99, ratio * 1.01))

    monkeypatch.setattr(profits, "bench", bench)
    monkeypatch.setattr(Job, "time", lambda *_, **__: None)
    return calls


def test_a_profit_is_measured_once_and_then_on_record(cache: Path) -> None:
    assert find_profit(Guarded(), "cpu", measure=False).source == "unknown"
    first = find_profit(Guarded(), "cpu", measure=True)
    assert (first.source, first.pays, first.runtime) == ("measured", True, RUNTIME)
    assert first.ratio is not None
    assert 0.2 < first.ratio < 0.9
    again = find_profit(Guarded(), "cpu", measure=False)
    assert again == dataclasses.replace(first, source="recorded")
    (key,) = json.loads(cache.read_text())["profits"]
    assert key.startswith(f"guarded-matmul cpu {RUNTIME} ")
    assert [path.name for path in cache.parent.iterdir()] == ["profits.json"]


def test_what_is_on_record_is_for_this_pass_its_options_provider_and_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = measured(monkeypatch, 0.5)
    for provider in ("cpu", "cuda", "cpu", "cuda"):
        find_profit(Guarded(), provider, measure=True)
    assert calls == ["cpu", "cuda"]
    find_profit(Guarded(width=2), "cpu", measure=True)
    assert len(calls) == 3
    monkeypatch.setattr(profits, "runtime_version", lambda: "onnxruntime 9.9.9")
    assert find_profit(Guarded(), "cpu", measure=True).runtime == "9.9.9"
    assert len(calls) == 4
    machine = SimpleNamespace(fingerprint="0123456789ab")
    monkeypatch.setattr(profits, "machine", lambda: machine)
    find_profit(Guarded(), "cpu", measure=True)
    assert len(calls) == 5


def test_the_record_comes_before_the_table_and_the_table_before_a_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = measured(monkeypatch, 0.5)
    find_profit(Guarded(width=3), "cpu", measure=True)
    row = Profit("guarded-matmul", "cpu", RUNTIME, 7.1, (7.0, 7.2), "shipped table")
    rows = [row, dataclasses.replace(row, name="guarded-matmul{width=3}")]
    monkeypatch.setattr(profits, "shipped_profits", lambda: rows)
    assert find_profit(Guarded(), "cpu", measure=True) is row
    assert find_profit(Guarded(width=3), "cpu", measure=True).source == "recorded"
    assert find_profit(Guarded(), "cuda", measure=True).source == "measured"
    assert calls == ["cpu", "cuda"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"schema": "onnxopt.profits/1", "profits": {"a": 3}}', "\ud800", "null"]
)
def test_a_record_that_cannot_be_read_is_begun_anew(
    text: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, 0.5)
    cache.parent.mkdir()
    cache.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert find_profit(Guarded(), "cpu", measure=True).source == "measured"
    assert find_profit(Guarded(), "cpu", measure=True).source == "recorded"


def test_where_nothing_can_be_recorded_it_is_measured_each_time(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = measured(monkeypatch, 0.5)
    cache.parent.write_text("no folder")
    assert [find_profit(Guarded(), "cpu", measure=True).source for _ in range(2)] == ["measured"] * 2
    assert len(calls) == 2


@pytest.mark.parametrize("error", [ProviderError("cuda: no GPU"), RuntimeMissingError("not installed")])
def test_where_nothing_can_be_measured_it_is_unknown(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(profits, "bench" if isinstance(error, ProviderError) else "runtime_version", fail)
    found = find_profit(Guarded(), "cuda", measure=True)
    assert (found.source, found.pays, found.reason) == ("unknown", False, str(error))


@pytest.mark.parametrize(
    ("ratio", "interval", "summary"),
    [
        (7.13, (7.0, 7.3), "p left out: 7.1x slower on onnxruntime 1.31.1 cpu (shipped table)"),
        (
            1.004,
            (0.98, 1.02),
            "p left out: no gain: 1.00x the time on onnxruntime 1.31.1 cpu (shipped table)",
        ),
        (0.17, (0.16, 0.18), "p kept: 0.17x the time on onnxruntime 1.31.1 cpu (shipped table)"),
        (0.97, (0.95, 1.0), "p left out: no gain: 0.97x the time on onnxruntime 1.31.1 cpu (shipped table)"),
        (None, None, "p left out: its speed on onnxruntime 1.31.1 cpu is unknown: why"),
    ],
)
def test_decisions_in_words(ratio: float | None, interval: tuple[float, float] | None, summary: str) -> None:
    profit = Profit("p", "cpu", "1.31.1", ratio, interval, "shipped table", "why")
    assert profit.summary == summary
    assert profit.to_dict()["kept"] == profit.pays == summary.startswith("p kept")


def test_a_pattern_has_weights_and_keeps_its_dynamicsizes_of() -> None:
    proto = pattern_of(Guarded())
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    assert shapes == {"b": (1,), "v": (256, 256), "w": (256, 256)}
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "rows_64"
    assert sizes_of(proto) == {"x": [64, 256]}
    assert pattern_of(Guarded()).SerializeToString() == proto.SerializeToString()


def fused_model() -> ir.Model:
    rng = np.random.default_rng(0)
    proto = text_model(
        "agraph (float[2, 8] x) => (float[2, 8] y) <float[8, 8] v, float[8, 8] w> "
        "{ dead = Exp(x)\n a = MatMul(x, v)\n b = MatMul(a, w)\n c = MatMul(b, v)\n y = Relu(c) }"
    )
    for name in ("v", "w"):
        tensor = ir.tensor(rng.standard_normal((8, 8)).astype(np.float32), name=name)
        proto.graph.initializer.append(ir.to_proto(tensor))
    return ir.from_proto(proto)


def test_what_does_not_pay_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = measured(monkeypatch, 7.1)
    pipeline = Pipeline((Guarded(), EliminateDead()))
    report = onnxopt.optimize(fused_model(), recipe=pipeline, verify=False).report
    assert calls == ["cpu"]
    assert [(step.name, step.changes) for step in report.steps] == [
        ("guarded-matmul", 0),
        ("eliminate-dead", 1),
    ]
    declined = report.steps[0].declined
    assert declined == {f"7.1x slower on onnxruntime {RUNTIME} cpu (measured)": ("b", "c")}
    schema = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text())
    held = json.loads(json.dumps(report.to_dict()))
    jsonschema.validate(held, schema)
    assert [(row["pass"], row["kept"], row["source"]) for row in held["profits"]] == [
        ("guarded-matmul", False, "measured")
    ]


def test_what_pays_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 0.5)
    report = onnxopt.optimize(fused_model(), recipe=Pipeline((Guarded(),)), verify=False).report
    assert [step.changes for step in report.steps] == [2]
    assert [profit.pays for profit in report.profits] == [True]


def test_without_bench_nothing_is_timed_and_the_unknown_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = measured(monkeypatch, 0.5)
    report = onnxopt.optimize(fused_model(), recipe=Pipeline((Guarded(),)), verify=False, bench=False).report
    assert not calls
    assert report.steps[0].changes == 0
    assert "run without --no-bench to measure it" in report.profits[0].summary


def test_passes_that_find_nothing_and_passes_asked_for_by_name_are_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = measured(monkeypatch, 7.1)
    other = text_model("agraph (float[2] x) => (float[2] y) { y = Relu(x) }")
    assert not onnxopt.optimize(other, recipe=Pipeline((Guarded(),)), verify=False).report.profits
    report = onnxopt.optimize(fused_model(), passes=[Guarded()], verify=False).report
    assert report.steps[0].changes == 2
    assert not report.profits
    assert not calls


def test_the_guard_has_nothing_against_other_passes() -> None:
    guard = Guard([MergeMatmul(), Guarded()], "cpu", measure=False)
    assert guard("merge-matmul") is None
    assert guard("of-nobody") is None
    assert guard("guarded-matmul") is not None


def guarded() -> Sequence[Any]:
    return [one for one in known_passes().values() if getattr(one, "pattern", "")]


@pytest.mark.parametrize("one", guarded(), ids=lambda one: one.name)
def test_guarded_passes_rewrite_their_pattern_and_are_in_the_table(one: Any) -> None:
    before = pattern_of(one())
    after = rewritten(one(), before)
    assert len(after.graph) < len(before.graph.node)
    assert any(row.name == one.name for row in shipped_profits())


def test_the_table_holds_one_row_for_each_pass_provider_and_version() -> None:
    rows = shipped_profits()
    keys = [(row.name, row.provider, row.runtime) for row in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        assert row.interval is not None
        assert row.ratio is not None
        assert row.interval[0] <= row.ratio <= row.interval[1]
