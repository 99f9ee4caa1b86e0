import gc
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from onnxopt.benchmarking.rounds import Clocks, Pilot, Plan, Protocol, clocks, measure, pilot, plan

ONE_THREAD = clocks(one_thread=True)


class Busy:
    """A session on the CPU whose run burns a given CPU time."""

    open_now = 0
    most_open = 0

    assignment: ClassVar = {"CPUExecutionProvider": 5}

    def __init__(self, name: str, milliseconds: float, log: list[str]) -> None:
        self.provider, self.name, self.milliseconds, self.log = "cpu", name, milliseconds, log

    def __enter__(self) -> "Busy":
        self.log.append(self.name)
        Busy.open_now += 1
        Busy.most_open = max(Busy.most_open, Busy.open_now)
        return self

    def __exit__(self, *_: object) -> None:
        Busy.open_now -= 1

    def run(self, feeds: Any) -> None:
        assert not feeds.get("refuse")
        end = time.thread_time_ns() + self.milliseconds * 1e6
        while time.thread_time_ns() < end:
            pass


def protocol(**changes: Any) -> Protocol:
    standard: dict[str, Any] = {
        "clocks": ONE_THREAD,
        "plan": Plan(warm_ups=1, refill=True, batch=2, rounds=4),
        "seconds": 0.2,
        "seed": 0,
        "together": True,
        "progress": None,
    }
    return Protocol(**{**standard, **changes})


def busy(name: str, milliseconds: float, log: list[str]) -> Any:
    return Busy(name, milliseconds, log)


def openers(log: list[str], before: float = 1.0, after: float = 2.0) -> list[Any]:
    speeds = {"before": before, "control": before, "after": after}
    return [lambda n=name, ms=speed: busy(n, ms, log) for name, speed in speeds.items()]


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    Busy.open_now = Busy.most_open = 0
    yield
    assert Busy.open_now == 0


def test_samples_are_nanoseconds_a_run_of_each_subject() -> None:
    found = measure(openers([]), [{}], protocol())
    repeats, rounds, subjects, both = found.runs.shape
    assert repeats >= 1
    assert (rounds, subjects, both) == (4, 3, 2)
    assert found.opens.shape == (repeats, 3)
    cpu = np.median(found.runs[..., 0], axis=(0, 1)) / 1e6
    assert cpu == pytest.approx([1.0, 1.0, 2.0], rel=0.1)
    assert (found.runs[..., 1] >= 0.9 * found.runs[..., 0]).all()


def test_every_repeat_has_fresh_sessions_in_an_order_that_the_seed_decides() -> None:
    def order(seed: int) -> list[tuple[str, ...]]:
        log: list[str] = []
        measure(openers(log, 0.1, 0.1), [{}], protocol(seed=seed))
        return list(zip(*[iter(log)] * 3, strict=True))

    first, again, other = order(1), order(1), order(2)
    assert all(sorted(names) == ["after", "before", "control"] for names in first)
    assert len(set(first)) > 1
    assert first[:3] == again[:3]
    assert first[:10] != other[:10]
    assert Busy.most_open == 3


def test_models_that_fill_the_memory_are_open_one_at_a_time() -> None:
    found = measure(openers([]), [{}], protocol(together=False))
    assert Busy.most_open == 1
    assert np.median(found.runs[..., 2, 0] / found.runs[..., 0, 0]) == pytest.approx(2.0, rel=0.1)


def test_slow_models_stop_after_three_times_the_seconds() -> None:
    begin = time.perf_counter()
    found = measure(openers([], 20.0, 20.0), [{}], protocol(seconds=0.05))
    assert found.runs.shape[:2] == (1, 4)
    assert time.perf_counter() - begin < 10


class Ticking:
    """A clock that only runs of its sessions move on."""

    def __init__(self) -> None:
        self.now = 0

    def nanoseconds(self) -> int:
        return self.now

    def opener(self, milliseconds: int) -> Any:
        session = busy("session", 0.0, [])

        def run(_feeds: Any) -> None:
            self.now += milliseconds * 1_000_000

        session.run = run
        return lambda: session


def test_progress_rises_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeat has 13 runs of 1, 1 and 2 ms: 0.052 s, while the wall stands still."""
    told: list[float] = []
    ticking = Ticking()
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    rules = protocol(clocks=Clocks(ticking.nanoseconds, 1e-9, "CPU time"), progress=told.append)
    measure([ticking.opener(ms) for ms in (1, 1, 2)], [{}], rules)
    assert told == pytest.approx([0.26, 0.52, 0.78, 1.0])
    told.clear()
    measure([ticking.opener(ms) for ms in (1, 1, 2)], [{}], replace(rules, seconds=0.02))
    assert told == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_a_round_gives_all_subjects_the_same_feeds_and_uses_them_in_turn() -> None:
    seen: list[tuple[str, str]] = []

    def opener(name: str) -> Any:
        session = busy(name, 0.0, [])
        session.run = lambda feeds: seen.append((name, feeds["id"]))
        return lambda: session

    rules = protocol(plan=Plan(warm_ups=0, refill=False, batch=1, rounds=4), seconds=1e-9)
    measure([opener(name) for name in ("before", "control", "after")], [{"id": "a"}, {"id": "b"}], rules)
    for turn in itertools.islice(zip(*[iter(seen)] * 3, strict=True), 8):
        assert {name for name, _ in turn} == {"before", "control", "after"}
        assert len({feed for _, feed in turn}) == 1
    assert {feed for _, feed in seen} == {"a", "b"}


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was_found_also_after_an_error(enabled: bool) -> None:
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        states: list[bool] = []

        def failing(feeds: Any) -> None:
            states.append(gc.isenabled())
            if len(states) > 3:
                raise RuntimeError("broken")

        session = busy("before", 0.1, [])
        session.run = failing
        with pytest.raises(RuntimeError, match="broken"):
            measure([lambda: session] * 3, [{}], protocol())
        assert gc.isenabled() is enabled
        assert states[-1] is False
    finally:
        (gc.enable if was else gc.disable)()


def test_pilot_sees_the_speed_and_runs_every_sample() -> None:
    log: list[str] = []
    found = pilot(lambda: busy("before", 2.0, log), [{}, {}, {}], ONE_THREAD)
    assert 0.002 <= found.run_s < 0.1
    assert found.build_s >= 0.006
    assert log == ["before"]
    assert found.assignment == {"CPUExecutionProvider": 5}
    with pytest.raises(AssertionError):
        pilot(lambda: busy("before", 2.0, log), [{}, {"refuse": True}], ONE_THREAD)


def test_plan_fills_samples_and_slots() -> None:
    quick = plan([Pilot(0.001, 0.001, 0.0001, {}), Pilot(0.001, 0.001, 0.0002, {})], ONE_THREAD, seconds=10)
    assert (quick.batch, quick.warm_ups, quick.refill) == (50, 3, True)
    assert quick.rounds * 3 * 51 * 0.00015 == pytest.approx(0.5, rel=0.1)
    costly_to_open = plan([Pilot(1.0, 1.0, 0.01, {})] * 2, ONE_THREAD, seconds=10)
    assert costly_to_open.rounds * 3 * 2 * 0.01 == pytest.approx(10 / 6, rel=0.1)
    slow = plan([Pilot(7.0, 2.0, 5.0, {})] * 2, ONE_THREAD, seconds=10)
    assert slow == Plan(warm_ups=1, refill=False, batch=1, rounds=3)


def test_samples_are_longer_where_the_clock_is_coarse() -> None:
    coarse = SimpleNamespace(sample_s=type(ONE_THREAD)(time.thread_time_ns, 1 / 64, "CPU time").sample_s)
    assert ONE_THREAD.sample_s == 0.005
    assert coarse.sample_s == pytest.approx(20 / 64)


def test_wall_time_decides_where_a_thread_does_not_do_all_the_work() -> None:
    assert (ONE_THREAD.decides, ONE_THREAD.cpu) == ("CPU time", time.thread_time_ns)
    several = clocks(one_thread=False)
    assert (several.decides, several.cpu) == ("wall time", time.process_time_ns)
