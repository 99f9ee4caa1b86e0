"""Models of one layer with a weight, stored in one of many ways."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.support import text_model

Call = tuple[str, tuple[int, ...], tuple[int, ...], int | None]

LAYERS: dict[str, Call] = {
    "Conv1D": ("Conv(x, w)", (6, 4, 3), (1, 4, 9), 0),
    "Conv2D": ("Conv(x, w)", (6, 4, 3, 3), (1, 4, 5, 5), 0),
    "Conv3D": ("Conv(x, w)", (6, 4, 3, 3, 3), (1, 4, 4, 4, 4), 0),
    "depthwise": ("Conv<group = 8>(x, w)", (8, 1, 3, 3), (1, 8, 5, 5), 0),
    "ConvTranspose": ("ConvTranspose(x, w)", (4, 6, 3, 3), (1, 4, 5, 5), 1),
    "in groups": ("ConvTranspose<group = 2>(x, w)", (4, 6, 3, 3), (1, 4, 5, 5), 1),
    "Gemm": ("Gemm(x, w)", (40, 6), (3, 40), 1),
    "Gemm left": ("Gemm<alpha = 0.5, beta = 2.0>(w, x)", (6, 40), (40, 3), 0),
    "MatMul": ("MatMul(x, w)", (40, 8), (2, 3, 40), 1),
    "MatMul stack": ("MatMul(x, w)", (2, 40, 8), (2, 3, 40), 2),
    "MatMul left": ("MatMul(w, x)", (8, 40), (2, 40, 3), 0),
    "LSTM": ("LSTM<hidden_size = 5>(x, w, r)", (1, 20, 8), (4, 1, 8), 1),
    "GRU": ("GRU<hidden_size = 5>(x, w, r)", (1, 15, 8), (4, 1, 8), 1),
    "RNN": ("RNN<hidden_size = 10>(x, w, r)", (1, 10, 8), (4, 1, 8), 1),
}


def weight_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def layer(name: str, opset: int = 21, store: str = "initializer") -> onnx.ModelProto:
    call, shape, x, _ = LAYERS[name]
    if "hidden" in call:
        body, rank = f"one, y = {call}", 3
    else:
        body, rank = f"y = {call}", len(x)
    dims = ", ".join(["?"] * rank)
    model = text_model(
        f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]> agraph (float{list(x)} x) =>'
        f" (float[{dims}] y) {{ {body} }}"
    )
    tensors = {"w": weight_of(shape)}
    if "hidden" in call:
        hidden = int(call.split("= ")[1].split(">")[0])
        tensors["r"] = weight_of((1, shape[1], hidden), 1)
    return stored(model, tensors, store)


def stored(
    model: onnx.ModelProto, tensors: dict[str, np.ndarray], store: str = "initializer"
) -> onnx.ModelProto:
    """The model with its weights stored in a way."""
    front = []
    for name, array in tensors.items():
        first = name if store in ("initializer", "node") else f"{name}_stored"
        if store == "transposed":
            array = np.ascontiguousarray(array.T)
        if store == "reshaped":
            array = array.reshape(array.shape[0], -1)
        tensor = numpy_helper.from_array(array.astype(np.float16) if store == "cast" else array, first)
        if store == "node":
            front.append(helper.make_node("Constant", [], [name], value=tensor))
            continue
        model.graph.initializer.append(tensor)
        if store == "transposed":
            front.append(helper.make_node("Transpose", [first], [name]))
        if store == "cast":
            front.append(helper.make_node("Cast", [first], [name], to=TensorProto.FLOAT))
        if store == "identity":
            front.append(helper.make_node("Identity", [first], [name]))
        if store == "reshaped":
            shape = numpy_helper.from_array(np.array(tensors[name].shape), f"{name}_shape")
            model.graph.initializer.append(shape)
            front.append(helper.make_node("Reshape", [first, f"{name}_shape"], [name]))
    nodes = [*front, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model
