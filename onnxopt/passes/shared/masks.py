"""The mask of attention: what is added to the scores, how low it can be, and of which shape.

In a row that -inf masks whole, Softmax and the contrib ops give NaN, the standard Attention zeros; that of
ONNX Runtime 1.31 takes the lowest number for -inf there. So a mask that may go so far is raised by the least
bit, which changes no weight, and is made NaN in rows that are to be NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxopt.evaluation import Dim, Dims, named
from onnxopt.graph import constant_array, constant_of
from onnxopt.pattern import Match, Patterns
from onnxopt.rewrite import Declined, Edit
from onnxopt.scope import Scope

__all__ = ["added_mask"]

_CHOICE = Patterns({"keep": "Where(keep, 0, 'low')", "drop": "Where(drop, 'low', 0)"})
_LOWEST = float(np.finfo(np.float32).min)
_ABOVE_LOWEST = float(np.nextafter(np.float32(_LOWEST), np.float32(0)))
_FAR_BELOW = -1e30
"""Added to a score of any use, it leaves itself."""
_LARGEST = 1 << 24
"""Bytes of a constant mask that is read."""
_FAR = 12
"""Ops above a mask that are looked at."""
_KEEPS = ("Cast", "Expand", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")

_Range = tuple[float, float]


def added_mask(
    edit: Edit, scope: Scope, dims: Dims, match: Match, *, contrib: bool, half: bool
) -> ir.Value | None:
    """What the fused op takes for the mask of a match: a bias, or a bool of what is kept; None without one.

    match: names the scores `s`, and the `mask` added to them, or what they are replaced by, `low`, where they
    are not to `keep` or to `drop`. It may be called `zeros for NaN`. half: of float16.

    Raises:
        Declined: rows that are masked whole, or shapes, may come out different.
    """
    mask, chosen, zeros = match.get("mask"), _chosen(match, scope), match.name == "zeros for NaN"
    given = mask or (chosen.condition if chosen is not None else None)
    if given is None:
        return None
    _require_fit(given, match, dims)
    if chosen is not None and chosen.low == -np.inf and not contrib and (zeros or chosen.is_live):
        value = chosen.condition if chosen.keeps else edit.op("Not", (chosen.condition,))
    elif mask is not None:
        value = _in_reach(edit, mask, _bounds(mask)[0], zeros=zeros, contrib=contrib, half=half)
    else:
        assert chosen is not None  # else nothing is masked
        value = _in_reach(edit, chosen.bias(edit), chosen.low, zeros=zeros, contrib=contrib, half=half)
    return _whole(edit, scope, dims, match, value, given, contrib=contrib)


@dataclass(frozen=True)
class _Choice:
    """A number where a condition keeps nothing: Where(keep, .., low) or Where(drop, low, ..)."""

    condition: ir.Value
    keeps: bool
    low: float
    number: ir.Value

    @property
    def is_live(self) -> bool:
        """Whether it surely leaves something of each row."""
        array = constant_array(self.condition, _LARGEST)
        return array is not None and array.ndim > 0 and bool((array == self.keeps).any(axis=-1).all())

    def bias(self, edit: Edit) -> ir.Value:
        """What can be added in its place; Declined where the number is not far below all scores."""
        if self.low > _FAR_BELOW:
            raise Declined("masked scores are replaced by a number that is not far below others")
        number = constant_of(self.number)
        zero = edit.constant(np.zeros((), number.numpy().dtype), "zero") if number is not None else None
        ends = (zero, self.number) if self.keeps else (self.number, zero)
        return edit.op("Where", (self.condition, *ends))


def _chosen(match: Match, scope: Scope) -> _Choice | None:
    """By what scores are replaced; or what is added to them, where that is 0 or a number."""
    found: Match | None = match
    if match.get("low") is None:
        mask = match.get("mask")
        maker = None if mask is None else mask.producer()
        found = None if maker is None else _CHOICE.find(maker, scope)
    if found is None:
        return None
    keep = found.get("keep")
    return _Choice(keep or found["drop"], keep is not None, found.number("low"), found["low"])


def _in_reach(edit: Edit, bias: ir.Value, low: float, *, zeros: bool, contrib: bool, half: bool) -> ir.Value:
    """What is added to the scores, such that rows which it masks whole come out as they did.

    In float16, a sum with half of the lowest number is still one.
    """
    rows = constant_array(bias, _LARGEST)
    if rows is not None and rows.ndim and bool((rows > np.finfo(rows.dtype).min).any(axis=-1).all()):
        return bias
    if contrib:
        if zeros and low == -np.inf:
            raise Declined("rows may be masked whole by -inf, which gives zeros, and NaN in the contrib op")
        return bias
    if low > (float(np.finfo(np.float16).min) / 2 if half else _LOWEST):
        return bias
    if half:
        raise Declined("rows may be masked whole, which float16 cannot tell from -inf")
    raised = edit.op("Max", (bias, edit.constant(np.array(_ABOVE_LOWEST, np.float32), "lowest")))
    if low > -np.inf:
        return raised
    highest = edit.op("ReduceMax", (bias, edit.constant(np.array([-1]), "axes")), {"keepdims": 1})
    dead = edit.constant(np.array(-np.inf if zeros else np.nan, np.float32), "dead")
    return edit.op("Where", (edit.op("IsInf", (highest,)), dead, raised))


def _bounds(value: ir.Value | None, far: int = _FAR) -> _Range:
    """The least and the largest number that the elements can be, as far as constants and types tell."""
    array = constant_array(value, _LARGEST)
    if array is not None and array.size and array.dtype.kind in "biuf":
        low, high = float(array.min()), float(array.max())
        return (-np.inf, np.inf) if np.isnan(low) else (low, high)
    node, found = None if value is None else value.producer(), _type_bounds(value)
    if node is None or node.domain or not far:
        return found
    if node.op_type in _KEEPS:
        inner = _bounds(node.inputs[0], far - 1)
        return max(inner[0], found[0]), min(inner[1], found[1])
    if node.op_type not in ("Add", "Mul", "Sub", "Where"):
        return found
    a, b = (_bounds(one, far - 1) for one in node.inputs[-2:])
    if node.op_type == "Where":
        return min(a[0], b[0]), max(a[1], b[1])
    combine = {"Add": np.add, "Mul": np.multiply, "Sub": np.subtract}[node.op_type]
    if value is None or value.dtype != ir.DataType.FLOAT or not np.isfinite((a, b)).all():
        return found
    with np.errstate(over="ignore"):
        ends = combine(*np.meshgrid(a, b)).astype(np.float32)
    return float(ends.min()), float(ends.max())


def _type_bounds(value: ir.Value | None) -> _Range:
    dtype = None if value is None else value.dtype
    if dtype == ir.DataType.BOOL:
        return 0, 1
    whole = dtype is not None and dtype.is_integer()
    return (float(dtype.min), float(dtype.max)) if dtype is not None and whole else (-np.inf, np.inf)


def _require_fit(mask: ir.Value, match: Match, dims: Dims) -> None:
    """Raise `Declined` unless broadcasting surely leaves the shape of the scores as it is."""
    scores = match["s"]
    own, full = dims.of(mask), dims.of(scores)
    if not own or full is None:
        raise Declined("the shape of the mask is not known")
    for axis in range(-len(own), 0) if dims.of(match["m"]) != full else ():
        same = {own[axis], _on_record(mask, axis)} & {full[axis], _on_record(scores, axis)} - {None}
        if own[axis] != 1 and not same:
            raise Declined("the mask is not known to have the sizes of the scores")


def _on_record(value: ir.Value, axis: int) -> Dim | None:
    size = value.shape[axis] if value.shape is not None else None
    return named(size.value) if isinstance(size, ir.SymbolicDim) and size.value else None


def _whole(
    edit: Edit, scope: Scope, dims: Dims, match: Match, value: ir.Value, given: ir.Value, *, contrib: bool
) -> ir.Value:
    """The mask, which has the shape of `given`, with the last two sizes in full, as runtimes want them."""
    own, full = dims.of(given) or (), dims.of(match["s"]) or ()
    pairs = zip((1, 1, *own)[-2:], full[-2:], strict=True)  # a name that fits a number may stand for 1
    target = [size if have == 1 or (isinstance(size, int) and have != size) else 1 for have, size in pairs]
    if target == [1, 1] and (len(own) == 4 or not contrib):
        return value
    target = [1, 1, *target] if contrib and len(own) < 4 else target
    if all(isinstance(size, int) for size in target):
        shape = edit.constant(np.array(target, np.int64), "shape")
    elif all(size in own for size in target):
        shape = _sizes(edit, given, [own.index(size) for size in target])
    else:
        rank = len(dims.of(match["q"]) or ())
        sources = *[(match["q"], rank - 2)] * 3, (match["k"], rank - 1)
        given_by = zip(target, sources[-len(target) :], strict=True)
        parts = [_size(edit, scope, dims, size, source) for size, source in given_by]
        shape = edit.op("Concat", parts, {"axis": 0})
    return edit.op("Expand", (value, shape))


def _sizes(edit: Edit, value: ir.Value, axes: list[int]) -> ir.Value:
    return edit.op("Gather", (edit.op("Shape", (value,)), edit.constant(np.array(axes, np.int64), "axes")))


def _size(edit: Edit, scope: Scope, dims: Dims, size: Dim, source: tuple[ir.Value, int]) -> ir.Value:
    """A tensor of shape [1] that holds a size: that of a graph input where one has it, else of `source`."""
    if isinstance(size, int):
        return edit.constant(np.array([size], np.int64), "size")
    for value in scope.graph.inputs:
        found = dims.of(value) or ()
        if size in found:
            source = value, found.index(size)
            break
    return _sizes(edit, source[0], [source[1]])
