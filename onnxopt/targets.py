"""What the targets take: one row each."""

from __future__ import annotations

from dataclasses import dataclass

from onnxopt.errors import UsageError, did_you_mean

__all__ = ["PLACEMENTS", "STANDARD", "TARGETS", "Placement", "Target", "find_target"]

STANDARD = frozenset({"", "ai.onnx.ml"})
"""The operator domains of the ONNX standard, training aside."""

_LAYERS = frozenset({"Conv", "Gemm", "MatMul"})


@dataclass(frozen=True)
class Placement:
    """Where a target wants QuantizeLinear and DequantizeLinear, and of which types.

    activation, weight: names of formats. symmetric: activations have their zero point in the middle.
    operators: those with integer kernels. outputs: a layer's output is quantized, too; else only what
    layers read. bias: biases are int32, with the scale of the product. narrow: layers with fewer channels
    in or out stay in floating point. residual: of an Add behind a layer, the other operand is quantized.
    """

    name: str
    activation: str
    weight: str
    symmetric: bool
    operators: frozenset[str]
    outputs: bool = True
    bias: bool = True
    narrow: int = 0
    residual: bool = False


_ORT_OPERATORS = _LAYERS | {
    "Add",
    "AveragePool",
    "Concat",
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "GlobalAveragePool",
    "HardSigmoid",
    "HardSwish",
    "LeakyRelu",
    "MaxPool",
    "Mul",
    "Reshape",
    "Resize",
    "Sigmoid",
    "Slice",
    "Softmax",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
}

PLACEMENTS = {
    placement.name: placement
    for placement in (
        Placement("x86", "uint8", "int8", False, _ORT_OPERATORS),
        Placement("arm", "int8", "int8", False, _ORT_OPERATORS),
        Placement(
            "tensorrt",
            "int8",
            "int8",
            True,
            _LAYERS | {"ConvTranspose"},
            outputs=False,
            bias=False,
            narrow=16,
            residual=True,
        ),
    )
}
"""What a kind of processor wants of a quantized model."""


@dataclass(frozen=True)
class Target:
    """Where a model is to run.

    provider: the execution provider that measures it. contrib: whether passes may add operators of
    domains outside the ONNX standard. recipe: the pipeline that prepares a model for it. opset: the
    version of the standard operators that a pass may raise a model to; None: the model's own stays.
    placement: how int8 is written for it; empty where int8 does not pay. sessions: whether it runs in
    sessions of ONNX Runtime, for which settings may be proposed. multiple: of so many channels its kernels
    work on at once.
    """

    name: str
    provider: str
    contrib: bool
    recipe: str
    opset: int | None
    placement: str
    about: str
    sessions: bool = True
    multiple: int = 8


TARGETS = {
    target.name: target
    for target in (
        Target(
            "cpu",
            "cpu",
            True,
            "cpu",
            23,
            "x86",
            "ONNX Runtime on the CPU; its own fused operators, too",
            multiple=16,
        ),
        Target("arm", "cpu", True, "cpu", 23, "arm", "ONNX Runtime on ARM; its own fused operators, too"),
        Target(
            "cuda",
            "cuda",
            True,
            "cuda",
            20,
            "",
            "ONNX Runtime on an NVIDIA GPU; its own fused operators, too",
        ),
        Target(
            "tensorrt",
            "tensorrt",
            False,
            "tensorrt",
            20,
            "tensorrt",
            "TensorRT 10 and later; standard operators only",
        ),
        Target(
            "generic",
            "cpu",
            False,
            "default",
            None,
            "x86",
            "any consumer; standard operators only",
            sessions=False,
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
