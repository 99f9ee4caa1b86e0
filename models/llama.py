"""LLaMA-like decoder: RMSNorm, rotary embedding, grouped queries, SwiGLU, KV cache; random weights."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto

from models.builder import Builder, Port


def llama(
    layers: int = 1,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 176,
    positions: int = 256,
    seed: int = 0,
) -> onnx.ModelProto:
    """Hidden states and cache to hidden states and a longer cache.

    Inputs: ``hidden_states`` float32 (batch, sequence, hidden); ``position_ids`` int64 (batch, sequence),
    below `positions`; ``attention_mask`` float32 (batch, 1, sequence, total), 0 or a large negative number,
    where total is past + sequence; for each layer ``past_key.i`` and ``past_value.i`` float32 (batch,
    kv_heads, past, head size).
    Outputs: ``output`` like ``hidden_states``; ``present_key.i`` and ``present_value.i`` (.., total, ..).
    """
    return _Decoder(hidden, heads, kv_heads, intermediate, positions, seed).model(layers)


class _Decoder:
    def __init__(
        self, hidden: int, heads: int, kv_heads: int, intermediate: int, positions: int, seed: int
    ) -> None:
        b = self.b = Builder(seed)
        self.hidden, self.heads, self.kv_heads, self.intermediate = hidden, heads, kv_heads, intermediate
        self.size = hidden // heads
        angles = np.outer(np.arange(positions), 10000.0 ** -(np.arange(0, self.size, 2) / self.size))
        angles = np.concatenate([angles, angles], axis=1)
        self.cos, self.sin = (
            b.add("Unsqueeze", b.add("Gather", b.constant(table), "position_ids"), b.ints(1))
            for table in (np.cos(angles), np.sin(angles))
        )

    def model(self, layers: int) -> onnx.ModelProto:
        b, x = self.b, "hidden_states"
        for layer in range(layers):
            x = b.add("Add", x, self.attention(self.norm(x), layer))
            x = b.add("Add", x, self.swiglu(self.norm(x)))
        b.add("Identity", self.norm(x), outputs=["output"])
        states: list[int | str] = ["batch", "sequence", self.hidden]
        inputs: list[Port] = [
            ("hidden_states", states),
            ("position_ids", ["batch", "sequence"]),
            ("attention_mask", ["batch", 1, "sequence", "total"]),
        ]
        outputs: list[Port] = [("output", states)]
        for name in (f"{kind}.{layer}" for layer in range(layers) for kind in ("key", "value")):
            inputs.append((f"past_{name}", ["batch", self.kv_heads, "past", self.size]))
            outputs.append((f"present_{name}", ["batch", self.kv_heads, "total", self.size]))
        return b.model("llama", inputs, outputs, position_ids=int(TensorProto.INT64))

    def norm(self, x: str) -> str:
        b = self.b
        mean = b.add("ReduceMean", b.add("Pow", x, b.constant(2.0)), axes=[-1])
        root = b.add("Sqrt", b.add("Add", mean, b.constant(1e-6)))
        normal = b.add("Mul", x, b.add("Div", b.constant(1.0), root))
        return b.add("Mul", b.constant(b.rng.uniform(0.8, 1.2, self.hidden)), normal)

    def linear(self, x: str, c_in: int, c_out: int) -> str:
        return self.b.add("MatMul", x, self.b.weight(c_in, c_out, scale=1 / math.sqrt(c_in)))

    def heads_of(self, x: str, count: int) -> str:
        b = self.b
        split = b.add(
            "Reshape", self.linear(x, self.hidden, count * self.size), b.ints(0, 0, count, self.size)
        )
        return b.add("Transpose", split, perm=[0, 2, 1, 3])

    def rotate(self, x: str) -> str:
        """x * cos + (-x[high], x[low]) * sin."""
        b, half = self.b, self.size // 2
        low = b.add("Slice", x, b.ints(0), b.ints(half), b.ints(3))
        high = b.add("Slice", x, b.ints(half), b.ints(2**63 - 1), b.ints(3))
        turned = b.add("Concat", b.add("Neg", high), low, axis=-1)
        return b.add("Add", b.add("Mul", x, self.cos), b.add("Mul", turned, self.sin))

    def repeat(self, x: str) -> str:
        """Each key-value head serves heads / kv_heads queries."""
        b = self.b
        total = b.add("Gather", b.add("Shape", x), b.ints(2))
        batch = b.add("Gather", b.add("Shape", x), b.ints(0))
        groups, size = b.ints(self.heads // self.kv_heads), b.ints(self.size)
        wide = b.add("Concat", batch, b.ints(self.kv_heads), groups, total, size, axis=0)
        expanded = b.add("Expand", b.add("Unsqueeze", x, b.ints(2)), wide)
        return b.add("Reshape", expanded, b.add("Concat", batch, b.ints(self.heads), total, size, axis=0))

    def attention(self, x: str, layer: int) -> str:
        b = self.b
        query = self.rotate(self.heads_of(x, self.heads))
        key, value = self.rotate(self.heads_of(x, self.kv_heads)), self.heads_of(x, self.kv_heads)
        key = b.add("Concat", f"past_key.{layer}", key, axis=2, outputs=[f"present_key.{layer}"])
        value = b.add("Concat", f"past_value.{layer}", value, axis=2, outputs=[f"present_value.{layer}"])
        scores = b.add("MatMul", query, b.add("Transpose", self.repeat(key), perm=[0, 1, 3, 2]))
        scores = b.add("Add", b.add("Div", scores, b.constant(math.sqrt(self.size))), "attention_mask")
        mixed = b.add("MatMul", b.add("Softmax", scores, axis=-1), self.repeat(value))
        joined = b.add("Reshape", b.add("Transpose", mixed, perm=[0, 2, 1, 3]), b.ints(0, 0, self.hidden))
        return self.linear(joined, self.hidden, self.hidden)

    def swiglu(self, x: str) -> str:
        b = self.b
        gate = self.linear(x, self.hidden, self.intermediate)
        silu = b.add("Mul", gate, b.add("Sigmoid", gate))
        gated = b.add("Mul", silu, self.linear(x, self.hidden, self.intermediate))
        return self.linear(gated, self.intermediate, self.hidden)
