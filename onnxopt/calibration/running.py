"""Run the model on samples and gather the statistics of its tensors, a sample at a time."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from onnxopt.calibration.exposing import Slices
from onnxopt.calibration.shards import Executor, run_shards
from onnxopt.calibration.splitting import digest_of
from onnxopt.calibration.statistics import Statistics
from onnxopt.calibration.storing import read_tensors, write_tensors
from onnxopt.calibration.tensors import TensorStatistics
from onnxopt.data import Feeds, Samples
from onnxopt.errors import UsageError
from onnxopt.model import ModelLike, fingerprint, reusable
from onnxopt.runtimes import runtime_version

if TYPE_CHECKING:
    from onnxopt.job import Progress

__all__ = ["calibrate"]

_NO_CHANNELS: Mapping[str, int] = MappingProxyType({})
_SAVE_S = 20.0
"""Seconds of work that a run which is killed may lose."""


def calibrate(
    model: ModelLike,
    samples: Sequence[Feeds],
    tensors: Sequence[str] | None = None,
    *,
    held_out: Sequence[Feeds] = (),
    channels: Mapping[str, int] = _NO_CHANNELS,
    memory: int = 128 << 20,
    cache: Path | None = None,
    workers: int = 1,
    executor: Executor = "process",
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of tensors of a model over samples: the same to the bit in whatever order those come.

    Args:
        model: a path, bytes, a binary file, a `ModelProto` or an `ir.Model`; it is not changed.
        samples: complete feeds, of any shapes that the model takes. Each is read when it is its turn: once
            for its size and hash, then once for each slice of the graph.
        tensors: names, of those that `exposable` lists; None: all of them.
        held_out: more samples, which go into the `held_out` histograms only.
        channels: tensor name -> axis, for statistics of each channel.
        memory: bytes that the exposed tensors of one run, in one worker, may take together, at the sizes of
            the largest sample; where all do not fit, slices of the graph are run one after the other. A
            tensor that is larger has a run of its own.
        cache: a folder for results, by the content of model and samples, and by the tensors: what is there
            is not run again, and a run that was killed goes on where it last saved. A file in it that
            cannot be read is written anew.
        workers: how many processes share the samples, one thread each. A script that asks for more than one
            has to be guarded by `if __name__ == "__main__"`.
        executor: where workers run: processes here, or tasks of the user's Ray cluster (a local one where
            none runs). A model with external data is read there by its path.
        progress: called after each sample, with workers after each one's share.

    Raises:
        UsageError: no samples, a tensor that is none or not float, channels that differ, no Ray.
        ModelError, RunError, RuntimeMissingError: as from `open_session` and `Session.run`.
    """
    if not len(samples) or workers < 1:
        raise UsageError(f"calibrate: {len(samples)} samples and {workers} workers: at least one of each")
    model = reusable(model)
    slices = Slices(model, tensors)
    if unknown := [name for name in channels if name not in slices.names]:
        raise UsageError(f"calibrate: channels of tensor {unknown[0]!r}, which is not calibrated")
    job = _Job(slices, channels, memory, _survey(samples), _survey(held_out), progress)
    result = cache and cache / f"{job.key(model)}.npz"
    parts = result and result.with_suffix(".parts")
    if result and (known := _read(result)):
        return known[0]
    if workers == 1:
        statistics = job.run(parts)
    else:
        shared = {"tensors": slices.names, "channels": dict(channels), "memory": memory, "cache": parts}
        statistics = run_shards(calibrate, model, job.shards(workers), shared, executor, progress)
    if result and parts:
        write_tensors(result, statistics)
        shutil.rmtree(parts, ignore_errors=True)
    return statistics


def _read(file: Path, state: str = "") -> tuple[Statistics, int] | None:
    """What was saved in that state, and how many steps had been done; None where nothing can be used."""
    try:
        tensors, found, done = read_tensors(file)
    except UsageError:  # none there, or it was cut off
        return None
    return (Statistics(tensors), done) if found == state else None


@dataclass(frozen=True)
class _Survey:
    """Samples in the order of their hashes, which is the same however they are given."""

    samples: Samples
    hashes: tuple[str, ...]
    sizes: tuple[int, ...]
    """Bytes."""


def _survey(samples: Sequence[Feeds]) -> _Survey:
    seen = []
    for index in range(len(samples)):
        sample = samples[index]
        seen.append((digest_of(sample), sum(np.asarray(array).nbytes for array in sample.values()), index))
    seen.sort()
    hashes, sizes, order = zip(*seen, strict=True) if seen else ((), (), ())
    return _Survey(Samples(len(order), lambda number: samples[order[number]]), hashes, sizes)


@dataclass(frozen=True)
class _Job:
    slices: Slices
    channels: Mapping[str, int]
    memory: int
    given: _Survey
    held_out: _Survey
    progress: Progress | None

    def key(self, model: ModelLike) -> str:
        """What the result depends on, as a hash; the memory is nothing of it."""
        asked = [self.slices.names, sorted(self.channels.items()), self.given.hashes, self.held_out.hashes]
        text = json.dumps([fingerprint(model), runtime_version(), *asked])
        return hashlib.sha256(text.encode()).hexdigest()

    def shards(self, workers: int) -> list[tuple[Sequence[Feeds], Sequence[Feeds]]]:
        """Samples, and held-out ones, of each worker: at least one sample each."""
        count = min(workers, len(self.given.samples))
        return [
            (self.given.samples[start::count], self.held_out.samples[start::count]) for start in range(count)
        ]

    def run(self, folder: Path | None = None) -> Statistics:
        """All samples through all slices; now and then what is known is saved in `folder`."""
        groups = self.slices.groups(self._largest, self.memory)
        state = json.dumps(groups)
        known = folder and _read(folder / "state.npz", state)
        statistics, done = known or (Statistics({name: TensorStatistics() for name in self.slices.names}), 0)
        parts = ((self.given.samples, False), (self.held_out.samples, True))
        steps = [(part, index, is_held_out) for part, is_held_out in parts for index in range(len(part))]
        saved = time.monotonic()
        for number, group in enumerate(groups):
            first = done - number * len(steps)
            if first >= len(steps):
                continue
            with self.slices.runner(group) as run:
                for part, index, is_held_out in steps[first:]:
                    for name, array in run(part[index]):
                        self._observe(statistics[name], name, array, is_held_out)
                    done += 1
                    if self.progress is not None:
                        self.progress("calibrating", done / (len(groups) * len(steps)))
                    if folder and time.monotonic() - saved >= _SAVE_S:
                        write_tensors(folder / "state.npz", statistics, state, done)
                        saved = time.monotonic()
        return statistics

    @property
    def _largest(self) -> Feeds:
        parts = (self.given, self.held_out)
        _, part, index = max(
            (size, p, i) for p, part in enumerate(parts) for i, size in enumerate(part.sizes)
        )
        return parts[part].samples[index]

    def _observe(self, stats: TensorStatistics, name: str, array: np.ndarray, is_held_out: bool) -> None:
        axis = self.channels.get(name)
        if is_held_out:
            stats.held_out.add(array)
            return
        if axis is not None and not -array.ndim <= axis < array.ndim:
            raise UsageError(f"calibrate: tensor {name!r} of shape {array.shape} has no axis {axis}")
        try:
            stats.observe(array, axis)
        except UsageError as error:
            raise UsageError(f"calibrate: tensor {name!r}: {error}") from None
