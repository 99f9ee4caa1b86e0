"""`onnxopt prune`, `pack` and `unpack`: what is written, and what is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxopt.cli import main
from onnxopt.pruning.masks import write_masks
from tests.pruning.small import net, samples, zeros

NETS = ("net.onnx", "out.onnx")


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say what to prune"),
        (["--sparsity", "0.5"], "--sparsity is of --weights"),
        (["--macs", "0.5", "--weights"], "--macs is of --channels"),
        (["--ratio", "0.5", "--weights"], "--ratio is of --channels"),
        (["--percentile", "50", "--channels"], "--percentile is of --weights"),
        (["--protect", "first", "--channels"], "--protect is of --weights"),
        (["--channels", "--macs", "1.5"], "macs is 1.5; expected a fraction between 0 and 1"),
        (["--channels", "--ratio", "0"], "ratio is 0; expected a fraction between 0 and 1"),
        (["--channels", "--macs", "0.5", "--parameters", "0.5"], "macs and parameters both say how much"),
        (["--weights", "--sparsity", "-1"], "sparsity is -1.0; expected 0 to 1"),
        (["--weights", "--percentile", "101"], "percentile is 101.0; expected 0 to 100"),
        (
            ["--weights", "--percentile", "50", "--threshold", "1"],
            "threshold and percentile both say how much",
        ),
        (["--weights", "--threshold", "inf"], "threshold is inf"),
        (["--weights", "--protect", "first,middle"], "protect: unknown value 'middle'"),
        (["--weights", "--small", "-1"], "-1 is not in the range"),
        (["--weights", "--nm", "5:4"], "nm is '5:4'; expected such as 2:4"),
        (["--weights", "--masks", "other.npz"], "masks: the model has no weight 'w' (known: u, v)"),
        (["--weights", "--masks", "none.npz"], "cannot be read: No such file"),
        (["--weights", "--masks", "net.onnx"], "not a file of masks"),
        (["--weights", "--recipe", "none.toml"], "recipe none.toml: cannot be read"),
        (["--weights", "--max-drop", "-1"], "--max-drop '-1': expected a drop such as 0.005"),
        (["--weights", "--max-drop", "some%"], "--max-drop 'some%': expected a drop"),
        (["--weights", "--max-drop", "1%", "--metric", "metric.py:fails"], "it failed: ValueError: no, no"),
        (
            ["--weights", "--max-drop", "1%", "--metric", "metric.py:fails_later"],
            "it failed: ValueError: later",
        ),
        (["--weights", "--data", "name.npz"], "no array for input 'x'"),
        (["--weights", "--data", "wide.npz"], "declared as N x 16, found 8 x 7"),
        (["--weights", "--data", "type.npz"], "takes float32, found int64"),
        (["--weights", "--data", "nan.npz"], "input 'x' holds NaN"),
        (["--weights", "--json", "net.onnx"], "this is no report"),
        (["--weights", "--save-masks", "net.onnx"], "this is no report"),
        (["--layers", "0"], "0 is not in the range"),
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
    arguments: Sequence[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path("net.onnx").read_bytes()
    refused(["prune", "net.onnx", "-o", "out.onnx", "--no-bench", *arguments], said, capsys)
    assert Path("net.onnx").read_bytes() == before


def refused(arguments: Sequence[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that says why, exit code 2, and nothing written."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    told = capsys.readouterr().err
    assert (stop.value.code, told.count("\n")) == (2, 1), told
    assert said in told
    assert not [one for one in Path().iterdir() if "out" in one.name]


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to work in with a model and all that is wrong with it and its samples."""
    monkeypatch.chdir(tmp_path)
    onnx.save(net(), "net.onnx")
    Path("cut.onnx").write_bytes(net().SerializeToString()[:700])
    Path("text.onnx").write_text("hello\nworld\n")
    Path("folder").mkdir()
    write_masks({}, "masks.npz")
    write_masks({"w": np.ones((3, 3), bool)}, "other.npz")
    x = np.random.default_rng(0).standard_normal((12, 8, 16)).astype(np.float32)
    for name, data in {
        "name": {"z": x},
        "wide": {"x": x[:, :, :7]},
        "type": {"x": x.astype(np.int64)},
        "nan": {"x": x * np.float32(np.nan)},
    }.items():
        np.savez(f"{name}.npz", **data)  # type: ignore[arg-type]
    Path("metric.py").write_text(
        "seen = []\n"
        "def fails(run):\n    raise ValueError('no,\\nno')\n"
        "def fails_later(run):\n    seen.append(run)\n"
        "    if len(seen) > 1:\n        raise ValueError('later')\n    return 1.0\n"
    )


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize("command", ["prune", "pack", "unpack"])
@pytest.mark.parametrize(
    ("model", "output", "said"),
    [
        ("none.onnx", "out", "none.onnx: "),
        ("folder", "out", "folder: "),
        ("cut.onnx", "out", "cut.onnx: not a"),
        ("text.onnx", "out", "text.onnx: not a"),
        ("net.onnx", "folder", "folder: cannot be written: it is a folder"),
        ("net.onnx", "none/out", "cannot be written: there is no folder"),
    ],
)
def test_bad_files_are_told_in_a_line(
    command: str, model: str, output: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "pack" in command:
        pytest.importorskip("zstandard", reason="packs need zstandard")
    more = ["--weights", "--no-bench"] if command == "prune" else []
    if command == "unpack" and model == "net.onnx":
        main_quietly(["pack", "net.onnx", "-o", "net.pack"])
        model = "net.pack"
    capsys.readouterr()
    refused([command, model, "-o", output, *more], said, capsys)


@pytest.mark.usefixtures("inputs")
def test_a_model_may_be_pruned_in_place_but_not_packed(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("zstandard", reason="packs need zstandard")
    refused(["pack", "net.onnx", "-o", "net.onnx"], "this is a file of the model", capsys)
    main_quietly(["prune", "net.onnx", "-o", "net.onnx", "--weights", "--small", "0", "--no-bench"])
    assert zeros(onnx.load("net.onnx"), "u") == 0.5


def main_quietly(arguments: Sequence[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize(
    ("arguments", "shares"),
    [
        (["--percentile", "75"], [0.75, 0.75]),
        (["--sparsity", "0.6", "--protect", "first"], [0.0, 0.6]),
        (["--sparsity", "0.6", "--protect", "first,last"], [0.0, 0.0]),
        (["--sparsity", "0.6", "--protect", "none", "--small", "400"], [0.6, 0.0]),
    ],
)
def test_amounts_and_protection_of_weights(arguments: Sequence[str], shares: Sequence[float]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["prune", "net.onnx", "-o", "out.onnx", "--no-bench", "--weights", *arguments])
    assert stop.value.code == int(not any(shares))
    done = onnx.load("out.onnx" if any(shares) else "net.onnx")
    assert [zeros(done, name) for name in ("u", "v")] == pytest.approx(shares, abs=0.01)


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize("flag", ["--weights", "--channels"])
def test_random_choices_take_the_seed(flag: str) -> None:
    made = []
    for seed in ("0", "1", "1"):
        options = ["--no-bench", "--no-metadata", "--score", "random", "--seed", seed]
        main_quietly(["prune", "net.onnx", "-o", "out.onnx", flag, *options])
        made.append(Path("out.onnx").read_bytes())
    assert made[0] != made[1]
    assert made[1] == made[2]


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize("budget", ["parameters", "ratio"])
def test_budgets_of_channels(budget: str) -> None:
    main_quietly(["prune", "net.onnx", "-o", "out.onnx", "--no-bench", "--channels", f"--{budget}", "0.5"])
    before, after = (sum(one.ByteSize() for one in onnx.load(path).graph.initializer) for path in NETS)
    assert after < 0.6 * before


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


@pytest.mark.usefixtures("inputs")
def test_layers_are_listed_with_what_each_costs_alone(capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("data.npz", x=np.concatenate([one["x"] for one in samples()]))
    asked = ["--weights", "--sparsity", "0.9", "--small", "0", "--data", "data.npz", "--max-drop", "0.1"]
    main_quietly(["prune", "net.onnx", "-o", "out.onnx", "--no-bench", "--list-layers", *asked])
    told = capsys.readouterr().out
    assert "pruned alone" in told
    assert "tried    100% of the strength, by what parts matter: agreement 1 before" in told
