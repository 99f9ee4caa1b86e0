"""The mask of attention: what is added to the scores, how low it can be, and of which shape.

In a row that -inf masks whole, Softmax and the contrib ops give NaN, the standard Attention zeros. That of
ONNX Runtime 1.31 takes the lowest number for -inf there, so that a mask that goes so far is raised by a bit.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxopt.evaluation import Dim, Dims, named
from onnxopt.graph import constant_array
from onnxopt.pattern import Match, Patterns
from onnxopt.rewrite import Declined, Edit
from onnxopt.scope import Scope

__all__ = ["added_mask"]

_CHOICE = Patterns({"keep": "Where(keep, 0, 'low')", "drop": "Where(drop, 'low', 0)"})
_LOWEST = float(np.finfo(np.float32).min)
_ABOVE_LOWEST = float(np.nextafter(np.float32(_LOWEST), np.float32(0)))
_FAR_BELOW = -1e30
"""Added to a score of any use, it leaves itself."""
_NOT_ZEROS = "the mask may be -inf all along a row, which gives NaN, and zeros in Attention"
_NOT_NAN = "the mask may be -inf all along a row, which gives zeros, and NaN in the contrib op"
_LARGEST = 1 << 24
"""Bytes of a constant mask that is read."""
_FAR = 12
"""Ops above a mask that are looked at."""
_KEEPS = ("Cast", "Expand", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")

_Range = tuple[float, float]


def added_mask(
    edit: Edit, scope: Scope, dims: Dims, match: Match, *, contrib: bool, live: bool
) -> ir.Value | None:
    """What the fused op takes for the mask of a match: a bias, or a bool of what is kept; None without one.

    match: names the scores `s`, and the `mask` added to them, or what they are replaced by, `low`, where they
    are not to `keep` or to `drop`. It may be called `zeros for NaN`. live: no row is masked whole.

    Raises:
        Declined: rows that are masked whole, or shapes, may come out different.
    """
    mask, choice, zeros = match.get("mask"), None, match.name == "zeros for NaN"
    if match.get("low") is not None:
        choice = match
    elif mask is None:
        return None
    elif (maker := mask.producer()) is not None:
        choice = _CHOICE.find(maker, scope)
    given = mask or match.get("keep") or match["drop"]
    _require_fit(given, match, dims)
    if choice is not None and choice.number("low") <= _FAR_BELOW:
        value = _of_choice(edit, choice, mask, zeros=zeros, contrib=contrib, live=live)
    elif mask is not None:
        value = mask if live else _of_bias(edit, mask, zeros=zeros, contrib=contrib)
    else:
        raise Declined("masked scores are replaced by a number that is not far below others")
    return _whole(edit, scope, dims, match, value, given, contrib=contrib)


def _of_choice(
    edit: Edit, choice: Match, mask: ir.Value | None, *, zeros: bool, contrib: bool, live: bool
) -> ir.Value:
    """Of Where(keep, 0, low) or Where(drop, low, 0), added to the scores or, as far below, in their place."""
    keep, low = choice.get("keep"), choice.number("low")
    condition = keep or choice["drop"]
    if low == -np.inf:
        if zeros == contrib and not (live or _has_live_rows(condition, keeps=keep is not None)):
            raise Declined(_NOT_NAN if contrib else _NOT_ZEROS)
        if not contrib:
            return keep or edit.op("Not", (condition,))
    raised = low if contrib else max(low, _ABOVE_LOWEST)
    if mask is not None and raised == low:
        return mask
    zero, bias = (edit.constant(np.array(end, np.float32), "bias") for end in (0, raised))
    return edit.op("Where", (condition, zero, bias) if keep is not None else (condition, bias, zero))


def _of_bias(edit: Edit, mask: ir.Value, *, zeros: bool, contrib: bool) -> ir.Value:
    """Of what is added to the scores; in float16, a sum with half of the lowest number is still one."""
    low = _bounds(mask)[0]
    if low == -np.inf and _has_live_rows(mask):
        return mask
    if contrib:
        if zeros and low == -np.inf:
            raise Declined(_NOT_NAN)
        return mask
    if low > (float(np.finfo(np.float16).min) / 2 if mask.dtype == ir.DataType.FLOAT16 else _LOWEST):
        return mask
    if low == _LOWEST:
        return edit.op("Max", (mask, edit.constant(np.array(_ABOVE_LOWEST, np.float32), "lowest")))
    raise Declined(_NOT_ZEROS)


def _has_live_rows(mask: ir.Value, *, keeps: bool = True) -> bool:
    """Whether it is a constant that leaves something of each row; a bool is of what it keeps, or drops."""
    array = constant_array(mask, _LARGEST)
    if array is None or not array.ndim:
        return False
    kept = array == keeps if array.dtype == bool else array > np.finfo(array.dtype).min
    return bool(kept.any(axis=-1).all())


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
    if own is None or full is None:
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
