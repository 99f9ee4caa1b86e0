"""Each pass shows itself: its example is a valid model that it rewrites, and the numbers stay."""

from __future__ import annotations

import inspect

import onnx
import pytest

from onnxopt.claims import Pass
from onnxopt.passes import BUILTIN
from onnxopt.protobuf import dump
from tests.support import assert_equivalent, run_pass, text_model


@pytest.mark.parametrize("one", BUILTIN, ids=lambda one: one.name)
def test_the_example_of_a_pass(one: type[Pass]) -> None:
    before = text_model(one.example)
    onnx.checker.check_model(before, full_check=True)
    done = run_pass(before, one())
    assert done.changes
    onnx.checker.check_model(dump(done.model), full_check=True)
    if one.kind != "lossy":  # whose numbers are held against a closed form in its own tests
        assert_equivalent(before, done.model, kind=one.kind)


@pytest.mark.parametrize("one", BUILTIN, ids=lambda one: one.name)
def test_the_text_of_a_pass_says_before_after_and_what_it_declines(one: type[Pass]) -> None:
    text = inspect.getmodule(one).__doc__ or ""
    assert [word for word in ("Before:", "After:", "\nDeclines: ") if word not in text] == []
    assert (one.__doc__ or "").split("\n")[0].endswith(".")
