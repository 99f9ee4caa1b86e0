"""What the targets take: one row each."""

from __future__ import annotations

from dataclasses import dataclass

from onnxopt.errors import UsageError, did_you_mean

__all__ = ["STANDARD", "TARGETS", "Target", "find_target"]

STANDARD = frozenset({"", "ai.onnx.ml"})
"""The operator domains of the ONNX standard, training aside."""


@dataclass(frozen=True)
class Target:
    """Where a model is to run.

    provider: the execution provider that measures it. contrib: whether passes may add operators of
    domains outside the ONNX standard. recipe: the pipeline that prepares a model for it.
    """

    name: str
    provider: str
    contrib: bool
    recipe: str
    about: str


TARGETS = {
    target.name: target
    for target in (
        Target("cpu", "cpu", True, "default", "ONNX Runtime on the CPU"),
        Target("cuda", "cuda", True, "default", "ONNX Runtime on an NVIDIA GPU"),
        Target("tensorrt", "tensorrt", False, "default", "TensorRT through ONNX Runtime"),
        Target("generic", "cpu", False, "default", "any consumer: standard operators only"),
    )
}


def find_target(name: str) -> Target:
    """The target of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}{did_you_mean(name, TARGETS)}")
    return TARGETS[name]
