"""What the tests share: run one pass on a small model and hold the numbers against the runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from onnxopt.claims import Pass
from onnxopt.emulation import find_isa
from onnxopt.errors import ProviderError
from onnxopt.examples import text_model as text_model
from onnxopt.graph import nodes
from onnxopt.ledger import Ledger
from onnxopt.protobuf import dump
from onnxopt.structure import checker_complaint, find_problem, signature_of

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Rewritten:
    """A model after one pass, run alone to its fixed point."""

    model: ir.Model
    changes: int
    declined: tuple[str, ...]

    def count(self, op_type: str) -> int:
        return sum(node.op_type == op_type for node in nodes(self.model))

    @property
    def op_types(self) -> list[str]:
        return [node.op_type for node in nodes(self.model)]


def run_pass(model: onnx.ModelProto | str, one: Pass, *, rounds: int = 5) -> Rewritten:
    """Apply a pass until it changes nothing; the structure must hold after each round."""
    proto = text_model(model) if isinstance(model, str) else model
    graph = ir.from_proto(proto)
    signature, changes, ledger = signature_of(graph), 0, Ledger(pass_name=one.name)
    sound = checker_complaint(graph) is None
    for _ in range(rounds):
        ledger = Ledger(pass_name=one.name)
        one.apply(graph, ledger)
        assert find_problem(graph, ledger.touched) is None
        if not ledger.granted:
            break
        changes += len(ledger.granted)
    assert not ledger.granted, f"{one.name} does not settle"
    if one.keeps_signature:
        assert signature_of(graph) == signature
    if sound:
        assert checker_complaint(graph) is None
    return Rewritten(graph, changes, tuple(ledger.declined.values()))


def execute(model: onnx.ModelProto | ir.Model, feeds: Feeds) -> list[np.ndarray]:
    """All outputs in the runtime with its optimizations off."""
    proto = dump(model) if isinstance(model, ir.Model) else model
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def random_feeds(
    model: onnx.ModelProto, seed: int = 0, sizes: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
    """Standard normal floats and small integers for each graph input that is no initializer."""
    rng, feeds = np.random.default_rng(seed), {}
    initializers = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name in initializers:
            continue
        kind = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        shape = [
            d.dim_value if d.HasField("dim_value") else (sizes or {}).get(d.dim_param, 2)
            for d in kind.shape.dim
        ]
        data = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
        feeds[value.name] = data.astype(dtype)
    return feeds


def assert_equivalent(
    before: onnx.ModelProto,
    after: ir.Model,
    feeds: Feeds | Sequence[Feeds] | None = None,
    *,
    kind: str = "exact",
) -> None:
    """Same outputs: bit-equal if exact; else an SQNR of 100 dB (60 dB in float16), of 20 dB if lossy."""
    samples = (
        [random_feeds(before)] if feeds is None else [feeds] if isinstance(feeds, Mapping) else list(feeds)
    )
    for sample in samples:
        for want, have in zip(execute(before, sample), execute(after, sample), strict=True):
            assert (want.dtype, want.shape) == (have.dtype, have.shape)
            if kind == "exact" or want.dtype.kind != "f":
                np.testing.assert_array_equal(want, have)
            else:
                least = 20 if kind == "lossy" else 60 if want.dtype == np.float16 else 100
                assert sqnr(want, have) >= least


def sqnr(want: np.ndarray, have: np.ndarray) -> float:
    """Signal to quantization noise ratio in dB, over the elements that are finite in both."""
    a, b = np.asarray(want, np.float64), np.asarray(have, np.float64)
    np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))
    finite = np.isfinite(a)
    noise = float(np.sum((a[finite] - b[finite]) ** 2))
    return float("inf") if noise == 0 else float(10 * np.log10(np.sum(a[finite] ** 2) / noise))


def why_no_emulator(isa: str = "avx2") -> str:
    """Why CPUs cannot be emulated here, for `pytest.mark.skipif`; empty where they can."""
    try:
        find_isa(isa)
    except ProviderError as error:
        return str(error)
    return ""
