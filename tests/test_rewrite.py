"""Edits and the driver: names, graph outputs, dead nodes, subgraphs, functions, linear time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxopt.ledger
import onnxopt.rewrite
import onnxopt.structure
from models.scale import chain
from onnxopt.graph import nodes, roots, walk
from onnxopt.index import Index, operator_of
from onnxopt.ledger import Ledger
from onnxopt.model import load, opener
from onnxopt.passes.eliminate.eliminate_identity import EliminateIdentity
from onnxopt.recipe import load_recipe
from onnxopt.rewrite import Declined, Edit, Rule, drive
from onnxopt.scope import Scope, scopes
from onnxopt.structure import find_problem
from tests.random_graphs import random_model
from tests.support import assert_equivalent, text_model


def first_scope(model: ir.Model) -> Scope:
    return next(scopes(model))


def node_of(model: ir.Model, output: str) -> ir.Node:
    return next(node for node in nodes(model) if node.outputs[0].name == output)


def test_a_new_value_takes_the_name_of_the_one_it_replaces() -> None:
    model = load(text_model("agraph (float[2] x) => (float[2] z) { y = Neg(x)\n z = Relu(y) }"))
    edit = Edit(node_of(model, "y"), first_scope(model))
    minus = edit.constant(np.array(-1, np.float32), "y")
    edit.replace(node_of(model, "y").outputs[0], edit.op("Mul", [model.graph.inputs[0], minus]))
    edit.commit()
    assert [(node.op_type, node.outputs[0].name) for node in model.graph] == [("Mul", "y"), ("Relu", "z")]
    assert list(model.graph.initializers) == ["y_1"]
    assert find_problem(model, list(model.graph)) is None


def test_nothing_changes_before_commit() -> None:
    model = load(text_model("agraph (float[2] x) => (float[2] z) { y = Neg(x)\n z = Relu(y) }"))
    source, scope = model.graph.inputs[0], first_scope(model)
    before = len(source.uses())
    edit = Edit(node_of(model, "y"), scope)
    edit.op("Mul", [source, edit.constant(np.array([1], np.float32), "one")])
    assert len(source.uses()) == before
    assert not model.graph.initializers
    assert scope.fresh("one") == "one"


def test_a_graph_output_keeps_name_type_and_shape() -> None:
    proto = text_model("agraph (float[N] x) => (float[N] z) { y = Neg(x)\n z = Identity(y) }")
    model = load(proto)
    node = node_of(model, "z")
    source = node.inputs[0]
    assert source is not None
    Edit(node, first_scope(model)).replace(node.outputs[0], source).commit()
    assert [node.op_type for node in model.graph] == ["Neg"]
    assert str(model.graph.outputs[0].shape) == "[N]"
    assert_equivalent(proto, model)


@pytest.mark.parametrize(
    "body",
    [
        "z = Identity(x)",
        "y = Neg(x)\n z = Identity(y)\n w = Identity(y)",
    ],
)
def test_a_graph_output_that_could_not_keep_its_name_is_declined(body: str) -> None:
    outputs = "float[2] z, float[2] w" if "w =" in body else "float[2] z"
    model = load(text_model(f"agraph (float[2] x) => ({outputs}) {{ {body} }}"))
    scope = first_scope(model)
    reasons = []
    for name in ("z", "w")[: len(model.graph.outputs)]:
        node = node_of(model, name)
        source = node.inputs[0]
        assert source is not None
        edit = Edit(node, scope).replace(node.outputs[0], source)
        try:
            edit.check()
            edit.commit()
        except Declined as reason:
            reasons.append(str(reason))
    assert len(reasons) == 1
    assert "graph output" in reasons[0]
    assert [value.name for value in model.graph.outputs] == ["z", "w"][: len(model.graph.outputs)]


def test_nodes_above_that_nobody_reads_go_too_and_others_stay() -> None:
    text = """agraph (float[2] x) => (float[2] z, float[2] b) {
        a = Abs(x)
        b = Neg(a)
        c = Exp(b)
        d = Log(c)
        z = Relu(d)
    }"""
    model = load(text_model(text))
    edit = Edit(node_of(model, "z"), first_scope(model))
    edit.replace(model.graph.outputs[0], edit.op("Relu", [model.graph.inputs[0]])).commit()
    assert [node.op_type for node in model.graph] == ["Abs", "Neg", "Relu"]


@pytest.mark.parametrize("ir_version", [3, 4, 10])
def test_constants_are_initializers_where_the_format_lets_them(ir_version: int) -> None:
    head = f'<ir_version: {ir_version}, opset_import: ["" : 9]>'
    proto = text_model(head + "agraph (float[2] x) => (float[2] z) { z = Neg(x) }")
    model = load(proto)
    edit = Edit(model.graph[0], first_scope(model))
    minus = edit.constant(np.array(-1, np.float32), "minus")
    edit.replace(model.graph.outputs[0], edit.op("Mul", [model.graph.inputs[0], minus])).commit()
    assert [node.op_type for node in model.graph] == (["Constant", "Mul"] if ir_version < 4 else ["Mul"])
    assert_equivalent(proto, model)


NEG_TO_MUL = Rule(
    "Neg",
    ("Neg",),
    lambda node, scope: (edit := Edit(node, scope)).replace(
        node.outputs[0], edit.op("Mul", [*node.inputs, edit.constant(np.array(-1, np.float32), "minus")])
    ),
)


def test_the_driver_reaches_branches_and_functions() -> None:
    text = """<ir_version: 10, opset_import: ["" : 17, "local" : 1]>
    agraph (bool c, float[2] x) => (float[2] z) {
        y = local.f(x)
        z = If(c) <
            then_branch = t () => (float[2] p) { p = Neg(y) },
            else_branch = e () => (float[2] q) { q = Abs(y) }
        >
    }
    <domain: "local", opset_import: ["" : 17]>
    f (a) => (b) { b = Neg(a) }
    """
    proto = text_model(text)
    model = load(proto)
    ledger = Ledger(pass_name="test")
    drive(model, (NEG_TO_MUL,), ledger)
    assert [rewrite.site for rewrite in ledger.granted] == ["p", "b"]
    assert "Neg" not in [node.op_type for node in nodes(model)]
    (function,) = model.functions.values()
    assert [node.op_type for node in function] == ["Constant", "Mul"]
    assert find_problem(model, ledger.touched) is None
    for flag in (True, False):
        assert_equivalent(proto, model, {"c": np.array(flag), "x": np.array([1, -2], np.float32)})


def long_chain(length: int) -> ir.Model:
    source = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    graph = ir.Graph([source], [], nodes=[], opset_imports={"": 17}, name="chain")
    value = source
    for _ in range(length):
        node = ir.Node("", "Neg", [value])
        graph.append(node)
        value = node.outputs[0]
    value.type, value.shape = source.type, source.shape
    graph.outputs.append(value)
    return ir.Model(graph, ir_version=10)


def test_the_driver_looks_at_each_node_a_few_times_however_many_there_are() -> None:
    def looks(length: int) -> int:
        seen = 0

        def apply(node: ir.Node, scope: Scope) -> Edit | None:
            nonlocal seen
            seen += 1
            return NEG_TO_MUL.apply(node, scope)

        ledger = Ledger(pass_name="test")
        drive(long_chain(length), (Rule("Neg to Mul", NEG_TO_MUL.op_types, apply),), ledger)
        assert len(ledger.granted) == length
        return seen

    assert looks(4000) <= 10 * looks(400)
    assert looks(400) <= 3 * 400


@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 12))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_index_has_all_nodes_of_an_operator_in_order(seed: int, steps: int) -> None:
    model = load(random_model(seed, steps).proto)
    index = Ledger().index(model)
    operators = sorted({operator_of(node) for node in nodes(model)})
    for root in roots(model):
        for wanted in (operators[::2], operators[1::2], operators[:1], ["Nothing"]):
            assert index.find(root, wanted) == [node for node in walk(root) if operator_of(node) in wanted]


def test_passes_share_the_index_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[ir.Model] = []

    def build(model: ir.Model) -> Index:
        built.append(model)
        return Index(model)

    monkeypatch.setattr(onnxopt.ledger, "Index", build)
    model, ledger = long_chain(3), Ledger(pass_name="test")
    idle = Rule("Relu", ("Relu",), lambda node, scope: None)
    for _ in range(5):
        drive(model, (idle,), ledger)
    assert len(built) == 1
    drive(model, (NEG_TO_MUL,), ledger)
    assert len(built) == 1
    drive(model, (idle,), ledger)
    assert len(built) == 2
    found = ledger.index(model).find(model.graph, ("Mul", "Neg"))
    assert [node.op_type for node in found] == ["Mul"] * 3
    other = long_chain(1)
    assert len(ledger.index(other).find(other.graph, ("Neg",))) == 1


def test_what_thousands_read_is_not_listed_for_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = 0
    uses = ir.Value.uses

    def counted(value: ir.Value) -> Collection[object]:
        nonlocal listed
        listed += len(uses(value))
        return uses(value)

    monkeypatch.setattr(ir.Value, "uses", counted)
    growth = []
    for readers in (50, 200):
        names = [f"a{number}" for number in range(readers)]
        lines = "\n".join(f"i{name} = Identity(r)\n {name} = Neg(i{name})" for name in names)
        text = (
            f"agraph (float[2] x) => (float[2] y) {{ r = Relu(x)\n {lines}\n y = Sum({', '.join(names)}) }}"
        )
        model, listed = load(text_model(text)), 0
        ledger = Ledger(pass_name="eliminate-identity")
        EliminateIdentity().apply(model, ledger)
        assert len(ledger.granted) == readers
        growth.append(listed)
    assert growth[1] <= 4 * growth[0]


def test_visits_and_questions_grow_with_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of repeated layers: each node is looked at as often in a long one as in a short one."""
    counts: Counter[str] = Counter()

    def counted(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: object, **options: object) -> object:
            counts[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(owner, name, call)

    counted(onnxopt.rewrite, "visit")
    counted(onnxopt.structure, "_node_problem")
    counted(onnxopt.ledger, "Index")
    found = []
    for length in (100, 400):
        counts.clear()
        load_recipe("default").run(opener(chain(length)))
        found.append(dict(counts))
    short, long = found
    assert long["Index"] == short["Index"]
    for name in ("visit", "_node_problem"):
        assert 0 < long[name] <= 4.1 * short[name]


def test_only_nodes_of_the_rules_operators_are_looked_at() -> None:
    model, seen = long_chain(10), []
    model.graph.append(last := ir.Node("", "Relu", [model.graph.outputs[0]]))
    model.graph.outputs[0] = last.outputs[0]
    drive(model, (Rule("any", ("Relu", "Exp"), lambda node, scope: seen.append(node)),), Ledger())
    assert seen == [last]


def test_a_node_that_stays_for_its_other_output_shares_no_name() -> None:
    text = """agraph (float[4] x) => (float[2] v, int64[2] i) <int64[1] k = {2}> {
        [top] a, b = TopK(x, k)
        v = Neg(a)
        i = Identity(b)
    }"""
    proto = text_model(text)
    model = load(proto)
    node = node_of(model, "a")
    edit = Edit(node, first_scope(model))
    edit.replace(
        node.outputs[0],
        edit.op("Slice", [node.inputs[0], *(edit.constant(np.array([n]), "n") for n in (0, 2))]),
    )
    edit.commit()
    assert node.graph is model.graph
    names = [n.name for n in model.graph if n.name]
    assert len(names) == len(set(names))
    assert find_problem(model, list(model.graph)) is None
    assert [node.outputs[0].name for node in model.graph][:2] == ["a", "unused"]
