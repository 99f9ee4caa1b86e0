"""fuse-projections against the runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from models.attention import attention
from onnxopt.passes.fuse.fuse_attention import FuseAttention
from onnxopt.passes.fuse.fuse_projections import FuseProjections
from onnxopt.protobuf import dump
from tests.support import assert_equivalent, random_feeds, run_pass, text_model

PRODUCTS = {name: f"{name} = MatMul (x, W{name})" for name in "qkv"}
BIASED = {name: f"{name}0 = MatMul (x, W{name}) {name} = Add ({name}0, b{name})" for name in "qkv"}
MIXED = {**PRODUCTS, "k": "k0 = MatMul (x, Wk) k = Add (bk, k0)"}
FUSED = "y = com.microsoft.MultiHeadAttention <num_heads = 2{}> (q, k, v{})"


def projected(
    nodes: str,
    *,
    inputs: str = "",
    outputs: str = "",
    widths: tuple[int, int, int] = (4, 4, 4),
    opset: int = 17,
) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    model = text_model(
        f"""<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>
        agraph (float[B,S,3] x{inputs}) => (float[B,S,{widths[2]}] y{outputs}) {{ {nodes} }}"""
    )
    for name, width in (*zip("qkv", widths, strict=True), ("", sum(widths))):
        for key, shape in (("W", (3, width)), ("b", (width,))):
            array = rng.normal(size=shape).astype(np.float32)
            if any(f"{key}{name}" in node.input for node in model.graph.node):
                model.graph.initializer.append(numpy_helper.from_array(array, f"{key}{name}"))
    return model


@pytest.mark.parametrize("mask", ["", ", , , mask"])
@pytest.mark.parametrize("scale", ["", ", scale = 0.3"])
@pytest.mark.parametrize("parts", [PRODUCTS, BIASED, MIXED])
@pytest.mark.parametrize("widths", [(4, 4, 4), (4, 4, 6)])
def test_three_products_become_one(
    parts: dict[str, str], scale: str, mask: str, widths: tuple[int, int, int]
) -> None:
    nodes = " ".join(parts.values()) + FUSED.format(scale, mask)
    model = projected(nodes, inputs=mask and ", float[B,1,S,S] mask", widths=widths)
    done = run_pass(model, FuseProjections())
    assert (done.op_types, done.declined) == (["Attention"], ())
    assert_equivalent(model, done.model, random_feeds(model, sizes={"B": 2, "S": 5}), kind="reorder")


@pytest.mark.parametrize(
    ("split", "opset"), [("(p, sizes)", 13), ("<split = [4, 4, 4]> (p)", 11), ("(p)", 17)]
)
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_that_is_split(split: str, opset: int, biased: bool) -> None:
    nodes = "p = MatMul (x, W)" if not biased else "r = MatMul (x, W) p = Add (r, b)"
    attribute = split.replace("<", "<axis = 2, ") if "<" in split else f"<axis = -1> {split}"
    constant = "sizes = Constant <value_ints = [4, 4, 4]> ()" if "sizes" in split else ""
    model = projected(f"{constant} {nodes} q, k, v = Split {attribute} {FUSED.format('', '')}", opset=opset)
    done = run_pass(model, FuseProjections())
    assert (done.count("Attention"), done.count("Split"), done.declined) == (1, 0, ())
    assert_equivalent(model, done.model, random_feeds(model, sizes={"B": 2, "S": 5}), kind="reorder")


def everything(**parts: str) -> str:
    return " ".join({**BIASED, **parts}.values()) + " " + FUSED.format("", "")


@pytest.mark.parametrize(
    ("nodes", "how", "reason"),
    [
        (everything(k="k0 = MatMul (x, w) k = Add (k0, bk)"), {"inputs": ", float[3,4] w"}, "run time"),
        (everything(k="k0 = MatMul (x, Wk) k = Add (k0, b)"), {"inputs": ", float[4] b"}, "is a graph input"),
        (everything() + " z = Relu (k)", {"outputs": ", float[B,S,4] z"}, "also read elsewhere"),
        (everything(), {"outputs": ", float[B,S,4] k"}, "also a graph output"),
        (everything(q="q1 = MatMul (x, W6) q = Relu (q1)"), {"inputs": ", float[3,4] W6"}, None),
        (everything(q="z = Relu (x) q = MatMul (z, Wq)"), {}, None),
        (everything().replace("(q, k, v)", "(q, k, v, bq)"), {}, None),
        (everything().replace("v)", "v, , , , p, p)"), {"inputs": ", float[B,2,P,2] p"}, None),
    ],
)  # fmt: skip
def test_declined_or_left_alone(nodes: str, how: dict[str, Any], reason: str | None) -> None:
    done = run_pass(projected(nodes, **how), FuseProjections())
    assert done.changes == 0
    assert reason is None or reason in done.declined[0]
    assert reason is not None or done.declined == ()


@settings(derandomize=True, max_examples=20, deadline=None)
@given(st.data())
def test_after_fuse_attention(data: st.DataObject) -> None:
    """Products and their split come together from the spellings of exporters."""
    split = data.draw(st.sampled_from(["transposed", "twice", "gather", "slice", "split"]))
    scale, mask = (
        data.draw(st.sampled_from(["div", "queries", "before"])),
        data.draw(st.sampled_from(["", "bias"])),
    )
    choices: list[tuple[int | str, int | str]] = [
        ("batch", "sequence"),
        ("batch", 1),
        (3, "sequence"),
        (1, 6),
    ]
    sizes = data.draw(st.sampled_from(choices))
    scale = "div" if split in ("gather", "slice", "split") else scale
    model = onnx.shape_inference.infer_shapes(attention(split, scale, mask, opset=17, sizes=sizes))
    half = run_pass(model, FuseAttention(contrib=True))
    done = run_pass(dump(half.model), FuseProjections())
    assert (done.count("Attention"), done.count("MatMul"), done.declined) == (1, 0, ())
    assert_equivalent(
        model, done.model, random_feeds(model, sizes={"batch": 2, "sequence": 5}), kind="reorder"
    )
