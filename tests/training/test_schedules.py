"""Schedules against their closed forms, and against torch's own where it has them."""

from __future__ import annotations

import math

import pytest

from onnxopt.errors import UsageError
from onnxopt.training.schedules import SCHEDULES, Clock, parse_schedule


@pytest.mark.parametrize(
    ("spelled", "at", "expected"),
    [
        ("constant", Clock(7, 10), 1.0),
        ("linear", Clock(3, 10), 0.7),
        ("linear{end=0.5}", Clock(10, 10), 0.5),
        ("linear{power=3}", Clock(5, 10), 0.125),
        ("cosine", Clock(0, 10), 1.0),
        ("cosine", Clock(5, 10), 0.5),
        ("cosine{end=0.1}", Clock(10, 10), 0.1),
        ("cosine", Clock(12, 10), 0.0),
        ("exponential{gamma=0.5}", Clock(99, 100, epoch=3), 0.125),
        ("step{every=2,gamma=0.1}", Clock(99, 100, epoch=5), 0.01),
        ("cyclic{period=10,low=0.2}", Clock(0, 100), 0.2),
        ("cyclic{period=10,low=0.2}", Clock(5, 100), 1.0),
        ("cyclic{period=10,low=0.2}", Clock(12, 100), 0.2 + 0.8 * 0.4),
        ("inverse-sqrt{delta=3,power=1}", Clock(5, 10), 16**-0.5),
        ("inverse-sqrt{delta=1,power=2}", Clock(3, 10), 0.25),
    ],
)
def test_closed_forms(spelled: str, at: Clock, expected: float) -> None:
    assert parse_schedule(spelled)(at) == pytest.approx(expected, abs=1e-12)


def test_warmup_rises_and_then_starts_the_schedule_at_its_own_zero() -> None:
    schedule = parse_schedule("linear", warmup=4)
    assert [schedule(Clock(t, 14)) for t in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.9])


def test_plateau_waits_and_drops() -> None:
    schedule = parse_schedule("plateau{factor=0.5,patience=1}")
    scores = (0.1, 0.2, 0.2, 0.2, 0.1, 0.1, 0.3)
    found = [schedule(Clock(scores=scores[:n])) for n in range(len(scores) + 1)]
    assert found == [1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25]


def test_every_schedule_starts_at_one_or_below() -> None:
    for name in SCHEDULES:
        assert 0 < parse_schedule(name)(Clock(0, 100)) <= 1 + 1e-12
    assert math.isclose(parse_schedule("constant", warmup=2)(Clock(1, 5)), 1.0)


@pytest.mark.parametrize(
    ("spelled", "told"),
    [
        ("cosin", r"unknown schedule 'cosin' \(did you mean 'cosine'\?\)"),
        ("cosine{stop=1}", "cosine: unknown option 'stop'"),
        ("linear{end=x}", "linear: end: expected float, found 'x'"),
        ("step{every=0}", "period and every are at least 1"),
    ],
)
def test_what_cannot_be_read_is_told(spelled: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse_schedule(spelled)
