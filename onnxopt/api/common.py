"""What the workflows share: samples, versions, and what is recorded in a model."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

import onnxopt
from onnxopt.benchmarking.profits import Guard
from onnxopt.data import Feeds, FeedSource, read_feeds, synthesize
from onnxopt.errors import NoSamplesError
from onnxopt.job import Job, Progress
from onnxopt.model import ModelLike, opener, reusable
from onnxopt.pipeline import Pipeline
from onnxopt.targets import Target

__all__ = ["opened", "record", "samples_for", "silent", "sizes_of", "source_of", "versions"]


def opened(
    model: ModelLike,
    pipeline: Pipeline,
    target: Target,
    shapes: Mapping[str, Sequence[int]] | None,
    seed: int,
    progress: Progress,
    *,
    frozen: bool,
) -> Job:
    """A job on a model whose passes are not guarded."""
    model = reusable(model)
    progress("reading the model", None)
    open_model = opener(model)
    guard = Guard((), target.provider, measure=False)
    return Job(
        model, open_model(), open_model, pipeline, target, guard, shapes, seed, progress, frozen=frozen
    )


def samples_for(job: Job, data: FeedSource | None) -> Sequence[Feeds]:
    """The user's samples, or synthetic ones; none, with a note, where none could be made up."""
    if data is not None:
        return read_feeds(data, job.model)
    job.progress("making up samples", None)
    try:
        return synthesize(job.model, seed=job.seed, shapes=job.shapes)
    except NoSamplesError as error:
        job.notes.append(str(error))
        return []


def sizes_of(samples: Sequence[Feeds]) -> dict[str, tuple[int, ...]]:
    """Input shapes of the first sample."""
    return {name: np.shape(array) for name, array in samples[0].items()} if samples else {}


def source_of(model: ModelLike) -> str:
    """What a report calls the input: its path, or what kind of object it was."""
    return os.fspath(model) if isinstance(model, str | os.PathLike) else f"({type(model).__name__})"


def silent(_what: str, _share: float | None) -> None:
    """The progress of a caller who asked for none."""


def record(model: ir.Model, applied: Sequence[str], input_sha256: str) -> None:
    """Write into the model's metadata what was done to it, by which versions, and to which input."""
    used = " ".join(f"{name}={version}" for name, version in versions().items())
    model.metadata_props["onnxopt.passes"] = ",".join(applied)
    model.metadata_props["onnxopt.versions"] = used
    model.metadata_props["onnxopt.input_sha256"] = input_sha256


def versions() -> dict[str, str]:
    """The versions that the result depends on, as far as they are installed."""
    found = {"onnxopt": onnxopt.__version__}
    for name in ("onnx", "onnx-ir", "numpy", "onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
