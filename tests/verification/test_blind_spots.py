"""Wrong rewrites that the default samples or the sum over a whole output would not show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxopt.data import synthesize
from onnxopt.runtimes import open_session
from onnxopt.verification import Baseline, Verdict, verify
from onnxopt.verification.distance import distance
from onnxopt.verification.probes import nudged

RNG = np.random.default_rng(11)


def parse(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]>\n{text}')
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return model


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def both_ways(before: str, after: str, **weights: np.ndarray) -> tuple[Verdict, Verdict]:
    """The verdicts on `before` as it is and on `after`, on synthetic samples."""
    original = parse(before, **weights)
    baseline = Baseline.measure(original, synthesize(original))
    return baseline.compare(original), baseline.compare(parse(after, **weights))


DETECTOR = """detector (float[N, 40, 8] x) => (float[N, 40, 8] y) <float big = {640}, float low = {-9}> {
    s = Split <num_outputs: int = 2, axis: int = 2> (x)
    boxes = Mul(s, big)
    logits = Add(t, low)
    scores = Sigmoid(logits)
    right = RIGHT
    y = Concat <axis: int = 2> (boxes, right)
}""".replace("s = Split", "s, t = Split")


@pytest.mark.parametrize(
    ("right", "place"),
    [
        ("Mul(scores, off)", "'y'[..., 6]"),
        ("Mul(scores, none)", "'y'[..., "),
        ("Gather <axis: int = 2> (scores, swap)", "'y'[..., "),
    ],
    ids=["one class 10 % off", "a constant", "two classes swapped"],
)
def test_an_error_in_a_quiet_slice_is_seen_beside_loud_ones(right: str, place: str) -> None:
    weights = {
        "off": np.array([1, 1, 1.1, 1], np.float32),
        "none": np.zeros(1, np.float32),
        "swap": np.array([0, 2, 1, 3]),
    }
    same, wrong = both_ways(
        DETECTOR.replace("RIGHT", "Identity(scores)"), DETECTOR.replace("RIGHT", right), **weights
    )
    assert same.status == "proved"
    assert wrong.status == "failed"
    assert wrong.outputs[0].sqnr > 100, "in all it is close"
    assert f"dB in {place}" in wrong.reason
    assert wrong.outputs[0].weakest is not None
    assert wrong.outputs[0].weakest.sqnr < 25
    assert wrong.to_dict()["outputs"][0]["weakest"]["required"] == 60


def test_a_quiet_channel_is_seen_too() -> None:
    text = "g (float[N, 3, 5, 5] x) => (float[N, 3, 5, 5] y) { a = Mul(x, scale) y = Mul(a, OFF) }"
    weights = {
        "scale": np.array([1e-6, 1, 50], np.float32).reshape(3, 1, 1),
        "one": np.ones((3, 1, 1), np.float32),
        "off": np.array([1.1, 1, 1], np.float32).reshape(3, 1, 1),
    }
    same, wrong = both_ways(text.replace("OFF", "one"), text.replace("OFF", "off"), **weights)
    assert same.ok
    assert "in 'y'[:, 0] where 60 dB is needed" in wrong.reason


def test_a_slice_of_rounding_noise_alone_is_no_fault() -> None:
    """What differs from its mean sums up to zero, but for rounding."""
    text = """g (float[N, 20, 64] x) => (float[N, 20, 65] y) {
        m = MEAN
        d = Sub(x, m)
        s = ReduceSum <keepdims: int = 1> (d, last)
        y = Concat <axis: int = 2> (s, x)
    }"""
    same, reordered = both_ways(
        text.replace("MEAN", "ReduceMean <keepdims: int = 1> (x, last)"),
        text.replace("m = MEAN", "z = Mul(x, part) m = ReduceSum <keepdims: int = 1> (z, last)"),
        last=np.array([-1]),
        part=np.array(1 / 64, np.float32),
    )
    assert same.ok
    assert reordered.ok
    assert reordered.outputs[0].weakest is not None
    assert reordered.outputs[0].weakest.required < 0


def test_slices_are_summed_over_samples_and_few_numbers_have_no_level() -> None:
    before = floats(6, 3)
    after = before * np.array([1, 1.01, 1], np.float32)
    found = distance(before, after)
    assert found.slices.keys() == {-1}
    levels = found.slices[-1].sqnr
    assert levels[[0, 2]].tolist() == [np.inf, np.inf]
    assert levels[1] == pytest.approx(40, abs=0.01)
    assert np.isinf(distance(before[:3], after[:3]).slices[-1].sqnr).all()
    found.add(floats(6, 5), floats(6, 5))
    assert found.slices[-1].numbers.tolist() == [12, 12, 12, 6, 6]
    image = floats(2, 3, 4, 5)
    assert distance(image, image).slices.keys() == {1, -1}
    tiny = np.full((8, 2), 1e-40, np.float32)
    assert np.isinf(distance(tiny, tiny * np.float32(1.1)).slices[-1].sqnr).all()


def test_neighbours_share_a_slice_where_there_are_very_many() -> None:
    before = np.ones((2, 200_000), np.float32)
    after = before.copy()
    after[:, 100_001] = 2
    slices = distance(before, after).slices[-1]
    worst = int(slices.sqnr.argmin())
    assert len(slices.sqnr) <= 1 << 16
    assert slices.name(worst) == "[..., 100000:100004]"


SIX = "g (float[N, 6] x) => (float[N, 6] y) "
BRANCH = """<float limit = {50}> {
    m = ReduceMax <keepdims: int = 0> (x)
    big = Greater(m, limit)
    y = If(big) <
        then_branch = t () => (float[N, 6] a) { a = THEN },
        else_branch = e () => (float[N, 6] b) { b = Neg(x) }
    >
}"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("<float l = {-255}, float h = {255}> { y = Clip(x, l, h) }", "{ y = Identity(x) }"),
        (
            "<float k = {0.1}, float l = {0}, float h = {6}> { a = Mul(x, k) y = Clip(a, l, h) }",
            "<float k = {0.1}> { a = Mul(x, k) y = Relu(a) }",
        ),
        ("<float l = {-20}> { y = Max(x, l) }", "{ y = Identity(x) }"),
        (BRANCH.replace("THEN", "Abs(x)"), BRANCH.replace("THEN", "Relu(x)")),
    ],
    ids=["Clip", "Relu6", "Max", "If"],
)
def test_bounds_far_out_are_reached(before: str, after: str) -> None:
    same, wrong = both_ways(SIX + before, SIX + after)
    assert same.ok
    assert (same.feeds, len(same.notes)) == (4, 0)
    assert wrong.status == "failed"
    assert wrong.reason.endswith(" on large inputs")


def test_large_inputs_hide_no_error_of_the_others() -> None:
    text = "g (float[N, 6] x) => (float[N, 6] y) { r = Relu(x) y = SUM }"
    same, wrong = both_ways(
        text.replace("SUM", "Identity(r)"), text.replace("SUM", "Add(r, off)"), off=np.array(1e-3, np.float32)
    )
    assert same.ok
    assert wrong.reason.startswith("output 'y': SQNR 5")
    assert "large" not in wrong.reason


def test_large_inputs_are_judged_by_what_they_can_show() -> None:
    """The exponential overflows and is left out; the sine of thousands has only its input's digits."""
    text = "g (float[N, 64] x) => (float[N, 64] y, float[N, 64] z) { y = Exp(x) a = BODY z = Sin(a) }"
    same, other = both_ways(
        text.replace("BODY", "Mul(x, third)"),
        text.replace("BODY", "Div(x, three)"),
        third=np.array(1 / 3, np.float32),
        three=np.array(3, np.float32),
    )
    assert same.ok
    assert other.ok
    model = parse("g (float[N, 4] x) => (float[N, 4] y) { a = Abs(x) y = Exp(a) }")
    samples = Baseline.measure(model, synthesize(model)).samples
    assert {sample.group for sample in samples} == {"given"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("y = Abs(x)", "y = Identity(x)"),
        ("y = Mod(x, three)", "y = Mod <fmod: int = 1> (x, three)"),
    ],
)
def test_integers_that_nothing_limits_are_negative_too(before: str, after: str) -> None:
    text = "g (int64[N, 6] x) => (int64[N, 6] y) { BODY }"
    three = np.array(3)
    same, wrong = both_ways(text.replace("BODY", before), text.replace("BODY", after), three=three)
    assert same.ok
    assert wrong.status == "failed"


def test_overridable_booleans_are_inverted() -> None:
    text = "g (float[N, 3] x, bool flip) => (float[N, 3] y, bool z) { y = Neg(x) z = Not(FLIP) }"
    weights = {"flip": np.array(True), "fixed": np.array(True)}
    same, wrong = both_ways(text.replace("FLIP", "flip"), text.replace("FLIP", "fixed"), **weights)
    assert same.ok
    assert wrong.reason == "output 'z': 100.00% of the elements differ with initializers overridden"


INDEXED = """g (float[N, 4] x, int64[3] i) => (float[N, 3] y) <int64[3] i = {0, 1, 3}> {
    y = Gather <axis: int = 1> (x, INDEX)
}"""


def test_overridable_indices_stay_valid_and_count() -> None:
    same, wrong = both_ways(
        INDEXED.replace("INDEX", "i"), INDEXED.replace("INDEX", "fixed"), fixed=np.array([0, 1, 3])
    )
    assert same.ok
    assert same.feeds == 5
    assert wrong.reason.endswith("with initializers overridden")


def test_overrides_that_the_original_refuses_are_left_out() -> None:
    model = parse(
        "g (float[2, 3] x, int64[2] s, float k) => (float[A, B] y) { a = Expand(x, s) y = Mul(a, k) }",
        s=np.array([2, 3]),
        k=np.array(2, np.float32),
    )
    verdict = verify(model, model, feeds=[{"x": floats(2, 3)}, {"x": floats(2, 3)}])
    assert verdict.ok
    assert verdict.feeds == 3
    assert any(note.startswith("the sample with other values of 's' is left out") for note in verdict.notes)


def test_branches_that_never_ran_are_named() -> None:
    model = parse(SIX + BRANCH.replace("THEN", "Abs(x)").replace("{50}", "{5000}"))
    verdict = verify(model, model)
    assert verdict.ok
    assert verdict.notes == ("then_branch of 'y' never ran on the samples",)


def test_questions_for_nan_go_unanswered() -> None:
    text = "g (float[N, 6] x) => (float[N, 6] y) <float z = {0}> { n = IsNaN(x) y = Where(n, z, x) }"
    model = parse(text)
    feeds = [{"x": floats(2, 6)}, {"x": floats(2, 6)}]
    note = "no sample holds NaN or infinity, which IsNaN asks for"
    assert note in verify(model, model, feeds=feeds).notes
    feeds[1]["x"][0, 0] = np.nan
    assert note not in verify(model, model, feeds=feeds).notes


BLIND = "no output shows what the model does on these samples"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("y = Relu(x)", ""),
        ("a = Abs(x) b = Neg(a) y = Relu(b)", f"{BLIND}: 'y' is zero"),
        ("y = RandomNormalLike(x)", f"{BLIND}: 'y' is random"),
        ("y = MatMul(x, x)", "the original ran on no sample"),
    ],
)  # fmt: skip
def test_what_cannot_be_proved_is_known_beforehand(body: str, why: str) -> None:
    model = parse(f"g (float[A, B] x) => (float[A, B] y) {{ {body} }}")
    baseline = Baseline.measure(model, [{"x": floats(2, 3)}, {"x": floats(2, 3)}])
    assert baseline.unprovable.startswith(why)
    assert bool(baseline.unprovable) == bool(why)
    verdict = baseline.compare(model)
    assert verdict.reason == baseline.unprovable
    assert (verdict.status == "unproved") == bool(why)


class Lazy(Sequence[dict[str, Any]]):
    """Five thousand samples, of which none beyond the first few may be read."""

    def __len__(self) -> int:
        return 5000

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        assert isinstance(index, int)
        assert index <= 64
        return {"x": np.full(4, index, np.float32)}


def endless() -> Iterator[dict[str, Any]]:
    while True:
        yield {"x": floats(4)}


def test_the_first_of_very_many_samples_are_used() -> None:
    model = parse("g (float[4] x) => (float[4] y) { y = Relu(x) }")
    verdict = verify(model, model, feeds=Lazy())
    assert (verdict.ok, verdict.feeds) == (True, 64)
    assert "the first 64 of 5000 samples were used" in verdict.notes
    assert "the first 64 samples were used" in verify(model, model, feeds=endless()).notes


def test_nodes_of_one_name_are_run_all_the_same() -> None:
    model = parse(SIX + BRANCH.replace("THEN", "Abs(x)"))
    for node in (
        *model.graph.node,
        *(node for attr in model.graph.node[-1].attribute for node in attr.g.node),
    ):
        node.name = "same"
    with open_session(model) as session:
        assert session.run({"x": np.full((1, 6), 60, np.float32)})["y"].tolist() == [[60] * 6]
    assert "onnxruntime" in verify(model, model).runtime


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_nudge_is_a_rounding_and_leaves_whole_numbers_whole(dtype: type) -> None:
    x: np.ndarray = np.arange(-20, 20).astype(dtype)
    moved = nudged({"x": x, "i": np.arange(3)})
    assert np.array_equal(np.trunc(moved["x"].astype(np.float64)), x)
    assert np.count_nonzero(moved["x"] != x) == 39
    assert np.allclose(moved["x"], x, rtol=3 * float(np.finfo(dtype).eps))
    assert moved["i"].tolist() == [0, 1, 2]
