"""Random graphs of ops that move elements, among others; for the passes that merge such ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

SHAPE = (2, 3, 1, 4)


class Movements:
    """A graph that grows by one random op on a random value at a time."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
        self.values: list[tuple[str, np.ndarray]] = [("x", np.zeros(SHAPE, np.float32))]
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def model(self, kinds: str, most: int) -> onnx.ModelProto | None:
        """Up to `most` ops of the kinds with these letters; the last value and another one are outputs."""
        for _ in range(self.number(3, most)):
            name, x = self.values[-1 if self.number(0, 1) else self.number(0, len(self.values) - 1)]
            if x.ndim and x.size < 2000:
                _KINDS[self.data.draw(st.sampled_from(kinds))](self, name, x)
        if not self.nodes:
            return None
        results = dict([self.values[-1], self.values[self.number(1, len(self.values) - 1)]])
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, y.shape) for n, y in results.items()],
            self.constants,
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return onnx.shape_inference.infer_shapes(proto, strict_mode=True)

    def number(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def add(self, op: str, inputs: list[str], *results: np.ndarray, **attributes: Any) -> None:
        names = [f"v{len(self.nodes)}_{index}" for index in range(len(results))]
        self.nodes.append(helper.make_node(op, inputs, names, name=names[0], **attributes))
        self.values += [(n, np.asarray(r, np.float32)) for n, r in zip(names, results, strict=True)]

    def held(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def alike(self, x: np.ndarray) -> str:
        """A value of the same shape, maybe the same."""
        return self.data.draw(st.sampled_from([name for name, y in self.values if y.shape == x.shape]))

    def transpose(self, name: str, x: np.ndarray) -> None:
        perm = self.data.draw(st.permutations(range(x.ndim)))
        self.add("Transpose", [name], x.transpose(perm), perm=perm)

    def reshape(self, name: str, x: np.ndarray) -> None:
        sizes = list(x.shape)
        ones = [axis for axis, size in enumerate(sizes) if size == 1]
        if ones and self.number(0, 1):
            sizes.pop(self.data.draw(st.sampled_from(ones)))
        elif len(sizes) > 1 and self.number(0, 1):
            sizes[:2] = [sizes[0] * sizes[1]]
        elif len(sizes) < 5:
            sizes.insert(self.number(0, len(sizes)), 1)
        self.add("Reshape", [name, self.held(np.array(sizes, np.int64))], x.reshape(sizes))

    def unary(self, name: str, x: np.ndarray) -> None:
        self.add("Sigmoid", [name], x)

    def constant(self, name: str, x: np.ndarray) -> None:
        shape = [size if self.number(0, 1) else 1 for size in x.shape][self.number(0, x.ndim) :]
        self.add("Add", [name, self.held(self.rng.standard_normal(shape).astype(np.float32))], x)

    def product(self, name: str, x: np.ndarray) -> None:
        self.add("Mul", [name, self.alike(x)], x)

    def concat(self, name: str, x: np.ndarray) -> None:
        axis, names = (
            self.number(-x.ndim, x.ndim - 1),
            [name, *(self.alike(x) for _ in range(self.number(1, 2)))],
        )
        self.add("Concat", names, np.concatenate([x] * len(names), axis), axis=axis)

    def reduce(self, name: str, x: np.ndarray) -> None:
        axes, keep = self.data.draw(st.sets(st.integers(0, x.ndim - 1), min_size=1)), self.number(0, 1)
        result = x.sum(tuple(axes), keepdims=bool(keep))
        self.add("ReduceSum", [name, self.held(sorted(axes))], result, keepdims=keep)

    def softmax(self, name: str, x: np.ndarray) -> None:
        self.add("Softmax", [name], x, axis=self.number(-x.ndim, x.ndim - 1))

    def slice(self, name: str, x: np.ndarray) -> None:
        axis = self.number(0, x.ndim - 1)
        start = self.number(0, x.shape[axis] - 1)
        end = self.number(start + 1, x.shape[axis])
        lists = [self.held([number]) for number in (start, end, axis)]
        self.add("Slice", [name, *lists], np.take(x, range(start, end), axis))

    def split(self, name: str, x: np.ndarray) -> None:
        axis = self.number(0, x.ndim - 1)
        cut = self.number(0, x.shape[axis])
        sizes = self.held([cut, x.shape[axis] - cut])
        if 0 < cut < x.shape[axis]:
            self.add("Split", [name, sizes], *np.split(x, [cut], axis), axis=axis)

    def gather(self, name: str, x: np.ndarray) -> None:
        axis = self.number(0, x.ndim - 1)
        start = self.number(0, x.shape[axis] - 1)
        taken = list(range(start, self.number(start + 1, x.shape[axis])))
        self.add("Gather", [name, self.held(taken)], np.take(x, taken, axis), axis=axis)

    def scatter(self, name: str, x: np.ndarray) -> None:
        """A whole slab along the first axes is written over."""
        start = self.number(0, x.shape[0] - 1)
        end = self.number(start + 1, x.shape[0])
        written = self.rng.standard_normal((end - start, *x.shape[1:])).astype(np.float32)
        self.add("ScatterND", [name, self.held([[row] for row in range(start, end)]), self.held(written)], x)


_KINDS: dict[str, Callable[[Movements, str, np.ndarray], None]] = {
    "T": Movements.transpose,
    "R": Movements.reshape,
    "u": Movements.unary,
    "c": Movements.constant,
    "p": Movements.product,
    "C": Movements.concat,
    "r": Movements.reduce,
    "s": Movements.softmax,
    "S": Movements.slice,
    "P": Movements.split,
    "G": Movements.gather,
    "X": Movements.scatter,
}
