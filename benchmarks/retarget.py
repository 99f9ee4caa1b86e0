"""How much faster models of ONNX Runtime's quantizer become by retarget-quantized, and how equal they stay.

    python benchmarks/retarget.py MODEL.onnx ... [--seconds 10] [--schemes s8s8 u8u8]

Each float model is raised to opset 17, simplified, quantized by ONNX Runtime on synthetic samples, then
rewritten. `ratio` is the CPU time of the rewritten model by that of the quantized one (paired, one thread),
`control` the quantized one against itself. `equal` compares all outputs with the runtime's optimizations off;
`fused` is the SQNR in dB at its default level, where it fuses two different graphs in its own way, and
`noise` that of the quantized model at the default level against none, for comparison.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from onnxopt.benchmarking import bench
from onnxopt.data import synthesize
from onnxopt.model import load
from onnxopt.pipeline import Pipeline
from onnxopt.recipe import load_recipe, parse_passes
from onnxopt.runtimes import Level, open_session
from onnxopt.storage import save

HEADER = """\
| model | scheme | changed | equal | fused dB | noise dB | ratio | control | speedup |
|---|---|---|---|---|---|---|---|---|"""
_PREPARE = (*parse_passes("freeze-initializers,retarget-opset{version=17}"), *load_recipe("default").passes)
S8, U8 = QuantType.QInt8, QuantType.QUInt8


@dataclass(frozen=True)
class Scheme:
    activations: QuantType
    weights: QuantType
    format: QuantFormat | None = QuantFormat.QDQ
    per_channel: bool = False
    symmetric: bool = False
    passes: str = "retarget-quantized,merge-qdq"


SCHEMES = {
    "s8s8-symmetric": Scheme(S8, S8, symmetric=True),
    "s8s8-symmetric-relu": Scheme(
        S8, S8, symmetric=True, passes="quantize-relu,retarget-quantized,merge-qdq"
    ),
    "s8s8": Scheme(S8, S8),
    "u8u8": Scheme(U8, U8),
    "u8u8-channels": Scheme(U8, U8, per_channel=True),
    "s8s8-qoperator": Scheme(S8, S8, QuantFormat.QOperator),
    "u8u8-qoperator": Scheme(U8, U8, QuantFormat.QOperator),
    "u8u8-dynamic": Scheme(U8, U8, None),
    "u8s8-dynamic": Scheme(U8, S8, None),
}


class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    def __init__(self, feeds: Sequence[Mapping[str, Any]]) -> None:
        self._left: Iterator[Mapping[str, Any]] = iter(feeds)

    def get_next(self) -> Mapping[str, Any] | None:
        return next(self._left, None)


def filled(source: Path) -> ir.Model:
    """A model, where the light ones of the onnx package get weights, scaled as He et al. do, 2015."""
    proto, rng = onnx.load(source), np.random.default_rng(0)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for node in [
        node for node in proto.graph.node if node.op_type == "ConstantOfShape" and node.input[0] in shapes
    ]:
        shape = tuple(shapes[node.input[0]])
        weights = (
            rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape) if len(shape) > 1 else np.full(shape, 0.5)
        )
        tensor = numpy_helper.from_array(weights.astype(np.float32))
        node.CopyFrom(helper.make_node("Constant", [], list(node.output), value=tensor))
    return load(proto)


def quantized(source: Path, scheme: Scheme, folder: Path) -> Path:
    """The file that ONNX Runtime's quantizer makes of a float model."""
    prepared, target = folder / "prepared.onnx", folder / "quantized.onnx"
    save(Pipeline(_PREPARE).run(lambda: filled(source)).model, prepared)
    if scheme.format is None:
        quantize_dynamic(
            str(prepared), str(target), weight_type=scheme.weights, per_channel=scheme.per_channel
        )
        return target
    quantize_static(
        str(prepared),
        str(target),
        Reader(synthesize(prepared)[:8]),
        quant_format=scheme.format,
        per_channel=scheme.per_channel,
        activation_type=scheme.activations,
        weight_type=scheme.weights,
        extra_options={"ActivationSymmetric": scheme.symmetric},
    )
    return target


def outputs(model: Path, feeds: Sequence[Mapping[str, Any]], level: Level) -> list[np.ndarray]:
    with open_session(model, level=level) as session:
        return [np.asarray(value) for feed in feeds for value in session.run(feed).values()]


def sqnr(want: Sequence[np.ndarray], have: Sequence[np.ndarray]) -> float:
    """Of all outputs together, each scaled to one; infinite where they are equal."""
    worst = float("inf")
    for a, b in zip(want, have, strict=True):
        a, b = a.astype(np.float64), b.astype(np.float64)
        noise = float(np.sum((a - b) ** 2))
        if noise:
            worst = min(worst, float(10 * np.log10(np.sum(a**2) / noise)))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description="Time what retarget-quantized gains.")
    parser.add_argument("models", nargs="+", type=Path, help="float models")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--seconds", type=float, default=10.0, help="time for one pair")
    options = parser.parse_args()
    print(HEADER)
    for source in options.models:
        for name in options.schemes:
            with tempfile.TemporaryDirectory() as folder:
                print(row(source, name, Path(folder), options.seconds), flush=True)


def row(source: Path, name: str, folder: Path, seconds: float) -> str:
    scheme, after = SCHEMES[name], folder / "retargeted.onnx"
    try:
        before = quantized(source, scheme, folder)
    except Exception as error:  # of the quantizer, which has no class of its own
        return f"| {source.stem} | {name} | the quantizer fails: {str(error).splitlines()[0]} | | | | | | |"
    done = Pipeline(parse_passes(scheme.passes)).run(lambda: load(before))
    save(done.model, after)
    feeds = synthesize(before)[:4]
    plain = [outputs(one, feeds, "none") for one in (before, after)]
    full = [outputs(one, feeds, "all") for one in (before, after)]
    equal = all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(*plain, strict=True))
    timing = bench(before, after, feeds=feeds, seconds=seconds)
    changed = ", ".join(f"{step.name} {step.changes}" for step in done.steps if step.changes)
    return (
        f"| {source.stem} | {name} | {changed or 'nothing'} | {'yes' if equal else f'{sqnr(*plain):.1f} dB'} "
        f"| {sqnr(*full):.1f} | {sqnr(plain[0], full[0]):.1f} | {timing.figures.ratio} "
        f"| {timing.figures.control} | {1 / timing.ratio:.2f} |"
    )


if __name__ == "__main__":
    main()
