"""ONNX's own tests of single operators, as cases in memory; `node_cases.txt` names those that pass.

To write that list anew: ``python -m tests.training.node_cases > tests/training/node_cases.txt``
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx.backend.test.case.node import collect_testcases

from onnxopt.errors import OnnxoptError
from onnxopt.training import to_torch

LIST = Path(__file__).with_name("node_cases.txt")


class Case(NamedTuple):
    """A model, sets of its inputs and outputs, and how near the outputs have to be."""

    model: onnx.ModelProto
    data_sets: Sequence[tuple[Sequence[Any], Sequence[Any]]]
    rtol: float
    atol: float


@functools.cache
def cases() -> Mapping[str, Case]:
    """Every case by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the making of some overflows on purpose
        found = collect_testcases(None)
    return {
        one.name: Case(one.model, one.data_sets, one.rtol, one.atol)
        for one in found
        if one.model is not None and one.data_sets is not None
    }


def listed() -> dict[str, list[str]]:
    """The names on the list that the installed onnx has, by operator."""
    groups: dict[str, list[str]] = {}
    for name in LIST.read_text(encoding="utf-8").split():
        if name in cases():
            groups.setdefault(operator_of(cases()[name]), []).append(name)
    return groups


def operator_of(case: Case) -> str:
    """What a case is about: the operator of its last node, or `functions` where there are several nodes."""
    nodes = case.model.graph.node
    return nodes[-1].op_type if len(nodes) == 1 else "functions"


def array_of(value: Any) -> Any:
    """A case's input or output as numpy has it."""
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    if isinstance(value, onnx.SequenceProto):
        return onnx.numpy_helper.to_list(value)
    return onnx.numpy_helper.to_optional(value) if isinstance(value, onnx.OptionalProto) else value


def check(case: Case) -> None:
    """Run a case; raises where a result is not the expected one."""
    module = to_torch(case.model)
    for inputs, outputs in case.data_sets:
        names = [value.name for value in case.model.graph.input]
        found = module(dict(zip(names, map(array_of, inputs), strict=True)))
        for value, wanted in zip(case.model.graph.output, outputs, strict=True):
            _compare(array_of(wanted), found[value.name], case.rtol, max(case.atol, 1e-6))


def _compare(wanted: Any, found: Any, rtol: float, atol: float) -> None:
    if isinstance(wanted, list):
        assert isinstance(found, list)
        for one, other in zip(wanted, found, strict=True):
            _compare(one, other, rtol, atol)
        return
    if wanted is None:
        assert found is None
        return
    want = np.asarray(wanted)
    if want.dtype.kind in "OUS":
        np.testing.assert_array_equal(found, want)
        return
    assert isinstance(found, torch.Tensor)
    if want.dtype.type.__module__ == "numpy":
        assert str(found.dtype).removeprefix("torch.") == str(want.dtype)
    narrow = found.dtype.is_floating_point and found.dtype.itemsize < 4
    have = (found.float() if narrow else found).detach().numpy()
    assert have.shape == want.shape
    kind = np.float32 if want.dtype.kind not in "fcbiu" or narrow else want.dtype
    np.testing.assert_allclose(have.astype(kind), want.astype(kind), rtol=rtol, atol=atol)


def failures(names: Sequence[str]) -> list[str]:
    """What is wrong with the cases of these names."""
    found = []
    for name in names:
        try:
            check(cases()[name])
        except (AssertionError, OnnxoptError, RuntimeError, TypeError, ValueError, KeyError) as error:
            found.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write("".join(f"{name}\n" for name in sorted(cases()) if not failures([name])))
