"""Recipes, and each of their passes alone, on random graphs: never undone, never another number."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import onnxopt.ledger
from onnxopt.claims import Pass
from onnxopt.graph import walk
from onnxopt.index import Index, operator_of
from onnxopt.model import opener
from onnxopt.pipeline import Pipeline
from onnxopt.protobuf import dump
from onnxopt.recipe import load_recipe
from onnxopt.structure import signature_of
from tests.random_graphs import FAMILIES, RandomModel, random_model
from tests.support import assert_equivalent, execute, run_pass

RECIPES = {name: load_recipe(name) for name in ("default", "cpu")}
SEEDS = st.integers(0, 2**32 - 1)
STEPS = st.integers(1, 12)
KINDS = st.sampled_from(sorted(FAMILIES))


def runs(model: RandomModel) -> bool:
    """Whether ONNX Runtime runs the model on its samples."""
    try:
        for feeds in model.feeds:
            execute(model.proto, feeds)
    except Exception:  # ONNX Runtime's classes have no common base below Exception
        return False
    return True


def optimized(proto: onnx.ModelProto, pipeline: Pipeline) -> ir.Model:
    """The model after a pipeline without proof, which would undo what is wrong; twice the same bytes."""
    done = [pipeline.run(opener(proto)) for _ in range(2)]
    assert done[0].left_out == (), done[0].left_out
    assert done[0].settled
    first, second = (dump(one.model).SerializeToString(deterministic=True) for one in done)
    assert first == second
    assert signature_of(done[0].model) == signature_of(opener(proto)())
    return done[0].model


@pytest.mark.parametrize("recipe", RECIPES)
@given(seed=SEEDS, steps=STEPS, family=KINDS)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_recipe(recipe: str, seed: int, steps: int, family: str) -> None:
    model, pipeline = random_model(seed, steps, family), RECIPES[recipe]
    assume(runs(model))
    onnx.checker.check_model(model.proto)
    after = optimized(model.proto, pipeline)
    onnx.checker.check_model(dump(after))
    assert_equivalent(model.proto, after, model.feeds, kind="reorder")
    assert pipeline.run(opener(dump(after))).changes == 0


class LookEverywhere(Index):
    """An index that leaves nothing out: each pass runs, and goes through all nodes as they are now."""

    def has(self, operators: Iterable[str]) -> bool:
        return True

    def find(self, root: ir.Graph, operators: Iterable[str]) -> list[ir.Node]:
        wanted = set(operators)
        return [node for node in walk(root) if operator_of(node) in wanted]


@given(seed=SEEDS, steps=STEPS, limit=st.none() | st.integers(0, 20))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_what_is_passed_over_would_have_changed_nothing(seed: int, steps: int, limit: int | None) -> None:
    proto = random_model(seed, steps).proto

    def outcome() -> object:
        done = RECIPES["default"].run(opener(proto), stop_after=limit)
        said = [(step.name, step.changes, step.declined, step.nodes, step.bytes) for step in done.steps]
        return dump(done.model).SerializeToString(deterministic=True), said

    quick = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxopt.ledger, "Index", LookEverywhere)
        assert outcome() == quick


@given(seed=SEEDS, steps=STEPS, family=KINDS, one=st.sampled_from(RECIPES["cpu"].passes))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_one_pass(seed: int, steps: int, family: str, one: Pass) -> None:
    model = random_model(seed, steps, family)
    assume(runs(model))
    # Around 16-bit operators the runtime puts Casts, and takes out pairs: what rounds depends on the graph.
    kind = "reorder" if model.dtype == "float16" else one.kind
    assert_equivalent(model.proto, run_pass(model.proto, one).model, model.feeds, kind=kind)
