"""fold-constants: what is folded, what is declined and why, and the numbers against the runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.graph import constant_array, constant_of
from onnxopt.ledger import Ledger
from onnxopt.passes.fold.fold_constants import FoldConstants
from onnxopt.structure import find_problem
from tests.support import Rewritten, assert_equivalent, run_pass, text_model

LARGE = FoldConstants(max_growth=1 << 20)


def inferred(text: str) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(text_model(text), data_prop=True)


def fold(text: str, one: FoldConstants = LARGE, *, infer: bool = True) -> Rewritten:
    """Run the pass and hold the result against the runtime."""
    model = inferred(text) if infer else text_model(text)
    after = run_pass(model, one)
    assert_equivalent(model, after.model, kind="reorder")
    return after


def test_a_chain_becomes_one_constant_where_it_is_read() -> None:
    after = fold("""g (float[2, 3] x) => (float[2, 2] y)
        <float[2, 3] w = {1, 2, 3, 4, 5, 6}, float s = {0.5}> {
        a = Mul(w, s) b = Transpose(a) c = Neg(b) y = MatMul(x, c) }""")
    assert after.op_types == ["MatMul"]
    assert after.changes == 1


def test_all_outputs_of_a_split_are_folded_together() -> None:
    after = fold(
        """g (float[2] x) => (float[2] y) <float[4] w = {1, 2, 3, 4}, int64[2] n = {2, 2}> {
        a, b = Split<axis=0>(w, n) c = Neg(b) d = Mul(x, a) y = Add(d, c) }""",
        FoldConstants(max_growth=0),
    )
    assert after.op_types == ["Mul", "Add"]


def test_a_constant_graph_output_is_given_by_a_constant_node() -> None:
    after = fold("""g (float[2] x) => (float[2] y, float[2] z) <float[2] w = {1, 2}> {
        a = Neg(w) z = Exp(a) y = Add(x, z) }""")
    assert after.op_types == ["Constant", "Add"]
    assert after.model.graph.outputs[1].name == "z"


def test_everything_constant_leaves_constant_nodes_only() -> None:
    after = fold("g (float[1] x) => (float[2] y) <float[2] w = {1, 2}> { a = Neg(w) y = Exp(a) }")
    assert after.op_types == ["Constant"]


def test_constants_go_into_the_branch_and_outer_ones_are_seen_there() -> None:
    after = fold("""g (float[2] x, bool c) => (float[2] y) <float[2] w = {1, 2}> {
        v = Neg(w)
        y = If(c) <then_branch = t () => (float[2] p) { q = Exp(v) p = Add(x, q) },
                   else_branch = e () => (float[2] r) { r = Abs(v) }> }""")
    assert sorted(after.op_types) == ["Add", "Constant", "If"]


def test_constants_of_functions_become_constant_nodes() -> None:
    text = """<ir_version: 10, opset_import: ["" : 17, "local" : 1]>
        g (float[2] x) => (float[2] y) { y = local.f(x) }
        <domain: "local", opset_import: ["" : 17]>
        f (a) => (b) { c = Constant<value_float = 2.0>() d = Sqrt(c) e = Neg(d) b = Mul(a, e) }"""
    model = text_model(text)
    after = run_pass(model, LARGE)
    assert_equivalent(model, after.model, kind="reorder")
    (function,) = after.model.functions.values()
    assert [node.op_type for node in function.graph] == ["Constant", "Mul"]


def test_an_attribute_set_by_the_caller_is_not_folded() -> None:
    text = """<ir_version: 10, opset_import: ["" : 17, "local" : 1]>
        g (float[2, 2] x) => (float[2, 2] y) { y = local.f<k = 1>(x) }
        <domain: "local", opset_import: ["" : 17]>
        f <k> (a) => (b) {
            c = Constant<value_floats = [2.0, 1.0]>() d = Softmax<axis: int = @k>(c) b = Mul(a, d) }"""
    after = run_pass(text_model(text), LARGE)
    assert after.declined == ("an attribute is set by the caller of the function",)


def test_below_ir_version_4_constants_are_nodes() -> None:
    model = text_model("""<ir_version: 3, opset_import: ["" : 9]>
        g (float[2] x) => (float[2] y) {
            w = Constant<value = float[2] {1.0, 2.0}>() a = Neg(w) y = Add(x, a) }""")
    after = run_pass(model, LARGE)
    assert_equivalent(model, after.model)
    assert after.op_types == ["Constant", "Add"]
    assert not after.model.graph.initializers


@pytest.mark.parametrize(
    ("body", "left", "reason"),
    [
        ("a = RandomNormalLike(w) y = Add(x, a)", 2, "it is random"),
        ("a = Bernoulli(w) y = Add(x, a)", 2, "it is random"),
        ("a, m = Dropout(w, s, t) y = Add(x, a)", 2, "it is random"),
        ("a = DequantizeLinear(q, s) y = Add(x, a)", 2, "it keeps a weight quantized"),
        (
            "a = QuantizeLinear(w, s) b = DequantizeLinear(a, s) y = Add(x, b)",
            3,
            "it keeps a weight quantized",
        ),
        ("a = Add(w, k) y = Add(x, a)", 2, "overridable; --freeze-initializers folds it"),
        ("a = Cast<to = 7>(n) b = Cast<to = 1>(a) y = Add(x, b)", 3, "outside the range"),
        (
            (
                "a = SequenceConstruct(w, w) b = ConcatFromSequence<axis = 0>(a) c = Slice(b, z, i)"
                " y = Add(x, c)"
            ),
            4,
            "no plain",
        ),
        ("a = com.acme.Op(w) y = Add(x, a)", 2, "domain 'com.acme'"),
        ("a = Softmax(w) y = Add(x, a)", 1, None),
    ],
)
def test_what_stays_says_why(body: str, left: int, reason: str | None) -> None:
    model = text_model(
        """<ir_version: 10, opset_import: ["" : 17, "com.acme" : 1]>
        g (float[2] x, float[2] k) => (float[2] y)
        <float[2] w = {1, 2}, float s = {0.5}, bool t = {1}, int8[2] q = {1, 2}, float[2] k = {3, 4},
         float[2] n = {1e30, 1}, int64[1] z = {0}, int64[1] i = {2}> { """
        + body
        + "}"
    )
    after = run_pass(model, LARGE)
    assert len(after.op_types) == left
    assert [reason in text for text in after.declined] == [True] if reason else not after.declined
    if "acme" not in body and reason != "it is random":
        assert_equivalent(model, after.model, kind="reorder")


def test_dropout_out_of_training_is_folded() -> None:
    after = fold("""g (float[2] x) => (float[2] y) <float[2] w = {1, 2}, float r = {0.5}, bool t = {0}> {
        a, m = Dropout(w, r, t) y = Add(x, a) }""")
    assert after.op_types == ["Add"]


def test_strings_and_conditions_are_left_alone() -> None:
    text = """g (float[2] x) => (float[2] y) <bool c = {1}> {
        y = If(c) <then_branch = t () => (float[2] p) { p = Neg(x) },
                   else_branch = e () => (float[2] q) { q = Abs(x) }> }"""
    after = fold(text)
    assert after.changes == 0
    assert after.declined == ()


@pytest.mark.parametrize("budget", [0, 2995, 2996])
def test_unpacking_a_weight_is_bound_by_the_budget_as_a_whole(budget: int) -> None:
    """1000 bytes of int8 and a scale of 4 become 4000 bytes of float32: 2996 more."""
    weight = ", ".join(["3"] * 1000)
    model = inferred(f"""g (float[10, 100] x) => (float[10, 10] y)
        <int8[100, 10] w = {{{weight}}}, float s = {{0.5}}> {{
        f = Cast<to = 1>(w) v = Mul(f, s) y = MatMul(x, v) }}""")
    after = run_pass(model, FoldConstants(max_growth=budget))
    assert after.op_types == (["MatMul"] if budget == 2996 else ["Cast", "Mul", "MatMul"])
    reason = f"it would add 3 kB to the model (max_growth={budget})"
    assert set(after.declined) == (set() if budget == 2996 else {reason})
    assert_equivalent(model, after.model, kind="reorder")


@pytest.mark.parametrize(
    "body",
    [
        "a = Expand(w, n)",
        "a = ConstantOfShape(n)",
        "r = Concat<axis = 0>(n, n) t = Slice(n, z, i) a = Expand(w, n)",
    ],
)
def test_blow_ups_stay(body: str) -> None:
    model = inferred(
        "g (float[1] x) => (float[300, 300] y)"
        "<float[1] w = {2}, int64[2] n = {300, 300}, int64[1] z = {0}, int64[1] i = {1}> { "
        + body
        + " y = Add(x, a) }"
    )
    after = run_pass(model, FoldConstants())
    assert "it would add 360 kB to the model (max_growth=4096)" in after.declined
    assert (
        sum(
            constant.nbytes
            for value in after.model.graph.initializers.values()
            if (constant := value.const_value)
        )
        < 100
    )


def test_a_blow_up_that_shrinks_again_is_folded() -> None:
    after = fold(
        """g (float[1] x) => (float[1] y) <int64[2] n = {300, 300}> {
        a = ConstantOfShape<value = float[1] {2.0}>(n) b = ReduceSum<keepdims = 0>(a) y = Add(x, b) }""",
        FoldConstants(),
    )
    assert after.op_types == ["Add"]


def test_what_is_too_large_to_make_is_never_made() -> None:
    model = inferred("""g (float[1] x) => (float[1] y) <int64[2] n = {1000000, 1000000}> {
        a = ConstantOfShape(n) b = ReduceSum<keepdims = 0>(a) y = Add(x, b) }""")
    assert run_pass(model, FoldConstants()).declined == ("the result would take 4,000,000 MB",)


def large_model(shared: bool) -> ir.Model:
    """y = x @ Transpose(w) with a weight of 2 MB that fails when it is read."""

    def read() -> ir.TensorProtocol:
        raise AssertionError("a weight was read to decide")

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 1024]))
    tensor = (
        ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape([512, 1024]))
        if shared
        else ir.tensor(np.ones((512, 1024), np.float32))
    )
    w = ir.Value(
        name="w", const_value=tensor, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([512, 1024])
    )
    turned = ir.node("Transpose", [w])
    product = ir.node("MatMul", [x, turned.outputs[0]])
    nodes = [turned, product, *([ir.node("Abs", [w])] if shared else [])]
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"v{number}"
    outputs = [node.outputs[0] for node in nodes[1:]]
    for value, shape in zip(outputs, ([1, 512], [512, 1024]), strict=False):
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=[w], opset_imports={"": 17}, name="g")
    return ir.Model(graph, ir_version=10)


def test_a_large_weight_is_moved_when_the_old_one_dies() -> None:
    model, ledger = large_model(shared=False), Ledger()
    FoldConstants(max_growth=0).apply(model, ledger)
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert find_problem(model, ledger.touched) is None


def test_a_large_shared_weight_is_not_read_to_decide() -> None:
    model, ledger = large_model(shared=True), Ledger()
    FoldConstants().apply(model, ledger)
    assert [node.op_type for node in model.graph] == ["Transpose", "MatMul", "Abs"]
    assert set(ledger.declined.values()) == {"it would add 2,097 kB to the model (max_growth=4096)"}


@pytest.mark.parametrize(
    ("shape", "attributes", "expected"),
    [
        ("2, 3, 4", "", [2, 3, 4]),
        ("n, 3, 4", "<start = 1>", [3, 4]),
        ("n, 3, 4", "<start = -1>", [4]),
        ("2, 3, m", "<end = -1>", [2, 3]),
        ("2, 3, 4", "<start = 2, end = 1>", []),
        ("n, 3, 4", "", None),
    ],
)
def test_shape_is_folded_where_its_dimensions_are_known(
    shape: str, attributes: str, expected: list[int] | None
) -> None:
    after = fold(
        f"g (float[{shape}] x) => (int64[k] y) <int64[1] o = {{0}}>"
        f"{{ s = Shape{attributes}(x) y = Concat<axis = 0>(s, o) }}"
    )
    if expected is None:
        assert after.op_types == ["Shape", "Concat"]
    else:
        assert after.op_types == ["Constant"]
        (value,) = after.model.graph.outputs
        array = constant_array(value)
        assert array is not None
        assert array.tolist() == [*expected, 0]


@pytest.mark.parametrize(
    "chain",
    [
        "a = Gather(s, two) c = Mul(a, two)",
        "a = Gather(s, scalar) c = Sub(scalar, a)",
        "a = Slice(s, two, three) b = Squeeze(a) c = Identity(b)",
        "a = Mul(s, pairs) c = Gather(a, two)",
        "d = Concat<axis = 0>(two, s) c = Gather(d, three)",
        "d = Cast<to = 6>(s) e = Cast<to = 7>(d) c = Gather(e, two)",
        "d, c = Split<axis = 0>(s, parts)",
        "d = Unsqueeze(s, zero) e = Transpose(d) f = Flatten(e) h = Reshape(f, minus) c = Gather(h, two)",
    ],
)
def test_the_known_part_of_a_shape_is_followed(chain: str) -> None:
    after = fold(f"""g (float[n, m, 5] x) => (float[n, m, 5] y)
        <int64[1] two = {{2}}, int64[1] three = {{3}},
         int64[3] pairs = {{2, 2, 3}}, int64[2] parts = {{2, 1}},
         int64[1] zero = {{0}}, int64[1] minus = {{-1}}, int64 scalar = {{2}}> {{
        s = Shape(x) {chain} f1 = Cast<to = 1>(c) y = Add(x, f1) }}""")
    assert after.op_types == ["Add"]


def test_an_unknown_dimension_is_never_made_up() -> None:
    after = fold("""g (float[n, 3] x) => (int64[1] y, int64[1] z) <int64[1] zero = {0}, int64[1] one = {1}> {
        s = Shape(x) a = Gather(s, zero) y = Mul(a, zero)
        b = Gather(s, one) c = Add(a, b) z = Identity(c) }""")
    assert after.count("Shape") == 1
    assert after.count("Mul") == 1
    assert constant_of(after.model.graph.outputs[1]) is None


def test_a_split_of_what_is_known_in_part_stays() -> None:
    after = fold("""g (float[n, 3] x) => (int64[1] y, int64[1] z)
        <int64[1] seven = {7}, int64[3] ones = {1, 1, 1}> {
        s = Shape(x) t = Concat<axis = 0>(s, seven) y, c, z = Split(t, ones) }""")
    assert after.op_types == ["Shape", "Concat", "Split"]


def test_size_needs_every_dimension() -> None:
    assert fold("g (float[2, 3] x) => (int64 y) { y = Size(x) }").op_types == ["Constant"]
    assert fold("g (float[n, 3] x) => (int64 y) { y = Size(x) }").op_types == ["Size"]


def test_a_folded_shape_reaches_the_nodes_behind_it_in_the_same_round() -> None:
    model = text_model("""g (float[2, 3, 4] x) => (float[c, d] y)
        <int64[1] zero = {0}, int64[1] minus = {-1}> {
        s = Shape(x) a = Gather(s, zero) t = Concat<axis = 0>(a, minus) r = Reshape(x, t) n = Neg(r)
        p = Shape(n) q = Slice(p, zero, a) y = Reshape(n, q) }""")
    graph, ledger = ir.from_proto(model), Ledger()
    FoldConstants().apply(graph, ledger)
    assert [node.op_type for node in graph.graph] == ["Reshape", "Neg", "Reshape"]
    assert_equivalent(model, graph)


def test_shapes_of_what_a_loop_carries_are_not_relied_on() -> None:
    text = """g (float[k] x, int64 n) => (float[m] y) <bool c = {1}> {
        y = Loop(n, c, x) <body = b (int64 i, bool d, float[1] s) => (bool e, float[p] t) {
            e = Identity(d) h = Shape(s) f = Cast<to = 1>(h) t = Concat<axis = 0>(s, f) }> }"""
    model = text_model(text)
    after = run_pass(model, LARGE)
    assert after.count("Shape") == 1
    assert_equivalent(model, after.model, {"x": np.ones(1, np.float32), "n": np.array(3)})


def test_the_shape_of_an_overridable_initializer_is_known_its_value_is_not() -> None:
    after = fold("""g (float[4] x, float[4] k) => (float[4] y) <float[4] k = {4, 4, 4, 4}> {
        s = Shape(k) r = Reshape(x, s) y = Add(r, k) }""")
    assert after.op_types == ["Reshape", "Add"]


def test_a_rewrite_that_is_left_out_leaves_what_it_is_made_from_foldable() -> None:
    graph = ir.from_proto(
        inferred(
            "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { a = Neg(w) b = Exp(a) y = Add(x, b) }"
        )
    )
    first = Ledger(pass_name="fold-constants")
    FoldConstants().apply(graph.clone(), first)
    second = Ledger(left_out=frozenset(first.granted), pass_name="fold-constants")
    FoldConstants().apply(graph, second)
    assert [node.op_type for node in graph.graph] == ["Exp", "Add"]
    assert [rewrite.site for rewrite in second.granted] == ["a"]


def test_a_limit_stops_between_valid_models() -> None:
    model = inferred("""g (float[2, 3] x) => (float[2, 3] y, float[2] z)
        <float[3] w = {1, 2, 3}, int64[1] one = {1}> {
        a = Neg(w) b = Add(x, a) c = Abs(w) d = Mul(b, c) z = ReduceSum<keepdims = 0>(d, one)
        s = Shape(x) y = Expand(b, s) }""")
    for limit in range(4):
        graph, ledger = ir.from_proto(model), Ledger(limit=limit)
        FoldConstants().apply(graph, ledger)
        assert len(ledger.granted) == limit
        assert find_problem(graph, ledger.touched) is None
        assert_equivalent(model, graph)


def test_a_long_chain_takes_linear_time_and_no_recursion() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    w = ir.Value(name="w", const_value=ir.tensor(np.ones(1, np.float32)))
    nodes, last = [], w
    for number in range(5000):
        nodes.append(ir.node("Neg", [last]))
        last = nodes[-1].outputs[0]
        last.name = f"v{number}"
    nodes.append(ir.node("Add", [x, last]))
    nodes[-1].outputs[0].name = "y"
    graph = ir.Graph([x], nodes[-1].outputs, nodes=nodes, initializers=[w], opset_imports={"": 17}, name="g")
    FoldConstants().apply(ir.Model(graph, ir_version=10), ledger := Ledger())
    assert len(graph) == 1
    assert len(ledger.granted) == 1


UNARY = ["Neg", "Abs", "Relu", "Tanh", "Exp", "Sigmoid", "Floor", "Identity"]
BINARY = ["Add", "Sub", "Mul", "Max", "Min"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_random_graphs_keep_their_numbers(data: st.DataObject) -> None:
    """DAGs of float nodes over constants and one input, with shape arithmetic mixed in."""
    values, lines = ["x", "w", "v"], []
    for number in range(data.draw(st.integers(2, 14))):
        kind = data.draw(st.sampled_from(["unary", "binary", "reduce", "clip", "shape", "split"]))
        pick = [data.draw(st.sampled_from(values)) for _ in range(2)]
        name = f"t{number}"
        if kind == "unary":
            lines.append(f"{name} = {data.draw(st.sampled_from(UNARY))}({pick[0]})")
        elif kind == "binary":
            lines.append(f"{name} = {data.draw(st.sampled_from(BINARY))}({pick[0]}, {pick[1]})")
        elif kind == "reduce":
            lines.append(f"{name} = ReduceMean<axes = [{data.draw(st.integers(-2, 1))}]>({pick[0]})")
        elif kind == "clip":
            lines.append(f"{name}a = Clip({pick[0]}, low, high) {name} = Add({name}a, {pick[1]})")
        elif kind == "split":
            whole = data.draw(st.sampled_from(["x", "w", "v"]))
            lines.append(f"{name}a, {name}b = Split<axis = -1>({whole}, halves)")
            lines.append(f"{name} = Concat<axis = -1>({name}b, {name}a)")
        else:
            lines.append(
                f"{name}a = Shape({pick[0]}) {name}b = Expand({pick[1]}, {name}a) {name} = Neg({name}b)"
            )
        values.append(name)
    outputs, rows = values[-3:], data.draw(st.sampled_from(["2", "n"]))
    model = inferred(
        f"g (float[{rows}, 4] x) => (float[a, b] o0, float[c, d] o1, float[e, f] o2)"
        "<float[2, 4] w = {1, -2, 3, 4, -5, 6, 0.5, 8}, float[1, 4] v = {0.25, 2, -1, 0.5},"
        " float low = {-1}, float high = {2}, int64[2] halves = {2, 2}> {"
        + " ".join(lines)
        + " ".join(f" o{i} = Identity({name})" for i, name in enumerate(outputs))
        + "}"
    )
    after = run_pass(model, FoldConstants())
    assert_equivalent(model, after.model, kind="reorder")


def slices(kept: str) -> onnx.ModelProto:
    """Four readers of four slices of a weight of 8 kB; `kept` reads the weight itself."""
    weight = ", ".join(["3"] * 2048)
    lines = [f"s{i} = Slice(w, i{i}, i{i + 1}) y{i} = Add(x, s{i})" for i in range(4)]
    numbers = ", ".join(f"int64[1] i{i} = {{{i}}}" for i in range(5))
    outputs = ", ".join(f"float[1, 512] y{i}" for i in range(4))
    return inferred(
        f"g (float[1, 512] x) => ({outputs}, float[4, 512] z) <float[4, 512] w = {{{weight}}},"
        f" int64[2] n = {{4, 512}}, {numbers}> {{ " + " ".join(lines) + f" {kept} }}"
    )


def test_slices_of_one_weight_are_judged_together() -> None:
    model = slices("z = Expand(x, n)")
    after = run_pass(model, FoldConstants(max_growth=1000))
    assert after.op_types == ["Add"] * 4 + ["Expand"]
    assert after.declined == ()
    assert_equivalent(model, after.model)


def test_slices_of_a_weight_that_stays_are_not_stored_beside_it() -> None:
    model = slices("z = Add(x, w)")
    after = run_pass(model, FoldConstants(max_growth=1000))
    assert after.count("Slice") == 4
    assert set(after.declined) == {"it would add 2 kB to the model (max_growth=1000)"}


def test_folds_that_are_judged_together_are_granted_one_by_one() -> None:
    model = slices("z = Expand(x, n)")
    for limit in range(5):
        graph, ledger = ir.from_proto(model), Ledger(limit=limit)
        FoldConstants(max_growth=1000).apply(graph, ledger)
        assert len(ledger.granted) == limit
        assert find_problem(graph, ledger.touched) is None
        assert_equivalent(model, graph)
