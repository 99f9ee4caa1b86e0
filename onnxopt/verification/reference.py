"""The ONNX reference evaluator as a session, for models that ONNX Runtime has no kernels for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from onnx.reference import ReferenceEvaluator

from onnxopt.errors import one_line
from onnxopt.model import ModelLike
from onnxopt.runtimes import RunError, UnsupportedModelError
from onnxopt.storage import materialize

__all__ = ["ReferenceSession", "Runner"]


class Runner(Protocol):
    """What the proof needs of a session, whatever runs it."""

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]: ...
    def close(self) -> None: ...


class ReferenceSession:
    """A model on `onnx.reference`: slow, in plain numpy, with kernels for nearly all standard operators.

    Raises UnsupportedModelError where it refuses the model.
    """

    def __init__(self, model: ModelLike) -> None:
        with materialize(model) as source:
            opened = str(source) if isinstance(source, Path) else source
            try:
                self._evaluator = ReferenceEvaluator(opened)
            except Exception as error:  # it raises whatever its kernels raise
                raise UnsupportedModelError(f"onnx.reference cannot open it: {one_line(error)}") from error

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run one sample; feeds that the model does not know are left out. Raises RunError."""
        known = set(self._evaluator.input_names)
        given = {name: value for name, value in feeds.items() if name in known}
        try:
            with np.errstate(all="ignore"):
                values = self._evaluator.run(None, given)
        except Exception as error:  # it raises whatever its kernels raise
            raise RunError(f"onnx.reference failed: {one_line(error)}") from error
        return dict(zip(self._evaluator.output_names, values, strict=True))

    def close(self) -> None:
        """Nothing outlives the object."""
