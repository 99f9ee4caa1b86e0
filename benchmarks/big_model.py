"""Peak memory and time of optimizing models above 2 GB, beside other tools and what the runtime needs.

    python benchmarks/big_model.py [--gigabytes 2.3] [--folder DIR] [--tools onnxopt onnx-ir onnxscript]

Three models with external data: one whose weights nothing changes, one whose weights can be scaled, and one
with each second weight behind a Transpose. Their data is written with holes, so it needs little disk until it
is saved again. Every tool loads, rewrites and saves in a process of its own, in turns; the fastest of
--repeat runs counts, since how fast pages are written depends on what else is being written. Peak memory is
the maximum of the resident set of each process, as the kernel counts it, mapped files included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers import ENVIRONMENTS, PEERS, Ran, run
from models.scale import big_model, transposed_model

_MEASURED = """
import json, resource, sys, time
started = time.perf_counter()
{body}
print(json.dumps([time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""
_RUN = """
import numpy as np
from onnxopt.data import synthesize
from onnxopt.runtimes import open_session
path = {source!r}
feeds = synthesize(path, samples=1)
for level in ("none", "all"):
    with open_session(path, level=level) as session:
        session.run(feeds[0])
"""
_OPTIMIZE = """
import onnxopt
result = onnxopt.optimize({source!r}, bench=False)
result.save({target!r})
assert not result.report.left_out
assert result.report.verdict.ok, result.report.verdict.summary
"""


def measure(body: str) -> tuple[float, int]:
    """Seconds and peak bytes of a Python process that runs `body`."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED.format(body=body)], check=True, stdout=subprocess.PIPE
    )
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def fastest(tool: str, environments: Path, source: Path, repeat: int) -> Ran:
    """The fastest run of a tool, saved beside the source and removed again."""
    runs = []
    for _ in range(repeat):
        target = source.parent / "out" / "model.onnx"
        target.parent.mkdir()
        os.sync()
        runs.append(run(PEERS[tool], environments, source, target, seconds=600))
        shutil.rmtree(target.parent)
    return min(runs, key=lambda ran: (bool(ran.fault), ran.wall))


def compare_tools(folder: Path, args: argparse.Namespace) -> None:
    builders: dict[str, Callable[[Path], Path]] = {
        "nothing to change": lambda place: big_model(place, args.gigabytes, scaled=False),
        "scaled weights": lambda place: big_model(place, args.gigabytes),
        "transposed weights": lambda place: transposed_model(place),
    }
    print("| model | tool | wall s | CPU s | peak MB |\n|---|---|---|---|---|")
    for what, build in builders.items():
        place = folder / what
        place.mkdir()
        source = build(place)
        for tool in args.tools:
            ran = fastest(tool, args.environments, source, args.repeat)
            told = ran.fault or f"{ran.wall:.2f} | {ran.cpu:.2f} | {ran.peak:.0f}"
            print(f"| {what} | {tool} | {told} |", flush=True)
        shutil.rmtree(place)


def compare_with_the_runtime(folder: Path, gigabytes: float) -> None:
    source = big_model(folder, gigabytes)
    target = folder / "out" / "model.onnx"
    target.parent.mkdir()
    names = {"source": str(source), "target": str(target)}
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    print(f"\nmodel: {size / 1e9:.2f} GB\n\n| what | seconds | peak GB | of the file |\n|---|---|---|---|")
    for what, body in {
        "runtime: load and run the original, twice": _RUN.format(**names),
        "optimize, verify and save": _OPTIMIZE.format(**names),
    }.items():
        seconds, peak = measure(body)
        print(f"| {what} | {seconds:.1f} | {peak / 1e9:.2f} | {peak / size:.2f} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.3)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--tools", nargs="*", default=["onnxopt", "onnx-ir", "onnxscript"])
    parser.add_argument(
        "--environments", type=Path, default=ENVIRONMENTS, help="where the tools are installed"
    )
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.tools:
            compare_tools(Path(folder), args)
        compare_with_the_runtime(Path(folder), args.gigabytes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
