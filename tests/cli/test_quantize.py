"""`onnxopt quantize`: exit codes, files, and one clear line where something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxopt.cli import main
from tests.quantization.test_quantize import net, samples


@dataclass(frozen=True)
class Ran:
    """What the command printed and how it ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]
SMALL = ("--scheme", "weight-int8", "--for", "size")


@pytest.fixture(name="run")
def make_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").write_bytes(net().SerializeToString())
    Path("data").mkdir()
    for number, sample in enumerate(samples(8)):
        np.savez(f"data/{number}.npz", x=sample["x"])
    Path("metric.py").write_text(
        "def fails(run):\n    raise KeyError('labels')\n"
        "def good(run, split):\n    return 1.0 if split == 'search' else score\n"
        "score = 1.0\n"
    )

    def run(*arguments: str) -> Ran:
        given = ["quantize", "model.onnx", "-o", "out.onnx", "--no-bench", *arguments]
        with pytest.raises(SystemExit) as ended:
            main(given)
        captured = capsys.readouterr()
        return Ran(int(ended.value.code or 0), captured.out, captured.err)

    return run


def test_what_keeps_its_accuracy_is_written_with_report_and_plan(run: Run) -> None:
    ran = run("--data", "data", "--json", "report.json", "--save-plan", "plan.json", "--list-nodes")
    assert ran.code == 0, ran.out + ran.err
    assert ran.err == ""
    assert "accuracy SQNR" in ran.out
    assert "integer kernels" in ran.out
    assert "written  out.onnx" in ran.out
    first = Path("out.onnx").read_bytes()
    onnx.checker.check_model(onnx.load_from_string(first))
    report, plan = (json.loads(Path(name).read_text()) for name in ("report.json", "plan.json"))
    assert (report["schema"], plan["schema"]) == ("onnxopt.quantize/1", "onnxopt.plan/1")
    assert report["ok"] is True
    assert report["input_sha256"] == plan["model"]
    assert all(node["weight_db"] is not None for node in plan["nodes"] if node["op_type"] == "Conv")
    again = run("--data", "data", "--plan", "plan.json")
    assert again.code == 0
    assert Path("out.onnx").read_bytes() == first


def test_a_refusal_leaves_the_file_there_as_it_was_and_has_the_figures(run: Run) -> None:
    Path("out.onnx").write_bytes(b"of yesterday")
    ran = run(
        "--data", "data", "--metric", "sqnr", "--max-drop", "0.1", "--json", "-", "--save-plan", "p.json"
    )
    assert ran.code == 1
    assert Path("out.onnx").read_bytes() == b"of yesterday"
    assert "nothing was written: no candidate keeps the budget; the nearest: sqnr 150 before" in " ".join(
        ran.err.split()
    )
    report = json.loads(ran.out)
    assert report["ok"] is False
    assert report["judgement"]["score"] > 20
    assert report["after"]["bytes"] < report["before"]["bytes"]
    assert json.loads(Path("p.json").read_text())["nodes"]


def test_the_last_check_can_refuse(run: Run) -> None:
    text = Path("metric.py").read_text()
    Path("metric.py").write_text(text.replace("score = 1.0", "import itertools\nscores = iter([1.0, 0.5])"))
    Path("metric.py").write_text(Path("metric.py").read_text().replace("else score", "else next(scores)"))
    ran = run(*SMALL, "--data", "data", "--metric", "metric.py:good", "--max-drop", "10%")
    assert ran.code == 1
    assert "the result does not keep the budget" in ran.out
    assert not Path("out.onnx").exists()


def test_nothing_to_quantize_is_no_success(run: Run) -> None:
    text = '<ir_version: 8, opset_import: ["": 13]> g (float[1,4] x) => (float[1,4] y) { y = Tanh(x) }'
    Path("model.onnx").write_bytes(onnx.parser.parse_model(text).SerializeToString())
    ran = run(*SMALL)
    assert ran.code == 1
    assert "nothing was written: nothing was quantized: there is nothing" in ran.out
    assert not Path("out.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--data", "gone"), "--data: gone: no such file or folder"),
        (("--scheme", "int9"), "unknown scheme 'int9'"),
        (("--target", "tpu"), "unknown target 'tpu'"),
        (("--target", "cuda"), "scheme int8 is not offered for target cuda"),
        (("--calibration", "best"), "unknown calibration method 'best'"),
        (("--metric", "f1"), "unknown metric 'f1'"),
        (("--metric", "metric.py:gone"), "gone"),
        (("--metric", "metric.py:fails"), "metric metric.py:fails: it failed: KeyError: 'labels'"),
        (("--max-drop", "-1"), "--max-drop '-1': expected a drop"),
        (("--keep", "layer9"), "--keep 'layer9': no node"),
        (("--also-isa", "sse9"), "unknown instruction set 'sse9'"),
        (("--plan", "gone.json"), "gone.json: the plan cannot be read"),
        (("--plan", "metric.py"), "metric.py: the plan is not JSON"),
        ((*SMALL, "--calibration", "mse"), "scheme weight-int8 has no use for --calibration"),
        ((*SMALL, "--save-plan", "p.json"), "scheme weight-int8 has no use for"),
        (("--json", "out.onnx"), "--json out.onnx: this is no report"),
        (("--save-plan", "model.onnx"), "--save-plan model.onnx: this is no report"),
        (("--plan", "p.json", "--json", "p.json"), "--json p.json: this is no report"),
        (("--save-plan", "no/p.json"), "no/p.json: cannot be written: there is no folder 'no'"),
        (("--for", "fun"), "'fun' is not one of"),
    ],
)
def test_bad_input_is_one_clear_line(run: Run, arguments: tuple[str, ...], said: str) -> None:
    data = () if "--data" in arguments else ("--data", "data")
    ran = run(*data, *arguments)
    assert ran.code == 2, ran.err
    assert said in ran.err
    assert ran.err.startswith("onnxopt: ")
    assert ran.err.count("\n") == 1
    assert not Path("out.onnx").exists()


def test_an_output_has_to_be_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["quantize", "model.onnx"])
    assert ended.value.code == 2
    assert "say where to write: -o OUT" in capsys.readouterr().err


def test_a_cpu_that_cannot_be_emulated_is_exit_3(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxopt.emulation.shutil.which", lambda _: None)
    ran = run("--data", "data", "--also-isa", "avx2")
    assert ran.code == 3
    assert "qemu-x86_64 is not installed" in ran.err
