"""ResNet-20 for 32x32 images (He et al. 2015, section 4.2), random weights, BatchNormalization unfused."""

from __future__ import annotations

import onnx

from models.builder import Builder


def resnet20(seed: int = 0, classes: int = 10) -> onnx.ModelProto:
    """``image`` float32 (batch, 3, 32, 32) to ``logits`` (batch, classes).

    The running statistics are near those that He-scaled convolutions give for an input of unit variance, and
    the second BatchNormalization of each block is damped, so that activations neither vanish nor explode.
    """
    b = Builder(seed)

    def conv_bn(x: str, c_in: int, c_out: int, kernel: int, stride: int, gain: float = 1.0) -> str:
        pad = [kernel // 2] * 4
        weight = b.weight(c_out, c_in, kernel, kernel)
        x = b.add("Conv", x, weight, kernel_shape=[kernel] * 2, pads=pad, strides=[stride] * 2)
        scale = b.constant(gain * b.rng.uniform(0.8, 1.2, c_out))
        bias, mean = b.constant(b.rng.normal(0, 0.1, c_out)), b.constant(b.rng.normal(0, 0.1, c_out))
        return b.add("BatchNormalization", x, scale, bias, mean, b.constant(b.rng.uniform(1.5, 2.5, c_out)))

    x, width = b.add("Relu", conv_bn("image", 3, 16, 3, 1)), 16
    for stage, channels in enumerate((16, 32, 64)):
        for block in range(3):
            stride = 2 if stage and not block else 1
            y = b.add("Relu", conv_bn(x, width, channels, 3, stride))
            y = conv_bn(y, channels, channels, 3, 1, gain=0.5)
            shortcut = x if width == channels else conv_bn(x, width, channels, 1, stride)
            x, width = b.add("Relu", b.add("Add", y, shortcut)), channels
    x = b.add("Flatten", b.add("GlobalAveragePool", x))
    weight = b.weight(classes, 64, scale=0.1)
    b.add("Gemm", x, weight, b.constant(b.rng.normal(0, 0.1, classes)), outputs=["logits"], transB=1)
    return b.model("resnet20", [("image", ["batch", 3, 32, 32])], [("logits", ["batch", classes])])
