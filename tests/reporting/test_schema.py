"""What commands write as JSON is as docs/report.schema.json says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from models.digits_cnn import PATH
from onnxopt.cli import main

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text())


def told(folder: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    """The report of a command that works in that folder, once it was found to follow the schema."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json", str(folder / "told.json")])
    assert ended.value.code == code
    report: dict[str, Any] = json.loads((folder / "told.json").read_text())
    jsonschema.validate(report, SCHEMA)
    return report


def test_the_schema_is_one_itself() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"schema": "onnxopt.prune/1"}, SCHEMA)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--weights", "--sparsity", "0.5", "--cluster", "bits=5"], 0),
        (["--channels", "--macs", "0.3", "--max-drop", "1%"], 1),
        (["--kernels", "energy=1.0"], 1),
    ],
)
def test_prune(arguments: Sequence[str], code: int, tmp_path: Path) -> None:
    out = ["-o", str(tmp_path / "out.onnx"), "--no-bench"]
    report = told(tmp_path, "prune", str(PATH), *out, *arguments, code=code)
    assert (report["schema"], report["ok"]) == ("onnxopt.prune/1", code == 0)


@pytest.mark.parametrize("scheme", ["int8", "dynamic"])
def test_quantize(scheme: str, tmp_path: Path) -> None:
    out = ["-o", str(tmp_path / "out.onnx"), "--no-bench", "--for", "size", "--scheme", scheme]
    report = told(tmp_path, "quantize", str(PATH), *out)
    assert (report["schema"], report["for"]) == ("onnxopt.quantize/1", "size")


def test_pack_and_unpack(tmp_path: Path) -> None:
    pytest.importorskip("zstandard", reason="packs need zstandard")
    pack, back = str(tmp_path / "net.onnxpack"), str(tmp_path / "back.onnx")
    there = told(tmp_path, "pack", str(PATH), "-o", pack)
    again = told(tmp_path, "unpack", pack, "-o", back)
    assert (there.pop("schema"), again.pop("schema")) == ("onnxopt.pack/1", "onnxopt.unpack/1")
    assert there["bytes"] == again["bytes"]


def test_train(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="training needs torch: pip install 'onnxopt[train]'")
    shape = (24, 1, 8, 8)
    np.savez(tmp_path / "data.npz", image=np.random.default_rng(0).random(shape, np.float32))
    data = ["--data", str(tmp_path / "data.npz"), "--epochs", "1", "--sparsity", "0.5"]
    report = told(tmp_path, "train", "prune", str(PATH), "-o", str(tmp_path / "out.onnx"), *data)
    assert (report["schema"], report["command"]) == ("onnxopt.train/1", "prune")
