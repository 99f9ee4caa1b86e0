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
from onnxopt.metric import Run
from onnxopt.passes.prune.prune_weights import PruneWeights
from onnxopt.pruning.search import Candidate, Passes, strongest, weaker
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
        ("cluster-weights{bits=4}", 0.5, "cluster-weights{bits=4}"),
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say what to prune"),
        (["--sparsity", "0.5"], "--sparsity is of --weights"),
        (["--macs", "0.5", "--weights"], "--macs is of --channels"),
        (["--weights", "--sparsity", "1.5"], "sparsity"),
        (["--weights", "--score", "wanda"], "samples"),
        (["--cluster", "bits=99"], "bits"),
        (["--pass", "prune-nothing"], "unknown pass"),
        (["--pass", "eliminate-dead"], "say what to prune"),
    ],
)
def test_bad_options_are_told_in_a_line(
    arguments: Sequence[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = tmp_path / "net.onnx", tmp_path / "out.onnx"
    onnx.save(net(), path)
    before = path.read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(["prune", str(path), "-o", str(output), "--no-bench", *arguments])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert path.read_bytes() == before
    assert not output.exists()


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
        main(["prune", str(path), *options, "--kernels", "energy=0.01"])
    assert stop.value.code == 1
    assert "nothing was pruned" in capsys.readouterr().out
    assert not output.exists()


def test_masks_are_written_and_used_again(tmp_path: Path) -> None:
    path, first, again, masks = (tmp_path / name for name in ("net.onnx", "a.onnx", "b.onnx", "masks.npz"))
    onnx.save(net(), path)
    spelled = "prune-weights{sparsity=0.7,small=0}"
    for arguments in (
        ["-o", str(first), "--no-bench", "--pass", spelled, "--save-masks", str(masks)],
        ["-o", str(again), "--no-bench", "--weights", "--masks", str(masks)],
    ):
        with pytest.raises(SystemExit) as stop:
            main(["prune", str(path), *arguments])
        assert stop.value.code == 0
    for name in ("u", "v"):
        assert zeros(onnx.load(first), name) == zeros(onnx.load(again), name) == pytest.approx(0.7, abs=0.01)


def test_a_pass_that_needs_data_says_so() -> None:
    with pytest.raises(UsageError, match="samples"):
        onnxopt.prune(net(), "prune-weights{score=obs}", bench=False)
