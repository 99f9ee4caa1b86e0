"""A BERT-like encoder as an exporter decomposes it: no fused op, shape arithmetic, random weights."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto

from models.builder import Builder


def bert(
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    intermediate: int | None = None,
    vocabulary: int = 1000,
    positions: int = 128,
    seed: int = 0,
) -> onnx.ModelProto:
    """Token ids to hidden states.

    Inputs: ``input_ids``, ``attention_mask``, ``token_type_ids``, int64 (batch, sequence), sequence at most
    `positions`. Output: ``last_hidden_state`` float32 (batch, sequence, hidden).
    """
    return _Encoder(hidden, heads, intermediate or 4 * hidden, seed).model(layers, vocabulary, positions)


class _Encoder:
    def __init__(self, hidden: int, heads: int, intermediate: int, seed: int) -> None:
        self.b = Builder(seed)
        self.hidden, self.heads, self.intermediate = hidden, heads, intermediate

    def model(self, layers: int, vocabulary: int, positions: int) -> onnx.ModelProto:
        b = self.b
        x = self.embeddings(vocabulary, positions)
        mask = self.extended_mask()
        for _ in range(layers):
            x = self.layer_norm(b.add("Add", self.attention(x, mask), x))
            x = self.layer_norm(b.add("Add", self.feed_forward(x), x))
        b.add("Identity", x, outputs=["last_hidden_state"])
        ids = ("input_ids", "attention_mask", "token_type_ids")
        return b.model(
            "bert",
            [(name, ["batch", "sequence"]) for name in ids],
            [("last_hidden_state", ["batch", "sequence", self.hidden])],
            opset=14,
            **dict.fromkeys(ids, int(TensorProto.INT64)),
        )

    def dim(self, x: str, axis: int) -> str:
        """One dimension as a tensor of shape (1,), by Shape, Gather and Unsqueeze."""
        b = self.b
        taken = b.add("Gather", b.add("Shape", x), b.constant(axis, np.int64), axis=0)
        return b.add("Unsqueeze", taken, b.ints(0))

    def embeddings(self, vocabulary: int, positions: int) -> str:
        b = self.b
        words = b.add("Gather", b.weight(vocabulary, self.hidden, scale=1.0), "input_ids")
        types = b.add("Gather", b.weight(2, self.hidden, scale=0.3), "token_type_ids")
        ids = b.ints(*range(positions))
        length = self.dim("input_ids", 1)
        used = b.add("Slice", ids, b.ints(0), length, b.ints(0))
        place = b.add("Gather", b.weight(positions, self.hidden, scale=0.3), used)
        return self.layer_norm(b.add("Add", b.add("Add", words, types), place))

    def extended_mask(self) -> str:
        """(1 - mask) * -10000, as (batch, 1, 1, sequence)."""
        b = self.b
        wide = b.add("Unsqueeze", b.add("Unsqueeze", "attention_mask", b.ints(1)), b.ints(2))
        as_float = b.add("Cast", wide, to=int(TensorProto.FLOAT))
        return b.add("Mul", b.add("Sub", b.constant(1.0), as_float), b.constant(-10000.0))

    def layer_norm(self, x: str) -> str:
        b = self.b
        centred = b.add("Sub", x, b.add("ReduceMean", x, axes=[-1]))
        variance = b.add("ReduceMean", b.add("Pow", centred, b.constant(2.0)), axes=[-1])
        deviation = b.add("Sqrt", b.add("Add", variance, b.constant(1e-12)))
        normal = b.add("Div", centred, deviation)
        scaled = b.add("Mul", normal, b.constant(b.rng.uniform(0.8, 1.2, self.hidden)))
        return b.add("Add", scaled, b.constant(b.rng.normal(0, 0.1, self.hidden)))

    def linear(self, x: str, c_in: int, c_out: int) -> str:
        b = self.b
        product = b.add("MatMul", x, b.weight(c_in, c_out, scale=1 / math.sqrt(c_in)))
        return b.add("Add", b.constant(b.rng.normal(0, 0.02, c_out)), product)

    def split_heads(self, x: str, perm: list[int]) -> str:
        b, size = self.b, self.hidden // self.heads
        shape = b.add("Concat", self.dim(x, 0), self.dim(x, 1), b.ints(self.heads), b.ints(size), axis=0)
        return b.add("Transpose", b.add("Reshape", x, shape), perm=perm)

    def attention(self, x: str, mask: str) -> str:
        b = self.b
        query = self.split_heads(self.linear(x, self.hidden, self.hidden), [0, 2, 1, 3])
        key = self.split_heads(self.linear(x, self.hidden, self.hidden), [0, 2, 3, 1])
        value = self.split_heads(self.linear(x, self.hidden, self.hidden), [0, 2, 1, 3])
        scores = b.add("MatMul", query, key)
        scores = b.add("Div", scores, b.constant(math.sqrt(self.hidden // self.heads)))
        weights = b.add("Softmax", b.add("Add", scores, mask), axis=-1)
        mixed = b.add("Transpose", b.add("MatMul", weights, value), perm=[0, 2, 1, 3])
        shape = b.add("Concat", self.dim(mixed, 0), self.dim(mixed, 1), b.ints(self.hidden), axis=0)
        return self.linear(b.add("Reshape", mixed, shape), self.hidden, self.hidden)

    def feed_forward(self, x: str) -> str:
        """Linear, Gelu as x * (erf(x / sqrt 2) + 1) * 0.5, Linear."""
        b = self.b
        x = self.linear(x, self.hidden, self.intermediate)
        erf = b.add("Erf", b.add("Div", x, b.constant(math.sqrt(2))))
        gelu = b.add("Mul", b.add("Mul", x, b.add("Add", erf, b.constant(1.0))), b.constant(0.5))
        return self.linear(gelu, self.intermediate, self.hidden)
