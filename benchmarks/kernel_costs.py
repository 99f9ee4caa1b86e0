"""Measure what nodes cost in float32 and in int8 here, and write onnxopt/quantization/costs.toml.

    python benchmarks/kernel_costs.py -o onnxopt/quantization/costs.toml

Everything runs at level ALL on one thread, in float and with Q and DQ on all tensors. Layers are timed as
what one more of them adds to the thread's time in a chain; what cannot stand in a chain by the runtime's
profiler, where it matters between two convolutions, in the layout and with the fusions of a net. The
coefficients are non-negative least squares.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import helper, numpy_helper

from onnxopt.benchmarking import machine
from onnxopt.quantization.costs import features, row_of

Array = np.ndarray | np.generic
Attrs = dict[str, Any]
Features = tuple[float, ...]
Sizes = tuple[int, ...]
Node = tuple[str, list[str], str, Attrs]
RNG = np.random.default_rng(0)
CACHE = 8 << 20
"""Bytes of weights a graph is given, so that they come from where they come from in a net."""
BORDERS = {"QuantizeLinear", "DequantizeLinear", "Transpose", "ReorderInput", "ReorderOutput"}
INTEGER = {
    *("Add", "AveragePool", "Concat", "Conv", "DepthToSpace", "Gather", "Gemm", "GlobalAveragePool"),
    *("LeakyRelu", "MatMul", "MaxPool", "Mul", "Resize", "Sigmoid", "Slice", "Softmax", "Split", "Transpose"),
}
"""Operators with an integer kernel."""
CONVS = {"Conv", "FusedConv", "QLinearConv"}


# channels in, channels out, kernel, size, stride, groups
DENSE = """
16 16 1 112 1; 16 16 1 56 1; 32 32 1 56 1; 32 32 1 28 1; 64 64 1 56 1; 64 64 1 28 1; 64 64 1 14 1
128 128 1 28 1; 128 128 1 14 1; 128 128 1 7 1; 256 256 1 14 1; 256 256 1 7 1; 512 512 1 7 1
512 512 1 14 1; 24 24 1 28 1; 8 8 1 48 1; 96 96 1 14 1; 40 40 1 28 1; 480 480 1 1 1; 64 64 1 1 1
16 96 1 56 1; 96 24 1 28 1; 24 144 1 28 1; 144 40 1 14 1; 480 112 1 14 1; 192 1152 1 7 1; 1152 320 1 7 1
320 1280 1 7 1; 8 16 1 24 1; 32 64 1 12 1; 200 50 1 10 1; 48 12 1 1 1; 16 16 3 56 1; 16 16 3 32 1
32 32 3 56 1; 32 32 3 16 1; 64 64 3 56 1; 64 64 3 28 1; 64 64 3 8 1; 128 128 3 28 1; 128 128 3 14 1
256 256 3 14 1; 256 256 3 7 1; 512 512 3 7 1; 8 8 3 64 1; 24 24 3 28 1; 48 48 3 40 1; 16 16 5 28 1
32 32 5 28 1; 64 64 5 28 1; 64 64 7 14 1; 128 128 5 14 1; 16 32 3 32 2; 32 64 3 56 2; 64 128 3 28 2
128 256 3 14 2; 3 32 3 224 2; 3 16 3 112 2; 3 64 7 224 2; 3 16 3 64 1; 1 64 5 112 1; 1 16 3 32 1
3 8 3 96 2; 3 16 3 208 1; 12 16 3 104 1; 64 32 3 112 1; 32 16 3 96 1
"""
DEPTHWISE = """
16 3 112 1; 32 3 56 1; 32 3 112 1; 64 3 28 1; 96 3 112 2; 144 3 56 1; 144 5 56 2; 240 5 28 1; 480 3 14 1
480 5 14 1; 672 5 14 1; 1152 5 7 1; 1152 3 7 1; 8 3 48 1; 64 3 12 1; 24 3 24 1; 128 3 14 1; 256 3 7 1
256 5 40 1; 512 3 14 2; 40 3 32 1; 200 3 20 1; 200 5 14 1; 88 5 17 1; 104 5 14 1
"""
MATMULS = """
1 64 64; 1 256 256; 1 768 768; 1 1280 1000; 1 2048 512; 4 256 256; 16 256 256; 40 120 360; 80 120 120
64 64 64; 128 384 384; 128 384 1536; 40 480 6625; 256 64 128; 32 32 32; 1 42 20
"""


@dataclass
class Spec:
    """A graph of float nodes (op, inputs, output, attributes), and the node of it that is meant."""

    nodes: list[Node]
    inputs: dict[str, list[int]]
    weights: dict[str, np.ndarray]
    meant: str
    framed: bool = False
    """Whether what stands between the convolutions is meant."""
    outputs: list[str] = field(default_factory=lambda: ["y"])


def weight(*shape: int) -> np.ndarray:
    return np.asarray(RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:])), np.float32)


def conv(
    cin: int, cout: int, kernel: Sequence[int], size: Sequence[int], stride: int = 1, group: int = 1
) -> Spec:
    """Convolutions from cin to cout and back; a single one where the stride or cin < 5 forbids that."""
    bytes_ = 4 * cout * cin // group * int(np.prod(kernel))
    length = 1 if stride > 1 or cin < 5 else 2 * int(np.clip(CACHE // bytes_ // 2, 4, 12))
    attrs = {"kernel_shape": kernel, "pads": [k // 2 for k in kernel] * 2, "strides": [stride] * len(kernel)}
    nodes: list[Node] = []
    weights: dict[str, np.ndarray] = {}
    for i in range(length):
        wide, deep = (cin, cout) if i % 2 else (cout, cin)
        weights[f"w{i}"], weights[f"b{i}"] = weight(wide, deep // group, *kernel), np.zeros(wide, np.float32)
        nodes.append(
            ("Conv", [f"y{i - 1}" if i else "x", f"w{i}", f"b{i}"], f"y{i}", {**attrs, "group": group})
        )
    return Spec(nodes, {"x": [1, cin, *size]}, weights, "Conv", outputs=[f"y{length - 1}"])


def matmul(op: str, rows: int, depth: int, columns: int) -> Spec:
    length = 2 * int(np.clip(CACHE // (4 * depth * columns) // 2, 4, 12))
    nodes: list[Node] = []
    weights: dict[str, np.ndarray] = {}
    for i in range(length):
        sizes = (columns, depth) if i % 2 else (depth, columns)
        weights[f"w{i}"] = weight(*sizes)
        more = [f"b{i}"] if op == "Gemm" else []
        weights |= {name: np.zeros(sizes[1], np.float32) for name in more}
        nodes.append((op, [f"y{i - 1}" if i else "x", f"w{i}", *more], f"y{i}", {}))
    return Spec(nodes, {"x": [rows, depth]}, weights, op, outputs=[f"y{length - 1}"])


def between(
    op: str, inputs: str, channels: int, size: int, attrs: Attrs | None = None, grow: int = 1, **extra: Array
) -> Spec:
    """A node between convolutions: `a` and `b` are of that size, `g` one number a channel."""

    def point(x: str, y: str, wide: int = channels) -> None:
        weights[f"w{y}"], weights[f"b{y}"] = weight(channels, wide, 1, 1), np.zeros(channels, np.float32)
        nodes.append(("Conv", [x, f"w{y}", f"b{y}"], y, {"kernel_shape": [1, 1]}))

    nodes: list[Node] = []
    weights: dict[str, np.ndarray] = {name: np.asarray(value) for name, value in extra.items()}
    point("x", "a")
    if "b" in inputs.split(","):
        point("a", "b")
    if "g" in inputs.split(","):
        nodes.append(("GlobalAveragePool", ["a"], "m", {}))
        point("m", "g")
    nodes.append((op, inputs.split(","), "t", attrs or {}))
    point("t", "y", channels * grow)
    return Spec(nodes, {"x": [1, channels, size, size]}, weights, op, framed=True)


def alone(
    op: str, shape: list[int], attrs: Attrs | None = None, two: list[int] | None = None, **extra: Array
) -> Spec:
    names = ["x", *(["v"] if two else []), *extra]
    inputs = {"x": shape} | ({"v": two} if two else {})
    return Spec([(op, names, "y", attrs or {})], inputs, {k: np.asarray(v) for k, v in extra.items()}, op)


def rows_of(text: str) -> list[list[int]]:
    return [[int(number) for number in row.split()] for row in text.strip().replace("\n", ";").split(";")]


def layers() -> Iterator[Spec]:
    for cin, cout, k, size, stride in rows_of(DENSE):
        yield conv(cin, cout, (k, k), (size, size), stride)
    for c, kernel, sizes in [(120, (1, 5), (1, 160)), (64, (5, 1), (12, 80)), (480, (1, 3), (1, 80))]:
        yield conv(c, c, kernel, sizes)
    for cin, kernel, sizes in [
        (1, (64, 1), (256, 16)),
        (1, (1, 64), (16, 256)),
        (8, (39, 3), (64, 64)),
        (3, (9, 1), (64, 64)),
    ]:
        yield conv(cin, 16, kernel, sizes)
    for c, k, size, stride in rows_of(DEPTHWISE):
        yield conv(c, c, (k, k), (size, size), stride, group=c)
    for c, group, size in [(32, 4, 28), (64, 8, 28), (64, 2, 28), (128, 4, 14), (256, 32, 14), (128, 32, 28)]:
        yield conv(c, c, (3, 3), (size, size), group=group)
    for c, k, size in [(32, 3, 256), (64, 5, 128), (128, 3, 64), (64, 9, 512), (256, 3, 128), (48, 1, 200)]:
        yield conv(c, c, (k,), (size,))
    for op, (rows, depth, columns) in itertools.product(("MatMul", "Gemm"), rows_of(MATMULS)):
        yield matmul(op, rows, depth, columns)
    for b, m, k, n in [
        (8, 40, 15, 40),
        (8, 40, 40, 15),
        (12, 128, 32, 128),
        (12, 128, 128, 32),
        (4, 64, 64, 64),
    ]:
        yield alone("MatMul", [1, b, m, k], two=[1, b, k, n])
    for c, d, k, size, stride in [
        (64, 32, 2, 28, 2),
        (128, 64, 4, 14, 2),
        (64, 64, 2, 14, 2),
        (32, 32, 3, 28, 1),
    ]:
        attrs = {"strides": [stride, stride], "kernel_shape": [k, k]}
        yield alone("ConvTranspose", [1, c, size, size], attrs, w=weight(c, d, k, k))


def images(c: int, s: int) -> Iterator[Spec]:
    """What works on maps of c channels, s times s."""
    shape = [1, c, s, s]
    for op in (
        "Elu",
        "Erf",
        "Exp",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Relu",
        "Sigmoid",
        "Sqrt",
        "Tanh",
    ):
        yield alone(op, shape)
    yield alone("Clip", shape, low=np.float32(-1), high=np.float32(1))
    yield alone("QuickGelu", shape, {"alpha": 1.0, "domain": "com.microsoft"})
    yield alone("Pow", shape, exponent=np.float32(2))
    yield alone("PRelu", shape, slope=np.full((c, 1, 1), 0.2, np.float32))
    yield alone("SpaceToDepth", [1, c, s // 2 * 2, s // 2 * 2], {"blocksize": 2})
    yield alone("DepthToSpace", shape, {"blocksize": 2})
    yield alone("InstanceNormalization", shape, s=np.ones(c, np.float32), b=np.zeros(c, np.float32))
    yield alone("ReduceMean", shape, {"axes": [2, 3]})
    yield alone("MaxPool", shape, {"kernel_shape": [2, 2], "strides": [2, 2]})
    for op in ("Add", "Div", "Mul", "Sub"):
        yield alone(op, shape, two=shape)


def sequences(shape: list[int]) -> Iterator[Spec]:
    """What works on rows."""
    one = np.ones(shape[-1], np.float32)
    yield alone("Softmax", shape, {"axis": -1})
    yield alone("LayerNormalization", shape, {"axis": -1}, scale_=one, bias=one)
    yield alone("Transpose", shape, {"perm": [0, 2, 1, 3][: len(shape)]})
    start, end, axis = (np.array([at]) for at in (0, shape[-1] // 2, len(shape) - 1))
    yield alone("Slice", shape, start=start, end=end, axis=axis)
    yield alone("Gather", shape, {"axis": 1}, indices=np.arange(shape[1] // 2))
    yield alone("Split", shape, {"axis": len(shape) - 1})


def specs() -> Iterator[Spec]:
    yield from layers()
    for c, s in [(16, 56), (32, 28), (64, 28), (128, 14), (64, 56), (16, 7), (8, 32)]:
        yield from spatial(c, s)
        yield from images(c, s)
    for shape in ([1, 128, 384], [1, 40, 120], [1, 8, 128, 128], [1, 40, 2048], [1, 8, 16]):
        yield from sequences(shape)


def spatial(c: int, s: int) -> Iterator[Spec]:
    """What stands between convolutions of c channels, s times s."""
    for k, t in ((3, 1), (2, 2), (5, 1)):
        attrs = {"kernel_shape": [k, k], "strides": [t, t], "pads": [k // 2 if t == 1 else 0] * 4}
        yield between("MaxPool", "a", c, s, attrs)
        yield between("AveragePool", "a", c, s, attrs)
    yield between("GlobalAveragePool", "a", c, s)
    yield between("Add", "a,b", c, s)
    yield between("Mul", "a,b", c, s)
    yield between("Add", "a,g", c, s)
    yield between("Mul", "a,g", c, s)
    yield between("Concat", "a,b", c, s, {"axis": 1}, grow=2)
    yield between("Sigmoid", "a", c, s)
    yield between("LeakyRelu", "a", c, s)
    yield between("Softmax", "a", c, s, {"axis": 1})
    nearest = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    yield between("Resize", "a,,to", c, s, nearest, to=np.array([1, 1, 2, 2], np.float32))
    linear = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    yield between("Resize", "a,,to", c, s, linear, to=np.array([1, 1, 2, 2], np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args()
    offset = profiler_ns()
    samples: dict[tuple[str, str], list[tuple[tuple[float, ...], float]]] = defaultdict(list)
    for spec in specs():
        for key, numbers, measured in measured_of(spec, offset):
            samples[key].append((numbers, measured))
    lines = [
        "# What kernels cost on one thread: nanoseconds by the features of onnxopt/quantization/costs.py.",
        "# Written by `python benchmarks/kernel_costs.py`.",
        f'runtime = "{onnxruntime.__version__}"',
        f'machine = "{machine().cpu}"',
        f"vnni = {json.dumps(machine().has_vnni)}",
    ]
    print(f"the profiler adds {offset[0]:.0f} ns a kernel and {offset[1]:.0f} ns an input")
    fitted = {key: fit(rows) for key, rows in samples.items()}
    for title, wanted in (("borders", str.islower), ("rows", lambda name: not name.islower())):
        lines += ["", f"[{title}]"]
        for kind in sorted({kind for kind, _ in fitted if wanted(kind)}):
            sides = {side: fitted[kind, side][0] for side in ("float", "int8") if (kind, side) in fitted}
            errors = {side: fitted[kind, side][1:] for side in sides}
            print(f"  {kind:24}", *(f"{side} {e:.0%} of {n}" for side, (e, n) in errors.items()))
            texts = {side: "[" + ", ".join(f"{x:.4g}" for x in row) + "]" for side, row in sides.items()}
            whole = "{ " + ", ".join(f"{side} = {text}" for side, text in texts.items()) + " }"
            lines.append(f"{kind} = {texts['float'] if title == 'borders' else whole}")
    asked.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def measured_of(spec: Spec, offset: tuple[float, float]) -> Iterator[tuple[tuple[str, str], Features, float]]:
    """(kind, side), features and nanoseconds of the node that is meant, and of what stands at its borders."""
    proto = onnx.shape_inference.infer_shapes(model(spec, quantized=False), data_prop=True)
    nodes = [node for node in ir.from_proto(proto).graph if node.op_type == spec.meant]
    kind = row_of(nodes[0], shapes)
    linear = kind == "Resize-linear"
    for side in ("float", "int8") if spec.meant in INTEGER and not linear else ("float",):
        quantized = side == "int8"
        if len(spec.nodes) > 1 and not spec.framed:  # a chain, there and back
            pair = np.mean([features(node, shapes, quantized=quantized) for node in nodes[:2]], axis=0)
            yield (kind, side), tuple(pair), slope(spec, quantized)
            continue
        kernels = profile(model(spec, quantized=quantized), spec.inputs, offset)
        meant = chosen(spec, kernels)
        if meant:
            yield (kind, side), features(nodes[0], shapes, quantized=quantized), meant
        if kind.startswith("Conv-"):
            yield from borders(
                kernels, [math.prod(shapes(v)) for v in (nodes[0].inputs[0], nodes[0].outputs[0]) if v]
            )


def borders(
    kernels: list[tuple[str, float]], counts: list[int]
) -> Iterator[tuple[tuple[str, str], Features, float]]:
    """What stands before and behind a convolution, of so many elements."""
    names = {"QuantizeLinear": "quantize", "DequantizeLinear": "dequantize", "Transpose": "transpose"}
    names |= {"ReorderInput": "reorder", "ReorderOutput": "reorder"}
    at = next(i for i, (op, _) in enumerate(kernels) if op in CONVS)
    for i, (op, ns) in enumerate(kernels):
        if op in names:
            yield (names[op], "float"), (1, counts[i > at]), ns


def shapes(value: ir.Value) -> Sizes:
    """The sizes that were inferred; of an operator that has no inference, those of its input."""
    if value.shape is None:
        return shapes(value.producer().inputs[0])  # type: ignore[union-attr, arg-type]
    return tuple(int(size) for size in value.shape.numpy())


def chosen(spec: Spec, kernels: list[tuple[str, float]]) -> float | None:
    """The time of the kernels that are meant: None where the runtime fused them away."""
    if spec.framed:
        at = [i for i, (op, _) in enumerate(kernels) if op in CONVS]
        kernels = kernels[at[-2] + 1 : at[-1]]
    return sum(ns for op, ns in kernels if op not in BORDERS or spec.meant == op) or None


def slope(spec: Spec, quantized: bool) -> float:
    """The thread's time for one node more in a chain."""
    short = replace(spec, nodes=spec.nodes[:2], outputs=["y1"])
    both = [session(model(one, quantized=quantized)) for one in (spec, short)]
    times: list[list[float]] = [[], []]
    feeds = feeds_of(spec.inputs)
    runs = 1
    for round_ in range(24):
        for one, held in zip(both, times, strict=True):
            start = time.thread_time_ns()
            for _ in range(runs):
                one.run(None, feeds)
            held.append((time.thread_time_ns() - start) / runs)
        if not round_:
            runs = int(np.clip(1e6 / times[0][0], 1, 10))
    return float(np.subtract(*np.quantile(times, 0.3, axis=1))) / (len(spec.nodes) - 2)


def feeds_of(inputs: dict[str, list[int]]) -> dict[str, np.ndarray]:
    return {name: RNG.uniform(-1, 1, shape).astype(np.float32) for name, shape in inputs.items()}


def session(proto: onnx.ModelProto, profiled: str = "") -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profiled:
        options.enable_profiling, options.profile_file_prefix = True, profiled
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def profile(
    proto: onnx.ModelProto, inputs: dict[str, list[int]], offset: tuple[float, float]
) -> list[tuple[str, float]]:
    """Operator and nanoseconds of each kernel in order, less what the profiler adds: (ns, ns an input)."""
    feeds = feeds_of(inputs)
    with tempfile.TemporaryDirectory() as folder:
        one = session(proto, f"{folder}/kernels")
        start = time.perf_counter()
        one.run(None, feeds)
        for _ in range(int(np.clip(0.08 / (time.perf_counter() - start), 8, 60))):
            one.run(None, feeds)
        events = json.loads(Path(one.end_profiling()).read_text(encoding="utf-8"))
    times: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            args = event["args"]
            times[args["node_index"], args["op_name"], len(args["input_type_shape"])].append(event["dur"])
    found = []
    for (_, op, count), values in times.items():
        late = np.array(values[len(values) // 5 :])
        kept = late[late <= 1.2 * np.quantile(late, 0.3) + 1]  # whole microseconds, cut
        found.append((op, max(1000 * (float(kept.mean()) + 0.5) - offset[0] - count * offset[1], 100)))
    return found


def profiler_ns() -> tuple[float, float]:
    """What the profiler adds to a kernel, and to it for each input: kernels of one input and of eight."""
    added = []
    for op, quantized in (("Exp", False), ("Add", True)):
        names = ["x", *(f"y{i}" for i in range(40))]
        nodes: list[Node] = [(op, [a, "x"][: 1 + quantized], b, {}) for a, b in itertools.pairwise(names)]
        spec = Spec(nodes, {"x": [1, 16]}, {}, op, outputs=["y39"])
        kernels = profile(model(spec, quantized=quantized), spec.inputs, (0, 0))
        seen = float(np.median([ns for _, ns in kernels]))
        added.append(seen - slope(spec, quantized))
    each = (added[1] - added[0]) / 7
    return added[0] - each, each


def fit(rows: list[tuple[tuple[float, ...], float]]) -> tuple[np.ndarray, float, int]:
    """Non-negative coefficients by coordinate descent, the median relative error, and how many rows."""
    width = max(len(numbers) for numbers, _ in rows)
    a = np.array([[*numbers, *[0] * (width - len(numbers))] for numbers, _ in rows], float)
    target = np.array([ns for _, ns in rows])
    a /= target[:, None] ** 0.8  # between relative and absolute: large nodes weigh somewhat more
    scale = np.maximum(np.abs(a).max(axis=0), 1e-30)
    a /= scale
    goal, x = target**0.2, np.zeros(width)
    gram, pull = a.T @ a + 1e-9 * np.eye(width), a.T @ goal
    for _ in range(20_000):
        for i in range(width):
            x[i] = max(0.0, x[i] + (pull[i] - gram[i] @ x) / gram[i, i])
    errors = np.abs(a @ x / goal - 1)
    used = np.abs(a).max(axis=0) > 0
    return np.where(used, x / scale, 0), float(np.median(errors)), len(rows)


def model(spec: Spec, *, quantized: bool) -> onnx.ModelProto:
    """The graph in float, or with Q and DQ on all its tensors."""
    made: list[onnx.NodeProto] = []
    held: dict[str, np.ndarray] = {}
    current: dict[str, str] = {}

    def constant(name: str, value: Array) -> str:
        held[name] = np.asarray(value)
        return name

    def quantize(name: str) -> str:
        if name not in current:
            both = [constant("scale", np.float32(0.05)), constant("zero", np.uint8(128))]
            made.append(helper.make_node("QuantizeLinear", [name, *both], [f"{name}_q"]))
            made.append(helper.make_node("DequantizeLinear", [f"{name}_q", *both], [f"{name}_d"]))
            current[name] = f"{name}_d"
        return current[name]

    def operand(op: str, name: str) -> str:
        value = spec.weights.get(name)
        if value is None:
            return quantize(name) if quantized and name else name
        if not quantized or op not in ("Conv", "Gemm", "MatMul"):
            return constant(name, value)
        axis = 0 if op == "Conv" or value.ndim == 1 else 1
        integers = RNG.integers(-127, 128, value.shape)
        count = value.shape[axis]
        dtype = np.int8 if value.ndim > 1 else np.int32
        scale = np.full(count, 0.01 if value.ndim > 1 else 0.0005, np.float32)
        parts = {"q": integers.astype(dtype), "s": scale, "z": np.zeros(count, dtype)}
        names = [constant(f"{name}_{key}", part) for key, part in parts.items()]
        made.append(helper.make_node("DequantizeLinear", names, [f"{name}_d"], axis=axis))
        return f"{name}_d"

    for op, inputs, output, attrs in spec.nodes:
        made.append(helper.make_node(op, [operand(op, name) for name in inputs], [output], **attrs))
        if quantized:
            quantize(output)
    given = [helper.make_tensor_value_info(name, 1, shape) for name, shape in spec.inputs.items()]
    results = [helper.make_tensor_value_info(current.get(name, name), 1, None) for name in spec.outputs]
    tensors = [numpy_helper.from_array(value, name) for name, value in held.items()]
    graph = helper.make_graph(made, "kernel", given, results, tensors)
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
        ir_version=8,
    )


if __name__ == "__main__":
    main()
