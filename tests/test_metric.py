"""Metrics: built-in ones against closed forms, the user's own and their mistakes, and the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.data import Feeds
from onnxopt.errors import OnnxoptError, UsageError
from onnxopt.metric import BUILTIN, Budget, Run, load_metric, parse_drop

RNG = np.random.default_rng(0)
SAMPLES: list[Feeds] = [{"x": RNG.standard_normal((2, 5))} for _ in range(4)]


def gives(**outputs: Callable[[np.ndarray], Any]) -> Run:
    """A model that computes its outputs from x."""

    def run(feed: Mapping[str, Any]) -> dict[str, Any]:
        return {name: function(feed["x"]) for name, function in outputs.items()}

    return run


def test_agreement_is_the_share_of_rows_with_the_same_largest_element() -> None:
    original = gives(y=lambda x: x)
    metric = load_metric("agreement", original, SAMPLES)
    assert metric(original) == 1
    rows = np.concatenate([feed["x"] for feed in SAMPLES])
    rounded = np.round(rows)
    want = np.mean(rows.argmax(1) == rounded.argmax(1))
    assert 0 < want < 1
    assert metric(gives(y=np.round)) == pytest.approx(want)
    assert (metric.name, metric.has_split) == ("agreement", False)


def test_agreement_of_labels_is_the_share_of_equal_ones() -> None:
    metric = load_metric("agreement", gives(label=lambda x: x.argmax(1)), SAMPLES)
    want = np.mean([feed["x"].argmax(1) == feed["x"].argmin(1) for feed in SAMPLES])
    assert metric(gives(label=lambda x: x.argmin(1))) == want == 0
    none = load_metric("agreement", gives(y=lambda x: x[0, 0]), SAMPLES)
    with pytest.raises(UsageError, match="no output has rows of scores or labels; take sqnr or mse"):
        none(gives(y=lambda x: x[0, 0]))


def test_mse_and_sqnr_are_their_formulas() -> None:
    original, noisy = gives(y=lambda x: x, z=lambda x: 3 * x), gives(y=np.round, z=lambda x: 3 * x)
    rows = np.concatenate([feed["x"] for feed in SAMPLES])
    noise = np.sum((rows - np.round(rows)) ** 2)
    assert load_metric("mse", original, SAMPLES)(noisy) == pytest.approx(-noise / (2 * rows.size))
    sqnr = load_metric("sqnr", original, SAMPLES)
    assert sqnr(noisy) == pytest.approx(10 * math.log10(np.sum(rows**2) / noise))
    assert sqnr(original) == 150
    assert sqnr(gives(y=lambda x: x * np.nan, z=lambda x: x)) == -150
    assert load_metric("mse", original, SAMPLES)(gives(y=lambda x: x + np.inf, z=lambda x: x)) == -math.inf
    labels = gives(y=lambda x: x.argmax(1))
    with pytest.raises(UsageError, match="no output is of floats; take agreement"):
        load_metric("sqnr", labels, SAMPLES)(labels)


def test_the_original_runs_once_over_each_split() -> None:
    seen: list[float] = []

    def original(feed: Mapping[str, Any]) -> dict[str, Any]:
        seen.append(feed["x"][0, 0])
        return {"y": feed["x"]}

    metric = load_metric("mse", original, SAMPLES[:1], SAMPLES[1:])
    assert metric.has_split
    one_off = gives(y=lambda x: x + (x[0, 0] == SAMPLES[0]["x"][0, 0]))
    assert [metric(one_off), metric(one_off), metric(one_off, "final")] == pytest.approx([-1, -1, 0])
    assert seen == [feed["x"][0, 0] for feed in SAMPLES]


def test_outputs_that_went_missing_or_changed_their_shape_are_an_error() -> None:
    metric = load_metric("mse", gives(y=lambda x: x), SAMPLES)
    for wrong in (gives(y=lambda x: x[:1]), gives(z=lambda x: x)):
        with pytest.raises(UsageError, match="cannot be compared with the original's: 'y': "):
            metric(wrong)


def test_a_function_in_a_file_is_called_with_run_and_with_the_split_it_asks_for(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def state(run):\n"
        "    x = np.ones((1, 1))\n"
        "    for _ in range(3):\n"
        "        x = run({'x': x})['y']\n"
        "    return x.sum()\n"
        "def split(run, split='search'):\n"
        "    return 1 if split == 'final' else 2\n"
    )
    state, split = (load_metric(f"{tmp_path / 'mine.py'}:{name}") for name in ("state", "split"))
    assert state(gives(y=lambda x: 2 * x)) == 8
    assert [state.has_split, split.has_split] == [False, True]
    assert [split(gives()), split(gives(), "final")] == [2, 1]
    assert load_metric(split) is split
    assert load_metric(lambda run, **rest: len(rest)).has_split
    assert not load_metric(max).has_split


def test_the_mistakes_of_a_metric_are_told_in_one_line() -> None:
    def broken(run: Run) -> float:
        return [0.5][len("many")]

    def stops(run: Run) -> float:
        raise SystemExit(3)

    def refuses(run: Run) -> float:
        return float(run({})["y"])

    def fails(feed: Mapping[str, Any]) -> dict[str, Any]:
        raise OnnxoptError("model: the run failed")

    for function, message in (
        (broken, "metric broken: it failed: IndexError: list index out of range"),
        (stops, "metric stops: it failed: SystemExit: 3"),
        (lambda run: None, "metric <lambda>: it failed: TypeError: float"),
        (lambda run: float("nan"), "metric <lambda>: it gives NaN"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            load_metric(function)(gives())
        assert "\n" not in str(caught.value)
    with pytest.raises(OnnxoptError, match=r"^model: the run failed$"):
        load_metric(refuses)(fails)


def test_metrics_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'agreemnt' \(did you mean 'agreement'\?\); or give"):
        load_metric("agreemnt")
    with pytest.raises(UsageError, match="no such file"):
        load_metric(f"{tmp_path / 'gone.py'}:metric")
    for name in BUILTIN:
        with pytest.raises(UsageError, match=f"metric {name}: it compares with the original on samples"):
            load_metric(name, gives())


def test_a_drop_is_absolute_or_relative() -> None:
    assert parse_drop("0.005") == parse_drop(0.005) == Budget(0.005)
    assert parse_drop(" 1% ") == Budget(0.01, relative=True)
    assert [str(parse_drop(text)) for text in ("0.005", "1%")] == ["0.005", "1%"]
    assert Budget(0.01).allows(0.9, 0.89)
    assert not Budget(0.01).allows(0.9, 0.8899)
    assert Budget(0.01, relative=True).allows(-2, -2.02)
    assert not Budget(0.01, relative=True).allows(-2, -2.03)
    assert not Budget(0.5).allows(1, -math.inf)
    assert not Budget(0.5).allows(1, math.nan)
    assert Budget(0).allows(math.inf, math.inf)
    assert not Budget(5, relative=True).allows(1, -math.inf)
    assert not Budget(5, relative=True).allows(math.inf, 1)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.floats(-1e3, 1e3), st.floats(0, 10), st.booleans())
def test_what_is_better_is_allowed_and_what_exceeds_the_drop_is_not(
    before: float, drop: float, relative: bool
) -> None:
    budget = Budget(drop, relative)
    limit = drop * abs(before) if relative else drop
    assert budget.allows(before, before)
    assert budget.allows(before, before + 1)
    assert budget.allows(before, before - limit)
    assert not budget.allows(before, before - limit - 1e-3)


@pytest.mark.parametrize("text", ["", "%", "-1", "-1%", "nan", "inf", "1 percent"])
def test_nonsense_for_a_drop_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected a drop such as 0"):
        parse_drop(text)
