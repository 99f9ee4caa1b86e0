"""Which nodes can compute in a 16-bit float type, and which have to stay in float32, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from onnxopt.graph import NONDETERMINISTIC, constant_of, subgraphs_of
from onnxopt.rewrite import Declined, NewerOpset
from onnxopt.streamed import pieces

__all__ = ["ANY", "Choice", "Half", "Ranges", "is_float32"]

Ranges = Mapping[str, tuple[float, float]]
"""Value name -> the smallest and largest number it was seen to hold."""

_MARGIN = 4.0
"""How much farther than on the samples seen a value may go."""
_LOST, _LOST_OF_WEIGHT = 0.01, 0.5
"""Share of a constant's non-zero elements that may become zero (of a weight, whose products are summed)."""

_CONTRACTS = frozenset(
    {"Attention", "Conv", "ConvTranspose", "DeformConv", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "RNN"}
)
"""Where 16 bits pay; all others compute in the type that their inputs have."""
_LEAVES = frozenset(
    {"Cosh", "CumProd", "CumSum", "Exp", "Pow", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceProd"}
)
_LEAVES |= {"ReduceSum", "ReduceSumSquare", "Sinh", "Tan"}
"""Their results may leave the range of float16 where their inputs do not."""
_SUMS = frozenset({"GroupNormalization", "InstanceNormalization", "LRN", "LayerNormalization", "LogSoftmax"})
_SUMS |= {"LpNormalization", "LpPool", "MeanVarianceNormalization", "RMSNormalization", "ReduceLogSum"}
_SUMS |= {"ReduceLogSumExp", "Softmax", "SoftmaxCrossEntropyLoss"}
"""They sum inside, exponentials or squares for the most part, and give what is small again."""
_EXACT = frozenset(
    {"AffineGrid", "DFT", "DequantizeLinear", "DynamicQuantizeLinear", "EyeLike", "GridSample"}
)
_EXACT |= {
    "MaxRoiPool",
    "NonMaxSuppression",
    "QuantizeLinear",
    "Range",
    "RoiAlign",
    "STFT",
    *NONDETERMINISTIC,
}
"""They count or place things, or an attribute of theirs names the type."""
_PASSES_ON = frozenset(
    {"Abs", "Add", "Max", "Mean", "Min", "Mul", "Neg", "ReduceMax", "ReduceMean", "ReduceMin"}
)
_PASSES_ON |= {"Sub", "Sum"}
"""What is large before them is large after them; likewise operators that move elements of any type."""
_SATURATES = frozenset({"Clip", "Max", "Min"})
"""A bound beyond the range does what infinity does."""
ANY = frozenset({"Cast", "Shape", "Size"})
"""They read a value in whichever type it has."""
_BYTES = (ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.UINT8)
"""Integers that 16-bit floats hold exactly."""


class Choice(NamedTuple):
    """Inputs and outputs of a node, by their number, that become 16 bits wide."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def is_float32(value: ir.Value | None) -> bool:
    """Whether a value is a tensor of float32 on record."""
    return (
        value is not None and isinstance(value.type, ir.TensorType) and value.type.dtype == ir.DataType.FLOAT
    )


@dataclass
class Half:
    """The choices for the nodes of a graph, made in its order.

    stored: values that are 16 bits wide now. wide: float32 values that may not fit 16 bits.
    """

    dtype: ir.DataType
    ranges: Ranges
    opsets: Mapping[str, int]
    stored: set[ir.Value] = field(default_factory=set)
    wide: set[ir.Value] = field(default_factory=set)
    _losses: dict[ir.Value, tuple[bool, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._info = ml_dtypes.finfo(self.dtype.numpy())  # type: ignore[no-untyped-call]  # ml_dtypes has no types

    def choose(self, node: ir.Node) -> Choice | None:
        """What of a node becomes 16 bits wide; None where nothing is float32.

        Raises:
            Declined: the node stays in float32, and why.
        """
        if node.op_type in ANY and not node.domain:
            return self._cast(node)
        if node.op_type == "Constant" or not any(map(is_float32, (*node.inputs, *node.outputs))):
            self._known(node)
            return None
        choice = self._allowed(node)
        if choice is None:
            return None
        fed = [value for value in filter(is_float32, node.inputs) if value and constant_of(value) is None]
        if any(value.is_initializer() and value.is_graph_input() for value in fed):
            raise Declined("a constant of it is also a graph input, which callers may override")
        self._check_constants(node, choice)
        if any(self.is_wide(value) for value in (*fed, *node.outputs)):
            raise Declined(f"what it reads or gives may not fit {self._name}")
        if node.op_type in _LEAVES | _SUMS and any(map(is_float32, node.outputs)):
            raise Declined(f"{node.op_type} sums or leaves the range of {self._name}")
        if any((producer := value.producer()) and producer.op_type == "DequantizeLinear" for value in fed):
            raise Declined("is quantized already")
        if not (_contracts(node) or any(value in self.stored for value in fed)) and (fed or not _feeds(node)):
            raise Declined("follows its inputs, which are in float32")
        return choice

    def keep(self, node: ir.Node) -> None:
        """Note that a node stays in float32, and whether its results may be too large for 16 bits."""
        if node.domain:
            return
        floats = [value for value in node.inputs if value is not None and is_float32(value)]
        leaves = node.op_type in _LEAVES and self.dtype == ir.DataType.FLOAT16
        grows = leaves or any(self._loses(value)[0] for value in floats)
        if grows or ((node.op_type in _PASSES_ON or self._moves(node)) and any(map(self.is_wide, floats))):
            self.wide.update(value for value in node.outputs if is_float32(value))

    @property
    def _name(self) -> str:
        return self.dtype.name.lower()

    def is_wide(self, value: ir.Value) -> bool:
        """Whether a value may not fit, as far as is known from samples or from what made it."""
        seen, info = self.ranges.get(value.name or ""), self._info
        if seen is None:
            return value in self.wide
        largest = max(map(abs, seen))
        return not (largest == 0 or float(info.smallest_normal) <= largest <= float(info.max) / _MARGIN)

    def _cast(self, node: ir.Node) -> Choice | None:
        """A Cast of bytes to float32 gives 16 bits instead; larger integers would be rounded."""
        source, result = node.inputs[0], node.outputs[0]
        if node.op_type != "Cast" or not is_float32(result) or source is None or source.dtype not in _BYTES:
            return None
        if self.is_wide(result):
            raise Declined(f"what it reads or gives may not fit {self._name}")
        return Choice((), (0,))

    def _known(self, node: ir.Node) -> None:
        if any(
            value is not None and value.name and value.type is None for value in (*node.inputs, *node.outputs)
        ):
            raise Declined("the types of its inputs or outputs are not known")

    def _allowed(self, node: ir.Node) -> Choice | None:
        """The float32 inputs and outputs that the operator takes in 16 bits, if it has such."""
        if subgraphs_of(node):
            raise Declined("what goes into its bodies and comes out of them stays in float32")
        version = self.opsets.get(node.domain, 0)
        if not onnx.defs.has(node.op_type, version, node.domain):
            raise Declined(
                f"the types that an operator of {node.domain or 'another opset'} takes are not known"
            )
        self._known(node)
        if node.op_type in _EXACT:
            raise Declined(f"{node.op_type} stays in float32")
        ports = (*node.inputs, *node.outputs)
        if any(v is not None and v.name and not isinstance(v.type, ir.TensorType) for v in ports):
            raise Declined("it handles sequences or optional values")
        choice = self._choice(node, onnx.defs.get_schema(node.op_type, version, node.domain))
        if not any(map(is_float32, node.outputs)):
            return choice if choice.inputs else None
        if choice.inputs and choice.outputs:
            return choice
        newest = onnx.defs.get_schema(node.op_type, node.domain)
        if newest.since_version > version and self._choice(node, newest).outputs:
            raise NewerOpset(f"{node.op_type} of {self._name}", newest.since_version)
        raise Declined(f"{node.op_type} takes no {self._name}")

    def _choice(self, node: ir.Node, schema: onnx.defs.OpSchema) -> Choice:
        def allowed(
            values: Sequence[ir.Value | None], formal: Sequence[onnx.defs.OpSchema.FormalParameter]
        ) -> Iterator[int]:
            for index, value in enumerate(values):
                if is_float32(value) and f"tensor({self._name})" in formal[min(index, len(formal) - 1)].types:
                    yield index

        return Choice(
            tuple(allowed(node.inputs, schema.inputs)), tuple(allowed(node.outputs, schema.outputs))
        )

    def _check_constants(self, node: ir.Node, choice: Choice) -> None:
        for index in choice.inputs:
            overflows, lost = self._loses(node.inputs[index])
            if lost > (_LOST_OF_WEIGHT if _contracts(node) else _LOST):
                raise Declined(f"a constant of it vanishes in {self._name}")
            if overflows and node.op_type not in _SATURATES:
                raise Declined(f"a constant of it leaves the range of {self._name}")

    def _loses(self, value: ir.Value | None) -> tuple[bool, float]:
        """Whether finite elements of a constant would become infinite, and which share of others zero."""
        tensor = constant_of(value)
        if value is None or tensor is None:
            return False, 0.0
        if value not in self._losses:
            overflows, used, lost = False, 0, 0
            for piece in pieces(tensor):
                array = np.abs(np.frombuffer(piece, np.float32))
                overflows |= bool(np.any((array > float(self._info.max)) & np.isfinite(array)))
                used += int(np.count_nonzero(array))
                lost += int(np.count_nonzero((array > 0) & (array < float(self._info.smallest_subnormal))))
            self._losses[value] = overflows, lost / max(used, 1)
        return self._losses[value]

    def _moves(self, node: ir.Node) -> bool:
        """Whether an operator only moves elements: it takes strings, too."""
        version = self.opsets.get(node.domain, 0)
        if not onnx.defs.has(node.op_type, version, node.domain):
            return False
        formal = onnx.defs.get_schema(node.op_type, version, node.domain).outputs
        return "tensor(string)" in formal[0].types


def _contracts(node: ir.Node) -> bool:
    """Whether a node sums products; a MatMul of columns and rows, as of position and frequency, does not."""
    shape = node.inputs[0].shape if node.op_type == "MatMul" and node.inputs[0] is not None else None
    return node.op_type in _CONTRACTS and not (shape is not None and len(shape) > 0 and shape[-1] == 1)


def _feeds(node: ir.Node) -> bool:
    """Whether what a node makes of constants is an embedding, or the weight of a contraction."""
    readers = (reader for value in node.outputs for reader in value.consumers())
    return node.op_type == "Gather" or any(map(_contracts, readers))
