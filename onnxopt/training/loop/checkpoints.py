"""Checkpoints: written whole or not at all, and read back only for the training that they are of."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from onnxopt.errors import ModelError, UsageError

__all__ = ["read_checkpoint", "write_checkpoint"]


def write_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write tensors and plain values; the file there is replaced when the new one is on the disk.

    Raises:
        ModelError: the place cannot be written to, or the disk is full.
    """
    draft = path.with_suffix(".draft")
    try:
        with draft.open("wb") as stream:
            torch.save(dict(state), stream)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written: {error.strerror or error}") from error


def read_checkpoint(path: Path, made_for: str) -> dict[str, Any] | None:
    """The state at `path`, on the CPU; None where there is none. No code in the file is run.

    Raises:
        UsageError: it is damaged, or of another model, data or recipe than `made_for` stands for.
    """
    if not path.exists():
        return None
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(f"--resume: {path} is no checkpoint, or damaged: remove it to start anew") from error
    if not isinstance(state, dict) or state.get("made_for") != made_for:
        raise UsageError(f"--resume: {path} is of another model or recipe: start anew without --resume")
    return dict(state)
