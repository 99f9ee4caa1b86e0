"""LLaMA-like decoder blocks with RMSNorm, rotary embedding, grouped queries, SwiGLU and a KV cache; random weights."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto

from models.builder import Builder


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

    Inputs: ``hidden_states`` float32 (batch, sequence, hidden); ``position_ids`` int64 (batch, sequence), below
    `positions`; ``attention_mask`` float32 (batch, 1, sequence, total), 0 or a large negative number, where total is
    past + sequence; for each layer ``past_key.i`` and ``past_value.i`` float32 (batch, kv_heads, past, head size).
    Outputs: ``output`` like ``hidden_states``; ``present_key.i`` and ``present_value.i`` (.., total, ..).
    """
    b = Builder(seed)
    size = hidden // heads
    angles = np.outer(np.arange(positions), 10000.0 ** -(np.arange(0, size, 2) / size))
    angles = np.concatenate([angles, angles], axis=1)
    tables = {"cos": b.constant(np.cos(angles), name="cos"), "sin": b.constant(np.sin(angles), name="sin")}
    cos, sin = (b.add("Unsqueeze", b.add("Gather", t, "position_ids"), b.ints(1)) for t in tables.values())

    def norm(x: str) -> str:
        mean = b.add("ReduceMean", b.add("Pow", x, b.constant(2.0)), axes=[-1])
        root = b.add("Sqrt", b.add("Add", mean, b.constant(1e-6)))
        normal = b.add("Mul", x, b.add("Div", b.constant(1.0), root))
        return b.add("Mul", b.constant(b.rng.uniform(0.8, 1.2, hidden)), normal)

    def linear(x: str, c_in: int, c_out: int) -> str:
        return b.add("MatMul", x, b.weight(c_in, c_out, scale=1 / math.sqrt(c_in)))

    def split(x: str, count: int) -> str:
        return b.add("Transpose", b.add("Reshape", x, b.ints(0, 0, count, size)), perm=[0, 2, 1, 3])

    def rotate(x: str) -> str:
        low = b.add("Slice", x, b.ints(0), b.ints(size // 2), b.ints(3))
        high = b.add("Slice", x, b.ints(size // 2), b.ints(2**63 - 1), b.ints(3))
        turned = b.add("Concat", b.add("Neg", high), low, axis=-1)
        return b.add("Add", b.add("Mul", x, cos), b.add("Mul", turned, sin))

    def repeat(x: str) -> str:
        """Each key-value head serves heads / kv_heads queries."""
        total = b.add("Gather", b.add("Shape", x), b.ints(2))
        batch = b.add("Gather", b.add("Shape", x), b.ints(0))
        wide = b.add(
            "Concat", batch, b.ints(kv_heads), b.ints(heads // kv_heads), total, b.ints(size), axis=0
        )
        expanded = b.add("Expand", b.add("Unsqueeze", x, b.ints(2)), wide)
        return b.add("Reshape", expanded, b.add("Concat", batch, b.ints(heads), total, b.ints(size), axis=0))

    def attention(x: str, layer: int) -> str:
        query = rotate(split(linear(x, hidden, hidden), heads))
        key = rotate(split(linear(x, hidden, kv_heads * size), kv_heads))
        value = split(linear(x, hidden, kv_heads * size), kv_heads)
        key = b.add("Concat", f"past_key.{layer}", key, axis=2, outputs=[f"present_key.{layer}"])
        value = b.add("Concat", f"past_value.{layer}", value, axis=2, outputs=[f"present_value.{layer}"])
        scores = b.add("MatMul", query, b.add("Transpose", repeat(key), perm=[0, 1, 3, 2]))
        scores = b.add("Add", b.add("Div", scores, b.constant(math.sqrt(size))), "attention_mask")
        mixed = b.add("MatMul", b.add("Softmax", scores, axis=-1), repeat(value))
        joined = b.add("Reshape", b.add("Transpose", mixed, perm=[0, 2, 1, 3]), b.ints(0, 0, hidden))
        return linear(joined, hidden, hidden)

    def swiglu(x: str) -> str:
        gate = linear(x, hidden, intermediate)
        silu = b.add("Mul", gate, b.add("Sigmoid", gate))
        return linear(b.add("Mul", silu, linear(x, hidden, intermediate)), intermediate, hidden)

    x = "hidden_states"
    for layer in range(layers):
        x = b.add("Add", x, attention(norm(x), layer))
        x = b.add("Add", x, swiglu(norm(x)))
    b.add("Identity", norm(x), outputs=["output"])

    states = ["batch", "sequence", hidden]
    caches = [f"{kind}.{layer}" for layer in range(layers) for kind in ("key", "value")]
    return b.model(
        "llama",
        [
            ("hidden_states", states),
            ("position_ids", ["batch", "sequence"]),
            ("attention_mask", ["batch", 1, "sequence", "total"]),
            *((f"past_{name}", ["batch", kv_heads, "past", size]) for name in caches),
        ],
        [
            ("output", states),
            *((f"present_{name}", ["batch", kv_heads, "total", size]) for name in caches),
        ],
        position_ids=int(TensorProto.INT64),
    )
