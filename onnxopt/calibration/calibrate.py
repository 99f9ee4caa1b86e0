"""Run the model on samples and gather the statistics of its tensors, a sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np

from onnxopt.calibration.exposing import Slices
from onnxopt.calibration.statistics import Statistics, TensorStatistics
from onnxopt.data import Feeds
from onnxopt.errors import UsageError
from onnxopt.model import ModelLike, reusable

__all__ = ["Executor", "Progress", "calibrate"]

Executor = Literal["process", "ray"]
Progress = Callable[[str, float | None], None]
"""Called with what is being done, and how much of it is done (0 to 1)."""
_NO_CHANNELS: Mapping[str, int] = MappingProxyType({})


def calibrate(
    model: ModelLike,
    samples: Sequence[Feeds],
    tensors: Sequence[str] | None = None,
    *,
    held_out: Sequence[Feeds] = (),
    channels: Mapping[str, int] = _NO_CHANNELS,
    memory: int = 256 << 20,
    cache: Path | None = None,
    workers: int = 1,
    executor: Executor = "process",
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of tensors of a model over samples: the same to the bit in whatever order those come.

    Args:
        model: a path, bytes, a binary file, a `ModelProto` or an `ir.Model`; it is not changed.
        samples: complete feeds, of any shapes that the model takes; each is read when it is its turn.
        tensors: names, of those that `exposable` lists; None: all of them.
        held_out: more samples, which go into the `held_out` histograms only.
        channels: tensor name -> axis, for statistics of each channel.
        memory: bytes that the exposed tensors of one run may take together, at the sizes of the
            largest sample; where all do not fit, slices of the graph are run one after the other. A tensor
            that is larger has a run of its own.
        progress: called after each sample.

    Raises:
        UsageError: no samples, a tensor that is none or not float, or channels that differ.
        ModelError, RunError, RuntimeMissingError: as from `open_session` and `Session.run`.
    """
    if not len(samples):
        raise UsageError("calibrate: there are no samples")
    if cache is not None or workers != 1 or executor != "process":
        raise UsageError("calibrate: cache, workers and executor are still to come")
    slices = Slices(reusable(model), tensors)
    if unknown := [name for name in channels if name not in slices.names]:
        raise UsageError(f"calibrate: channels of tensor {unknown[0]!r}, which is not calibrated")
    statistics = {name: TensorStatistics() for name in slices.names}
    groups = slices.groups(_largest(samples, held_out), memory)
    parts, done = ((samples, False), (held_out, True)), 0
    steps = len(groups) * (len(samples) + len(held_out))
    for group in groups:
        with slices.runner(group) as run:
            for part, is_held_out in parts:
                for index in range(len(part)):
                    for name, array in run(part[index]):
                        _observe(statistics[name], name, array, channels.get(name), is_held_out)
                    done += 1
                    if progress is not None:
                        progress("calibrating", done / steps)
    return Statistics(statistics)


def _largest(*parts: Sequence[Feeds]) -> Feeds:
    """The sample of the most bytes; the sizes of all samples are looked at, one at a time."""
    sizes = [
        (sum(np.asarray(array).nbytes for array in part[index].values()), -number, -index)
        for number, part in enumerate(parts)
        for index in range(len(part))
    ]
    _, number, index = max(sizes)
    return parts[-number][-index]


def _observe(
    stats: TensorStatistics, name: str, array: np.ndarray, axis: int | None, is_held_out: bool
) -> None:
    if is_held_out:
        stats.held_out.add(array)
        return
    if axis is not None and not -array.ndim <= axis < array.ndim:
        raise UsageError(f"calibrate: tensor {name!r} of shape {array.shape} has no axis {axis}")
    try:
        stats.observe(array, axis)
    except UsageError as error:
        raise UsageError(f"calibrate: tensor {name!r}: {error}") from None
