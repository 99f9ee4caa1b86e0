"""The default recipe, and each of its passes alone, on random graphs: never undone, never another number."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnxopt.claims import Pass
from onnxopt.model import opener
from onnxopt.pipeline import Pipeline
from onnxopt.protobuf import dump
from onnxopt.recipe import load_recipe
from onnxopt.structure import signature_of
from tests.random_graphs import RandomModel, random_model
from tests.support import assert_equivalent, execute, run_pass

DEFAULT = load_recipe("default")
SEEDS = st.integers(0, 2**32 - 1)
STEPS = st.integers(1, 12)


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


@given(seed=SEEDS, steps=STEPS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_default_recipe(seed: int, steps: int) -> None:
    model = random_model(seed, steps)
    assume(runs(model))
    onnx.checker.check_model(model.proto)
    after = optimized(model.proto, DEFAULT)
    onnx.checker.check_model(dump(after))
    assert_equivalent(model.proto, after, model.feeds, kind="reorder")
    assert DEFAULT.run(opener(dump(after))).changes == 0


@given(seed=SEEDS, steps=STEPS, one=st.sampled_from(DEFAULT.passes))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_one_pass(seed: int, steps: int, one: Pass) -> None:
    model = random_model(seed, steps)
    assume(runs(model))
    # Around 16-bit operators the runtime puts Casts, and takes out pairs: what rounds depends on the graph.
    kind = "reorder" if model.dtype == "float16" else one.kind
    assert_equivalent(model.proto, run_pass(model.proto, one).model, model.feeds, kind=kind)
