"""Minimum cuts against brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.quantization.mincut import Cut

COSTS = st.one_of(st.just(0.0), st.integers(1, 8).map(float), st.floats(0.001, 1e9))


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, list[float], list[float], dict[tuple[int, int], float]]:
    """Nodes, what each costs on the first and on the second side, and what parting two of them costs."""
    count = draw(st.integers(1, 6))
    first, second = (draw(st.lists(COSTS, min_size=count, max_size=count)) for _ in range(2))
    pairs = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(lambda p: p[0] != p[1])
    return count, first, second, draw(st.dictionaries(pairs, COSTS, max_size=12))


def cost(
    side: tuple[bool, ...], first: list[float], second: list[float], parted: dict[tuple[int, int], float]
) -> float:
    alone = sum(first[node] if is_first else second[node] for node, is_first in enumerate(side))
    return alone + sum(amount for (a, b), amount in parted.items() if side[a] and not side[b])


@given(problems())
@settings(derandomize=True, deadline=None, max_examples=200)
def test_the_parting_is_the_cheapest_of_all_and_has_the_fewest_on_the_first_side(
    problem: tuple[int, list[float], list[float], dict[tuple[int, int], float]],
) -> None:
    count, first, second, parted = problem
    cut = Cut()
    for node in range(count):
        cut.if_first(node, first[node])
        cut.if_second(node, second[node])
    for (a, b), amount in parted.items():
        cut.if_parted(a, b, amount)
    found = cut.first_side()
    side = tuple(node in found for node in range(count))
    every = list(itertools.product((False, True), repeat=count))
    least = min(cost(one, first, second, parted) for one in every)
    assert cost(side, first, second, parted) == pytest.approx(least, rel=1e-9, abs=1e-6)
    whole = all(amount == int(amount) for amount in (*first, *second, *parted.values()))
    if whole:  # then ties are exact
        best = [one for one in every if cost(one, first, second, parted) == least]
        assert sum(side) == min(map(sum, best))


def test_costs_are_of_the_side_they_are_named_after() -> None:
    cut = Cut()
    cut.if_first("slow in front", 2)
    cut.if_second("slow in front", 1)
    cut.if_second("slow behind", 2)
    cut.if_first("slow behind", 1)
    found = cut.first_side()
    assert "slow behind" in found
    assert "slow in front" not in found


def test_what_must_not_be_parted_goes_where_both_together_cost_least() -> None:
    cut = Cut()
    cut.if_second("a", 5)
    cut.if_first("b", 3)
    cut.if_parted("a", "b", float("inf"))
    assert {"a", "b"} <= cut.first_side()


def test_a_ring_of_thousands() -> None:
    cut = Cut()
    for node in range(3000):
        cut.if_first(node, 1.0)
        cut.if_second(node, 1.5 if node % 2 else 0.7)
        cut.if_parted(node, (node + 1) % 3000, 0.1)
        cut.if_parted((node + 1) % 3000, node, 0.1)
    found = cut.first_side()
    assert {node for node in range(3000) if node % 2} == {node for node in found if isinstance(node, int)}
