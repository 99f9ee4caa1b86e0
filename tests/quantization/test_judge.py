"""What is judged good enough: the default rule at its edges, and the user's metric."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxopt.data import Feeds
from onnxopt.errors import UsageError
from onnxopt.metric import Budget, Run
from onnxopt.quantization import judge as module
from onnxopt.quantization.bounds import SIGNALS_DB
from onnxopt.quantization.judge import LEAST_AGREEMENT, Judge, Judgement
from onnxopt.runtimes import open_session
from tests.support import text_model

RNG = np.random.default_rng(0)
SAMPLES: list[Feeds] = [{"x": RNG.standard_normal((5, 10)).astype(np.float32)} for _ in range(4)]


def model(body: str, outputs: str = "float[5,10] y") -> ir.Model:
    return ir.from_proto(text_model(f"agraph (float[5,10] x) => ({outputs}) {{ {body} }}"))


def times(factor: float, zero: float = 0.0) -> str:
    constants = f"f = Constant <value_float = {factor:.6f}> () c = Constant <value_float = {zero:.6f}> ()"
    return f"{constants} p = Mul(x, f) y = Add(p, c)"


def judged(before: str, after: str, outputs: str = "float[5,10] y") -> Judgement:
    return Judge(model(before, outputs), SAMPLES)(model(after, outputs))


@pytest.mark.parametrize(("error", "ok"), [(0.0098, True), (0.0102, False), (0.0, True)])
def test_a_float_output_has_to_keep_the_sqnr(error: float, ok: bool) -> None:
    found = judged(times(1), times(1 + error))
    assert found.ok is ok
    if error:
        assert found.score == pytest.approx(-20 * math.log10(error) - SIGNALS_DB, abs=1e-3)
        assert f"SQNR {-20 * math.log10(error):.2f} dB of output 'y', 40 dB needed" in found.summary
    else:
        assert found.score == math.inf
    assert found.summary.endswith("same top-1 100.0%, on 4 held-out samples")
    assert (found.before, found.unseen, found.reason) == (None, False, "" if ok else found.summary)


@pytest.mark.parametrize(
    ("error", "near"), [(0.0099, False), (0.0101, True), (0.0125, True), (0.0126, False)]
)
def test_what_misses_the_bound_by_two_decibels_is_near(error: float, near: bool) -> None:
    assert judged(times(1), times(1 + error)).near is near


@pytest.mark.parametrize(("lost", "near"), [(0.09, False), (0.11, True), (0.19, True), (0.21, False)])
def test_what_loses_the_budget_of_a_metric_twice_is_near(lost: float, near: bool) -> None:
    scores = iter([1.0, 1 - lost])
    judge = Judge(model(times(1)), SAMPLES, lambda _: next(scores), Budget(0.1))
    assert judge(model(times(1))).near is near


@pytest.mark.parametrize(
    ("before", "after", "ok", "why"),
    [
        ("y = Abs(x)", "y = Sqrt(x)", False, "elements of output 'y' became NaN or infinite"),
        ("y = Sqrt(x)", "y = Sqrt(x)", True, "SQNR inf dB"),
        ("y = Sqrt(x)", "a = Abs(x) y = Sqrt(a)", False, "elements of output 'y' became NaN or infinite"),
        (times(0), times(0), True, "SQNR inf dB"),
        (times(0), times(0, 1e-5), False, "output 'y' was zero throughout, and no longer is"),
        (times(0, 3), times(0, 3.02), True, "SQNR 43.52 dB"),
        (times(0, 3), times(0, 3.04), False, "SQNR 37.50 dB"),
    ],
    ids=["nan", "nan in both", "nan no longer", "zero", "zero no longer", "constant", "constant moved"],
)
def test_outputs_without_signal_or_numbers(before: str, after: str, ok: bool, why: str) -> None:
    found = judged(before, after)
    assert found.ok is ok
    assert why in found.summary
    json.dumps(found.to_dict(), allow_nan=False)


def labels(differing: int, kind: str) -> str:
    """As many elements of 200 as that differ from those with none."""
    array = np.zeros(200, np.int64)
    array[:differing] = 1
    numbers = ", ".join(map(str, array))
    line = {"int64": "y = Identity(v)", "bool": "y = Cast <to = 9> (v)", "string": "y = Cast <to = 8> (v)"}[
        kind
    ]
    return (
        f"z = Constant <value_float = 0.0> () v = Constant <value_ints = [{numbers}]> () {line} w = Mul(x, z)"
    )


@pytest.mark.parametrize("kind", ["int64", "bool", "string"])
@pytest.mark.parametrize(("differing", "ok"), [(0, True), (4, True), (5, False)])
def test_of_other_outputs_most_elements_have_to_stay(kind: str, differing: int, ok: bool) -> None:
    outputs = f"float[5,10] w, {kind}[200] y"
    found = judged(labels(0, kind), labels(differing, kind), outputs)
    assert found.ok is ok
    assert f"{1 - differing / 200:.1%} of output 'y' the same, {LEAST_AGREEMENT:.0%} needed" in found.summary


def test_the_worst_output_decides() -> None:
    body = "a = Constant <value_float = {}> () p = Mul(x, a) q = Identity(x)"
    found = judged(body.format("1.0"), body.format("1.2"), "float[5,10] q, float[5,10] p")
    assert not found.ok
    assert "13.98 dB of output 'p'" in found.summary


SEQUENCE = "a = Constant <value_float = {}> () p = Mul(x, a) y = SequenceConstruct(x, {})"


@pytest.mark.parametrize(
    ("before", "after", "ok", "why"),
    [
        (SEQUENCE.format("1.0", "p"), SEQUENCE.format("1.01", "p"), True, "dB of output 'y'"),
        (SEQUENCE.format("1.0", "p"), SEQUENCE.format("1.5", "p"), False, "SQNR 9.03 dB of output 'y'"),
        (
            SEQUENCE.format("1.0", "p"),
            SEQUENCE.format("1.0", "p, p"),
            False,
            "a sequence of 2 became one of 3",
        ),
    ],
)
def test_sequences(before: str, after: str, ok: bool, why: str) -> None:
    found = judged(before, after, "seq(float[5,10]) y")
    assert found.ok is ok
    assert why in found.summary


@pytest.mark.parametrize(
    ("line", "output"), [("y = NonZero(r)", "int64[2,N] y"), ("y = Compress(r, r_bool)", "float[N] y")]
)
def test_a_shape_that_depends_on_numbers_cannot_be_compared(line: str, output: str) -> None:
    body = "{} r_bool_all = Cast <to = 9> (r) shape = Constant <value_ints = [-1]> ()"
    body += " r_bool = Reshape(r_bool_all, shape) " + line
    found = judged(body.format("r = Relu(x)"), body.format("a = Abs(x) r = Relu(a)"), output)
    assert not found.ok
    assert "output 'y' cannot be compared: shape" in found.summary


def mean(run: Run) -> float:
    return float(np.mean([run(feeds)["y"].mean() for feeds in SAMPLES]))


@pytest.mark.parametrize(
    ("before", "after", "budget", "ok"),
    [
        (2.0, 1.96, Budget(0.05), True),
        (2.0, 1.9, Budget(0.05), False),
        (2.0, 1.9, Budget(0.06, relative=True), True),
        (2.0, 1.8, Budget(0.06, relative=True), False),
        (-2.0, -2.1, Budget(0.06, relative=True), True),
        (-2.0, -2.2, Budget(0.06, relative=True), False),
        (-2.0, 5.0, Budget(0.0), True),
        (0.0, -0.001, Budget(0.5, relative=True), False),
    ],
)
def test_a_metric_may_lose_what_the_budget_says(
    before: float, after: float, budget: Budget, ok: bool
) -> None:
    found = Judge(model(times(0, before)), SAMPLES, mean, budget)(model(times(0, after)))
    assert found.ok is ok
    assert (found.before, found.score) == pytest.approx((before, after))
    assert found.summary == f"mean {before:.4g} before, {after:.4g} after, {budget} may be lost"


def test_a_metric_that_keeps_samples_unseen_has_the_last_word_on_them() -> None:
    asked = []

    def metric(run: Run, split: str) -> float:
        asked.append(split)
        score = mean(run)
        return score if split == "search" else 10 * score

    judge = Judge(model(times(0, 1)), SAMPLES, metric, Budget(0.5))
    candidate = model(times(0, 0.9))
    assert asked == ["search", "final"]
    search, final = judge(candidate), judge(candidate, "final")
    assert asked[2:] == ["search", "final"]
    assert (search.ok, search.unseen, search.before) == (True, False, 1)
    assert (final.ok, final.unseen, final.before) == (False, True, 10)


@pytest.mark.parametrize("metric", [None, mean, "agreement", "sqnr"])
def test_without_unseen_samples_the_last_word_is_not_said_to_be_of_any(metric: Any) -> None:
    found = Judge(model(times(1)), SAMPLES, metric, Budget(0.01))(model(times(1)), "final")
    assert found.ok
    assert not found.unseen
    assert found.to_dict()["unseen"] is False


def test_a_metric_that_gives_minus_infinity_can_be_written_as_json() -> None:
    found = Judge(model(times(1)), SAMPLES, "mse", Budget(0.1))(model("y = Sqrt(x)"))
    assert not found.ok
    assert found.to_dict()["score"] == "-inf"
    worse = Judge(model(times(1)), SAMPLES, lambda _: -math.inf, Budget(0.1))(model(times(1)))
    assert json.loads(json.dumps(worse.to_dict(), allow_nan=False))["before"] == "-inf"


def broken(_: Run) -> float:
    raise KeyError("labels")


def feeds_nothing(run: Run) -> float:
    return float(run({})["y"].mean())


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (broken, "metric broken: it failed: KeyError: 'labels'"),
        (feeds_nothing, "metric feeds_nothing: it failed on the original model: .*x"),
        (lambda _: math.nan, "it gives NaN"),
        ("accurracy", "unknown metric 'accurracy'"),
        ("nothing.py:metric", "nothing.py"),
    ],
)
def test_a_metric_that_fails_is_the_users_to_mend(metric: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        Judge(model(times(1)), SAMPLES, metric, Budget(0.1))
    assert "\n" not in str(raised.value)


def test_samples_that_the_original_cannot_run_are_the_users_to_mend() -> None:
    table = "t = Constant <value_floats = [1.0, 2.0]> () i = Cast <to = 7> (x) y = Gather(t, i)"
    with pytest.raises(UsageError, match=r"the original model cannot run held-out sample 0: .*Gather"):
        Judge(model(table), [{"x": np.full((5, 10), 7, np.float32)}])


def test_the_budget_holds_elsewhere_too(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Elsewhere:
        def __init__(self, candidate: ir.Model) -> None:
            self.session = open_session(candidate)

        def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
            return {name: array * np.float32(1.1) for name, array in self.session.run(feeds).items()}

    @contextlib.contextmanager
    def emulated(candidate: ir.Model, *, isa: str, session_config: object) -> Iterator[Elsewhere]:
        opened.append(isa)
        yield Elsewhere(candidate)

    monkeypatch.setattr(module, "open_emulated", emulated)
    judge = Judge(model(times(1)), SAMPLES, isas=["avx2"])
    found = judge(model(times(1.01)))
    assert found.within
    assert not found.ok
    assert found.elsewhere["avx2"].reason == found.reason.removeprefix("on avx2: ")
    assert "SQNR 19.09 dB" in found.reason
    assert found.to_dict()["elsewhere"]["avx2"]["ok"] is False
    assert not judge(model(times(1.5))).elsewhere
    assert opened == ["avx2"]
