"""The wheel and the source distribution hold every pass and recipe, once."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_wheel_and_sdist_hold_every_pass_and_recipe_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = archive.namelist()
    with tarfile.open(sdist) as sources:
        in_sdist = [name.split("/", 1)[1] for name in sources.getnames()]
    files = (p for p in (ROOT / "onnxopt" / "passes").rglob("*") if p.suffix in (".py", ".toml"))
    expected = sorted(p.relative_to(ROOT).as_posix() for p in files)
    for listing in (in_wheel, in_sdist):
        assert (
            sorted(n for n in listing if "passes/" in n and n.startswith(("onnxopt", "passes"))) == expected
        )
        assert "onnxopt/py.typed" in listing
