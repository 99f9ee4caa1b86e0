"""The operators whose form or meaning a newer opset changed, and how to keep their own."""

from __future__ import annotations

import numpy as np

from onnxopt.graph import constant_array, int_attr, str_attr
from onnxopt.passes.shared.opsets import Adapter, Form

__all__ = ["CHANGES", "REVIEWED"]

REVIEWED = 26
"""The newest opset whose changes are in the table."""

_SMALL = 4096
"""Bytes of a constant that is read."""
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")


def _to_input(name: str, position: int, dtype: str = "int64") -> Adapter:
    """An attribute becomes an input; an empty list is left out, as is one that is absent."""

    def adapt(form: Form) -> None:
        attr = form.take(name)
        if attr is not None and len(attr.value):
            form.put(position, np.array(attr.value, dtype))

    return adapt


def _slice(form: Form) -> None:
    for position, name in enumerate(("starts", "ends", "axes"), 1):
        _to_input(name, position)(form)


def _scalar(form: Form, name: str, position: int) -> None:
    """A float attribute becomes a scalar input of the type of the first one."""
    attr, source = form.take(name), form.node.inputs[0]
    if attr is not None:
        form.decline_if(source is None or source.dtype is None, "its type is not known")
        assert source is not None
        assert source.dtype is not None
        form.put(position, np.array(attr.as_float(), source.dtype.numpy()))


def _clip(form: Form) -> None:
    _scalar(form, "min", 1)
    _scalar(form, "max", 2)


def _pad(form: Form) -> None:
    _to_input("pads", 1)(form)
    _scalar(form, "value", 2)


def _top_k(form: Form) -> None:
    attr = form.take("k")
    form.put(1, None if attr is None else np.array([attr.as_int()], np.int64))


def _dropout_10(form: Form) -> None:
    mask = any(value.uses() or value.is_graph_output() for value in form.node.outputs[1:])
    form.decline_if(mask, "its mask is read, and was something else")


def _dropout_12(form: Form) -> None:
    _dropout_10(form)
    attr = form.take("ratio")
    form.put(1, None if attr is None else np.array(attr.as_float(), np.float32))


def _batchnorm_9(form: Form) -> None:
    spatial = form.take("spatial")
    form.decline_if(spatial is not None and spatial.as_int() == 0, "spatial=0 is no more")


def _batchnorm_14(form: Form) -> None:
    form.decline_if(any(value.name for value in form.node.outputs[1:]), "it trains, in a form of its own")


def _split_18(form: Form) -> None:
    if len(form.inputs) < 2 or form.inputs[1] is None:
        form.give("num_outputs", len(form.node.outputs))


def _along_axis(form: Form) -> None:
    """Softmax and its like were over all axes from `axis` on, and are over one."""
    attr, source = form.take("axis"), form.node.inputs[0]
    axis = 1 if attr is None else attr.as_int()
    rank = None if source is None or source.shape is None else len(source.shape)
    axis += rank if rank is not None and axis < 0 else 0
    beyond = () if rank is None or source is None or source.shape is None else source.shape.dims[axis + 1 :]
    if axis != -1 and (rank is None or any(size != 1 for size in beyond)):
        form.flatten, axis = axis, -1
    form.give("axis", axis)


def _upsample_10(form: Form) -> None:
    form.rename("Resize")


def _resize_11(form: Form) -> None:
    """Before opset 11 a point of the result was at x / scale; its nearest neighbour up when made smaller."""
    scales = form.inputs[1]
    array = scales if isinstance(scales, np.ndarray) else constant_array(scales, _SMALL)
    form.decline_if(array is None, "its scales are no constant")
    assert array is not None
    shrinks, grows = bool((array < 1).any()), bool((array > 1).any())
    form.decline_if(shrinks and grows, "it makes one axis larger and another smaller")
    form.inputs[1:] = [np.zeros(0, np.float32) if form.version < 13 else None, scales]
    form.give("coordinate_transformation_mode", "asymmetric")
    if str_attr(form.node, "mode", "nearest") == "nearest":
        form.give("nearest_mode", "ceil" if shrinks else "floor")


def _resize_13(form: Form) -> None:
    mode = form.attributes.get("coordinate_transformation_mode")
    form.decline_if(mode is not None and mode.as_string() == "tf_half_pixel_for_nn", "its mode is no more")


def _roi_align_16(form: Form) -> None:
    form.give("coordinate_transformation_mode", "output_half_pixel")


def _grid_sample_20(form: Form) -> None:
    mode = form.take("mode")
    names = {"bilinear": "linear", "bicubic": "cubic"}
    form.give("mode", "linear" if mode is None else names.get(mode.as_string(), mode.as_string()))


def _dft_20(form: Form) -> None:
    attr = form.take("axis")
    form.put(2, np.array(1 if attr is None else attr.as_int(), np.int64))


def _group_normalization_21(form: Form) -> None:
    """Scale and bias were for each group, and are for each channel."""
    shape = form.node.inputs[0].shape if form.node.inputs[0] is not None else None
    channels = shape[1] if shape is not None and len(shape) > 1 else None
    for position in (1, 2):
        array = constant_array(form.node.inputs[position])
        form.decline_if(array is None or not isinstance(channels, int), "its scale or channels are not known")
        assert array is not None
        assert isinstance(channels, int)
        form.put(position, np.repeat(array, channels // int_attr(form.node, "num_groups", 1)))


def _unless(name: str, default: int | str, reason: str) -> Adapter:
    """The same, unless an attribute is at another value than its default."""

    def adapt(form: Form) -> None:
        attr = form.attributes.get(name)
        form.decline_if(attr is not None and (attr.is_ref() or attr.value != default), reason)

    return adapt


def _never(reason: str) -> Adapter:
    return lambda form: form.decline_if(True, reason)


_CEIL = _unless("ceil_mode", 0, "with ceil_mode it may give another shape")

CHANGES: dict[tuple[str, int], Adapter] = {
    ("AveragePool", 19): _CEIL,
    ("AveragePool", 22): _CEIL,
    ("BatchNormalization", 9): _batchnorm_9,
    ("BatchNormalization", 14): _batchnorm_14,
    ("Clip", 11): _clip,
    ("ConvTranspose", 11): _unless("auto_pad", "NOTSET", "it pads on the other side"),
    ("DFT", 20): _dft_20,
    ("Dropout", 10): _dropout_10,
    ("Dropout", 12): _dropout_12,
    ("GridSample", 20): _grid_sample_20,
    ("GroupNormalization", 21): _group_normalization_21,
    ("Hardmax", 13): _along_axis,
    ("LogSoftmax", 13): _along_axis,
    ("MaxPool", 12): _CEIL,
    ("MaxPool", 22): _CEIL,
    ("OneHot", 11): _never("negative indices got a meaning"),
    ("Pad", 11): _pad,
    ("ReduceSum", 13): _to_input("axes", 1),
    **{(f"Reduce{kind}", 18): _to_input("axes", 1) for kind in _REDUCTIONS},
    ("Resize", 11): _resize_11,
    ("Resize", 13): _resize_13,
    ("RoiAlign", 16): _roi_align_16,
    ("Scatter", 11): lambda form: form.rename("ScatterElements"),
    ("Slice", 10): _slice,
    ("Softmax", 13): _along_axis,
    ("Split", 13): _to_input("split", 1),
    ("Split", 18): _split_18,
    ("Squeeze", 13): _to_input("axes", 1),
    ("TopK", 10): _top_k,
    ("Unsqueeze", 13): _to_input("axes", 1),
    ("Upsample", 9): _to_input("scales", 1, "float32"),
    ("Upsample", 10): _upsample_10,
}
"""Operator and the opset that changed it -> how a node keeps its meaning, or why it cannot."""
