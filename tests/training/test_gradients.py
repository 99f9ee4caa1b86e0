"""Gradients against the difference quotient, in float64 and along a random direction."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from onnxopt.runtimes import open_session
from onnxopt.training import GraphModule, to_torch
from onnxopt.training.interpreter.registry import find
from tests.support import random_feeds, text_model
from tests.training.node_cases import Case, array_of, cases, listed

STEP = 1e-6

NUDGE = 1e-3
"""How far inputs are moved first: the cases are full of ties and of corners, where there is no derivative."""
STATISTICS = {"BatchNormalization": (3, 4)}
"""Inputs that torch takes for constants."""


def derivative_error(
    module: GraphModule, feeds: Mapping[str, Tensor], fixed: Collection[str]
) -> float | None:
    """Relative error of the gradient along a random direction; None where no result has a gradient.

    Results that are not finite, here or a step away, are left out.
    """
    generator = torch.Generator().manual_seed(5)

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=torch.float64, generator=generator)

    free = {
        name: (x + NUDGE * noise(x)).requires_grad_()
        for name, x in feeds.items()
        if x.dtype == torch.float64 and name not in fixed
    }
    ways = {name: noise(x) for name, x in free.items()}

    def results(shift: float) -> list[Tensor]:
        moved = {name: x + shift * ways[name] for name, x in free.items()}
        found = module({**feeds, **moved}).values()
        flat = [one for group in found for one in (group if isinstance(group, list) else [group])]
        return [one for one in flat if one.dtype == torch.float64 and one.numel()]

    here, ahead, behind = results(0), results(STEP), results(-STEP)
    if not any(one.requires_grad for one in here):
        return None
    known, measured = torch.zeros((), dtype=torch.float64), 0.0
    for now, after, before in zip(here, ahead, behind, strict=True):
        finite = now.isfinite() & after.isfinite() & before.isfinite()
        weights = noise(now)[finite]
        known = known + (now[finite] * weights).sum()
        measured += float(((after - before)[finite] * weights).sum().detach()) / (2 * STEP)
    grads = torch.autograd.grad(known, list(free.values()), allow_unused=True)
    along = sum(float((g * way).sum()) for g, way in zip(grads, ways.values(), strict=True) if g is not None)
    return abs(measured - along) / max(abs(measured), abs(along), 1.0)


def case_error(case: Case) -> float | None:
    """That of a case in float64; None where it has no floats to move."""
    proto = case.model
    names = [value.name for value in proto.graph.input]
    arrays = dict(zip(names, map(array_of, case.data_sets[0][0]), strict=True))
    if not all(isinstance(x, np.ndarray) and x.dtype.kind in "fbiu" for x in arrays.values()):
        return None
    if not any(x.dtype in (np.float32, np.float64) and x.size for x in arrays.values()):
        return None
    feeds = {
        name: torch.from_numpy(x.astype(np.float64) if x.dtype.kind == "f" else x.copy())
        for name, x in arrays.items()
    }
    (node,), version = proto.graph.node, proto.opset_import[0].version
    operator = find(node.domain, node.op_type, version)
    static = operator.static if operator is not None else ()
    fixed = [node.input[i] for i in (*static, *STATISTICS.get(node.op_type, ())) if i < len(node.input)]
    return derivative_error(to_torch(proto).double(), feeds, fixed)


DIFFERENTIABLE = frozenset(
    {
        *(
            "Abs",
            "Add",
            "Attention",
            "AveragePool",
            "BatchNormalization",
            "Conv",
            "ConvTranspose",
            "DeformConv",
        ),
        *("Div", "Einsum", "Exp", "GRU", "Gather", "Gelu", "Gemm", "GridSample", "GroupNormalization"),
        *("InstanceNormalization", "LRN", "LSTM", "LayerNormalization", "Loop", "MatMul", "MaxPool", "Mul"),
        *("PRelu", "RNN", "ReduceMean", "Resize", "RMSNormalization", "RoiAlign", "RotaryEmbedding", "STFT"),
        *("Scan", "ScatterElements", "ScatterND", "Softmax", "Sub", "TopK", "Where"),
    }
)
"""Operators of which at least one case must have a gradient."""
UNCHECKED = {
    "FlexAttention": "its function computes in float32",
    "LinearAttention": "its function computes in float32",
}
OUTSIDE = frozenset(
    {"test_acosh_example", *(f"test_mod_float_edge_cases_fmod_0_float{bits}" for bits in (32, 64))}
)
"""Cases with inputs where the function ends."""
CASES = {
    operator: [name for name in names if "_expanded" not in name and name not in OUTSIDE]
    for operator, names in listed().items()
    if operator != "functions" and operator not in UNCHECKED
}


@pytest.mark.parametrize("operator", sorted(CASES))
def test_the_gradient_is_the_difference_quotient(operator: str) -> None:
    errors = {name: case_error(cases()[name]) for name in CASES[operator]}
    wrong = {name: error for name, error in errors.items() if error is not None and not error < 1e-5}
    assert wrong == {}
    assert operator not in DIFFERENTIABLE or any(error is not None for error in errors.values())


CONTRIB: Mapping[str, tuple[Mapping[str, str], str]] = {
    "Attention": ({"x": "2, 3, 8", "w": "8, 24", "b": "24"}, "num_heads = 2"),
    "BiasGelu": ({"x": "2, 8", "b": "8"}, ""),
    "FastGelu": ({"x": "2, 8", "b": "8"}, ""),
    "FusedConv": ({"x": "1, 2, 5, 5", "w": "3, 2, 3, 3", "b": "3"}, 'activation = "Sigmoid"'),
    "FusedGemm": ({"a": "2, 3", "b": "3, 4", "c": "4"}, 'activation = "Tanh"'),
    "FusedMatMul": ({"a": "2, 3, 4", "b": "2, 5, 4"}, "alpha = 0.5, transB = 1"),
    "Gelu": ({"x": "2, 8"}, ""),
    "MultiHeadAttention": ({"q": "2, 3, 8", "k": "2, 4, 8", "v": "2, 4, 8", "b": "24"}, "num_heads = 2"),
    "QuickGelu": ({"x": "2, 8"}, "alpha = 1.5"),
    "SkipLayerNormalization": (
        {"x": "2, 3, 8", "s": "2, 3, 8", "g": "8", "b": "8", "c": "8"},
        "epsilon = 0.001",
    ),
    "SkipSimplifiedLayerNormalization": (
        {"x": "2, 3, 8", "s": "2, 3, 8", "g": "8", "c": "8"},
        "epsilon = 0.001",
    ),
}
"""Operators of ONNX Runtime: the shapes of their inputs, and attributes."""


def contrib_model(operator: str) -> onnx.ModelProto:
    shapes, attributes = CONTRIB[operator]
    inputs = ", ".join(f"float[{shape}] {name}" for name, shape in shapes.items())
    options = f"<{attributes}>" if attributes else ""
    node = f"com.microsoft.{operator} {options} ({', '.join(shapes)})"
    opsets = '<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]>'
    return text_model(f"{opsets} g ({inputs}) => (float[M] y) {{ y = {node} }}")


@pytest.mark.parametrize("operator", sorted(CONTRIB))
def test_operators_of_the_runtime_are_its_own_and_differentiable(operator: str) -> None:
    model = contrib_model(operator)
    feeds = random_feeds(model)
    module = to_torch(model)
    with open_session(model, level="none") as session:
        want = session.run(feeds)["y"]
    np.testing.assert_allclose(module(feeds)["y"].detach().numpy(), want, rtol=1e-4, atol=1e-5)
    exact = {name: torch.from_numpy(x.astype(np.float64)) for name, x in feeds.items()}
    error = derivative_error(module.double(), exact, ())
    assert error is not None
    assert error < 1e-5


def test_rows_that_attend_to_nothing_are_zero_and_so_are_their_gradients() -> None:
    model = text_model(
        '<ir_version: 10, opset_import: ["": 23]>'
        " g (float[1, 2, 3, 4] q, float[1, 2, 5, 4] k, float[1, 2, 5, 4] v, bool[3, 5] m)"
        " => (float[1, 2, 3, 4] y) { y = Attention(q, k, v, m) }"
    )
    feeds = {name: torch.from_numpy(x) for name, x in random_feeds(model).items()}
    feeds["m"] = torch.tensor([[True] * 5, [False] * 5, [True, False] * 2 + [True]])
    moved = {name: x.requires_grad_() for name, x in feeds.items() if x.dtype == torch.float32}
    y = to_torch(model)(feeds)["y"]
    y.sum().backward()
    assert y[:, :, 1].abs().max() == 0
    for x in moved.values():
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())
    assert moved["q"].grad is not None
    assert moved["q"].grad[:, :, 1].abs().max() == 0
