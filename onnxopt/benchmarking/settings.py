"""Session settings that a model does better with: what the runtime's own optimizer should leave alone.

Each row of the table says for which versions of ONNX Runtime, which provider and which pattern in the
model. A setting against wrong results is always proposed; one for speed is tried on the model itself, and
kept where that gets faster. Without a measurement it is proposed for the versions that it is known for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import onnx_ir as ir

from onnxopt.graph import constant_array, constant_of, nodes, sole_user, str_attr

__all__ = ["Setting", "proposals", "session_config"]

_DISABLE = "optimization.disable_specified_optimizers"
_PRODUCTS = ("Gather", "Gemm", "MatMul")
"""What reads stored integers without making floats of all of them at each run."""
_WITHOUT_NEGATIVES = ("Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax")


@dataclass(frozen=True)
class Setting:
    """An entry for `SessionOptions.add_session_config_entry`.

    purpose: against wrong results, or for speed. known: whether this version of the runtime is known to need
    it. ratio: time of this model with the settings / without, where that was measured.
    """

    key: str
    value: str
    purpose: Literal["correctness", "speed"]
    why: str
    known: bool
    ratio: float | None = None

    def __str__(self) -> str:
        return f"{self.key}={self.value}"

    @property
    def summary(self) -> str:
        """What to set, what for, and how it is known, in one line."""
        if self.purpose == "correctness":
            known = "against wrong results"
        elif self.ratio is None:
            known = "known for this version of the runtime, not measured here"
        else:
            known = f"{self.ratio:.3f}x the time of the result without it"
        return f"{self} ({known}): {self.why}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        return asdict(self)


@dataclass(frozen=True)
class _Row:
    """One setting: an optimizer of the runtime to disable, where `key` is the default.

    op_types: of the nodes that `applies` is asked of. without: operators of which the model has none.
    since: from this version on; known: seen in these; where empty, it is for measurement to say.
    """

    value: str
    purpose: Literal["correctness", "speed"]
    why: str
    op_types: tuple[str, ...]
    applies: Callable[[ir.Node], bool]
    providers: tuple[str, ...] = ("cpu", "cuda", "tensorrt")
    without: tuple[str, ...] = ()
    key: str = _DISABLE
    since: tuple[int, ...] = (1, 24)
    known: tuple[str, ...] = ("1.24", "1.25", "1.26", "1.27", "1.28", "1.29", "1.30", "1.31")


def proposals(model: ir.Model, provider: str, runtime: str) -> tuple[Setting, ...]:
    """The settings to try for a model; `runtime` is the version, `1.31.1`."""
    version = tuple(map(int, runtime.split(".")[:2]))
    rows = [row for row in _ROWS if provider in row.providers and version >= row.since]
    asked: dict[str, list[_Row]] = {}
    for row in rows:
        for op_type in row.op_types:
            asked.setdefault(op_type, []).append(row)
    found, there = set[_Row](), set[str]()
    for node in nodes(model):
        there.add(node.op_type)
        found |= {row for row in asked.get(node.op_type, ()) if row not in found and row.applies(node)}
    known = ".".join(map(str, version))
    return tuple(
        Setting(row.key, row.value, row.purpose, row.why, known in row.known)
        for row in rows
        if row in found and not there & set(row.without)
    )


def session_config(settings: Sequence[Setting]) -> dict[str, str]:
    """The settings as session config entries; optimizers to disable share one."""
    config: dict[str, str] = {}
    for one in settings:
        config[one.key] = f"{config[one.key]};{one.value}" if one.key in config else one.value
    return config


def _producer(node: ir.Node, index: int) -> ir.Node | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return value.producer() if value is not None else None


def _is(node: ir.Node | None, *op_types: str) -> bool:
    return node is not None and not node.domain and node.op_type in op_types


def _norm_of_add(node: ir.Node) -> bool:
    """LayerNormalization of a sum, as one node or as Sub(x, ReduceMean(x)) and what follows."""
    starts = node.op_type == "LayerNormalization" or _is(_producer(node, 1), "ReduceMean")
    return starts and _is(_producer(node, 0), "Add")


def _zeros_before_max_pool(node: ir.Node) -> bool:
    """A Pad of zeros that only a MaxPool reads, around values that may all be negative."""
    if str_attr(node, "mode", "constant") != "constant":
        return False
    user = sole_user(node.outputs[0])
    value = node.inputs[2] if len(node.inputs) > 2 else None
    filler = constant_array(value, 64)
    zero = value is None or (filler is not None and not filler.any())
    return zero and _is(user, "MaxPool") and not _is(_producer(node, 0), *_WITHOUT_NEGATIVES)


def _mul_of_div(node: ir.Node) -> bool:
    """Mul of a Div and of something that the runtime takes out: Cast, Dropout, Identity."""
    operands = [_producer(node, 0), _producer(node, 1)]
    return any(_is(one, "Div") for one in operands) and any(
        _is(one, "Cast", "Dropout", "Identity") for one in operands
    )


def _stored_for_layers(node: ir.Node) -> bool:
    """Stored integers that a convolution or a recurrent layer reads as floats."""
    readers = [usage.node for usage in node.outputs[0].uses()]
    return constant_of(node.inputs[0]) is not None and any(one.op_type not in _PRODUCTS for one in readers)


_ROWS = (
    _Row(
        "Pad_Fusion",
        "correctness",
        "it makes a Pad of zeros before a MaxPool padding of -inf: wrong where all else is negative",
        ("Pad",),
        _zeros_before_max_pool,
    ),
    _Row(
        "DivMulFusion",
        "correctness",
        "it leaves an invalid graph where 1 / y is multiplied by the output of a node that is taken out, too",
        ("Mul",),
        _mul_of_div,
    ),
    _Row(
        "SkipLayerNormFusion",
        "speed",
        "it joins Add and LayerNormalization to one operator whose kernel is several times slower",
        ("LayerNormalization", "Sub"),
        _norm_of_add,
        providers=("cpu",),
        since=(1, 30),
        known=("1.30", "1.31"),
    ),
    _Row(
        "1",
        "speed",
        "stored integers become floats once, not in each run; they then take the memory of floats",
        ("DequantizeLinear",),
        _stored_for_layers,
        providers=("cpu",),
        without=("QuantizeLinear",),
        key="session.disable_quant_qdq",
        known=(),
    ),
)
