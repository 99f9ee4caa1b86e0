"""Calibration shared out among processes of this machine, or among the tasks of a Ray cluster."""

from __future__ import annotations

import functools
import multiprocessing
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from onnxopt.calibration.statistics import Statistics
from onnxopt.data import Feeds, Samples
from onnxopt.errors import UsageError, did_you_mean
from onnxopt.graph import uses_external_data
from onnxopt.model import ModelLike, load
from onnxopt.storage import materialize

if TYPE_CHECKING:
    from onnxopt.job import Progress

__all__ = ["Executor", "run_shards"]

Executor = Literal["process", "ray"]
Shard = tuple[Sequence[Feeds], Sequence[Feeds]]
"""Samples, and held-out samples."""


def run_shards(
    calibrate: Callable[..., Statistics],
    model: ModelLike,
    shards: Sequence[Shard],
    shared: Mapping[str, Any],
    executor: Executor,
    progress: Progress | None,
) -> Statistics:
    """The merged statistics of all shards, each calibrated by a worker of its own.

    Samples are read here, one at a time, and handed over through files, or through Ray's object store, which
    goes to disk by itself. Raises UsageError where workers cannot run, and what `calibrate` raises.
    """
    if executor not in _EXECUTORS:
        raise UsageError(f"unknown executor {executor!r}{did_you_mean(executor, _EXECUTORS)}")
    merged: Statistics | None = None
    with materialize(model) as source, _EXECUTORS[executor](calibrate, source, shards, shared) as results:
        for done, statistics in enumerate(results, start=1):
            merged = statistics if merged is None else merged.merge(statistics)
            if progress is not None:
                progress("calibrating", done / len(shards))
    assert merged is not None
    return merged


Results = Iterator[Statistics]


@contextmanager
def _processes(
    calibrate: Callable[..., Statistics],
    model: Path | bytes,
    shards: Sequence[Shard],
    shared: Mapping[str, Any],
) -> Iterator[Results]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="onnxopt-") as folder:
        work = functools.partial(_from_files, calibrate, model, shared)
        with ProcessPoolExecutor(len(shards), context) as pool:
            tasks = [
                pool.submit(
                    work,
                    *(_written(part, Path(folder) / f"{shard}-{kind}") for kind, part in enumerate(parts)),
                )
                for shard, parts in enumerate(shards)
            ]
            yield _results(tasks)


def _results(tasks: Sequence[Any]) -> Results:
    try:
        for task in as_completed(tasks):
            yield task.result()
    except BrokenProcessPool as error:
        raise UsageError(
            "calibrate: a worker died: for want of memory, or because the script that asked for workers is "
            "not guarded by `if __name__ == '__main__'`"
        ) from error


def _written(samples: Sequence[Feeds], folder: Path) -> list[Path]:
    """The samples as files; pickled, since .npz holds neither strings nor bfloat16: they never leave here."""
    folder.mkdir()
    files = [folder / str(index) for index in range(len(samples))]
    for index, file in enumerate(files):
        file.write_bytes(pickle.dumps(samples[index]))
    return files


def _from_files(
    calibrate: Callable[..., Statistics],
    model: Path | bytes,
    shared: Mapping[str, Any],
    files: Sequence[Path],
    held_out: Sequence[Path],
) -> Statistics:
    def samples(part: Sequence[Path]) -> Samples:
        return Samples(len(part), lambda index: pickle.loads(part[index].read_bytes()))

    return calibrate(model, samples(files), held_out=samples(held_out), **shared)


@contextmanager
def _ray_tasks(
    calibrate: Callable[..., Statistics],
    model: Path | bytes,
    shards: Sequence[Shard],
    shared: Mapping[str, Any],
) -> Iterator[Results]:
    ray = _ray()
    if isinstance(model, Path) and not uses_external_data(load(model)):
        model = model.read_bytes()
    own = not ray.is_initialized() and _join(ray, len(shards))
    try:
        place, put = ray.put(model), ray.put
        task = ray.remote(_from_store)
        pending = [
            task.remote(
                calibrate, place, shared, *([put(part[i]) for i in range(len(part))] for part in parts)
            )
            for parts in shards
        ]
        yield _as_ready(ray, pending)
    finally:
        if own:
            ray.shutdown()


def _as_ready(ray: ModuleType, pending: list[Any]) -> Results:
    while pending:
        ready, pending = ray.wait(pending)
        try:
            yield ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error


def _from_store(
    calibrate: Callable[..., Statistics],
    model: Path | bytes,
    shared: Mapping[str, Any],
    refs: Sequence[Any],
    held_out: Sequence[Any],
) -> Statistics:
    ray = _ray()

    def samples(part: Sequence[Any]) -> Samples:
        return Samples(len(part), lambda index: ray.get(part[index]))

    return calibrate(model, samples(refs), held_out=samples(held_out), **shared)


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise UsageError("calibrate: Ray is not installed: pip install 'onnxopt[ray]'") from error
    module: ModuleType = ray
    return module


def _join(ray: ModuleType, workers: int) -> bool:
    """Connect to the running cluster, or start one on this machine; True, since it is ours to leave."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError:
        ray.init(num_cpus=workers, include_dashboard=False, **quiet)
    return True


_EXECUTORS = {"process": _processes, "ray": _ray_tasks}
