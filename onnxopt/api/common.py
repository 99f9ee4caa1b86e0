"""What the workflows share: samples, versions, and what is recorded in a model."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

import onnxopt
from onnxopt.data import Feeds, FeedSource, read_feeds, synthesize
from onnxopt.errors import NoSamplesError
from onnxopt.job import Job
from onnxopt.model import ModelLike

__all__ = ["record", "samples_for", "silent", "sizes_of", "source_of", "versions"]


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
