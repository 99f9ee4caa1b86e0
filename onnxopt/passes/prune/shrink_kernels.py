"""Cut weak borders off the kernels of convolutions.

Before: y = Conv<pads = [1, 1, 1, 1]>(x, w)    w: [M, C, 3, 3], whose first row is nearly zero
After:  y = Conv<pads = [0, 1, 1, 1]>(x, w')   w': [M, C, 2, 3]
Declines: the weight is a graph input, computed at run time or not finite; there is less padding than would go
    with the border; auto_pad with a stride and a size that is not known, or of a ConvTranspose; output_shape.

A slice at the border of a kernel goes where its share of the squared elements is small. One dilation of
padding goes with it, so that no position moves; also with a ConvTranspose, which spreads where Conv
gathers. Zeros at borders come from pruned weights, and from layers that were merged or padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.errors import UsageError
from onnxopt.graph import str_attr
from onnxopt.passes.shared.layer import Layer, layer_of
from onnxopt.passes.shared.window import window_of
from onnxopt.rewrite import AttributeValue, Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["ShrinkKernels"]

_Sides = list[tuple[int, int]]
"""Of each spatial axis, how many slices in front and behind."""


@dataclass(frozen=True)
class ShrinkKernels(Pass):
    """Cut weak borders off the kernels of convolutions.

    energy: a slice at a border goes if the others keep this share of the sum of the squared elements of the
        kernels; 1: only where it is all zero, which changes no number.
    """

    name: ClassVar[str] = "shrink-kernels"
    kind: ClassVar[Kind] = "lossy"
    example: ClassVar[str] = """
agraph (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y) <float[1, 1, 3, 3] w = {0, 0, 0, 0, 1, 2, 0, 3, 4}> {
    y = Conv<pads = [1, 1, 1, 1]>(x, w)
}
    """

    energy: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise UsageError(f"{self.name}: energy is {self.energy}; expected a share, above 0 and up to 1")

    def rules(self) -> Sequence[Rule]:
        return (Rule("weak border of a kernel", ("Conv", "ConvTranspose"), self._cropped),)

    def _cropped(self, node: ir.Node, scope: Scope) -> Edit | None:
        layer = layer_of(node)
        if layer is None or not layer.stored:
            return None
        weight = layer.weight()
        array = weight.tensor.numpy()
        power = np.square(array.astype(np.float64)).sum(axis=(0, 1))
        if not np.isfinite(power).all():
            raise Declined("the weight is not finite")
        if not any(map(any, _weak(power, 1 - self.energy, [(size, size) for size in power.shape]))):
            return None
        pads, step = _padding(layer)
        room = [(front // d, behind // d) for (front, behind), d in zip(pads, step, strict=True)]
        cut = _weak(power, 1 - self.energy, room)
        if not any(map(any, cut)):
            raise Declined("there is less padding than would go with the border")
        box = [slice(front, size - behind) for (front, behind), size in zip(cut, power.shape, strict=True)]
        left = [
            tuple(pad - slices * d for pad, slices in zip(both, gone, strict=True))
            for both, gone, d in zip(pads, cut, step, strict=True)
        ]
        kept = np.ascontiguousarray(array[(slice(None), slice(None), *box)])
        edit = Edit(node, scope)
        smaller = edit.constant(ir.Tensor(kept, dtype=weight.tensor.dtype), weight.value.name)
        attributes: dict[str, AttributeValue] = dict(node.attributes)
        attributes.pop("auto_pad", None)
        sides = [both[0] for both in left] + [both[1] for both in left]
        attributes |= {"kernel_shape": kept.shape[2:], "pads": sides}
        inputs = [layer.source, smaller, *node.inputs[2:]]
        return edit.replace(node.outputs[0], edit.op(node.op_type, inputs, attributes))


def _weak(power: np.ndarray, share: float, room: _Sides) -> _Sides:
    """The slices at the borders that go, the weakest first, until no more of what is left is weak.

    Args:
        power: float64, the squares of the elements, summed over channels, by position in the kernel.
        share: of a slice that goes, of the sum over the positions that are left.
        room: how many may go.
    """
    cut = [(0, 0)] * power.ndim
    while True:
        total, slices = power.sum(), []
        for axis in range(power.ndim):
            if power.shape[axis] == 1:
                continue
            for side in (0, 1):
                if cut[axis][side] < room[axis][side]:
                    slices.append((power.take(-side, axis).sum(), axis, side))
        weakest = min(slices, default=None)
        if weakest is None or weakest[0] > share * total:
            return cut
        _, axis, side = weakest
        front, behind = cut[axis]
        cut[axis] = (front, behind + 1) if side else (front + 1, behind)
        power = np.delete(power, -side, axis)


def _padding(layer: Layer) -> tuple[_Sides, tuple[int, ...]]:
    """Pads and dilations."""
    node = layer.node
    makes_pads = str_attr(node, "auto_pad", "NOTSET") != "NOTSET" or "output_shape" in node.attributes
    if node.op_type == "ConvTranspose" and makes_pads:
        raise Declined("a ConvTranspose that makes pads of its own")
    window = window_of(node, layer.weight().shape[2:])
    pads = [both for both in window.pads if both is not None]
    if len(pads) < len(window.pads):
        raise Declined("auto_pad makes pads of a size that is not known")
    return pads, window.dilations
