"""One spelling of every option in TOML, in Python and as text; what cannot be read is told in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from onnxopt.cli.train import command
from onnxopt.errors import UsageError
from onnxopt.training.initialization import SCHEMES
from onnxopt.training.loop.losses import LOSSES
from onnxopt.training.loop.optimizers import OPTIMIZERS
from onnxopt.training.recipe import Recipe, read_recipe
from onnxopt.training.samples.transforms import TRANSFORMS
from onnxopt.training.schedules import SCHEDULES


def test_toml_python_and_text_give_the_same_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        'labels = ["y"]\nepochs = 3\nlr = 1\nbatch_size = 16\n'
        'compile = true\nmax_drop = 0.01\nmetric = "loss"\n'
    )
    python: dict[str, Any] = {
        "labels": "y",
        "epochs": 3,
        "lr": 1.0,
        "batch_size": 16,
        "compile": True,
        "max_drop": 0.01,
        "metric": "loss",
    }
    text = {**python, "epochs": "3", "lr": "1", "batch_size": "16", "compile": "true", "max_drop": "0.01"}
    wanted = Recipe(
        labels=("y",), epochs=3, lr=1.0, batch_size="16", compile=True, max_drop="0.01", metric="loss"
    )
    assert read_recipe(Recipe, tmp_path / "r.toml", {}) == wanted
    assert read_recipe(Recipe, None, python) == wanted
    assert read_recipe(Recipe, None, text) == wanted
    over = read_recipe(Recipe, tmp_path / "r.toml", {"epochs": 9})
    assert over == dataclasses.replace(wanted, epochs=9) == read_recipe(Recipe, wanted, {"epochs": "9"})


def test_every_option_is_documented_and_has_a_json_type() -> None:
    fields = [f.name for f in dataclasses.fields(Recipe)]
    assert list(Recipe.meanings) == fields == list(Recipe().to_dict())
    shown = Recipe(data=list, metric=max, test=Path("a")).to_dict()
    assert (shown["data"], shown["metric"], shown["test"]) == ("(list)", "(max)", "a")


def test_what_a_file_names_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "d.npz").write_bytes(b"")
    (tmp_path / "f.py").write_text("")
    (tmp_path / "p.toml").write_text("")
    (tmp_path / "r.toml").write_text(
        'data = "d.npz"\nloss = "f.py:focal"\ntest = "hf:digits:test"\npreprocess = "p.toml"\n'
    )
    found = read_recipe(Recipe, tmp_path / "r.toml", {})
    assert found.preprocess == str(tmp_path / "p.toml")
    assert found.data == str(tmp_path / "d.npz")
    assert found.loss == f"{tmp_path / 'f.py'}:focal"
    assert found.test == "hf:digits:test"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"epoch": 3}, r"train: unknown option 'epoch' \(did you mean 'epochs'\?\)"),
        ({"epochs": "many"}, "train: epochs: expected int, found 'many'"),
        ({"epochs": 2.5}, "train: epochs: expected int, found 2.5"),
        ({"epochs": True}, "train: epochs: expected int, found True"),
        ({"freeze": [1]}, r'train: freeze: expected a list of texts such as \["name"\], found \[1\]'),
        ({"precision": "bfloat"}, r"unknown value 'bfloat' \(did you mean 'bfloat16'\?\)"),
        ({"loss": [3]}, r"train: loss: expected str, found \[3\]"),
        ({"epochs": 0}, "epochs: 0 is less than 1"),
        ({"lr": float("nan")}, "lr: nan is less than 0"),
        ({"ema": 1.0}, "ema and holdout are at least 0 and less than 1"),
    ],
)
def test_what_cannot_be_read_is_told(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        read_recipe(Recipe, None, given)


def test_help_shows_the_defaults_of_lists() -> None:
    shown = " ".join(CliRunner().invoke(command, ["qat", "--help"]).output.split())
    assert "Repeatable. [default: scales{lr=10}]" in shown


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("epochs = \n")
    (tmp_path / "b.toml").write_text("epoch = 1\n")
    for name, told in {
        "a.toml": "not TOML",
        "b.toml": r"unknown option 'epoch' \(did you mean 'epochs'",
        "c.toml": "cannot be read: No such file",
    }.items():
        with pytest.raises(UsageError, match=f"recipe .*{name}: {told}"):
            read_recipe(Recipe, tmp_path / name, {})


def test_the_page_names_all_that_is_spelled_and_what_each_takes() -> None:
    page = (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8")
    for known in (LOSSES, OPTIMIZERS, SCHEDULES, SCHEMES, TRANSFORMS):
        for name, made in known.items():
            fields = dataclasses.fields(made) if isinstance(made, type) and name != "zeros" else ()
            taken = ",".join(one.name for one in fields if one.name != "input")
            assert f"`{name}{f'{{{taken}}}' if taken else ''}`" in page
