"""An untrained CNN of depthwise and pointwise convolutions, and the handwritten digits of scikit-learn.

Depthwise layers lose most when a weight has one scale for all its channels: a small case where quantization
needs training.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["depthwise_cnn", "handwritten"]

_LAYERS = (  # channels in and out over the width, kernel, depthwise or not, stride
    (0, 1, 3, False, 1),
    (1, 2, 3, False, 1),
    (2, 2, 3, True, 2),
    (2, 4, 1, False, 1),
    (4, 4, 3, True, 2),
    (4, 4, 1, False, 1),
)


def depthwise_cnn(seed: int, width: int = 16) -> onnx.ModelProto:
    """``x`` float32 (batch, 1, 8, 8) to ``y`` float32 (batch, 10), with random weights (He et al., 2015)."""
    rng, nodes, weights, value = np.random.default_rng(seed), [], dict[str, np.ndarray](), "x"
    for number, (ins, outs, size, depthwise, stride) in enumerate(_LAYERS):
        before, after = max(ins * width, 1), outs * width
        groups = after if depthwise else 1
        name, fan_in = f"conv{number}", before // groups * size * size
        weights[f"{name}.weight"] = rng.normal(0, (2 / fan_in) ** 0.5, (after, before // groups, size, size))
        weights[f"{name}.bias"] = np.zeros(after)
        inputs = [value, f"{name}.weight", f"{name}.bias"]
        pads = [size // 2] * 4
        nodes.append(
            helper.make_node("Conv", inputs, [name], name, group=groups, pads=pads, strides=[stride] * 2)
        )
        nodes.append(helper.make_node("Relu", [name], [value := f"relu{number}"], value))
    weights["fc.weight"] = rng.normal(0, (16 * width) ** -0.5, (16 * width, 10))
    weights["fc.bias"] = np.zeros(10)
    nodes.append(helper.make_node("Flatten", [value], ["flat"], "flat"))
    nodes.append(helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["y"], "fc"))
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def handwritten(seed: int, test: int = 600) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """scikit-learn's 1,797 digits to train on and to test on: ``x``, from 0 to 1, and ``label``."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, label = (found.images[:, None] / 16).astype(np.float32), found.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(x))
    rows = order[test:], order[:test]
    train, held_out = ({"x": x[each], "label": label[each]} for each in rows)
    return train, held_out
