"""What a model can be quantized to: one row each."""

from __future__ import annotations

from dataclasses import dataclass

from onnxopt.errors import UsageError, did_you_mean
from onnxopt.targets import Target

__all__ = ["SCHEMES", "Scheme", "find_scheme"]


@dataclass(frozen=True)
class Scheme:
    """A way to quantize.

    static: activations have scales from calibration. activation, weight: formats, where they are not the
    target's. passes: of those that need no data. finishing: for the CPU, passes over what static quantization
    leaves in floating point. opset: what the model is raised to. targets: those that it is for, all where
    empty. elsewhere: why not for others. note: what a user has to know.
    """

    name: str
    about: str
    static: bool = False
    activation: str | None = None
    weight: str | None = None
    passes: tuple[str, ...] = ()
    finishing: tuple[str, ...] = ()
    opset: int = 17
    targets: tuple[str, ...] = ()
    elsewhere: str = ""
    note: str = ""

    def require(self, target: Target) -> None:
        """Raise UsageError where it is not for that target."""
        if self.targets and target.name not in self.targets:
            raise UsageError(f"scheme {self.name} is not offered for target {target.name}: {self.elsewhere}")


_INSTEAD = "take float16, or weight-int8 or weight-int4"
_EXPERIMENTAL = "experimental: few models keep their accuracy without training for it; what is left is above"

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "int8",
            "weights and activations in 8 bits, ranges from calibration",
            static=True,
            finishing=(
                "quantize-dynamic{layers=LSTM}",
                "quantize-dynamic{layers=Gemm+MatMul}",
                "quantize-weights{layers=Gather}",
            ),
            targets=("cpu", "arm", "tensorrt", "generic"),
            elsewhere="its provider has no integer kernels for Conv, Gemm and MatMul, and runs them in float "
            f"between Q and DQ, slower than without; {_INSTEAD}",
        ),
        Scheme(
            "int16",
            "activations in 16 bits, weights in 8",
            static=True,
            activation="uint16",
            opset=21,
            targets=("cpu", "arm", "generic"),
            elsewhere=f"it has no kernels for 16-bit activations; {_INSTEAD}",
            note="ONNX Runtime has no kernels for 16-bit activations on the CPU: layers run in float between "
            "Q and DQ, slower than without; --for size keeps the smaller file",
        ),
        Scheme(
            "float8",
            "small floats, for TensorRT",
            static=True,
            activation="float8e4m3fn",
            weight="float8e4m3fn",
            opset=19,
            targets=("tensorrt",),
            elsewhere="only TensorRT has kernels for 8-bit floats; take int8 on a CPU, float16 on CUDA",
            note="ONNX Runtime's CPU provider refuses 8-bit floats unless session.disable_quant_qdq is 1",
        ),
        Scheme(
            "dynamic",
            "MatMul, Gemm and LSTM in 8 bits, ranges from each input; no data needed",
            passes=("quantize-dynamic", "quantize-weights{layers=Gather}"),
            targets=("cpu", "arm", "generic"),
            elsewhere=f"ranges that are found at run time are for the CPU's kernels; {_INSTEAD}",
        ),
        Scheme("weight-int8", "weights alone in 8 bits", passes=("quantize-weights",)),
        Scheme(
            "weight-int4",
            "weights alone in 4 bits, a scale for each 32",
            passes=("quantize-weights{type=int4,block=32,clip=true}", "quantize-weights{layers=Gather}"),
            opset=21,
        ),
        Scheme("float16", "16-bit floats, float32 where range demands it", passes=("quantize-floats",)),
        Scheme(
            "bfloat16",
            "bfloat16, float32 where exactness demands it",
            passes=("quantize-floats{type=bfloat16}",),
            opset=22,
        ),
        Scheme(
            "ternary",
            "experimental: weights of -a, 0, a",
            passes=("quantize-weights{levels=ternary}",),
            note=_EXPERIMENTAL,
        ),
        Scheme(
            "binary",
            "experimental: weights of -a, a",
            passes=("quantize-weights{levels=binary}",),
            note=_EXPERIMENTAL,
        ),
    )
}


def find_scheme(name: str) -> Scheme:
    """The scheme of that name. Raises UsageError where there is none."""
    if name not in SCHEMES:
        raise UsageError(f"unknown scheme {name!r}{did_you_mean(name, SCHEMES)}")
    return SCHEMES[name]
