"""`prune`: what is cut and said, how much a budget allows, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxopt
from onnxopt.claims import Pass
from onnxopt.cli import main
from onnxopt.data import Feeds
from onnxopt.errors import UsageError
from onnxopt.examples import text_model
from onnxopt.inspection import macs
from onnxopt.job import Job
from onnxopt.metric import Run
from onnxopt.passes.prune.prune_weights import PruneWeights
from onnxopt.pipeline import Step
from onnxopt.pruning.masks import write_masks
from onnxopt.pruning.search import Candidate, Passes, fast_enough, strongest, weaker
from onnxopt.quantization.judge import Judgement
from onnxopt.recipe import parse_pass

WIDTH = 32


def net() -> onnx.ModelProto:
    """A hidden layer of which two thirds hardly matter, and classes."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((16, WIDTH)).astype(np.float32)
    hidden[:, WIDTH // 3 :] *= 0.01
    classes = rng.standard_normal((WIDTH, 10)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "u"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("MatMul", ["b", "v"], ["y"], "classes"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(hidden, "u"), numpy_helper.from_array(classes, "v")],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def samples(count: int = 12) -> list[Feeds]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((8, 16)).astype(np.float32)} for _ in range(count)]


def zeros(model: Any, name: str) -> float:
    array = numpy_helper.to_array(next(one for one in model.graph.initializer if one.name == name))
    return float(np.mean(array == 0))


def test_zeros_are_written_counted_and_told() -> None:
    result = onnxopt.prune(net(), "prune-weights{sparsity=0.5,small=0}", data=samples(), bench=False)
    report = result.report
    assert report.ok
    assert zeros(result.model, "u") == 0.5
    assert report.zeros == pytest.approx(0.5)
    assert {one.weight: one.share for one in report.layers} == {"u": 0.5, "v": 0.5}
    assert any("no faster" in sentence for sentence in report.savings)
    assert report.before.macs == report.after.macs
    assert report.packed is None or report.packed[1] < report.packed[0]
    held = json.loads(json.dumps(report.to_dict()))
    assert held["schema"] == "onnxopt.prune/1"
    assert held["passes"] == ["prune-weights{sparsity=0.5,small=0}"]


def test_zeros_of_shared_numbers_count() -> None:
    spelled = "prune-weights{sparsity=0.75,small=0},cluster-weights{bits=3,small=0}"
    report = onnxopt.prune(net(), spelled, data=samples(), bench=False).report
    assert report.zeros == pytest.approx(0.75)
    assert [one.elements for one in report.layers] == [16 * WIDTH, WIDTH * 10]


def test_channels_are_cut_and_fewer_products_left() -> None:
    result = onnxopt.prune(net(), "prune-channels{macs=0.5,multiple=1}", data=samples(), bench=False)
    report = result.report
    assert report.ok
    assert isinstance(report.before.macs, int)
    assert isinstance(report.after.macs, int)
    assert report.after.macs <= report.before.macs / 2
    assert any("multiply-adds are left" in sentence for sentence in report.savings)
    assert not isinstance(result.model, bytes | ir.Model)
    assert [one.dims[1] for one in result.model.graph.initializer if one.name == "u"] < [WIDTH]


def test_the_budget_finds_the_strongest_pruning_that_keeps_it() -> None:
    asked = PruneWeights(sparsity=0.99, small=0, scope="global")
    whole = onnxopt.prune(net(), [asked], data=samples(), bench=False)
    assert whole.report.searched.best.judgement.score < 0.9
    held = onnxopt.prune(net(), [asked], data=samples(), max_drop=0.1, bench=False)
    report = held.report
    assert report.ok
    assert report.searched.best.judgement.score >= 0.9
    assert 0 < report.zeros < whole.report.zeros
    assert set(report.searched.sensitivity) == {"u", "v"}
    assert not report.searched.trials[0].ok
    tried = [trial.share for trial in report.searched.trials[1:]]
    assert tried[0] == 1.0  # at the full strength, with what the layers matter
    assert all(0 < share < 1 for share in tried[1:])


def test_without_a_strength_that_keeps_the_budget_nothing_is_changed() -> None:
    def metric(run: Run) -> float:
        return float(np.abs(run(samples(1)[0])["y"]).sum() == whole)

    whole = float(np.abs(onnxopt_run(net(), samples(1)[0])).sum())
    result = onnxopt.prune(
        net(), "prune-weights{sparsity=0.9,small=0}", data=samples(), metric=metric, max_drop=0.5, bench=False
    )
    assert not result.report.ok
    assert "no strength keeps the budget" in result.report.reason
    assert zeros(result.model, "u") == 0


def onnxopt_run(model: onnx.ModelProto, feeds: Feeds) -> np.ndarray:
    from onnxopt.runtimes import open_session

    with open_session(model) as session:
        return np.asarray(session.run(feeds)["y"])


@pytest.mark.parametrize(
    ("spelled", "share", "expected"),
    [
        ("prune-weights{sparsity=0.8}", 0.5, "prune-weights{sparsity=0.4}"),
        ("prune-weights{threshold=0.5}", 0.5, "prune-weights{threshold=0.25}"),
        ("prune-weights{nm=2:4}", 0.5, "prune-weights{nm=2:4}"),
        ("prune-channels{macs=0.5}", 0.5, "prune-channels{macs=0.75}"),
        ("prune-channels{ratio=0.5}", 0.5, "prune-channels{ratio=0.25}"),
        ("shrink-kernels{energy=0.9}", 0.5, "shrink-kernels{energy=0.95}"),
        ("cluster-weights{bits=4}", 0.5, "cluster-weights{bits=4}"),
        ("factorize-weights{energy=0.8}", 0.5, "factorize-weights{energy=0.9}"),
        ("drop-layers{number=4}", 0.5, "drop-layers{number=2}"),
        ("drop-layers", 0.25, "drop-layers{number=0}"),
    ],
)
def test_a_share_of_the_strength(spelled: str, share: float, expected: str) -> None:
    assert str(weaker(parse_pass(spelled), share)) == expected


@dataclass(frozen=True)
class Loses(Pass):
    """Of which so much can be kept."""

    name = "loses"
    kind = "lossy"
    ratio: float | None = 1.0


def test_the_search_bisects_five_times() -> None:
    shares: list[float] = []

    def make(passes: Passes) -> Candidate:
        (one,) = passes
        assert isinstance(one, Loses)
        shares.append(one.ratio or 0.0)
        ok = (one.ratio or 0.0) <= 0.4
        return Candidate(
            passes, ir.Model(ir.Graph([], [], nodes=[]), ir_version=8), (), Judgement(ok, 0, None, "")
        )

    found = strongest(
        (Loses(),), ir.Model(ir.Graph([], [], nodes=[]), ir_version=8), make, lambda _: 0.0, guarded=True
    )
    assert shares == [1.0, 0.5, 0.25, 0.375, 0.4375, 0.40625]
    assert found.best.passes == (Loses(0.375),)


def test_the_least_pruning_that_is_fast_enough_is_bisected() -> None:
    shares: list[float] = []

    def make(passes: Passes) -> Candidate:
        (one,) = passes
        assert isinstance(one, Loses)
        shares.append(one.ratio or 0.0)
        time = 1 - (one.ratio or 0.0) / 2
        judged = Judgement(True, 0, None, "")
        steps = (Step("loses", "lossy", int(shares[-1] < 1.0), {}, 0.0, 0, 0),)
        return Candidate(passes, ir.Model(ir.Graph([], [], nodes=[]), ir_version=8), steps, judged, time)

    found = fast_enough((Loses(),), make, 0.7)
    assert shares == [1.0, 0.5, 0.75, 0.625, 0.5625, 0.59375]
    assert found.best.passes == (Loses(0.625),)
    assert [trial.ok for trial in found.trials] == [False, False, True, True, False, False]
    assert [trial.time for trial in found.trials[:2]] == [0.5, 0.75]
    nothing = fast_enough((Loses(0.9),), make, 0.4)
    assert [(trial.ok, trial.time) for trial in nothing.trials] == [(False, 0.55)]


@dataclass(frozen=True)
class Clock:
    """A measurement that says this and no more."""

    ratio: float

    @property
    def interval(self) -> tuple[float, float]:
        return self.ratio, self.ratio

    def to_dict(self) -> dict[str, Any]:
        return {"ratio": self.ratio}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run takes as long as its multiply-accumulates."""

    def time(_: Job, before: Any, after: ir.Model, *rest: Any, **options: Any) -> Clock:
        of = [macs(onnxopt.load(one), {"x": (8, 16)}) for one in (before, after)]
        return Clock(float(of[1]) / float(of[0]))

    monkeypatch.setattr(Job, "time", time)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("spelled", ["prune-channels{multiple=1}", "prune-channels{multiple=1,macs=0.2}"])
def test_as_fast_as_is_asked_and_no_more(spelled: str) -> None:
    report = onnxopt.prune(net(), spelled, data=samples(), latency=0.7).report
    assert report.ok
    assert isinstance(report.before.macs, int)
    assert isinstance(report.after.macs, int)
    assert 0.6 < report.after.macs / report.before.macs <= 0.7
    held = report.to_dict()
    assert len(held["trials"]) == 6
    assert all((trial["time"] <= 0.7) == trial["ok"] for trial in held["trials"])


@pytest.mark.usefixtures("clock")
def test_time_that_is_not_reached_is_told_with_the_best() -> None:
    result = onnxopt.prune(net(), "prune-channels{macs=0.5,multiple=1}", data=samples(), latency=0.3)
    assert result.report.reason == "0.3 of the time is not reached: 0.500 at best"
    assert len(result.report.searched.trials) == 1


@pytest.mark.usefixtures("clock")
def test_time_and_accuracy_both_have_to_hold() -> None:
    asked = "prune-channels{macs=0.2,multiple=1}"
    both = onnxopt.prune(net(), asked, data=samples(), latency=0.7, max_drop=0.5)
    assert both.report.ok
    none = onnxopt.prune(net(), asked, data=samples(), latency=0.3, max_drop=0.0)
    assert "no strength keeps the budget" in none.report.reason


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"latency": 0.5, "bench": False}, "latency is measured, and measuring is switched off"),
        ({"latency": 1.5}, "latency is 1.5; expected a share"),
    ],
)
def test_latency_that_cannot_be_asked_for(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        onnxopt.prune(net(), "prune-channels", **options)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say what to prune"),
        (["--sparsity", "0.5"], "--sparsity is of --weights"),
        (["--macs", "0.5", "--weights"], "--macs is of --channels"),
        (["--cluster", "bits=5", "--score", "l1"], "--score is of --weights and --channels"),
        (["--cluster", "bits=5", "--masks", "masks.npz"], "--masks is of --weights"),
        (["--channels", "--latency", "0.5"], "measuring is switched off"),
        (["--weights", "--sparsity", "1.5"], "sparsity"),
        (["--weights", "--score", "wanda"], "samples"),
        (["--weights", "--nm", "2:4", "--masks", "masks.npz"], "masks say what goes, and nm how much"),
        (["--cluster", "bits=99"], "bits"),
        (["--pass", "prune-nothing"], "unknown pass"),
        (["--recipe", "default"], "say what to prune"),
        (["--pass", "eliminate-dead"], "say what to prune"),
    ],
)
def test_bad_options_are_told_in_a_line(
    arguments: Sequence[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = tmp_path / "net.onnx", tmp_path / "out.onnx"
    onnx.save(net(), path)
    write_masks({}, tmp_path / "masks.npz")
    before = path.read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(["prune", str(path), "-o", str(output), "--no-bench", *_in(tmp_path, arguments)])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert path.read_bytes() == before
    assert not output.exists()


def _in(folder: Path, arguments: Sequence[str]) -> list[str]:
    """Arguments of which files lie in that folder."""
    return [str(folder / one) if one.endswith(".npz") else one for one in arguments]


def test_the_command_writes_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output, told = tmp_path / "net.onnx", tmp_path / "out.onnx", tmp_path / "told.json"
    onnx.save(net(), path)
    given: Mapping[str, np.ndarray] = {"x": np.concatenate([one["x"] for one in samples()])}
    np.savez(tmp_path / "data.npz", **given)  # type: ignore[arg-type]
    options = ["-o", str(output), "--data", str(tmp_path / "data.npz"), "--json", str(told), "--no-bench"]
    with pytest.raises(SystemExit) as stop:
        main(["prune", str(path), *options, "--channels", "--macs", "0.5", "--weights", "--sparsity", "0.5"])
    assert stop.value.code == 0, capsys.readouterr().err
    assert output.exists()
    assert json.loads(told.read_text())["ok"]
    output.unlink()
    with pytest.raises(SystemExit) as stop:
        main(["prune", str(path), *options, "--kernels", "energy=0.99"])
    assert stop.value.code == 1
    assert "nothing was pruned" in capsys.readouterr().out
    assert not output.exists()


def test_masks_are_written_and_used_again(tmp_path: Path) -> None:
    path, first, again, masks = (tmp_path / name for name in ("net.onnx", "a.onnx", "b.onnx", "masks.npz"))
    onnx.save(net(), path)
    spelled, recipe = "prune-weights{sparsity=0.7,small=0}", tmp_path / "recipe.toml"
    recipe.write_text('passes = ["prune-weights"]')
    for arguments in (
        ["-o", str(first), "--no-bench", "--pass", f"{spelled},cluster-weights", "--save-masks", str(masks)],
        ["-o", str(again), "--no-bench", "--weights", "--masks", str(masks)],
        ["-o", str(again), "--no-bench", "--recipe", str(recipe), "--masks", str(masks)],
    ):
        again.unlink(missing_ok=True)
        with pytest.raises(SystemExit) as stop:
            main(["prune", str(path), *arguments])
        assert stop.value.code == 0
    for name in ("u", "v"):
        assert zeros(onnx.load(again), name) == pytest.approx(0.7, abs=0.01)


def test_a_pass_that_needs_data_says_so() -> None:
    with pytest.raises(UsageError, match="samples"):
        onnxopt.prune(net(), "prune-weights{score=obs}", bench=False)


def prune(model: onnx.ModelProto, passes: str, **how: Any) -> Any:
    """On samples of the model's inputs, without timing."""
    kinds = [
        (one.name, [d.dim_value or 8 for d in one.type.tensor_type.shape.dim]) for one in model.graph.input
    ]
    rng = np.random.default_rng(2)
    data = [{name: rng.standard_normal(shape).astype(np.float32) for name, shape in kinds} for _ in range(12)]
    return onnxopt.prune(model, passes, data=data, bench=False, **how)


def residual() -> onnx.ModelProto:
    """Two blocks, the second of which does next to nothing."""
    model = text_model(
        """agraph (float[N, 16] x) => (float[N, 10] y) {
            a = MatMul(x, u)  b = Relu(a)  c = MatMul(b, v)  d = Add(x, c)
            e = MatMul(d, s)  f = Relu(e)  g = MatMul(f, v)  h = Add(d, g)  y = MatMul(h, w)
        }"""
    )
    rng = np.random.default_rng(0)
    for name, shape, scale in (
        ("u", (16, 32), 1),
        ("v", (32, 16), 1),
        ("s", (16, 32), 1e-3),
        ("w", (16, 10), 1),
    ):
        array = scale * rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    return model


def test_passes_that_can_use_samples_get_them() -> None:
    dropped = prune(residual(), "drop-layers")
    assert dropped.report.ok
    assert [step.changes for step in dropped.report.searched.best.steps] == [1]
    assert dropped.report.searched.best.judgement.score > 0.95
    fitted = prune(net(), "factorize-weights{energy=0.99,multiple=1}")
    (step,) = fitted.report.searched.best.steps
    assert step.changes == 1  # by the weight alone, 0.99 takes all ranks


def test_blocks_are_dropped_as_far_as_the_budget_allows() -> None:
    held = prune(residual(), "drop-layers{number=2}", max_drop=0.1)
    assert held.report.ok
    assert [str(one) for one in held.report.searched.best.passes] == ["drop-layers"]
    left = prune(residual(), "drop-layers{number=2}", metric="sqnr", max_drop=1)
    assert "no strength that changes anything keeps the budget: sqnr 150 before" in left.report.reason
    assert left.report.savings == ()


def test_an_amount_that_nobody_names_is_searched_from_too() -> None:
    held = prune(net(), "prune-weights{small=0}", max_drop=0.05)
    assert len(held.report.searched.trials) > 1
    assert held.report.ok
    assert 0 < held.report.zeros < 0.5
    assert "nothing was pruned" in prune(net(), "prune-weights{sparsity=0,small=0}").report.reason


def test_what_is_sparse_and_clustered_is_told_as_both(tmp_path: Path) -> None:
    result = prune(net(), "prune-weights{sparsity=0.8,small=0},cluster-weights{bits=4}")
    report = result.report
    assert report.zeros == pytest.approx(0.8, abs=0.01)
    assert {one.weight for one in report.layers} == {"u", "v"}
    assert (
        report.after.bytes < 0.4 * report.before.bytes
    )  # clean-up leaves codebooks alone, small as they are
    assert not any("no smaller as a file" in sentence for sentence in report.savings)
    assert any("of the bytes of tensors are left" in sentence for sentence in report.savings)


def test_a_pack_is_pruned_as_its_model_is(tmp_path: Path) -> None:
    pytest.importorskip("zstandard", reason="packs need zstandard")
    onnx.save(net(), tmp_path / "net.onnx")
    packed = onnxopt.pack(tmp_path / "net.onnx", tmp_path / "net.onnxpack").packed_bytes
    report = onnxopt.prune(tmp_path / "net.onnxpack", "prune-weights{small=0}", bench=False).report
    assert report.packed is not None
    assert report.packed[0] == packed > report.packed[1]


def test_outputs_without_rows_are_judged_by_sqnr() -> None:
    model = text_model("agraph (float[2, 4, 8, 8] x) => (float[2, 8, 6, 6] y) { y = Conv(x, w) }")
    weight = np.random.default_rng(0).standard_normal((8, 4, 3, 3)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    assert "sqnr 150 before" in prune(model, "prune-weights").report.searched.best.judgement.summary
    with pytest.raises(UsageError, match="no output has rows of scores or labels; take sqnr or mse"):
        prune(model, "prune-weights", max_drop=0.1)


def test_what_nothing_can_be_proved_of_is_tidy_all_the_same() -> None:
    model = text_model(
        """agraph (float[1, 2, 8, 8] x) => (float[1, 4, 8, 8] y) <float[4] b = {1, 2, 3, 4}> {
            y = Conv<pads = [1, 1, 1, 1]>(x, w, b)
        }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((4, 2, 3, 3), np.float32), "w"))
    result = prune(model, "shrink-kernels")
    assert [list(one.dims) for one in result.model.graph.initializer] == [[4], [4, 2, 1, 1]]


def test_what_is_carried_to_an_output_of_unknown_shape_stays() -> None:
    model = text_model(
        "agraph (float[4, 2, 16] x) => (float[a, b, c, d] y) { y = LSTM<hidden_size = 8>(x, w, r) }"
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    rng = np.random.default_rng(0)
    for name, shape in (("w", (1, 32, 16)), ("r", (1, 32, 8))):
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    assert "nothing was pruned: prune-channels" in prune(model, "prune-channels{multiple=1}").report.reason


def test_products_of_integers_are_cut_but_not_fitted() -> None:
    model = text_model(
        """agraph (float[N, 16] x) => (int64[N, 4] y) {
            i = Cast<to = 7>(x)  a = MatMul(i, u)  b = Abs(a)  y = MatMul(b, v)
        }"""
    )
    rng = np.random.default_rng(0)
    for name, shape in (("u", (16, 32)), ("v", (32, 4))):
        model.graph.initializer.append(numpy_helper.from_array(rng.integers(-9, 9, shape), name))
    assert prune(model, "prune-channels{multiple=1}").report is not None


def test_a_weight_of_low_rank_keeps_all_its_energy_in_float32() -> None:
    model = text_model("agraph (float[N, 32] x) => (float[N, 32] y) { y = MatMul(x, w) }")
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((32, 4)) @ rng.standard_normal((4, 32))).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    result = onnxopt.prune(model, "factorize-weights{energy=1.0,multiple=1}", metric="sqnr", bench=False)
    assert result.report.searched.best.judgement.score >= 120
    assert result.report.after.bytes == 2 * 32 * 4 * 4
