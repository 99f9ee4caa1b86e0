"""What a model can be quantized to: one row each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import onnx_ir as ir

from onnxopt.errors import UsageError, did_you_mean
from onnxopt.recipe import parse_pass

__all__ = ["SCHEMES", "Scheme", "find_scheme"]


_SPELLING = {"per_channel": "--per-tensor", "power_of_two": "--power-of-two"}


@dataclass(frozen=True)
class Scheme:
    """A way to quantize.

    static: activations have scales from calibration. activation, weight: formats, where they are not the
    target's. passes: of those that need no data. opset: what the model is raised to.
    """

    name: str
    about: str
    static: bool = False
    activation: str | None = None
    weight: str | None = None
    passes: tuple[str, ...] = ()
    opset: int = 17

    def passes_with(
        self, asked: Mapping[str, Any], wanted: Mapping[str, Any]
    ) -> tuple[ir.passes.PassBase, ...]:
        """The passes with these options, option -> value, where they have them.

        The first pass, which is what the scheme is about, must have those `asked` for, else UsageError; those
        `wanted` go where there is use for them.
        """
        passes: list[Any] = [parse_pass(text) for text in self.passes]
        for option in asked:
            if not hasattr(passes[0], option):
                raise UsageError(
                    f"scheme {self.name} has no choice of {option.replace('_', '-')}: leave it out"
                )
        options = {**wanted, **asked}
        return tuple(
            replace(one, **{f.name: options[f.name] for f in fields(one) if f.name in options})
            for one in passes
        )


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", "weights and activations in 8 bits, ranges from calibration", static=True),
        Scheme("int16", "activations in 16 bits, weights in 8", static=True, activation="uint16", opset=21),
        Scheme("float8", "small floats, for TensorRT", True, "float8e4m3fn", "float8e4m3fn", opset=19),
        Scheme(
            "dynamic",
            "MatMul, Gemm and LSTM in 8 bits, ranges from each input; no data needed",
            passes=("quantize-dynamic", "quantize-weights{layers=Gather}"),
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
        Scheme("ternary", "experimental: weights of -a, 0, a", passes=("quantize-weights{levels=ternary}",)),
        Scheme("binary", "experimental: weights of -a, a", passes=("quantize-weights{levels=binary}",)),
    )
}


def find_scheme(name: str) -> Scheme:
    """The scheme of that name. Raises UsageError where there is none."""
    if name not in SCHEMES:
        raise UsageError(f"unknown scheme {name!r}{did_you_mean(name, SCHEMES)}")
    return SCHEMES[name]
