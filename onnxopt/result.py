"""What `optimize`, `quantize`, `prune` and the trainings give back, and how it is written."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import onnx
import onnx_ir as ir

from onnxopt.model import ModelLike
from onnxopt.protobuf import dump
from onnxopt.reporting import Report
from onnxopt.reporting.pruning import PruningReport
from onnxopt.reporting.quantization import QuantizationReport
from onnxopt.reporting.report import SESSION_SCHEMA, session_file
from onnxopt.reporting.training import TrainingReport
from onnxopt.storage import check_target, save, staging

__all__ = ["Result"]


Told = TypeVar("Told", Report, QuantizationReport, PruningReport, TrainingReport)


@dataclass(frozen=True)
class Result(Generic[Told]):
    """A rewritten model and the report on it."""

    graph: ir.Model
    report: Told
    _source: ModelLike

    @property
    def model(self) -> bytes | onnx.ModelProto | ir.Model:
        """The model as the kind that was given: bytes for bytes or a file, an `ir.Model` for a path.

        Raises:
            ModelError: bytes or a `ModelProto` were given and would now exceed 2 GB.
        """
        if isinstance(self._source, str | os.PathLike | ir.Model):
            return self.graph
        proto = dump(self.graph)
        return (
            proto
            if isinstance(self._source, onnx.ModelProto)
            else proto.SerializeToString(deterministic=True)
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the model atomically, see `onnxopt.save`, and the settings for its sessions beside it.

        They go to `session_file(path)`; where there are none, such a file of an earlier result is removed.
        """
        beside = session_file(path)
        if self.report.settings:
            check_target(beside)
        written = save(self.graph, path)
        if self.report.settings:
            with staging(beside) as folder:
                staged = folder / beside.name
                staged.write_text(json.dumps(self.report.session, indent=2) + "\n", encoding="utf-8")
                staged.replace(beside)
        elif _is_ours(beside):
            beside.unlink()
        return written


def _is_ours(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["schema"] == SESSION_SCHEMA)
    except (OSError, ValueError, TypeError, KeyError):
        return False
