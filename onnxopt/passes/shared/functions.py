"""Activation functions: how exporters write them in parts, and what stands for them; a row each."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PARTS", "ROWS", "Row"]


@dataclass(frozen=True)
class Row:
    """What the patterns become, from an opset on; `contrib` before that, or where `option` is not on."""

    opset: int
    result: str
    patterns: tuple[str, ...]
    contrib: str = ""
    option: str = ""


_GATE = "HardSigmoid(x, alpha=0.16666666666666666, beta=0.5)"

PARTS = {
    "Gate": _GATE,
    "Six": "Clip(Add(x, 3), 0, 6) | Clip(Add(x, 3), min=0, max=6)",
    "Line": "Add(Mul(x, 'a'), 'b')",
    "Error": "Erf(Mul(x, 0.7071067811865476))",
    "Cube": "Mul(0.044715, x, x, x) | Mul(0.044715, Pow(x, 3)) | Mul(0.044715, x, Pow(x, 2))",
    "Square": "Mul(0.044715, x, x) | Mul(0.044715, Pow(x, 2))",
    "Tangent": """Tanh(Mul(0.7978845608028654, Add(x, Cube)) | Mul(0.7978845608028654, x, Add(Square, 1))
        | Add(Mul(0.7978845608028654, x),
              Mul(0.035677408136300125, x, x, x) | Mul(0.035677408136300125, Pow(x, 3))))""",
    "Logarithm": "Log(Add(Exp(x), 1))",
    "Positive": "Greater(x, 0) | GreaterOrEqual(x, 0)",
}
"""What several patterns have in common."""

ROWS = (
    Row(14, "HardSwish(x)", ("Mul(x, Gate)", "Mul(x, Six, 0.16666666666666666)")),
    Row(6, f"Mul(x, {_GATE})", ("Mul(x, Six, 0.16666666666666666)",)),
    Row(6, _GATE, ("Mul(Six, 0.16666666666666666)",)),
    Row(6, "HardSigmoid(x, alpha=a, beta=b)", ("Clip(Line, 0, 1)", "Clip(Line, min=0, max=1)")),
    Row(
        20,
        "Gelu(x)",
        ("Mul(x, 0.5, Add(Error, 1))", "Mul(x, Add(Mul(Error, 0.5), 0.5))"),
        "com_microsoft.Gelu(x)",
    ),
    Row(
        20,
        "Gelu(x, approximate='tanh')",
        (
            "Mul(x, 0.5, Add(Tangent, 1))",
            "Mul(x, Add(Mul(Tangent, 0.5), 0.5))",
            "Mul(x, Sigmoid(Mul(1.5957691216057308, Add(x, Cube))))",
        ),
        "com_microsoft.FastGelu(x)",
    ),
    Row(18, "Mish(x)", ("Mul(x, Tanh(Softplus(x)))", "Mul(x, Tanh(Logarithm))")),
    Row(
        24,
        "Swish(x)",
        ("Mul(x, Sigmoid(x))", "Div(x, Add(Exp(Neg(x)), 1))"),
        "com_microsoft.QuickGelu(x, alpha=1.0)",
        "swish",
    ),
    Row(
        24,
        "Swish(x, alpha=alpha)",
        ("Mul(x, Sigmoid(Mul(x, 'alpha')))",),
        "com_microsoft.QuickGelu(x, alpha=alpha)",
        "swish",
    ),
    Row(6, "Sigmoid(x)", ("Div(1, Add(Exp(Neg(x)), 1))", "Reciprocal(Add(Exp(Neg(x)), 1))")),
    Row(1, "Softplus(x)", ("Add(Relu(x) | Max(x, 0), Log(Add(Exp(Neg(Abs(x))), 1)))",)),
    Row(1, "Softplus(x)", ("Logarithm",), option="stable"),
    Row(1, "Softsign(x)", ("Div(x, Add(Abs(x), 1))",)),
    Row(
        6,
        "LeakyRelu(x, alpha=alpha)",
        (
            "Where(Positive, x, Mul(x, 'alpha'))",
            "Where(Less(x, 0) | LessOrEqual(x, 0), Mul(x, 'alpha'), x)",
            "PRelu(x, 'alpha')",
        ),
    ),
    Row(6, "LeakyRelu(x, alpha=fraction)", ("Max(x, Mul(x, 'fraction'))",)),
    Row(6, "Elu(x)", ("Where(Positive, x, Sub(Exp(x), 1))",)),
    Row(6, "Elu(x, alpha=alpha)", ("Where(Positive, x, Mul(Sub(Exp(x), 1), 'alpha'))",)),
    Row(6, "Selu(x)", ("Mul(Elu(x, alpha=1.6732632423543772), 1.0507009873554805)",)),
    Row(6, "Relu(x)", ("Max(x, 0)",)),
)
