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
    domains outside the ONNX standard. recipe: the pipeline that prepares a model for it. opset: the
    version of the standard operators that a pass may raise a model to; None: the model's own stays.
    sessions: whether it runs in sessions of ONNX Runtime, for which settings may be proposed.
    """

    name: str
    provider: str
    contrib: bool
    recipe: str
    opset: int | None
    about: str
    sessions: bool = True


TARGETS = {
    target.name: target
    for target in (
        Target("cpu", "cpu", True, "cpu", 23, "ONNX Runtime on the CPU; its own fused operators, too"),
        Target(
            "cuda", "cuda", True, "cuda", 20, "ONNX Runtime on an NVIDIA GPU; its own fused operators, too"
        ),
        Target(
            "tensorrt", "tensorrt", False, "tensorrt", 20, "TensorRT 10 and later; standard operators only"
        ),
        Target(
            "generic", "cpu", False, "default", None, "any consumer; standard operators only", sessions=False
        ),
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
