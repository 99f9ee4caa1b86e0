"""ONNX's own tests of single operators: what has passed once must not fail."""

from __future__ import annotations

import pytest

from tests.training.node_cases import LIST, cases, failures, listed

GROUPS = listed()


@pytest.mark.parametrize("operator", sorted(GROUPS))
def test_cases_that_passed_still_pass(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxopt.training.interpreter.frozen.open_session", None)  # torch alone computes them
    assert failures(GROUPS[operator]) == []


def test_nine_of_ten_cases_are_on_the_list() -> None:
    known = set(LIST.read_text(encoding="utf-8").split())
    assert len(known & set(cases())) >= 0.9 * len(cases())
