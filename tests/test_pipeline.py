"""The pipeline: fixed point, steps, and the search for the one rewrite that breaks the model."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxopt.claims import Kind, Pass
from onnxopt.errors import UsageError
from onnxopt.ledger import Ledger, Rewrite, site_of
from onnxopt.model import opener
from onnxopt.passes.eliminate.eliminate_dead import EliminateDead
from onnxopt.passes.eliminate.eliminate_identity import EliminateIdentity
from onnxopt.pipeline import Pipeline
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope
from tests.support import assert_equivalent, execute, random_feeds, text_model

CHAIN = """
agraph (float[2,3] x) => (float[2,3] y) {
    a = Relu(x)
    b = Neg(a)
    c = Identity(b)
    d = Neg(c)
    e = Relu(d)
    y = Neg(e)
}
"""


def neg_to(op_type: str, only: str | None = None) -> Callable[[ir.Node, Scope], Edit | None]:
    def apply(node: ir.Node, scope: Scope) -> Edit | None:
        if only is not None and node.outputs[0].name != only:
            return None
        edit = Edit(node, scope)
        return edit.replace(node.outputs[0], edit.op(op_type, node.inputs))

    return apply


@dataclass(frozen=True)
class NegToMinusX(Pass):
    """Right everywhere but at `wrong`, where Neg becomes Abs."""

    name = "neg-to-minus"
    wrong: str = "d"

    def rules(self) -> Sequence[Rule]:
        def apply(node: ir.Node, scope: Scope) -> Edit | None:
            edit = Edit(node, scope)
            if node.outputs[0].name == self.wrong:
                return edit.replace(node.outputs[0], edit.op("Floor", node.inputs))
            minus = edit.constant(np.array(-1, np.float32), "minus")
            return edit.replace(node.outputs[0], edit.op("Mul", [*node.inputs, minus]))

        return (Rule("Neg", ("Neg",), apply),)


def prove_by_running(
    feeds: dict[str, np.ndarray], want: list[np.ndarray]
) -> Callable[[ir.Model, Kind], str | None]:
    def prove(model: ir.Model, kind: Kind) -> str | None:
        have = execute(model, feeds)
        return (
            None if all(np.array_equal(a, b) for a, b in zip(want, have, strict=True)) else "numbers differ"
        )

    return prove


@pytest.fixture(name="proof")
def make_proof() -> Callable[[ir.Model, Kind], str | None]:
    proto = text_model(CHAIN)
    feeds = random_feeds(proto)
    return prove_by_running(feeds, execute(proto, feeds))


def test_runs_to_a_fixed_point_and_tallies_each_pass() -> None:
    proto = text_model(CHAIN)
    outcome = Pipeline((EliminateIdentity(),)).run(opener(proto))
    (step,) = outcome.steps
    assert (step.name, step.changes, step.nodes, step.bytes) == ("eliminate-identity", 1, -1, 0)
    assert outcome.settled
    assert outcome.rounds == 2
    assert_equivalent(proto, outcome.model)


def test_a_wrong_rewrite_is_found_left_out_named_and_the_rest_goes_on(
    proof: Callable[[ir.Model, Kind], str | None],
) -> None:
    pipeline = Pipeline((NegToMinusX(), EliminateIdentity()))
    outcome = pipeline.run(opener(text_model(CHAIN)), prove=proof)
    (left,) = outcome.left_out
    assert left.rewrite == Rewrite("neg-to-minus", "Neg", "d")
    assert left.reason == "numbers differ"
    assert str(left.rewrite) == "neg-to-minus: Neg at 'd'"
    assert [step.changes for step in outcome.steps] == [2, 1]
    assert [node.op_type for node in outcome.model.graph] == ["Relu", "Mul", "Neg", "Relu", "Mul"]
    assert_equivalent(text_model(CHAIN), outcome.model)


@dataclass(frozen=True)
class Raises(Pass):
    """Raises in the middle of a change, or before any."""

    name = "raises"
    claims: bool = True

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        for node in list(model.graph):
            if node.op_type == "Neg" and self.claims and ledger.claim("Neg", node.outputs[0].name or ""):
                node.op_type = "Abs"
                raise RuntimeError("lost")
        if not self.claims:
            model.graph.outputs.clear()
            raise RuntimeError("lost")


def test_a_pass_that_raises_is_undone_rewrite_by_rewrite() -> None:
    outcome = Pipeline((Raises(), EliminateIdentity())).run(opener(text_model(CHAIN)))
    assert [left.rewrite.site for left in outcome.left_out] == ["b", "d", "y"]
    assert all(left.reason == "RuntimeError: lost" for left in outcome.left_out)
    assert [node.op_type for node in outcome.model.graph] == ["Relu", "Neg", "Neg", "Relu", "Neg"]


def test_a_pass_that_raises_without_a_claim_is_left_out_whole() -> None:
    outcome = Pipeline((Raises(claims=False), EliminateIdentity())).run(opener(text_model(CHAIN)))
    assert [str(left.rewrite) for left in outcome.left_out] == ["raises: the whole pass"]
    assert len(outcome.model.graph) == 5
    assert_equivalent(text_model(CHAIN), outcome.model)


@dataclass(frozen=True)
class Useless(Pass):
    """Has an option that this model has no use for."""

    name = "useless"

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        raise UsageError("useless: there is nothing to choose from")


def test_an_option_that_is_of_no_use_is_the_users_to_change() -> None:
    with pytest.raises(UsageError, match="nothing to choose from"):
        Pipeline((Useless(),)).run(opener(text_model(CHAIN)))


def break_order(model: ir.Model) -> None:
    first = model.graph[0]
    model.graph.remove(first)
    model.graph.append(first)


def break_output_name(model: ir.Model) -> None:
    model.graph.outputs[0].name = "z"


def break_type(model: ir.Model) -> None:
    model.graph[1].outputs[0].dtype = ir.DataType.DOUBLE


def break_schema(model: ir.Model) -> None:
    model.graph[1].op_type = "Conv"


def break_input(model: ir.Model) -> None:
    model.graph[3].replace_input_with(0, ir.Value(name="nowhere"))


def break_name(model: ir.Model) -> None:
    model.graph[1].outputs[0].name = "a"


@pytest.mark.parametrize(
    ("wreck", "complaint"),
    [
        (break_order, "which nothing before it defines"),
        (break_output_name, "graph inputs or outputs changed"),
        (break_type, "DOUBLE on record, FLOAT by its operator"),
        (break_schema, "Conv"),
        (break_input, "reads 'nowhere'"),
        (break_name, "two values are named 'a'"),
    ],
)
def test_broken_structure_is_caught_after_the_pass(wreck: Callable[[ir.Model], None], complaint: str) -> None:
    class Breaks(Pass):
        name = "breaks"

        def apply(self, model: ir.Model, ledger: Ledger) -> None:
            if ledger.claim("good", "first"):
                ledger.touch([model.graph[0]])
            if ledger.claim("bad", "second"):
                node = model.graph[1]
                node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([2, 3])
                node.inputs[0].dtype = ir.DataType.FLOAT  # type: ignore[union-attr]
                ledger.touch([node])
                wreck(model)

    outcome = Pipeline((Breaks(), EliminateIdentity()), rounds=2).run(opener(text_model(CHAIN)))
    (left,) = outcome.left_out
    assert left.rewrite == Rewrite("breaks", "bad", "second")
    assert complaint in left.reason
    assert_equivalent(text_model(CHAIN), outcome.model)


def test_stop_after_makes_that_many_rewrites() -> None:
    pipeline = Pipeline((NegToMinusX(wrong=""), EliminateIdentity()))
    for limit in range(5):
        outcome = pipeline.run(opener(text_model(CHAIN)), stop_after=limit)
        assert outcome.changes == limit
        assert_equivalent(text_model(CHAIN), outcome.model)


class PlainWrong(ir.passes.InPlacePass):
    """A plain onnx_ir pass that turns each Neg into Abs."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in model.graph if node.op_type == "Neg"]
        for node in found:
            node.op_type = "Abs"
        return ir.passes.PassResult(model, bool(found))


def test_plain_onnx_ir_passes_run_and_count_as_one_rewrite(
    proof: Callable[[ir.Model, Kind], str | None],
) -> None:
    dead = CHAIN.replace("y = Neg(e)", "unused = Abs(e)\n    y = Neg(e)")
    outcome = Pipeline((RemoveUnusedNodesPass(), PlainWrong())).run(opener(text_model(dead)), prove=proof)
    assert [step.changes for step in outcome.steps] == [1, 0]
    assert [str(left.rewrite) for left in outcome.left_out] == ["PlainWrong: the whole pass"]
    assert outcome.steps[0].name == "RemoveUnusedNodesPass"
    assert_equivalent(text_model(CHAIN), outcome.model)


def test_a_pass_that_never_settles_is_stopped(proof: Callable[[ir.Model, Kind], str | None]) -> None:
    class Turns(Pass):
        name = "turns"

        def rules(self) -> Sequence[Rule]:
            return (
                Rule("to Abs", ("Neg",), neg_to("Abs")),
                Rule("to Neg", ("Abs",), neg_to("Neg")),
            )

    outcome = Pipeline((Turns(), EliminateIdentity())).run(opener(text_model(CHAIN)), prove=proof)
    assert "keeps rewriting" in outcome.left_out[0].reason
    assert outcome.steps[1].changes == 1
    assert_equivalent(text_model(CHAIN), outcome.model)


def test_the_round_limit_is_reported() -> None:
    class Grows(Pass):
        name = "grows"

        def apply(self, model: ir.Model, ledger: Ledger) -> None:
            if ledger.claim("grow", str(len(model.graph))):
                model.graph.insert_before(model.graph[0], ir.Node("", "Relu", [model.graph.inputs[0]]))

    outcome = Pipeline((Grows(),), rounds=3).run(opener(text_model(CHAIN)))
    assert not outcome.settled
    assert outcome.rounds == 3
    assert outcome.changes == 3


def test_declined_reasons_name_their_places() -> None:
    class Declines(Pass):
        name = "declines"

        def rules(self) -> Sequence[Rule]:
            def apply(node: ir.Node, scope: Scope) -> Edit | None:
                raise Declined("not today")

            return (Rule("Relu", ("Relu",), apply),)

    outcome = Pipeline((Declines(),)).run(opener(text_model(CHAIN)))
    assert outcome.steps[0].declined == {"not today": ("a", "e")}
    assert outcome.changes == 0


def test_the_weakest_promise_of_the_passes_that_changed_something_is_asked_for() -> None:
    class Reorders(NegToMinusX):
        name = "reorders"
        kind = "reorder"

    seen: list[Kind] = []

    def note(model: ir.Model, kind: Kind) -> str | None:
        seen.append(kind)
        return None

    Pipeline((EliminateIdentity(), Reorders(wrong=""))).run(opener(text_model(CHAIN)), prove=note)
    Pipeline((EliminateIdentity(),)).run(opener(text_model(CHAIN)), prove=note)
    assert seen == ["reorder", "exact"]


@dataclass(frozen=True)
class AtSites(Pass):
    """Rewrites every Neg to x * -1; at some sites it computes something else, breaks the graph, or raises."""

    name = "at-sites"
    wrong: tuple[str, ...] = ()
    invalid: tuple[str, ...] = ()
    raising: tuple[str, ...] = ()

    def rules(self) -> Sequence[Rule]:
        def apply(node: ir.Node, scope: Scope) -> Edit | None:
            site = node.outputs[0].name or ""
            if site in self.raising:
                raise ZeroDivisionError(site)
            edit = Edit(node, scope)
            if site in self.wrong:
                return edit.replace(node.outputs[0], edit.op("Abs", node.inputs))
            if site in self.invalid:
                return edit.replace(node.outputs[0], edit.op("Conv", node.inputs))
            minus = edit.constant(np.array(-1, np.float32), "minus")
            return edit.replace(node.outputs[0], edit.op("Mul", [*node.inputs, minus]))

        return (Rule("Neg", ("Neg",), apply),)


def test_a_rule_that_raises_is_left_out_at_that_place_alone() -> None:
    outcome = Pipeline((AtSites(raising=("d",)),)).run(opener(text_model(CHAIN)))
    (left,) = outcome.left_out
    assert left.rewrite == Rewrite("at-sites", "Neg", "d")
    assert left.reason == "ZeroDivisionError: d"
    assert outcome.changes == 2


def test_broken_structure_is_not_mixed_up_with_numbers_broken_before(
    proof: Callable[[ir.Model, Kind], str | None],
) -> None:
    outcome = Pipeline((AtSites(wrong=("b",), invalid=("y",)),)).run(opener(text_model(CHAIN)), prove=proof)
    reasons = {left.rewrite.site: left.reason for left in outcome.left_out}
    assert set(reasons) == {"b", "y"}
    assert reasons["b"] == "numbers differ"
    assert "Conv" in reasons["y"]
    assert outcome.changes == 1
    assert_equivalent(text_model(CHAIN), outcome.model)


class Liar(ir.passes.InPlacePass):
    """Changes the graph and says that it did not."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in model.graph:
            if node.op_type == "Neg":
                node.op_type = "Abs"
        return ir.passes.PassResult(model, False)


def test_a_pass_that_hides_its_change_is_blamed_for_it(proof: Callable[[ir.Model, Kind], str | None]) -> None:
    outcome = Pipeline((AtSites(), Liar(), EliminateIdentity())).run(opener(text_model(CHAIN)), prove=proof)
    assert outcome.left_out == ()
    outcome = Pipeline((Liar(), EliminateIdentity())).run(opener(text_model(CHAIN)), prove=proof)
    assert [str(left.rewrite) for left in outcome.left_out] == ["Liar: the whole pass"]
    assert outcome.changes == 1
    assert_equivalent(text_model(CHAIN), outcome.model)


def test_a_change_without_leave_is_blamed_on_its_pass(proof: Callable[[ir.Model, Kind], str | None]) -> None:
    class Sneaks(Pass):
        name = "sneaks"

        def apply(self, model: ir.Model, ledger: Ledger) -> None:
            for node in model.graph:
                if node.op_type == "Neg":
                    node.op_type = "Abs"

    outcome = Pipeline((EliminateIdentity(), Sneaks())).run(opener(text_model(CHAIN)), prove=proof)
    (left,) = outcome.left_out
    assert str(left.rewrite) == "sneaks: the whole pass"
    assert left.reason == "it changed the graph without the ledger's leave"
    assert outcome.changes == 1
    assert_equivalent(text_model(CHAIN), outcome.model)
    alone = Pipeline((Sneaks(),)).run(opener(text_model(CHAIN)), prove=proof)
    assert alone.changes == 0
    assert_equivalent(text_model(CHAIN), alone.model)


def test_a_renamed_output_is_seen_without_a_claim() -> None:
    class Renames(Pass):
        name = "renames"

        def apply(self, model: ir.Model, ledger: Ledger) -> None:
            model.graph.outputs[0].name = "z"

    outcome = Pipeline((Renames(), EliminateIdentity())).run(opener(text_model(CHAIN)))
    assert [str(left.rewrite) for left in outcome.left_out] == ["renames: the whole pass"]
    assert outcome.changes == 1
    assert_equivalent(text_model(CHAIN), outcome.model)


def test_flaws_of_the_input_are_blamed_on_no_pass() -> None:
    text = """agraph (float[2,3] x, bool c) => (float[2,3] y) <float[5] a> {
        a = Identity(x)
        b = Neg(a)
        y = If(c) <
            then_branch = t () => (float[2,3] p) { q = Relu(b)\n p = Identity(q) },
            else_branch = e () => (float[2,3] r) { q = Neg(b)\n r = Identity(q) }
        >
    }"""
    proto = text_model(text)
    proto.graph.node[2].attribute[0].g.node[0].output[0] = "b2"
    proto.graph.node[2].attribute[0].g.node[1].input[0] = "b2"
    outcome = Pipeline((EliminateIdentity(), AtSites())).run(opener(proto))
    assert outcome.left_out == ()
    assert outcome.changes == 5


def test_a_place_that_is_taken_away_later_is_no_near_miss() -> None:
    @dataclass(frozen=True)
    class Fussy(Pass):
        """Declines everything."""

        name = "fussy"

        def rules(self) -> Sequence[Rule]:
            def apply(node: ir.Node, scope: Scope) -> Edit | None:
                raise Declined("no")

            return (Rule("any", ("Identity", "Relu"), apply),)

    model = text_model(CHAIN)
    outcome = Pipeline((Fussy(), EliminateIdentity())).run(opener(model))
    assert outcome.steps[0].declined == {"no": ("a", "e")}


def test_a_veto_keeps_a_pass_from_rewriting_and_is_said() -> None:
    asked: list[str] = []

    def veto(name: str, _site: str) -> str | None:
        asked.append(name)
        return "it does not pay" if name == "neg-to-minus" else None

    model = text_model(CHAIN)
    outcome = Pipeline((NegToMinusX("none"), EliminateIdentity())).run(opener(model), veto=veto)
    assert [step.changes for step in outcome.steps] == [0, 1]
    assert outcome.steps[0].declined == {"it does not pay": ("b", "d", "y")}
    assert set(asked) == {"neg-to-minus", "eliminate-identity"}


def test_a_veto_can_hold_for_one_place() -> None:
    outcome = Pipeline((NegToMinusX("none"),)).run(
        opener(text_model(CHAIN)), veto=lambda _, site: "not here" if site == "d" else None
    )
    assert outcome.steps[0].declined == {"not here": ("d",)}
    assert [rewrite.site for rewrite in outcome.granted] == ["b", "y"]


def test_a_place_is_called_by_the_first_output_that_has_a_name() -> None:
    for first, site in (("", "h"), ("y", "y")):
        (node,) = ir.from_proto(
            text_model(
                "agraph (float[6, 3, 8] x, float[1, 32, 8] w) => (float[1, 3, 8] h) "
                f"{{ {first}, h = LSTM<hidden_size = 8>(x, w, w) }}"
            )
        ).graph
        assert site_of(node) == site


def test_weights_that_go_are_freed_without_the_collector() -> None:
    made: list[weakref.ref[np.ndarray]] = []

    @dataclass(frozen=True)
    class Again(Pass):
        """Makes a weight for each node, and then another one instead."""

        name = "again"

        def rules(self) -> Sequence[Rule]:
            return (Rule("Neg or Mul", ("Neg", "Mul"), self.apply_to),)

        def apply_to(self, node: ir.Node, scope: Scope) -> Edit | None:
            assert not gc.isenabled()
            if len(made) == 40:
                return None
            weight = np.full(3, -1, np.float32)
            made.append(weakref.ref(weight))
            edit = Edit(node, scope)
            return edit.replace(node.outputs[0], edit.op("Mul", [node.inputs[0], edit.constant(weight, "w")]))

    gc.disable()
    try:
        outcome = Pipeline((Again(), EliminateDead())).run(opener(text_model(CHAIN)))
        assert sum(weight() is not None for weight in made) == len(outcome.model.graph.initializers) == 3
    finally:
        gc.enable()
    assert len(made) == 40
    assert_equivalent(text_model(CHAIN), outcome.model)


def test_the_collector_is_left_as_it_was_found() -> None:
    def wrong() -> ir.Model:
        assert not gc.isenabled()
        raise RuntimeError("cannot be read")

    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            with pytest.raises(RuntimeError, match="cannot be read"):
                Pipeline((EliminateIdentity(),)).run(wrong)
            assert gc.isenabled() == enabled
        finally:
            gc.enable()
