"""fuse-cache against the runtime."""

from __future__ import annotations

import onnx
import pytest

from onnxopt.passes.fuse.fuse_cache import FuseCache
from tests.support import assert_equivalent, random_feeds, run_pass, text_model

GROWN = "keys = Concat <axis = {axis}> (pk, k) values = Concat <axis = 2> (pv, v)"


def cached(nodes: str, *, inputs: str = "", outputs: str = "", opset: int = 23) -> onnx.ModelProto:
    return text_model(
        f"""<ir_version: 10, opset_import: ["" : {opset}]>
        agraph (float[B,6,S,4] q, float[B,KV,P,4] pk, float[B,KV,P,5] pv, float[B,KV,S,4] k,
            float[B,KV,S,5] v{inputs}) => (float[B,6,S,5] y{outputs}) {{ {nodes} }}"""
    )


PRESENT = ", float[B,KV,T,4] keys, float[B,KV,T,5] values"


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("outputs", ["", PRESENT])
@pytest.mark.parametrize("mask", ["", ", mask"])
@pytest.mark.parametrize("axis", [2, -2])
def test_the_cache_grows_inside(axis: int, mask: str, outputs: str, opset: int) -> None:
    nodes = f"{GROWN.format(axis=axis)} y = Attention <scale = 0.3> (q, keys, values{mask})"
    model = cached(nodes, inputs=mask and ", float[B,1,S,T] mask", outputs=outputs, opset=opset)
    done = run_pass(model, FuseCache())
    assert (done.op_types, done.declined) == (["Attention"], ())
    for past, length, heads in ((3, 2, 2), (0, 4, 3), (5, 1, 6)):
        sizes = {"B": 2, "KV": heads, "P": past, "S": length, "T": past + length}
        assert_equivalent(model, done.model, random_feeds(model, sizes=sizes), kind="exact")


@pytest.mark.parametrize(
    ("nodes", "outputs", "reason"),
    [
        (f"{GROWN} y = Attention <is_causal = 1> (q, keys, values)", "", "it is causal"),
        (
            GROWN.replace("pv, v", "v, pv") + " y = Attention (q, keys, values)",
            "",
            "known to be as many",
        ),
        (f"{GROWN} y = Attention (q, keys, values) z = Relu (keys)", ", float[A,C,D,E] z", "read elsewhere"),
        (f"{GROWN} z = Shape (values) y = Attention (q, keys, values)", ", int64[4] z", "read elsewhere"),
    ],
)
def test_declined(nodes: str, outputs: str, reason: str) -> None:
    done = run_pass(cached(nodes.format(axis=2), outputs=outputs), FuseCache())
    assert done.changes == 0
    assert reason in done.declined[0]


def test_heads_in_one_axis_are_declined() -> None:
    model = text_model(
        """<ir_version: 10, opset_import: ["" : 23]>
        agraph (float[B,S,8] q, float[B,P,8] pk, float[B,S,8] k) => (float[B,S,8] y) {
            keys = Concat <axis = -2> (pk, k)
            values = Concat <axis = -2> (pk, k)
            y = Attention <q_num_heads = 2, kv_num_heads = 2> (q, keys, values)
        }"""
    )
    assert run_pass(model, FuseCache()).declined == ("heads are not apart, as they are in a cache",)


@pytest.mark.parametrize(
    "nodes",
    [
        f"{GROWN} y = Attention (q, keys, v)",
        "keys = Concat <axis = 1> (pk, k) values = Concat <axis = 1> (pv, v) y = Attention (q, keys, values)",
        f"{GROWN.replace(', k)', ', k, k)')} y = Attention (q, keys, values)",
        f"{GROWN} y, a, b = Attention (q, keys, values, , pk, pv)",
    ],
)
def test_what_is_no_cache_stays(nodes: str) -> None:
    done = run_pass(cached(nodes.format(axis=2)), FuseCache())
    assert (done.changes, done.declined) == (0, ())
