"""How a random model grows: node by node, each tried in the runtime before it is taken."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

__all__ = ["SAMPLES", "Attributes", "Graph", "Known", "Model", "RandomModel", "Step", "element"]

Arrays = tuple[np.ndarray, ...]
Attributes = dict[str, Any]
Step = tuple[Callable[["Graph"], None], int, bool]
"""A step, how often, and whether it makes graphs or functions inside."""

SAMPLES = 3
OPSETS = (7, 8, 9, 10, 11, 11, 12, 13, 13, 14, 15, 16, 17, 17, 18, 18, 19, 20, 21, 21, 22, 23, 24)
_FLOATS = ("float32", "float32", "float32", "float64", "float16")
_JUMPS = frozenset(
    {"ArgMax", "ArgMin", "Cast", "Ceil", "Equal", "Floor", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"}
    | {"Mod", "NonZero", "QuantizeLinear", "DynamicQuantizeLinear", "Round", "Sign", "TopK"}
)
"""Where a last bit of a float decides: taken only of values that no rewrite may round otherwise."""
_ROUNDING = frozenset(
    {"Add", "AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "Div", "Erf", "Exp", "Gelu", "Gemm"}
    | {"HardSwish", "LeakyRelu", "MatMul", "Mean", "Mul", "Pow", "ReduceL2", "ReduceMean", "ReduceSum"}
    | {
        "Sigmoid",
        "Softmax",
        "Sqrt",
        "Sub",
        "Sum",
        "Tanh",
        "Softplus",
        "Softsign",
        "Elu",
        "Selu",
        "Mish",
        "Swish",
    }
    | {"HardSigmoid", "PRelu", "Reciprocal", "Log", "InstanceNormalization", "LayerNormalization", "Einsum"}
    | {
        "GroupNormalization",
        "RMSNormalization",
        "ReduceSumSquare",
        "ReduceL1",
        "ReduceProd",
        "CumSum",
        "Resize",
    }
    | {"GRU", "LSTM", "RNN", "LogSoftmax", "Celu", "GlobalAveragePool", "ReduceLogSumExp", "LpNormalization"}
)
_HOLDERS = ("If", "Loop", "Scan")


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


def element(array: np.ndarray) -> int:
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
        if clean.dtype.kind != "f":
            continue
        if not np.isfinite(clean).all() or not (np.abs(clean) < 500).all():
            return False
        signal, error = clean.astype(np.float64), noisy.astype(np.float64) - clean
        decibels = 66 if clean.dtype == np.float16 else 112
        if float(np.sum(error**2)) > 10 ** (-decibels / 10) * float(np.sum(signal**2)):
            return False
    return True


def _constant_node(data: np.ndarray, name: str, model: Model, rng: random.Random) -> onnx.NodeProto:
    given: Attributes = {"value": numpy_helper.from_array(data)}
    if model.opset >= 12 and rng.random() < 0.4:
        if data.dtype == np.int64 and data.ndim == 1 and data.size:
            given = {"value_ints": data.tolist()}
        elif data.dtype == np.float32 and data.ndim == 0:
            given = {"value_float": float(data)}
    return helper.make_node("Constant", [], [name], **given)


class Model:
    """What all graphs of a model share."""

    def __init__(self, rng: random.Random, steps: Sequence[Step]) -> None:
        self.rng, self.steps = rng, steps
        self.numbers = np.random.default_rng(rng.getrandbits(32))
        self.opset = rng.choice(OPSETS)
        self.ir_version = rng.choice((3, 4, 4, 7, 8, 8, 8, 9, 10, 10, 10, 11))
        self.dtype = np.dtype(rng.choice(_FLOATS))
        self.imports = [helper.make_opsetid("", self.opset)]
        self.functions: list[onnx.FunctionProto] = []
        self.count = 0
        self.dynamic = rng.choice((0.2, 0.5, 0.5, 1))
        """How likely the first axis of an input varies; others do less."""
        self.read_apart = rng.choice((0, 0, 0.1, 0.2))
        """How likely a value in the middle is an output, or is read by a later step."""
        self.symbols = {"M": self.sizes(0.04), "N": self.sizes(0.02)}

    def sizes(self, zero: float, most: int = 3) -> tuple[int, ...]:
        """A size for each sample, now and then 0."""
        one = [self.rng.randint(1, most) for _ in range(SAMPLES)]
        if self.rng.random() < zero:
            one[-1] = 0
        return tuple(one)

    def fresh(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def build(self, steps: int) -> RandomModel:
        main = Graph(self, None)
        for _ in range(self.rng.randint(1, 3)):
            main.add_input()
        main.grow(steps)
        outputs = main.choose_outputs()
        graph = helper.make_graph(
            main.nodes,
            "random",
            [*main.inputs, *main.overridable],
            [helper.make_tensor_value_info(v.name, element(v.arrays[0]), [None] * v.rank) for v in outputs],
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
            [helper.make_tensor_value_info(v.name, element(v.arrays[0]), None) for v in inputs],
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


class Graph:
    """A graph that grows: the main graph, a body, or a function."""

    def __init__(self, model: Model, parent: Graph | None, *, holds_initializers: bool = True) -> None:
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
        shapes, dims = [[0] * rank for _ in range(SAMPLES)], list[int | str | None]([0] * rank)
        for axis in range(rank):
            dims[axis] = size = rng.choice(small if axis < 2 else large)
            sizes = (size,) * SAMPLES
            if rng.random() < self.model.dynamic * (1 if axis == 0 else 0.3):
                symbol = rng.choice((*self.model.symbols, None))
                sizes = self.model.symbols[symbol] if symbol else self.model.sizes(0, 3 if axis < 2 else 7)
                dims[axis] = symbol or rng.choice((f"{name}_{axis}", None))
            for shape, chosen in zip(shapes, sizes, strict=True):
                shape[axis] = chosen
        others = ("int64", "int32", "bool", "uint8", "int8", "float64", "float16")
        dtype = self.model.dtype if rng.random() < 0.85 else np.dtype(rng.choice(others))
        arrays = tuple(self.data(shape, dtype) for shape in shapes) * 2
        for feed, array in zip(self.feeds, arrays[:SAMPLES], strict=True):
            feed[name] = array
        self.inputs.append(helper.make_tensor_value_info(name, element(arrays[0]), dims))
        return self.add(Known(name, arrays, True))

    def data(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """Quarters between -3 and 3, which no type rounds, or small integers."""
        if dtype.kind == "f":
            return np.asarray(self.model.numbers.integers(-12, 13, shape) / 4, dtype)
        return np.asarray(self.model.numbers.integers(0 if dtype.kind in "bu" else -3, 4, shape), dtype)

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
                        name, element(data), rng.choice((data.shape, [None] * data.ndim))
                    )
                )
                if data.dtype.kind == "f" and data.size and model.ir_version >= 4:
                    arrays = (*(data,) * (SAMPLES - 1), np.asarray(data + 0.25, data.dtype)) * 2
                    self.feeds[-1][name] = arrays[-1]
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
        known = onnx.defs.has(op_type, self.model.opset, "")  # the runtime takes some that ONNX had not yet
        if (op_type in _JUMPS and not exact) or not known:
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
        table = self.model.steps
        from_table = [step for step, weight, nests in table if not (nested and nests) for _ in range(weight)]
        for _ in range(steps):
            self.rng.choice(from_table)(self)

    def hide(self, since: int) -> None:
        """Leave what was made since then, but for the last, to those who read it already; mostly."""
        if self.rng.random() >= self.model.read_apart:
            del self.known[since:-1]

    def choose_outputs(self) -> list[Known]:
        """The newest value and others, in the middle too; unread ones may stay dead."""
        made = [v for v in self.known if not v.stored and v.name not in {i.name for i in self.inputs}]
        if not made:
            copy = self.op("Identity", [self.known[0]])
            assert copy is not None
            return [copy]
        others = [v for v in made[:-1] if self.rng.random() < self.model.read_apart]
        return [*others, made[-1]]


@dataclass(frozen=True)
class RandomModel:
    """A model and samples of different sizes of its dynamic axes; the last one overrides initializers."""

    proto: onnx.ModelProto
    feeds: tuple[dict[str, np.ndarray], ...]
    dtype: str
