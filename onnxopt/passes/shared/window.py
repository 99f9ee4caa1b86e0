"""Where the kernel of a convolution lies over its input."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxopt.calibration.windows import pads_of
from onnxopt.graph import ints_attr, str_attr

__all__ = ["Window", "window_of"]


@dataclass(frozen=True)
class Window:
    """Of each spatial axis: size of the kernel, stride, dilation, and pads in front and behind.

    Pads are None where `auto_pad` makes them of an extent that is not known.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int] | None, ...]

    @property
    def keeps(self) -> tuple[bool, ...]:
        """Of each axis, whether the output surely is as long as the input."""
        sides = zip(self.kernel, self.strides, self.dilations, self.pads, strict=True)
        return tuple(s == 1 and pads is not None and sum(pads) == (k - 1) * d for k, s, d, pads in sides)


def window_of(node: ir.Node, kernel: tuple[int, ...]) -> Window:
    """The window of a Conv whose weight has a kernel of these sizes."""
    ones = (1,) * len(kernel)
    strides, dilations = ints_attr(node, "strides") or ones, ints_attr(node, "dilations") or ones
    extents = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
    source = node.inputs[0]
    shape = source.shape if source is not None else None
    dims = shape.dims[2:] if shape is not None else (None,) * len(kernel)
    known = tuple(size if isinstance(size, int) else None for size in dims)
    sizes = tuple(extent if size is None else size for size, extent in zip(known, extents, strict=True))
    settled = str_attr(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID")
    pads = tuple(
        both if settled or stride == 1 or size is not None else None
        for both, stride, size in zip(pads_of(node, sizes, extents, strides), strides, known, strict=True)
    )
    return Window(kernel, strides, dilations, pads)
