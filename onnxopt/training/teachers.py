"""What teachers say to a batch: run in ONNX Runtime, kept by what the samples are, or run in torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from onnxopt.calibration.splitting import digest_of
from onnxopt.data.contract import contract_of
from onnxopt.errors import UsageError, did_you_mean
from onnxopt.graph import FLOATS
from onnxopt.model import ModelLike, load
from onnxopt.runtimes import RunError, open_session
from onnxopt.training.interpreter.module import to_torch
from onnxopt.training.interpreter.values import NATIVE
from onnxopt.training.loop.scoring import final_activations
from onnxopt.training.samples.dataset import Dataset

__all__ = ["Teacher", "fitting", "known", "looks_random", "paired", "pairs"]

Arrays = dict[str, np.ndarray]

_LOOKED_AT = 64
"""Samples that are looked at to tell whether they are noise."""


def pairs(specs: Sequence[str]) -> list[tuple[str, str]]:
    """``STUDENT=TEACHER``, or one name for both. Raises UsageError."""
    found = [(one.partition("=")[0], one.partition("=")[2] or one) for one in specs]
    for spec, (mine, theirs) in zip(specs, found, strict=True):
        if not mine or theirs.endswith("="):
            raise UsageError(f"distill: cannot read {spec!r}: expected STUDENT=TEACHER")
    return found


def fitting(specs: Sequence[str], names: Sequence[str]) -> list[tuple[str, str]]:
    """As `pairs`; a pattern (`*Relu*`) stands for all of these names that fit it. Raises UsageError."""
    found = []
    for mine, theirs in pairs(specs):
        fit = fnmatch.filter(names, mine) if mine == theirs else []
        if "*" in mine and not fit:
            raise UsageError(f"distill: no tensor that both models have is called {mine!r}")
        found += [(one, one) for one in fit] or [(mine, theirs)]
    return found


def paired(
    what: str, names: Sequence[str], others: Sequence[str], given: Mapping[str, str]
) -> dict[str, str]:
    """Each name with the one of the others that goes with it: as given, the same, or the only one."""
    found = {}
    for name in names:
        other = given.get(name, name)
        if other not in others and name not in given and len(names) == len(others) == 1:
            other = others[0]
        if other not in others:
            shown = ", ".join(map(repr, others)) or "none"
            raise UsageError(
                f"distill: no {what} goes with {name!r} among {shown}{did_you_mean(other, others)}; "
                f"say it with {what}s=STUDENT=TEACHER"
            )
        found[name] = other
    if not found:
        raise UsageError(f"distill: the model has no float {what} to learn with")
    return found


def known(what: str, names: Iterable[str], there: Sequence[str]) -> None:
    """Raise UsageError where one of the names is not there."""
    for name in names:
        if name not in there:
            raise UsageError(f"distill: {what}: there is no {name!r}{did_you_mean(name, there)}")


class Teacher:
    """A model that is learned from, and the tensors of it that are asked for.

    Args:
        model: as `load` takes it.
        hidden: tensors to give besides the outputs.
        fed_by: input of the teacher -> name of the array that feeds it.
        device: where it runs as a torch module; None: in ONNX Runtime, on the CPU.
        memory: bytes of results that are kept by the content of the samples; 0: none. What is kept is
            computed a sample at a time, so that it does not depend on the batch a sample comes in.

    Raises:
        ModelError, UsageError: no such model, tensor or array.
    """

    def __init__(
        self,
        model: ModelLike,
        hidden: Sequence[str] = (),
        fed_by: Mapping[str, str] | None = None,
        *,
        device: torch.device | None = None,
        memory: int = 0,
    ) -> None:
        loaded = load(model)
        self.activations = final_activations(loaded)
        self.outputs = tuple(one.name or "" for one in loaded.graph.outputs if one.dtype in (None, *FLOATS))
        self.inputs = {item.name: item for item in contract_of(loaded).required}
        self.fed_by = dict(fed_by or {name: name for name in self.inputs})
        sizes = [item.dims[0] for item in self.inputs.values() if item.dims]
        self._fixed = next((size for size in sizes if isinstance(size, int)), 0)
        self._free, self._kept = memory, dict[str, Arrays]()
        self._device = device
        if device is not None:
            self._module = to_torch(loaded, trainable=(), expose=hidden).to(device).eval()
        else:
            self._session = open_session(_exposed(loaded, hidden))

    def __call__(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs and hidden tensors by name, for a batch of the student's inputs; on the arrays' device."""
        device = next(iter(arrays.values())).device
        fed = {name: arrays[mine] for name, mine in self.fed_by.items()}
        if self._device is not None:
            with torch.no_grad():
                kinds = {name: NATIVE[ir.DataType.from_numpy(one.dtype)] for name, one in self.inputs.items()}
                found = self._module({name: one.to(self._device, kinds[name]) for name, one in fed.items()})
            return {name: one.to(device) for name, one in found.items()}
        fed = {name: one.float() if one.dtype == torch.bfloat16 else one for name, one in fed.items()}
        feeds = {name: one.cpu().numpy().astype(self.inputs[name].dtype) for name, one in fed.items()}
        lengths = {len(one) for one in feeds.values() if one.ndim}
        count = lengths.pop() if len(lengths) == 1 else 0
        rows = self._recalled(feeds, count) if self._free or self._kept else self._run(feeds, count)
        return {name: torch.from_numpy(one).to(device) for name, one in rows.items()}

    def _recalled(self, feeds: Arrays, count: int) -> Arrays:
        """What was said before, or now, to each sample."""
        rows = []
        for one in [_part(feeds, number, 1) for number in range(count)] or [feeds]:
            key = digest_of(one)
            row = self._kept.get(key)
            if row is None:
                row = self._run(one, min(count, 1))
                size = sum(array.nbytes for array in row.values())
                if size <= self._free:
                    self._free -= size
                    self._kept[key] = row
            rows.append(row)
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def _run(self, feeds: Arrays, count: int) -> Arrays:
        """In batches of the size that the model is made for, filled up; else all at once.

        count: of samples; 0: the arrays differ along axis 0, as with a state: they are one feed as they are.
        """
        if not count:
            return self._said(feeds)
        size = self._fixed or count
        parts = []
        for first in range(0, count, size):
            piece, left = _part(feeds, first, size), count - first
            filled = {
                name: np.resize(array, (size, *array.shape[1:])) if array.ndim else array
                for name, array in piece.items()
            }
            found = self._said(filled)
            parts.append(found if left >= size else _part(found, 0, left))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _said(self, feeds: Arrays) -> Arrays:
        try:
            return _floats(self._session.run(feeds))
        except RunError as error:
            raise UsageError(f"distill: the teacher does not take these inputs: {error}") from error


def _part(feeds: Arrays, first: int, size: int) -> Arrays:
    """Some samples; a scalar is of all of them."""
    return {name: array[first : first + size] if array.ndim else array for name, array in feeds.items()}


def _floats(found: Mapping[str, np.ndarray]) -> Arrays:
    return {name: one for name, one in found.items() if np.ndim(one) and np.asarray(one).dtype.kind == "f"}


def _exposed(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """The caller's own model, with these tensors as further outputs."""
    computed = {value.name or "": value for node in model.graph for value in node.outputs}
    for name in names:
        if name not in computed:
            raise UsageError(f"distill: the teacher has no tensor {name!r}{did_you_mean(name, computed)}")
        if computed[name] not in model.graph.outputs:
            model.graph.outputs.append(computed[name])
    return model


def looks_random(data: Dataset) -> bool:
    """Whether neighbours in the inputs have nothing to do with each other, in every input that has some.

    Of the first samples, less their mean at each place; rows of features that have no order do not count.
    """
    if data.length is None:
        return False
    batch = next(data.evaluated(_LOOKED_AT))
    found = []
    for item in data.contract.required:
        x = batch.arrays[item.name]
        if x.dtype.kind != "f" or x.ndim < 3 or x.size < 1 << 12 or len(x) < 8:
            continue
        x = x.astype(np.float64) - x.mean(0, dtype=np.float64)
        power = max(float((x * x).mean()), float(np.finfo(np.float64).tiny))
        near = [
            float((x.take(range(1, n), axis) * x.take(range(n - 1), axis)).mean())
            for axis in (-1, -2)
            if (n := x.shape[axis]) > 1 and axis + x.ndim > 0
        ]
        found.append(all(abs(one) / power < 4 / x.size**0.5 for one in near))
    return bool(found) and all(found)
