"""Random models, rich where passes have preconditions; each is valid and runs.

A model grows node by node. Each node is tried in the runtime, alone, on the arrays that its inputs have for
two samples of different sizes, and taken only if it runs and gives tame numbers. Whatever the steps propose
(wrong axes, odd broadcasts, negative steps), the model as a whole has an answer for both samples. Each sample
also runs with half a unit in the last place of noise on what is rounded: a node that makes much of it is not
taken, so that a rewrite which rounds otherwise has no excuse.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

__all__ = ["RandomModel", "random_model"]

Arrays = tuple[np.ndarray, ...]
Attributes = dict[str, Any]

SAMPLES = 2
OPSETS = (9, 11, 13, 15, 17, 18, 21)
_FLOATS = ("float32", "float32", "float32", "float64", "float16")
_JUMPS = frozenset(
    {"ArgMax", "Cast", "Ceil", "Equal", "Floor", "Greater", "Less", "Mod", "NonZero", "Round", "Sign"}
)
"""Where a last bit of a float decides: taken only of values that no rewrite may round otherwise."""
_ROUNDING = frozenset(
    {"Add", "AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "Div", "Erf", "Exp", "Gelu", "Gemm"}
    | {"HardSwish", "LeakyRelu", "MatMul", "Mean", "Mul", "Pow", "ReduceL2", "ReduceMean", "ReduceSum"}
    | {"Sigmoid", "Softmax", "Sqrt", "Sub", "Sum", "Tanh"}
)
_HOLDERS = ("If", "Loop")


@dataclass(frozen=True)
class RandomModel:
    """A model and a sample for each of two sizes of its dynamic axes; the second overrides initializers."""

    proto: onnx.ModelProto
    feeds: tuple[dict[str, np.ndarray], ...]
    dtype: str


@dataclass(frozen=True)
class Known:
    """A value. `exact`: no float operation has rounded it."""

    name: str
    arrays: Arrays
    """What it is in each sample, and then in each sample with noise."""
    exact: bool
    stored: bool = False

    @property
    def rank(self) -> int:
        return self.arrays[0].ndim

    @property
    def shape(self) -> tuple[int, ...]:
        return self.arrays[0].shape

    @property
    def is_float(self) -> bool:
        return self.arrays[0].dtype.kind == "f"

    @property
    def is_int(self) -> bool:
        return self.arrays[0].dtype.kind in "iu"

    @property
    def filled(self) -> bool:
        """Whether it has elements in each sample."""
        return all(array.size for array in self.arrays)

    def fixed(self, axis: int) -> bool:
        """Whether an axis has the same size in all samples."""
        return len({array.shape[axis] for array in self.arrays}) == 1


def random_model(seed: int, steps: int) -> RandomModel:
    """A model of about `steps` nodes or small patterns; the same arguments give the same model."""
    return _Model(random.Random(seed)).build(steps)


class _Model:
    """What all graphs of a model share."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.numbers = np.random.default_rng(rng.getrandbits(32))
        self.opset = rng.choice(OPSETS)
        self.ir_version = rng.choice((3, 4, 4, 7, 8, 8, 8, 10, 10, 10))
        self.dtype = np.dtype(rng.choice(_FLOATS))
        self.imports = [helper.make_opsetid("", self.opset)]
        self.functions: list[onnx.FunctionProto] = []
        self.count = 0

    def fresh(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def build(self, steps: int) -> RandomModel:
        main = _Graph(self, None)
        for _ in range(self.rng.randint(1, 3)):
            main.add_input()
        main.grow(steps)
        outputs = main.choose_outputs()
        graph = helper.make_graph(
            main.nodes,
            "random",
            [*main.inputs, *main.overridable],
            [helper.make_tensor_value_info(v.name, _element(v.arrays[0]), [None] * v.rank) for v in outputs],
            main.initializers,
        )
        proto = helper.make_model(
            graph, opset_imports=self.imports, ir_version=self.ir_version, functions=self.functions
        )
        if self.rng.random() < 0.5:
            proto = onnx.shape_inference.infer_shapes(proto)
        return RandomModel(proto, tuple(main.feeds), self.dtype.name)

    def run(self, node: onnx.NodeProto, inputs: Sequence[Known], rounds: bool) -> tuple[Arrays, ...] | None:
        """What a node gives for each sample, output by output; None if the runtime refuses it."""
        graph = helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info(v.name, _element(v.arrays[0]), None) for v in inputs],
            [onnx.ValueInfoProto(name=name) for name in node.output if name],
        )
        proto = helper.make_model(
            graph,
            opset_imports=self.imports,
            ir_version=max(self.ir_version, 4),
            functions=self.functions,
        )
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        noise = self.noisy if rounds else np.asarray
        try:
            session = ort.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            runs = [session.run(None, {v.name: v.arrays[i] for v in inputs}) for i in range(SAMPLES)]
            for i in range(SAMPLES, 2 * SAMPLES):
                results = session.run(None, {v.name: noise(v.arrays[i]) for v in inputs})
                runs.append([noise(result) for result in results])
        except Exception:  # ONNX Runtime's classes have no common base below Exception
            return None
        return tuple(zip(*runs, strict=True))

    def noisy(self, array: np.ndarray) -> np.ndarray:
        """The array with up to half a unit in the last place of noise on floats."""
        if array.dtype.kind != "f":
            return array
        size = float(np.finfo(array.dtype).eps) / 2
        wide = array.astype(np.float64)
        return np.asarray(wide * (1 + self.numbers.uniform(-size, size, array.shape)), array.dtype)


class _Graph:
    """A graph that grows: the main graph, a body, or a function."""

    def __init__(self, model: _Model, parent: _Graph | None, *, holds_initializers: bool = True) -> None:
        self.model, self.parent, self.rng = model, parent, model.rng
        self.holds_initializers = holds_initializers
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.overridable: list[onnx.ValueInfoProto] = []
        self.feeds: list[dict[str, np.ndarray]] = [{} for _ in range(SAMPLES)]
        self.known: list[Known] = []
        self.stored: list[Known] = []
        self.focus: Known | None = None
        """Where a chain has got to: read by the next step, if it can."""

    # Values.

    def add_input(self) -> Known:
        rng, name = self.rng, self.model.fresh("x")
        rank = rng.choice((0, 1, 2, 2, 3, 3, 4, 4, 4))
        small, large = rng.choice(([1, 2, 3], [2, 3, 4])), [4, 5, 6, 7]
        one = [rng.choice(small if axis < 2 else large) for axis in range(rank)]
        other, dims = list(one), list[int | str | None](one)
        for axis in range(rank):
            if rng.random() < (0.5 if axis == 0 else 0.15):
                other[axis] = rng.choice([1, 2, 3] if axis < 2 else large)
                dims[axis] = rng.choice((f"{name}_{axis}", f"{name}_{axis}", None))
        dtype = self.model.dtype if rng.random() < 0.85 else np.dtype(rng.choice(("int64", "int32", "bool")))
        arrays = tuple(self.data(shape, dtype) for shape in (one, other)) * 2
        for feed, array in zip(self.feeds, arrays[:SAMPLES], strict=True):
            feed[name] = array
        self.inputs.append(helper.make_tensor_value_info(name, _element(arrays[0]), dims))
        return self.add(Known(name, arrays, True))

    def data(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """Quarters between -3 and 3, which no type rounds, or small integers."""
        if dtype.kind == "f":
            return np.asarray(self.model.numbers.integers(-12, 13, shape) / 4, dtype)
        return np.asarray(self.model.numbers.integers(0 if dtype.kind == "b" else -3, 4, shape), dtype)

    def add(self, value: Known) -> Known:
        self.known.append(value)
        return value

    def visible(self) -> Iterator[Known]:
        """The values that a node may read, innermost and newest first."""
        yield from reversed(self.known)
        if self.parent is not None:
            yield from self.parent.visible()

    def pick(self, fits: Callable[[Known], bool] = lambda _: True) -> Known | None:
        """A value: the end of the chain that is being made, else most likely one of the newest."""
        if self.focus is not None and fits(self.focus) and self.rng.random() < 0.9:
            return self.focus
        found = [value for value in self.visible() if fits(value)]
        while len(found) > 1 and self.rng.random() < 0.4:
            found.pop(0)
        return found[0] if found else None

    def tensor(self) -> Known | None:
        return self.pick(lambda v: v.is_float)

    def constant(self, array: np.ndarray | Sequence[int], dtype: Any = None) -> Known:
        """A constant, stored in one of the ways there are; now and then one that another reader has."""
        rng, model = self.rng, self.model
        data = np.asarray(array, dtype)
        same = [v for v in self.stored if _same(v.arrays[0], data)]
        if same and rng.random() < 0.3:
            return rng.choice(same)
        name, arrays = model.fresh("c"), (data,) * (2 * SAMPLES)
        way = rng.random()
        if (
            self.holds_initializers
            and way < (0.8 if model.ir_version > 3 else 0.3)
            and not self._needs_nodes()
        ):
            self.initializers.append(numpy_helper.from_array(data, name))
            if self.parent is None and (model.ir_version == 3 or way < 0.06):
                self.overridable.append(
                    helper.make_tensor_value_info(
                        name, _element(data), rng.choice((data.shape, [None] * data.ndim))
                    )
                )
                if data.dtype.kind == "f" and data.size and model.ir_version >= 4:
                    arrays = (data, np.asarray(data + 0.25, data.dtype)) * 2
                    self.feeds[1][name] = arrays[1]
        else:
            self.nodes.append(_constant_node(data, name, model, rng))
        value = Known(name, arrays, True, stored=True)
        self.stored.append(value)
        if data.dtype.kind == "f" and rng.random() < 0.1:
            self.known.insert(rng.randrange(len(self.known) + 1), value)
        return value

    def _needs_nodes(self) -> bool:
        """In bodies, and below IR version 4, an initializer would be an input."""
        return self.parent is not None and self.model.ir_version < 4

    def weights(self, shape: Sequence[int], low: float = -1, high: float = 1) -> Known:
        return self.constant(np.asarray(self.model.numbers.uniform(low, high, shape), self.model.dtype))

    def ints(self, values: Sequence[int], dtype: str = "int64") -> Known:
        return self.constant(values, dtype)

    # Nodes.

    def op(
        self, op_type: str, inputs: Sequence[Known | None], outputs: int = 1, **given: Any
    ) -> Known | None:
        """Append a node if it runs; its first output, or None. `given`: attributes, None where absent."""
        read = [v for v in inputs if v is not None]
        exact = all(v.exact for v in read)
        if op_type in _JUMPS and not exact:
            return None
        node = helper.make_node(
            op_type,
            [v.name if v is not None else "" for v in inputs],
            [self.model.fresh("v") for _ in range(outputs)],
            name=self.model.fresh("n"),
            **{name: value for name, value in given.items() if value is not None},
        )
        return self.append(node, read, exact=exact and op_type not in _ROUNDING)

    def append(self, node: onnx.NodeProto, read: Sequence[Known], *, exact: bool) -> Known | None:
        rounds = not exact and (node.op_type in _ROUNDING or node.op_type in _HOLDERS or bool(node.domain))
        results = self.model.run(node, list({v.name: v for v in read}.values()), rounds)
        if results is None or not all(map(_tame, results)):
            return None
        self.nodes.append(node)
        names = [name for name in node.output if name]
        values = [
            Known(name, arrays, exact or arrays[0].dtype.kind != "f")
            for name, arrays in zip(names, results, strict=True)
        ]
        for value in reversed(values):
            self.add(value)
        if self.focus in read:
            self.focus = self.rng.choice(values)
        return values[0]

    def grow(self, steps: int, *, nested: bool = False) -> None:
        from_table = [step for step, weight, nests in _STEPS if not (nested and nests) for _ in range(weight)]
        for _ in range(steps):
            self.rng.choice(from_table)(self)

    def choose_outputs(self) -> list[Known]:
        """The newest value and others, in the middle too; unread ones may stay dead."""
        made = [v for v in self.known if not v.stored and v.name not in {i.name for i in self.inputs}]
        if not made:
            copy = self.op("Identity", [self.known[0]])
            assert copy is not None
            return [copy]
        others = [v for v in made[:-1] if self.rng.random() < 0.2]
        return [*others, made[-1]]


def _element(array: np.ndarray) -> int:
    return int(helper.np_dtype_to_tensor_dtype(array.dtype))


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


def _tame(arrays: Arrays) -> bool:
    """Whether a value has one rank, is finite and small, and shows little of the noise."""
    if len({array.ndim for array in arrays}) > 1:
        return False
    for clean, noisy in zip(arrays[:SAMPLES], arrays[SAMPLES:], strict=True):
        if clean.size > 4000 or clean.shape != noisy.shape:
            return False
        if clean.dtype.kind == "b":
            continue
        if not np.isfinite(clean).all() or not (np.abs(clean) < 500).all():
            return False
        signal, error = clean.astype(np.float64), noisy.astype(np.float64) - clean
        decibels = 66 if clean.dtype == np.float16 else 112
        if float(np.sum(error**2)) > 10 ** (-decibels / 10) * float(np.sum(signal**2)):
            return False
    return True


def _constant_node(data: np.ndarray, name: str, model: _Model, rng: random.Random) -> onnx.NodeProto:
    given: Attributes = {"value": numpy_helper.from_array(data)}
    if model.opset >= 12 and rng.random() < 0.4:
        if data.dtype == np.int64 and data.ndim == 1 and data.size:
            given = {"value_ints": data.tolist()}
        elif data.dtype == np.float32 and data.ndim == 0:
            given = {"value_float": float(data)}
    return helper.make_node("Constant", [], [name], **given)


# Steps: each proposes a node or a small pattern at the newest values.


def _axes(graph: _Graph, rank: int, count: int) -> list[int]:
    axes = graph.rng.sample(range(rank), count)
    return [axis - rank if graph.rng.random() < 0.3 else axis for axis in axes]


def _with_axes(
    graph: _Graph, op_type: str, x: Known, axes: list[int] | None, since: int, **given: Any
) -> Known | None:
    """An operator whose axes are an attribute below opset `since` and an input from there on."""
    if axes is None:
        return graph.op(op_type, [x], **given)
    if graph.model.opset < since:
        return graph.op(op_type, [x], axes=axes, **given)
    return graph.op(op_type, [x, graph.ints(axes)], **given)


def _layer(graph: _Graph) -> None:
    # Of no elements, some windows end the runtime's process.
    rng, x = graph.rng, graph.pick(lambda v: v.is_float and v.rank >= 2 and v.filled)
    if x is None:
        return
    if x.rank >= 3 and rng.random() < 0.85 and x.fixed(1):
        _convolution(graph, x)
    elif x.rank == 2 and rng.random() < 0.6 and (x.fixed(0) or x.fixed(1)):
        _gemm(graph, x)
    elif x.fixed(-1):
        n = rng.randint(1, 5)
        graph.op("MatMul", [x, graph.weights((x.shape[-1], n))])


def _convolution(graph: _Graph, x: Known) -> None:
    rng, channels, spatial = graph.rng, x.shape[1], x.rank - 2
    transposed = rng.random() < 0.25
    group = rng.choice([g for g in range(1, channels + 1) if channels % g == 0])
    each = rng.randint(1, 3)
    kernel = [rng.randint(1, 3) for _ in range(spatial)]
    shape = (channels, each, *kernel) if transposed else (each * group, channels // group, *kernel)
    inputs: list[Known | None] = [x, graph.weights(shape)]
    if rng.random() < 0.5:
        inputs.append(graph.weights((each * group,)))
    given: Attributes = {"group": group if group > 1 or rng.random() < 0.3 else None}
    match rng.randrange(4):
        case 0:
            given["pads"] = [rng.randint(0, 1) for _ in range(2 * spatial)]
        case 1:
            given["auto_pad"] = rng.choice(("SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"))
    if rng.random() < 0.4:
        given["strides"] = [rng.randint(1, 2) for _ in range(spatial)]
    if rng.random() < 0.2 and not given.get("auto_pad"):
        given["dilations"] = [rng.randint(1, 2) for _ in range(spatial)]
    if rng.random() < 0.5:
        given["kernel_shape"] = kernel
    graph.op("ConvTranspose" if transposed else "Conv", inputs, **given)


def _gemm(graph: _Graph, x: Known) -> None:
    rng, n = graph.rng, graph.rng.randint(1, 5)
    trans_a, trans_b = rng.random() < 0.25 or not x.fixed(1), rng.random() < 0.5
    if not x.fixed(0 if trans_a else 1):
        return
    k, m = (x.shape[0], x.shape[1]) if trans_a else (x.shape[1], x.shape[0])
    inputs: list[Known | None] = [x, graph.weights((n, k) if trans_b else (k, n))]
    if graph.model.opset < 11 or rng.random() < 0.8:
        inputs.append(graph.weights(rng.choice(((n,), (1, n), (1,), (), (m, 1), (m, n), (1, 1)))))
    graph.op(
        "Gemm",
        inputs,
        transA=rng.choice((int(trans_a), int(trans_a) or None)),
        transB=int(trans_b) or None,
        alpha=rng.choice((None, 0.5, -1.5)),
        beta=rng.choice((None, 2.0, 0.0)),
    )


def _channel_shapes(graph: _Graph, x: Known) -> tuple[int, ...]:
    """A shape for a constant beside x: by channel, by column, a number, or larger than x."""
    rng, rank = graph.rng, x.rank
    shapes: list[tuple[int, ...]] = [(), (1,), (1,) * rank, (1,) * (rank + 1)]
    if rank:
        shapes += [(x.shape[-1],), (1, x.shape[-1])]
    if rank >= 2:
        channel = (x.shape[1], *(1,) * (rank - 2))
        shapes += [channel, channel, channel, (1, *channel), (1, *channel), (1, 1, *channel), x.shape]
    return rng.choice(shapes)


def _affine(graph: _Graph) -> None:
    rng, x = graph.rng, graph.tensor()
    if x is None:
        return
    op_type = rng.choice(("Add", "Sub", "Mul", "Div"))
    shape = _channel_shapes(graph, x)
    if rng.random() < 0.25:
        neutral = 0 if op_type in ("Add", "Sub") else 1
        c = graph.constant(np.full(shape, neutral, graph.model.dtype))
    else:
        c = graph.weights(shape, 0.5, 2) if rng.random() < 0.7 else graph.weights(shape, -2, -0.5)
    graph.op(op_type, [c, x] if rng.random() < 0.35 else [x, c])


def _batchnorm(graph: _Graph) -> None:
    rng = graph.rng
    x = graph.pick(lambda v: v.is_float and v.rank >= 2 and v.fixed(1))
    if x is None:
        return
    size = (x.shape[1],)
    parameters = [graph.weights(size, *span) for span in ((0.5, 2), (-1, 1), (-1, 1), (0.3, 3))]
    graph.op("BatchNormalization", [x, *parameters], epsilon=rng.choice((None, 1e-3, 0.1)))


def _block(graph: _Graph) -> None:
    """A layer with what is folded into it around it."""
    for step in (_affine, _pad, _transpose, _batchnorm):
        if graph.rng.random() < 0.2:
            step(graph)
    _layer(graph)
    for step in (_batchnorm, _affine, _affine, _clip):
        if graph.rng.random() < 0.5:
            step(graph)
    if graph.rng.random() < 0.3:
        _layer(graph)


def _activation(graph: _Graph) -> None:
    rng, x = graph.rng, graph.tensor()
    if x is not None:
        kinds = ("Relu", "Relu", "Tanh", "Sigmoid", "LeakyRelu", "Neg", "Abs", "Softmax", "Exp", "Erf")
        newer = ("HardSwish",) if graph.model.opset >= 14 else ()
        graph.op(rng.choice((*kinds, *newer)), [x])


def _clip(graph: _Graph) -> None:
    rng = graph.rng
    x = graph.pick(lambda v: v.is_float or (v.is_int and graph.model.opset >= 12))
    if x is None:
        return
    dtype, high = x.arrays[0].dtype, rng.choice((0, 1, 3, 6))
    low = rng.choice((0, 1, 2) if dtype.kind == "u" else (-1, 0, 1, 2))
    match rng.randrange(4):
        case 0:
            graph.op("Relu", [x])
        case 1:
            shape = rng.choice(((), (1,), (1,) * x.rank))
            bound = graph.constant(np.full(shape, rng.choice((low, high)), dtype))
            graph.op(rng.choice(("Min", "Max")), rng.choice(([x, bound], [bound, x])))
        case _ if graph.model.opset < 11:
            graph.op("Clip", [x], min=rng.choice((None, float(low))), max=rng.choice((None, float(high))))
        case _:
            ends = [
                graph.constant(np.array(end, dtype)) if rng.random() < 0.7 else None for end in (low, high)
            ]
            graph.op("Clip", [x, *ends])


def _pad(graph: _Graph) -> None:
    rng, x = graph.rng, graph.pick(lambda v: v.rank > 0 and v.arrays[0].dtype.kind in "fi")
    if x is None:
        return
    opset, mode = graph.model.opset, rng.choice((None, None, None, "constant", "edge", "reflect"))
    axes = list(range(x.rank))
    amounts = [rng.choice((0, 1, 2)) if axis % x.rank > 1 or rng.random() < 0.2 else 0 for axis in axes * 2]
    if rng.random() < 0.1:
        amounts[-1] = -1
    value = rng.choice((None, None, 0.0, 1.0))
    if opset < 11:
        graph.op("Pad", [x], pads=amounts, mode=mode, value=value)
        return
    fill = None if value is None else graph.constant(np.array(value, x.arrays[0].dtype))
    inputs: list[Known | None] = [x, graph.ints(amounts)]
    if opset >= 18 and rng.random() < 0.4:
        chosen = _axes(graph, x.rank, rng.randint(1, x.rank))
        inputs[1] = graph.ints([rng.randint(0, 2) for _ in range(2 * len(chosen))])
        graph.op("Pad", [*inputs, fill, graph.ints(chosen)], mode=mode)
    else:
        graph.op("Pad", [*inputs, fill] if fill is not None else inputs, mode=mode)


def _pool(graph: _Graph) -> None:
    rng, x = graph.rng, graph.pick(lambda v: v.is_float and v.rank in (3, 4) and v.filled)
    if x is None:
        return
    spatial = x.rank - 2
    kernel = [rng.randint(1, 3) for _ in range(spatial)]
    given: Attributes = {"kernel_shape": kernel, "strides": rng.choice((None, [2] * spatial))}
    if rng.random() < 0.5:
        given["pads"] = [rng.randint(0, size - 1) for size in kernel * 2]
    if rng.random() < 0.5:
        graph.op("MaxPool", [x], **given)
    else:
        graph.op("AveragePool", [x], count_include_pad=rng.choice((None, 1)), **given)


def _transpose(graph: _Graph) -> None:
    x = graph.pick(lambda v: v.rank > 0)
    if x is not None:
        perm = graph.rng.sample(range(x.rank), x.rank)
        graph.op("Transpose", [x], perm=graph.rng.choice((perm, perm, None, list(range(x.rank)))))


def _reshape(graph: _Graph) -> None:
    rng, x = graph.rng, graph.pick(lambda v: v.rank > 0)
    if x is None:
        return
    if rng.random() < 0.15:
        graph.op(
            "Flatten",
            [x],
            axis=rng.choice((None, rng.randint(-x.rank if graph.model.opset > 10 else 0, x.rank))),
        )
        return
    target = list(x.shape)
    match rng.randrange(5):
        case 0 if x.rank > 1:
            axis = rng.randrange(x.rank - 1)
            target[axis : axis + 2] = [target[axis] * target[axis + 1]]
        case 1:
            target.insert(rng.randrange(x.rank + 1), 1)
        case 2:
            rng.shuffle(target)
        case 3:
            axis = rng.randrange(x.rank)
            even = target[axis] % 2 == 0
            target[axis : axis + 1] = [2, target[axis] // 2] if even else [target[axis], 1]
    free = [axis for axis in range(len(target)) if not (axis < x.rank and x.fixed(axis))]
    if rng.random() < 0.5 or free:
        target[rng.choice(free or range(len(target)))] = -1
    target = [
        0 if i < x.rank and size == x.shape[i] and rng.random() < 0.4 else size
        for i, size in enumerate(target)
    ]
    allow = rng.choice((0, None)) if graph.model.opset >= 14 else None
    graph.op("Reshape", [x, graph.ints(target)], allowzero=allow)


def _squeeze(graph: _Graph) -> None:
    rng, x = graph.rng, graph.pick()
    if x is None:
        return
    ones = [axis for axis in range(x.rank) if x.shape[axis] == 1 and x.fixed(axis)]
    if ones and rng.random() < 0.6:
        axes = rng.sample(ones, rng.randint(1, len(ones)))
        if graph.model.opset < 11:
            axes.sort()  # ONNX's own inference passes over those that are out of order
        negative = rng.random() < 0.3 and graph.model.opset >= 11
        axes = [axis - x.rank if negative else axis for axis in axes]
        _with_axes(graph, "Squeeze", x, rng.choice((axes, axes, None)), 13)
    elif x.rank < 5:
        count = rng.randint(1, 2)
        axes = rng.sample(range(x.rank + count), count)
        if rng.random() < 0.3 and graph.model.opset >= 11:
            axes = [axis - x.rank - count for axis in axes]
        _with_axes(graph, "Unsqueeze", x, axes, 13)


def _slice(graph: _Graph) -> None:
    rng, x = graph.rng, graph.pick(lambda v: v.rank > 0)
    if x is None:
        return
    axes = _axes(graph, x.rank, rng.randint(1, min(2, x.rank)))
    starts = [rng.choice((0, 0, 1, -1, -2, -3, 2**31 - 1, -(2**31))) for _ in axes]
    ends = [rng.choice((2**31 - 1, 2**63 - 1, -1, 2, 3, x.shape[a], -(2**31), -(2**63) + 1)) for a in axes]
    steps = [rng.choice((1, 1, 1, 2, -1, -2)) for _ in axes]
    # Backwards to the largest integer, ONNX Runtime goes past index 0, where ONNX's text gives nothing.
    ends = [-end if step < 0 and end >= 2**31 - 1 else end for end, step in zip(ends, steps, strict=True)]
    if graph.model.opset < 10:
        graph.op("Slice", [x], starts=starts, ends=ends, axes=axes)
        return
    inputs: list[Known | None] = [x, graph.ints(starts), graph.ints(ends), graph.ints(axes)]
    graph.op("Slice", [*inputs, graph.ints(steps)] if rng.random() < 0.6 else inputs)


def _concat(graph: _Graph) -> None:
    rng, x = graph.rng, graph.pick(lambda v: v.rank > 0)
    if x is None:
        return
    axis = rng.randrange(x.rank)

    def fits(v: Known) -> bool:
        return v.arrays[0].dtype == x.arrays[0].dtype and all(
            len(a.shape) == len(b.shape)
            and all(i == axis or n == m for i, (n, m) in enumerate(zip(a.shape, b.shape, strict=True)))
            for a, b in zip(v.arrays, x.arrays, strict=True)
        )

    parts = [x, *(graph.pick(fits) for _ in range(rng.randint(0, 2)))]
    graph.op("Concat", rng.sample(parts, len(parts)), axis=axis - x.rank if rng.random() < 0.2 else axis)


def _split(graph: _Graph) -> None:
    rng, x = graph.rng, graph.pick(lambda v: v.rank > 0)
    if x is None:
        return
    axis = rng.randrange(x.rank)
    size, count = x.shape[axis], rng.randint(1, 3)
    cuts = sorted(rng.randint(0, size) for _ in range(count - 1))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    if rng.random() < 0.4:
        number = count if graph.model.opset >= 18 else None
        graph.op("Split", [x], count, axis=axis, num_outputs=number)
    elif graph.model.opset < 13:
        graph.op("Split", [x], count, axis=axis, split=sizes)
    else:
        graph.op("Split", [x, graph.ints(sizes)], count, axis=axis)


def _cast(graph: _Graph) -> None:
    rng, x = graph.rng, graph.pick(lambda v: v.exact)
    kinds = ("float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool")
    for _ in range(rng.randint(1, 2)):
        if x is not None:
            kind = rng.choice((*kinds, str(graph.model.dtype), str(x.arrays[0].dtype)))
            x = graph.op("Cast", [x], to=int(helper.np_dtype_to_tensor_dtype(np.dtype(kind)))) or x


def _identity(graph: _Graph) -> None:
    rng, x = graph.rng, graph.pick()
    if x is not None:
        mask = 2 if x.is_float and rng.random() < 0.2 else 1
        graph.op(rng.choice(("Identity", "Dropout")), [x], mask)


def _shape_arithmetic(graph: _Graph) -> None:
    """Reshape, Expand or ConstantOfShape by what Shape, Gather, Concat and a little arithmetic give."""
    rng, x = graph.rng, graph.pick(lambda v: v.rank > 0)
    if x is None:
        return
    whole = graph.op("Shape", [x])
    if whole is None:
        return
    if rng.random() < 0.2:
        graph.op("Shape", [x], start=rng.randint(-x.rank, x.rank) if graph.model.opset >= 15 else None)
        graph.op("Size", [x])
    parts: list[Known] = []
    for axis in range(x.rank):
        index = graph.ints([axis] if rng.random() < 0.5 else axis)  # type: ignore[arg-type]
        part = graph.op("Gather", [whole, index], axis=rng.choice((0, None)))
        if part is not None and part.rank == 0:
            part = _with_axes(graph, "Unsqueeze", part, [0], 13)
        if part is not None and rng.random() < 0.3:
            part = graph.op("Mul", [part, graph.ints([1])]) or part
        parts += [part] if part is not None else []
    if len(parts) != x.rank:
        return
    if rng.random() < 0.5:
        parts[rng.randrange(x.rank)] = graph.ints([-1])
    target = graph.op("Concat", parts, axis=0)
    if target is None:
        return
    match rng.randrange(4):
        case 0:
            graph.op("ConstantOfShape", [whole], value=helper.make_tensor("v", 1, [1], [1.0]))
        case 1:
            graph.op("Expand", [x, whole])
        case _:
            graph.op("Reshape", [x, target])


def _integers(graph: _Graph) -> None:
    rng, x = graph.rng, graph.pick(lambda v: v.is_int)
    if x is not None:
        c = graph.constant(
            np.full(rng.choice(((), (1,), (1,) * x.rank)), rng.choice((1, 2, 3)), x.arrays[0].dtype)
        )
        kind = rng.choice(("Add", "Sub", "Mul", "Div", "Mod", "Max", "Min"))
        graph.op(kind, rng.choice(([x, c], [c, x])))


def _binary(graph: _Graph) -> None:
    rng, x = graph.rng, graph.pick(lambda v: v.arrays[0].dtype.kind in "fi")
    if x is None:
        return
    other = graph.pick(lambda v: v.arrays[0].dtype == x.arrays[0].dtype)
    count = rng.choice((1, 2, 3))
    if rng.random() < 0.3:
        graph.op(rng.choice(("Sum", "Max", "Min", "Mean")), [x, other, x][:count])
    elif rng.random() < 0.3:
        condition = graph.op(rng.choice(("Less", "Greater", "Equal")), [x, other])
        if condition is not None:
            graph.op("Where", [condition, x, other])
    else:
        graph.op(rng.choice(("Add", "Mul", "Sub", "Div")), [x, other])


def _reduce(graph: _Graph) -> None:
    # A reduction of nothing keeps its axes in ONNX Runtime, whatever keepdims says.
    x = graph.pick(lambda v: v.rank > 0 and v.arrays[0].dtype.kind in "fi" and v.filled)
    rng = graph.rng
    if x is None:
        return
    kind = rng.choice(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceL2"))
    axes = _axes(graph, x.rank, rng.randint(1, x.rank)) if rng.random() < 0.8 else None
    if graph.model.opset < 11 and axes is not None:
        axes = [axis % x.rank for axis in axes]
    _with_axes(graph, kind, x, axes, 13 if kind == "ReduceSum" else 18, keepdims=rng.choice((None, 0, 1)))


def _gather(graph: _Graph) -> None:
    rng, x = graph.rng, graph.pick(lambda v: v.rank > 0)
    if x is None:
        return
    axis = rng.randrange(x.rank)
    shape = rng.choice(((), (1,), (2,), (2, 2)))
    least = min(array.shape[axis] for array in x.arrays)
    if least:
        index = graph.model.numbers.integers(-least, least, shape)
        graph.op("Gather", [x, graph.constant(index, "int64")], axis=axis)


def _odd(graph: _Graph) -> None:
    """One of the rarer operators."""
    rng, x = graph.rng, graph.pick(lambda v: v.rank > 0)
    if x is None:
        return
    match rng.randrange(8):
        case 0:
            graph.op("Tile", [x, graph.ints([rng.randint(1, 2) for _ in range(x.rank)])])
        case 1:
            graph.op("Expand", [x, graph.ints([1] * rng.randint(0, x.rank + 1))])
        case 2:
            graph.op("NonZero", [x])
        case 3:
            graph.op("ArgMax", [x], axis=rng.randrange(x.rank), keepdims=rng.choice((0, None)))
        case 4:
            graph.op("Pow", [x, graph.constant(np.ones(rng.choice(((), (1,))), graph.model.dtype))])
        case 5 if graph.model.opset >= 15:
            graph.op("CastLike", [x, graph.weights((1,))]) if x.exact else None
        case 6:
            step = rng.choice((1, 2, -1))
            graph.op("Range", [graph.constant(np.array(n, np.int64)) for n in (0, 4 * step, step)])
        case _:
            noise = graph.op("RandomNormal", [], shape=list(x.shape), seed=float(rng.randint(1, 9)))
            if noise is not None and rng.random() < 0.5:
                graph.op("RandomUniform", [], shape=list(x.shape), seed=float(rng.randint(1, 9)))


def _duplicate(graph: _Graph) -> None:
    """An earlier node again, with outputs of its own."""
    known = {value.name: value for value in (*graph.visible(), *graph.stored)}
    nodes = [
        node
        for node in graph.nodes
        if node.op_type != "Constant"
        and all(not name or name in known for name in node.input)
        and not any(attr.HasField("g") for attr in node.attribute)
    ]
    if nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(graph.rng.choice(nodes))
        exact = [known[name].exact for name in copy.output if name in known]
        copy.name = graph.model.fresh("n")
        copy.output[:] = [graph.model.fresh("v") if name else "" for name in copy.output]
        graph.append(copy, [known[name] for name in copy.input if name], exact=all(exact) and bool(exact))


def _chain(graph: _Graph) -> None:
    """Steps of one family, each on what the one before it gave."""
    rng, family = graph.rng, graph.rng.choice(_FAMILIES)
    graph.focus = graph.pick()
    for _ in range(rng.randint(2, 4)):
        rng.choice(family)(graph)
    graph.focus = None


def _constant_arithmetic(graph: _Graph) -> None:
    """Steps on a constant, and what comes of it beside a value."""
    rng, model = graph.rng, graph.model
    dtype = rng.choice((model.dtype, model.dtype, np.dtype("int64"), np.dtype("int32")))
    graph.focus = graph.constant(
        graph.data([rng.randint(0 if rng.random() < 0.1 else 1, 4) for _ in range(rng.randint(0, 4))], dtype)
    )
    for _ in range(rng.randint(1, 4)):
        rng.choice(_MOVES)(graph)
    found, graph.focus = graph.focus, None
    x = graph.pick(lambda v: v.arrays[0].dtype == found.arrays[0].dtype and not v.stored)
    if x is not None:
        graph.op(rng.choice(("Add", "Mul", "Sub", "Max")), rng.choice(([x, found], [found, x])))


def _body(graph: _Graph, name: str, inner: _Graph, outputs: Sequence[Known]) -> onnx.GraphProto:
    return helper.make_graph(
        inner.nodes,
        name,
        inner.inputs,
        [helper.make_tensor_value_info(v.name, _element(v.arrays[0]), None) for v in outputs],
        inner.initializers,
    )


def _captured(graph: _Graph, *bodies: onnx.GraphProto) -> list[Known]:
    """What bodies read of the graphs around them."""
    outer: dict[str, Known] = {}
    level: _Graph | None = graph
    while level is not None:
        outer = {**{v.name: v for v in (*level.known, *level.stored)}, **outer}
        level = level.parent
    names = [name for body in bodies for name in _names_in(body)]
    return [outer[name] for name in dict.fromkeys(names) if name in outer]


def _names_in(body: onnx.GraphProto) -> Iterator[str]:
    yield from (port.name for port in body.output)
    for node in body.node:
        yield from node.input
        for attr in node.attribute:
            if attr.HasField("g"):
                yield from _names_in(attr.g)


def _if(graph: _Graph) -> None:
    rng, model = graph.rng, graph.model
    condition = graph.pick(lambda v: v.arrays[0].dtype == bool and v.arrays[0].size == 1 and v.rank < 2)
    if condition is None or rng.random() < 0.3:
        condition = graph.constant(np.array(rng.random() < 0.5))
    bodies, shapes, exact = [], [], []
    for _ in range(2):
        inner = _Graph(model, graph)
        inner.grow(rng.randint(1, 4), nested=rng.random() < 0.7)
        results = [v for v in inner.known if v.is_float and not v.stored]
        kind = [v for v in results if v.arrays[0].dtype == model.dtype]
        if not kind:
            return
        bodies.append(_body(graph, model.fresh("branch"), inner, kind[-1:]))
        shapes.append([array.shape for array in kind[-1].arrays])
        exact.append(kind[-1].exact)
    if model.opset < 11 and shapes[0] != shapes[1]:
        return  # the runtime takes one branch's shape for the other's
    node = helper.make_node(
        "If", [condition.name], [model.fresh("v")], then_branch=bodies[0], else_branch=bodies[1]
    )
    graph.append(node, [condition, *_captured(graph, *bodies)], exact=all(exact))


def _loop(graph: _Graph) -> None:
    """A Loop that carries one value, whose shape may change on the way, and may collect another."""
    rng, model = graph.rng, graph.model
    state = graph.pick(lambda v: v.is_float and v.rank > 0)
    if state is None:
        return
    inner = _Graph(model, graph)
    ports = [model.fresh("b") for _ in range(3)]
    firsts = (np.array(0, np.int64), np.array(True), None)
    for name, first in zip(ports, firsts, strict=True):
        arrays = state.arrays if first is None else (first,) * (2 * SAMPLES)
        shape = (
            rng.choice((None, list(state.shape)))
            if first is None and state.arrays[0].shape == state.arrays[1].shape
            else None
        )
        inner.inputs.append(
            helper.make_tensor_value_info(name, _element(arrays[0]), [] if first is not None else shape)
        )
        inner.add(Known(name, arrays, exact=False))
    carried = inner.known[-1]
    inner.grow(rng.randint(1, 4), nested=rng.random() < 0.7)
    if rng.random() < 0.3:
        inner.op("Concat", [carried, carried], axis=0)
    results = [
        v
        for v in inner.known
        if v.arrays[0].dtype == state.arrays[0].dtype and v.name != carried.name and not v.stored
    ]
    go = inner.op("Identity", [inner.known[1]]) if rng.random() < 0.7 else inner.constant(np.array(True))
    if not results or go is None:
        return
    outputs = [go, results[-1], *results[-1:0:-1][:1]] if rng.random() < 0.4 else [go, results[-1]]
    if len({v.name for v in outputs}) < len(outputs):
        return
    body = _body(graph, model.fresh("body"), inner, outputs)
    trips = graph.constant(np.array(rng.randint(1, 3), np.int64))
    node = helper.make_node(
        "Loop", [trips.name, "", state.name], [model.fresh("v") for _ in outputs[1:]], body=body
    )
    graph.append(node, [trips, state, *_captured(graph, body)], exact=False)


def _function(graph: _Graph) -> None:
    """Define a function of two values, or call one that there is."""
    rng, model = graph.rng, graph.model
    x = graph.tensor()
    y = graph.pick(lambda v: v.is_float and x is not None and v.arrays[0].dtype == x.arrays[0].dtype)
    if x is None or y is None or model.ir_version < 8:
        return
    if not model.functions or rng.random() < 0.4:
        inner = _Graph(model, None, holds_initializers=False)
        names = [model.fresh("a"), model.fresh("b")]
        inner.known = [Known(names[0], x.arrays, False), Known(names[1], y.arrays, False)]
        inner.grow(rng.randint(1, 4), nested=True)
        made = [v for v in inner.known if v.name not in names and v.is_float and not v.stored]
        if not made:
            return
        leaky = [node for node in inner.nodes if node.op_type == "LeakyRelu"]
        for node in leaky:
            node.attribute.append(
                onnx.AttributeProto(name="alpha", ref_attr_name="alpha", type=onnx.AttributeProto.FLOAT)
            )
        if not any(imported.domain == "d" for imported in model.imports):
            model.imports.append(helper.make_opsetid("d", 1))
        model.functions.append(
            helper.make_function(
                "d",
                model.fresh("f"),
                names,
                [v.name for v in made[-rng.randint(1, 2) :]],
                inner.nodes,
                [
                    i
                    for i in model.imports
                    if not (i.domain == "d" and not any(n.domain == "d" for n in inner.nodes))
                ],
                ["alpha"] if leaky else [],
            )
        )
    called = rng.choice(model.functions)
    given: Attributes = {"alpha": 0.25} if called.attribute else {}
    node = helper.make_node(
        called.name, [x.name, y.name], [model.fresh("v") for _ in called.output], domain="d", **given
    )
    graph.append(node, [x, y], exact=False)


_MOVES = (
    *(_activation, _affine, _cast, _clip, _concat, _gather, _identity, _integers, _odd, _pad, _reduce),
    *(_reshape, _shape_arithmetic, _slice, _split, _squeeze, _transpose),
)
_FAMILIES: tuple[tuple[Callable[[_Graph], None], ...], ...] = (
    (_pad, _pad, _pool, _layer),
    (_reshape, _reshape, _squeeze),
    (_squeeze,),
    (_transpose,),
    (_slice,),
    (_concat, _concat, _split),
    (_clip,),
    (_cast,),
    (_layer, _layer, _affine),
    (_layer, _batchnorm, _affine, _transpose, _reshape),
    (_transpose, _reshape, _slice, _identity),
    _MOVES,
)

_STEPS: tuple[tuple[Callable[[_Graph], None], int, bool], ...] = (
    (_block, 6, False),
    (_chain, 16, False),
    (_constant_arithmetic, 6, False),
    (_layer, 3, False),
    (_affine, 4, False),
    (_batchnorm, 2, False),
    (_activation, 2, False),
    (_clip, 3, False),
    (_pad, 3, False),
    (_pool, 2, False),
    (_transpose, 3, False),
    (_reshape, 4, False),
    (_squeeze, 3, False),
    (_slice, 3, False),
    (_concat, 2, False),
    (_split, 2, False),
    (_cast, 3, False),
    (_identity, 2, False),
    (_shape_arithmetic, 2, False),
    (_integers, 2, False),
    (_binary, 2, False),
    (_reduce, 2, False),
    (_gather, 2, False),
    (_odd, 2, False),
    (_duplicate, 3, False),
    (_if, 2, True),
    (_loop, 2, True),
    (_function, 2, True),
)
"""Step, how often, and whether it makes graphs or functions inside."""
