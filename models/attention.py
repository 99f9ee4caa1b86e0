"""One attention in the ways in which exporters write its parts; random weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto

from models.builder import Builder, Port

SPLITS = ("transposed", "twice", "flattened", "batched", "rows", "gather", "slice", "split", "apart")
SCALES = ("div", "mul", "queries", "both", "before", "none")
MASKS = ("", "bias", "product", "choice", "keep", "drop", "infinite", "causal", "input")
JOINS = ("joined", "rows", "apart")


def attention(
    split: str = "transposed",
    scale: str = "div",
    mask: str = "",
    join: str = "joined",
    *,
    guard: bool = False,
    heads: int = 2,
    kv_heads: int | None = None,
    size: int = 4,
    opset: int = 23,
    sizes: tuple[int | str, int | str] = ("batch", "sequence"),
) -> onnx.ModelProto:
    """Hidden states to hidden states, float32 (batch, sequence, heads * size), without a projection behind.

    Args:
        split: how queries, keys and values come to have heads: `transposed`, keys by one Transpose as
            TorchScript writes them; `twice`, by two; `flattened`, turned as [batch * heads, ..] as
            torch.export does; `batched`, all of them so (BART, CLIP, Whisper); `rows`, from [batch *
            sequence, ..] (tf2onnx; one of the two is a number); `gather`, `slice`, `split`: out of one
            product (timm, Paddle); `apart`: inputs ``q``, ``k``, ``v`` (batch, heads, sequence, size).
        scale: what is scaled, and how: the scores by `div` or `mul`; `queries` or `both` after, or queries
            `before` their heads are split; or `none`.
        mask: what masks the scores: a `bias` of -10000, or a `product` with the lowest number, of an int64
            input ``mask`` (batch, sequence); a `choice` of 0 and the lowest number by an input ``keep``
            (batch, 1, sequence, sequence); that number, or an `infinite` one, in place of what is not to
            ``keep`` or to ``drop``; a constant `causal` one of -inf; a float `input` ``mask``.
        join: what becomes of the heads: `joined`, in `rows` (batch * sequence, ..), or left `apart`.
        guard: zeros for NaN, as torch.export writes them.
        heads, kv_heads, size, opset, sizes: of the model; keys and values are repeated where they are fewer.
            The opset is 13 at least.
    """
    made = _Attention(heads, kv_heads or heads, size, sizes, split, scale)
    return made.model(mask, join, guard, opset)


class _Attention:
    def __init__(
        self, heads: int, kv_heads: int, size: int, sizes: tuple[int | str, int | str], split: str, scale: str
    ) -> None:
        self.b = Builder(seed=0)
        self.heads, self.kv_heads, self.size, self.split, self.scale = heads, kv_heads, size, split, scale
        self.sizes, self.inputs, self.dtypes = sizes, list[Port](), dict[str, int]()

    def model(self, mask: str, join: str, guard: bool, opset: int) -> onnx.ModelProto:
        b = self.b
        q, k, v = self.operands()
        scores = b.add("MatMul", q, k)
        if self.scale == "div":
            scores = b.add("Div", scores, b.constant(math.sqrt(self.size)))
        if self.scale == "mul":
            scores = b.add("Mul", b.constant([1 / math.sqrt(self.size)]), scores)
        if self.split == "batched" and mask:
            length = self.of_x(1)
            scores = b.add(
                "Reshape", scores, b.add("Concat", self.of_x(0), b.ints(self.heads), length, length, axis=0)
            )
            masked = self.masked(scores, mask)
            scores = b.add("Reshape", masked, b.add("Concat", self.rows(), length, length, axis=0))
        else:
            scores = self.masked(scores, mask)
        weights = b.add("Softmax", scores, axis=-1)
        if guard:
            weights = b.add("Where", b.add("IsNaN", weights), b.constant(0.0), weights)
        mixed = b.add("MatMul", weights, v)
        if self.split == "batched":
            front = b.add("Concat", self.of_x(0), b.ints(self.heads), b.ints(-1), b.ints(self.size), axis=0)
            mixed = b.add("Reshape", mixed, front)
        rank = self.join(mixed, join)
        shape = [f"y{axis}" for axis in range(rank)]
        return b.model("attention", self.inputs, [("y", shape)], opset, **self.dtypes)

    def input(self, name: str, shape: Sequence[int | str], dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append((name, shape))
        self.dtypes[name] = int(dtype)
        return name

    def operands(self) -> tuple[str, str, str]:
        b, batch, length = self.b, *self.sizes
        if self.split == "apart":
            q, k, v = (self.input(n, [batch, self.heads, length, self.size]) for n in "qkv")
            return self.scaled(q), b.add("Transpose", self.scaled(k, keys=True), perm=[0, 1, 3, 2]), v
        x, width = self.input("x", [batch, length, self.heads * self.size]), self.heads * self.size
        if self.split in ("gather", "slice", "split"):
            q, k, v = self.parts(self.linear(x, width, 3 * width))
            return self.scaled(q), b.add("Transpose", self.scaled(k, keys=True), perm=[0, 1, 3, 2]), v
        if self.split == "rows":
            x = b.add("Reshape", x, b.ints(-1, width))
        q, k, v = (self.linear(x, width, n * self.size) for n in (self.heads, self.kv_heads, self.kv_heads))
        if self.scale == "before":
            q = b.add("Div", q, b.constant(math.sqrt(self.size)))
        if self.split == "transposed" and self.kv_heads == self.heads:
            turned = self.scaled(self.apart(k, self.heads, [0, 2, 3, 1]), keys=True)
            return self.scaled(self.apart(q, self.heads)), turned, self.apart(v, self.heads)
        if self.split == "batched":
            shape = b.add("Concat", self.rows(), b.ints(-1), b.ints(self.size), axis=0)
            q, k, v = (b.add("Reshape", self.apart(one, self.heads), shape) for one in (q, k, v))
            return self.scaled(q), b.add("Transpose", self.scaled(k, keys=True), perm=[0, 2, 1]), v
        k, v = (self.repeated(self.apart(one, self.kv_heads)) for one in (k, v))
        return self.scaled(self.apart(q, self.heads)), self.turned(self.scaled(k, keys=True)), v

    def linear(self, x: str, c_in: int, c_out: int) -> str:
        b = self.b
        product = b.add("MatMul", x, b.weight(c_in, c_out, scale=1 / math.sqrt(c_in)))
        return b.add("Add", product, b.constant(b.rng.normal(0, 0.1, c_out)))

    def scaled(self, x: str, *, keys: bool = False) -> str:
        root = 1 / math.sqrt(self.size)
        if self.scale == "both":
            return self.b.add("Mul", x, self.b.constant(math.sqrt(root)))
        return self.b.add("Mul", x, self.b.constant(root)) if self.scale == "queries" and not keys else x

    def apart(self, x: str, heads: int, perm: Sequence[int] = (0, 2, 1, 3)) -> str:
        b, front = self.b, [0, 0]
        if self.split == "rows":
            front = [size if isinstance(size, int) else -1 for size in self.sizes]
        return b.add("Transpose", b.add("Reshape", x, b.ints(*front, heads, self.size)), perm=list(perm))

    def parts(self, x: str) -> list[str]:
        """Queries, keys and values side by side, taken apart."""
        b = self.b
        split = b.add("Reshape", x, b.ints(0, 0, 3, self.heads, self.size))
        whole = b.add("Transpose", split, perm=[2, 0, 3, 1, 4])
        if self.split == "gather":
            return [b.add("Gather", whole, b.constant(i, np.int64), axis=0) for i in range(3)]
        if self.split == "slice":
            slices = [b.add("Slice", whole, b.ints(i), b.ints(i + 1), b.ints(0)) for i in range(3)]
        else:
            slices = [f"part_{i}" for i in range(3)]
            b.add("Split", whole, b.ints(1, 1, 1), outputs=slices, axis=0)
        return [b.add("Squeeze", one, b.ints(0)) for one in slices]

    def of_x(self, axis: int) -> str:
        """A size of the input, as a tensor of shape (1,)."""
        return self.b.add("Gather", self.b.add("Shape", "x"), self.b.ints(axis))

    def rows(self) -> str:
        """Batch times heads."""
        return self.b.add("Mul", self.of_x(0), self.b.ints(self.heads))

    def repeated(self, x: str) -> str:
        """Each head as often as it serves queries; `repeat_kv`, with sizes that are known."""
        b, times = self.b, self.heads // self.kv_heads
        if times == 1:
            return x
        wide = b.add("Expand", b.add("Unsqueeze", x, b.ints(2)), b.ints(1, 1, times, 1, 1))
        return b.add("Reshape", wide, b.ints(0, self.heads, -1, self.size))

    def turned(self, x: str) -> str:
        """[.., sequence, size] to [.., size, sequence]."""
        b = self.b
        if self.split != "flattened":
            return b.add("Transpose", x, perm=[0, 1, 3, 2])
        length = b.add("Gather", b.add("Shape", x), b.ints(2))
        rows = b.add("Reshape", x, b.add("Concat", b.ints(-1), length, b.ints(self.size), axis=0))
        front = b.add("Gather", b.add("Shape", x), b.ints(0, 1))
        shape = b.add("Concat", front, b.ints(self.size), length, axis=0)
        return b.add("Reshape", b.add("Transpose", rows, perm=[0, 2, 1]), shape)

    def masked(self, scores: str, mask: str) -> str:
        b, (batch, length) = self.b, self.sizes
        full, lowest = [batch, 1, length, length], float(np.finfo(np.float32).min)
        if mask in ("bias", "product"):
            ints = self.input("mask", [batch, length], TensorProto.INT64)
            kept = b.add("Cast", b.add("Reshape", ints, b.ints(0, 1, 1, -1)), to=int(TensorProto.FLOAT))
            low = b.constant(-10000.0 if mask == "bias" else lowest)
            return b.add("Add", scores, b.add("Mul", b.add("Sub", b.constant(1.0), kept), low))
        if mask == "choice":
            keep = self.input("keep", full, TensorProto.BOOL)
            return b.add("Add", scores, b.add("Where", keep, b.constant(0.0), b.constant(lowest)))
        if mask in ("keep", "infinite"):
            low = b.constant(lowest if mask == "keep" else -np.inf)
            return b.add("Where", self.input("keep", full, TensorProto.BOOL), scores, low)
        if mask == "drop":
            return b.add("Where", self.input("drop", full, TensorProto.BOOL), b.constant(lowest), scores)
        if mask == "input":
            return b.add("Add", self.input("mask", full), scores)
        if mask == "causal":
            assert isinstance(length, int)
            later = np.triu(np.ones((length, length), bool), 1)
            return b.add("Add", scores, b.constant(np.where(later, -np.inf, 0.0)))
        return scores

    def join(self, mixed: str, join: str) -> int:
        """Gives the output; its rank."""
        b, width = self.b, self.heads * self.size
        if join == "apart":
            b.add("Identity", mixed, outputs=["y"])
            return 4
        back = b.add("Transpose", mixed, perm=[0, 2, 1, 3])
        shape = b.ints(0, 0, width) if join == "joined" else b.ints(-1, width)
        b.add("Reshape", back, shape, outputs=["y"])
        return 3 if join == "joined" else 2
