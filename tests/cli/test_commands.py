"""The command line end to end: output, exit codes, files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from models.resnet20 import resnet20
from onnxopt.cli import main
from tests.support import text_model

TEXT = """
agraph (float[N,3] x) => (float[N,3] y) <float[3] w = {1, 2, 3}> {
    a = Identity(x)
    b = Mul(a, w)
    unused = Neg(b)
    y = Relu(b)
}
"""


@dataclass(frozen=True)
class Ran:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture(name="run")
def make_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Ran:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        captured = capsys.readouterr()
        return Ran(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(name="model")
def write_model(tmp_path: Path) -> str:
    path = tmp_path / "m.onnx"
    path.write_bytes(text_model(TEXT).SerializeToString())
    return str(path)


def test_optimize_writes_a_proved_model_and_says_so(run: Run, model: str) -> None:
    ran = run("optimize", model, "-o", "out.onnx", "--no-bench")
    assert ran.code == 0
    assert "proved: bit-equal" in ran.out
    assert "written" in ran.out
    assert ran.err == ""
    proto = onnx.load("out.onnx")
    assert [node.op_type for node in proto.graph.node] == ["Mul", "Relu"]
    assert {p.key for p in proto.metadata_props} == {
        "onnxopt.passes",
        "onnxopt.versions",
        "onnxopt.input_sha256",
    }


def test_same_input_same_bytes(run: Run, model: str) -> None:
    for name in ("a.onnx", "b.onnx"):
        assert run("optimize", model, "-o", name, "--no-bench").code == 0
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()


def test_json_goes_to_stdout_and_the_table_away_from_it(run: Run, model: str) -> None:
    ran = run("optimize", model, "-o", "out.onnx", "--json", "-", "--no-bench")
    report = json.loads(ran.out)
    assert report["schema"] == "onnxopt.optimize/1"
    assert report["before"]["nodes"] == 4
    assert report["after"]["nodes"] == 2
    assert report["verdict"]["status"] == "proved"
    assert report["timing"] is None
    assert "proved" in ran.err


def test_json_file(run: Run, model: str) -> None:
    assert run("optimize", model, "--dry-run", "--json", "r.json", "--no-bench").code == 0
    assert json.loads(Path("r.json").read_text())["left_as_it_was"] is False
    assert not Path("out.onnx").exists()


def test_passes_can_be_chosen_skipped_and_stopped(run: Run, model: str) -> None:
    def ops(*options: str) -> list[str]:
        assert run("optimize", model, "-o", "out.onnx", "--no-bench", *options).code == 0
        return [node.op_type for node in onnx.load("out.onnx").graph.node]

    assert ops("--pass", "eliminate-identity") == ["Mul", "Neg", "Relu"]
    assert ops("--pass", "eliminate-dead", "--pass", "eliminate-identity") == ["Mul", "Relu"]
    assert ops("--skip", "eliminate-identity", "--skip", "eliminate-noop") == ["Identity", "Mul", "Relu"]
    assert ops("--stop-after", "0") == ["Identity", "Mul", "Neg", "Relu"]


def test_no_metadata_and_no_verify(run: Run, model: str) -> None:
    ran = run("optimize", model, "-o", "out.onnx", "--no-bench", "--no-metadata", "--no-verify")
    assert ran.code == 0
    assert "only structure was checked" in ran.out
    assert not onnx.load("out.onnx").metadata_props


def test_bench_reports_a_control(run: Run, model: str) -> None:
    ran = run("bench", model, model, "--seconds", "1", "--json", "b.json")
    assert ran.code == 0
    assert "control" in ran.out
    timing = json.loads(Path("b.json").read_text())
    assert timing["schema"] == "onnxopt.bench/1"
    assert timing["provider"] == "cpu"


def test_optimize_measures_speed(run: Run, model: str) -> None:
    ran = run("optimize", model, "-o", "out.onnx", "--shape", "x=64x3")
    assert ran.code == 0
    assert "control" in ran.out


def test_verify_proves_and_fails(run: Run, model: str) -> None:
    assert run("optimize", model, "-o", "good.onnx", "--no-bench").code == 0
    good = run("verify", model, "good.onnx", "--kind", "exact", "--json", "v.json")
    assert good.code == 0
    assert "proved: bit-equal" in good.out
    assert json.loads(Path("v.json").read_text())["outputs"][0]["sqnr"] == "inf"
    Path("bad.onnx").write_bytes(text_model(TEXT.replace("{1, 2, 3}", "{1, 2, 4}")).SerializeToString())
    bad = run("verify", model, "bad.onnx")
    assert bad.code == 1
    assert "failed: " in bad.out


def test_user_data(run: Run, model: str) -> None:
    np.savez("samples.npz", x=np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32))
    ran = run("verify", model, model, "--data", "samples.npz")
    assert ran.code == 0
    assert "on 5 feeds" in ran.out
    assert run("optimize", model, "-o", "o.onnx", "--data", "samples.npz", "--no-bench").code == 0


def test_overridable_initializers_are_kept_unless_frozen(run: Run) -> None:
    proto = resnet20()
    known = {value.name for value in proto.graph.input}
    for tensor in proto.graph.initializer:
        if tensor.name not in known:
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    Path("ir3.onnx").write_bytes(proto.SerializeToString())

    def left(*options: str) -> int:
        assert run("optimize", "ir3.onnx", "-o", "out.onnx", "--no-bench", *options).code == 0
        return sum(node.op_type == "BatchNormalization" for node in onnx.load("out.onnx").graph.node)

    assert left() > 0
    declined = run("optimize", "ir3.onnx", "--dry-run", "--no-bench", "--list-declined").out
    assert "--freeze-initializers" in declined.replace("\n", " ")
    assert left("--freeze-initializers") == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["optimize", "none.onnx", "-o", "o.onnx"], "none.onnx: no such file"),
        (["optimize", "m.onnx"], "say where to write: -o OUT"),
        (["optimize", "m.onnx", "-o", "no/where.onnx"], "no/where.onnx: cannot be written"),
        (["optimize", "m.onnx", "-o", "."], "cannot be written: it is a folder"),
        (["optimize", "m.onnx", "-o", "o.onnx", "--pass", "fold-batchnrm"], "did you mean 'fold-batchnorm'?"),
        (["optimize", "m.onnx", "-o", "o.onnx", "--skip", "eliminate-ded"], "did you mean 'eliminate-dead'?"),
        (["optimize", "m.onnx", "-o", "o.onnx", "--target", "gpu"], "unknown target 'gpu'"),
        (["optimize", "m.onnx", "-o", "o.onnx", "--recipe", "fast"], "unknown recipe 'fast'"),
        (["optimize", "m.onnx", "-o", "o.onnx", "--shape", "x"], "--shape"),
        (["optimize", "m.onnx", "-o", "o.onnx", "--shape", "z=1x3"], "no input 'z'"),
        (["optimize", "m.onnx", "-o", "o.onnx", "--shape", "x=1x4"], "'x'"),
        (["optimize", "m.onnx", "-o", "o.onnx", "--data", "none.npz"], "none.npz"),
        (["optimize", "m.onnx", "-o", "o.onnx", "--stop-after", "-1"], "--stop-after"),
        (["verify", "m.onnx", "none.onnx"], "none.onnx: no such file"),
        (["optimise", "m.onnx"], "unknown command 'optimise' (did you mean 'optimize'?)"),
        (["optimize", "m.onnx", "--no-bnch"], "--no-bench"),
        (["inspect", "m.onnx", "--json", "no/where.json"], "no/where.json: cannot be written"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(run: Run, model: str, arguments: list[str], complaint: str) -> None:
    before = sorted(p.name for p in Path().iterdir())
    ran = run(*arguments)
    assert ran.code == 2
    assert complaint in ran.err
    assert ran.err.startswith("onnxopt: ")
    assert ran.err.count("\n") == 1
    assert sorted(p.name for p in Path().iterdir()) == before
    assert Path(model).read_bytes() == text_model(TEXT).SerializeToString()


@pytest.mark.parametrize("command", ["verify", "bench"])
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_cannot_run_is_exit_3(run: Run, model: str, command: str, provider: str) -> None:
    from onnxopt.runtimes import providers

    if next(p for p in providers() if p.name == provider).available:
        pytest.skip("this machine has the provider")
    ran = run(command, model, model, "--provider", provider)
    assert ran.code == 3
    assert provider in ran.err
    assert ran.err.count("\n") == 1


def test_a_target_that_cannot_run_here_is_still_served(run: Run, model: str) -> None:
    ran = run("optimize", model, "-o", "o.onnx", "--target", "tensorrt", "--json", "r.json")
    assert ran.code == 0
    report = json.loads(Path("r.json").read_text())
    if report["timing"] is None:
        assert any("speed not measured" in note for note in report["notes"])
    assert report["verdict"]["status"] == "proved"


def test_strict_refuses_a_model_that_is_best_left_as_it_was(run: Run, model: str) -> None:
    assert run("optimize", model, "-o", "once.onnx", "--no-bench").code == 0
    again = run("optimize", "once.onnx", "-o", "twice.onnx", "--no-bench")
    assert again.code == 0
    assert Path("twice.onnx").exists()
    strict = run("optimize", "once.onnx", "-o", "thrice.onnx", "--no-bench", "--strict")
    assert strict.code == 1
    assert not Path("thrice.onnx").exists()


def test_unknown_domains_are_kept_and_reported(run: Run) -> None:
    head = '<ir_version: 9, opset_import: ["" : 17, "my.ops" : 1]>'
    text = head + "agraph (float[2] x) => (float[2] y) { a = Identity(x)\n y = my.ops.Twist(a) }"
    Path("custom.onnx").write_bytes(text_model(text).SerializeToString())
    ran = run("optimize", "custom.onnx", "-o", "o.onnx", "--no-bench")
    assert ran.code == 0
    assert "unproved" in ran.out
    assert "left as it was" in ran.out
    assert [node.op_type for node in onnx.load("o.onnx").graph.node] == ["Identity", "Twist"]
    assert run("optimize", "custom.onnx", "-o", "o.onnx", "--no-bench", "--no-verify").code == 0
    assert [node.op_type for node in onnx.load("o.onnx").graph.node] == ["Twist"]


def test_inspect_passes_and_doctor(run: Run, model: str) -> None:
    inspected = run("inspect", model, "--json", "i.json")
    assert inspected.code == 0
    assert "Identity" in inspected.out
    assert json.loads(Path("i.json").read_text())["totals"]["nodes"] == 4
    listed = run("passes", "--json", "-")
    assert {"fold-batchnorm", "eliminate-dead"} <= {p["name"] for p in json.loads(listed.out)["passes"]}
    doctor = run("doctor", "--json", "-")
    assert doctor.code == 0
    assert json.loads(doctor.out)["healthy"] is True


def test_every_command_has_help_that_starts_from_an_example(run: Run) -> None:
    for command in ("optimize", "verify", "bench", "inspect", "passes", "doctor"):
        ran = run(command, "--help")
        assert ran.code == 0
        assert f"onnxopt {command}" in ran.out.split("Options:")[0]


def test_the_traceback_only_with_verbose(run: Run) -> None:
    assert "Traceback" not in run("inspect", "none.onnx").err
    assert "Traceback" in run("-v", "inspect", "none.onnx").err


def test_as_a_program(model: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "onnxopt", "inspect", model], capture_output=True, text=True, check=True
    )
    assert "Mul" in done.stdout
    assert done.stderr == ""


def test_a_pass_explains_itself(run: Run) -> None:
    ran = run("passes", "merge-affine")
    assert ran.code == 0
    for word in (
        "reorder",
        "Before:",
        "Declines:",
        "Example",
        "Gemm (x, w, b)",
        "becomes",
        "Gemm (x, w_1, b_1)",
    ):
        assert word in ran.out
    held = json.loads(run("passes", "fold-constants", "--json", "-").out)
    assert held["schema"] == "onnxopt.pass/1"
    assert held["declines"].startswith("random and quantizing operators, ")
    assert held["options"] == {"max_growth": 4096}
    assert "max_growth: bytes" in held["options_text"]
    assert "Transpose" in held["example"]["before"]
    assert "Transpose" not in held["example"]["after"]
    assert held["profits"] is None


def test_every_pass_explains_itself(run: Run) -> None:
    for facts in json.loads(run("passes", "--json", "-").out)["passes"]:
        held = json.loads(run("passes", facts["name"], "--json", "-").out)
        assert held["declines"]
        assert held["example"]["before"] != held["example"]["after"]


def test_an_unknown_pass_is_refused_with_the_nearest(run: Run) -> None:
    ran = run("passes", "merge-afine")
    assert ran.code == 2
    assert ran.err == "onnxopt: unknown pass 'merge-afine' (did you mean 'merge-affine'?)\n"
    assert run("passes", "xyz").err == "onnxopt: unknown pass 'xyz': `onnxopt passes` lists them\n"


@pytest.mark.parametrize("option", [["--list-declined"], ["--recipe", "cpu"]])
def test_what_needs_a_model_says_so(run: Run, option: list[str]) -> None:
    ran = run("passes", *option)
    assert (ran.code, "name it" in ran.err) == (2, True)


def test_which_passes_fire_on_a_model(run: Run, model: str) -> None:
    before = Path(model).read_bytes()
    ran = run("passes", "--for", model)
    assert ran.code == 0
    assert "eliminate-identity" in ran.out.split("nothing to do:")[0]
    assert "merge-matmul" in ran.out.split("nothing to do:")[1]
    held = json.loads(run("passes", "--for", model, "--target", "generic", "--json", "-").out)
    assert (held["schema"], held["target"]) == ("onnxopt.passes-for/1", "generic")
    assert {step["name"]: step["changes"] for step in held["steps"]}["eliminate-identity"] == 1
    assert Path(model).read_bytes() == before
    alone = json.loads(run("passes", "eliminate-dead", "--for", model, "--json", "-").out)
    assert [(step["name"], step["changes"]) for step in alone["steps"]] == [("eliminate-dead", 1)]
    assert run("passes", "--for", "none.onnx").code == 2
    assert run("passes", "eliminate-ded", "--for", model).code == 2


def test_near_misses_say_where_and_why(run: Run) -> None:
    text = "agraph (float[2] x) => (float[2] y, float[2] z) { y = Identity(x)\n z = Identity(x) }"
    Path("m.onnx").write_bytes(text_model(text).SerializeToString())
    for command in (("optimize", "m.onnx", "--dry-run", "--no-bench"), ("passes", "--for", "m.onnx")):
        lines = " ".join(run(*command, "--list-declined").out.split())
        for site in ("y", "z"):
            assert f"eliminate-identity: {site}: is a graph output whose value comes from outside" in lines


def test_settings_are_written_stated_and_can_be_tried(run: Run) -> None:
    text = """agraph (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y) <int64[8] p = {0, 0, 1, 1, 0, 0, 1, 1}> {
        a = Identity(x)
        b = Pad(a, p)
        y = MaxPool<kernel_shape = [3, 3]>(b) }"""
    Path("m.onnx").write_bytes(text_model(text).SerializeToString())
    ran = run("optimize", "m.onnx", "-o", "out.onnx", "--no-bench")
    assert ran.code == 0
    said = " ".join(ran.out.split())
    assert "setting optimization.disable_specified_optimizers=Pad_Fusion (against wrong results)" in said
    assert "written out.session.json" in said
    setting = "optimization.disable_specified_optimizers=Pad_Fusion"
    assert run("verify", "m.onnx", "out.onnx", "--session-config", setting).code == 0
    ran = run(
        "bench", "m.onnx", "out.onnx", "--session-config", setting, "--seconds", "0.1", "--json", "b.json"
    )
    assert ran.code == 0
    held = json.loads(Path("b.json").read_text())["session_config"]
    assert held == {"optimization.disable_specified_optimizers": "Pad_Fusion"}
    assert run("bench", "m.onnx", "m.onnx", "--session-config", "no value").code == 2
    assert run("verify", "m.onnx", "m.onnx", "--session-config", "=1").code == 2


def test_a_dry_run_writes_no_settings(run: Run) -> None:
    text = """agraph (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y) <int64[8] p = {0, 0, 1, 1, 0, 0, 1, 1}> {
        b = Pad(x, p)
        y = MaxPool<kernel_shape = [3, 3]>(b) }"""
    Path("m.onnx").write_bytes(text_model(text).SerializeToString())
    assert run("optimize", "m.onnx", "--dry-run", "--no-bench").code == 0
    assert [path.name for path in Path().iterdir()] == ["m.onnx"]
