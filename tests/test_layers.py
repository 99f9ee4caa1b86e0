"""The arrows of the house: who may import whom; and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import onnxopt

ROOT = Path(onnxopt.__file__).parent
ENGINE = {
    "attempt",
    "claims",
    "collector",
    "admission",
    "boxes",
    "errors",
    "graph",
    "index",
    "inference",
    "ledger",
    "model",
    "pattern",
    "pipeline",
    "protobuf",
    "recipe",
    "rewrite",
    "scope",
    "storage",
    "streamed",
    "structure",
    "subpattern",
    "targets",
}
DOORS = {"recipe": {"passes"}, "model": {"packing"}, "storage": {"packing"}}
"""Modules of the engine that open a room: passes by their names, and packs as models."""
FORBIDDEN_IN_PASSES = {
    "api",
    "benchmarking",
    "cli",
    "emulation",
    "packing",
    "reporting",
    "runtimes",
    "training",
    "tuning",
    "verification",
}


def imports_of(file: Path, below: str = "onnxopt.") -> set[str]:
    """First names below `onnxopt.` of all that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.removeprefix(below).split(".")[0] for name in names if name and name.startswith(below)}
    return found


def test_passes_import_only_the_engine_below_them() -> None:
    files = sorted((ROOT / "passes").rglob("*.py"))
    assert len(files) > 3
    for file in files:
        assert not imports_of(file) & FORBIDDEN_IN_PASSES, file.name


def test_the_engine_imports_no_room_and_no_single_pass() -> None:
    for name in ENGINE:
        file = ROOT / f"{name}.py"
        allowed = ENGINE | DOORS.get(name, set())
        assert imports_of(file) <= allowed, name
        assert "onnxopt.passes." not in file.read_text(encoding="utf-8").replace("onnxopt.passes.toml", ""), (
            name
        )


def test_library_rooms_do_not_import_the_command_line() -> None:
    for file in sorted(ROOT.rglob("*.py")):
        if "cli" not in file.parts and file.name != "__main__.py":
            assert "cli" not in imports_of(file), file


def test_the_trainer_has_one_door() -> None:
    users = {
        file.relative_to(ROOT).as_posix() for file in ROOT.rglob("*.py") if "training" in imports_of(file)
    }
    assert {name for name in users if not name.startswith("training/")} == {"cli/train.py"}


def test_the_rooms_of_the_trainer_stand_on_one_another() -> None:
    below = {
        "interpreter": set[str](),
        "samples": {"schedules"},
        "loop": {"interpreter", "recipe", "samples", "schedules", "seeds"},
    }
    for room, allowed in below.items():
        for file in sorted((ROOT / "training" / room).rglob("*.py")):
            assert imports_of(file, below="onnxopt.training.") <= allowed | {room}, file


def test_without_torch_the_trainer_says_what_it_needs() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import onnxopt.cli as c\n"
        "c.main(['train', 'finetune', 'm.onnx', '-o', 'o.onnx', '--data', 'd.npz'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "onnxopt: training needs torch: pip install 'onnxopt[train]'\n"


def test_all_public_names_resolve_and_are_sorted() -> None:
    assert onnxopt.__all__ == sorted(onnxopt.__all__)
    for name in onnxopt.__all__:
        assert getattr(onnxopt, name) is not None
    assert set(onnxopt.__all__) == set(onnxopt._HOMES) | {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        getattr(onnxopt, "nope")  # noqa: B009 - an attribute that mypy knows is not there


def test_import_loads_nothing_heavy() -> None:
    heavy = "('numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'rich')"
    code = f"import sys, onnxopt; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_and_bad_usage_load_nothing_heavy() -> None:
    code = (
        "import sys, onnxopt.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: print([m for m in ('numpy', 'onnx', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_the_package_cannot_be_imported_under_the_name_of_the_link() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import passes"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    assert "import onnxopt.passes, not 'passes'" in done.stderr
