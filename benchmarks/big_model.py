"""Peak memory and time of optimizing a model above 2 GB, against what the runtime needs to run it.

    python benchmarks/big_model.py [--gigabytes 2.3] [--folder DIR]

The model's external data is written with holes, so it needs little disk until it is saved again. Peak memory
is the maximum of the resident set of each process, as the kernel counts it, mapped files included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from models.scale import big_model

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
result = onnxopt.optimize({source!r}, bench=False, verify={verify})
result.save({target!r})
assert not result.report.left_out
assert not {verify} or result.report.verdict.ok, result.report.verdict.summary
"""


def measure(body: str) -> tuple[float, int]:
    """Seconds and peak bytes of a Python process that runs `body`."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED.format(body=body)], check=True, stdout=subprocess.PIPE
    )
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.3)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = big_model(folder, args.gigabytes)
        target = Path(folder) / "out" / "model.onnx"
        target.parent.mkdir()
        names = {"source": str(source), "target": str(target)}
        size = sum(file.stat().st_size for file in Path(folder).iterdir() if file.is_file())
        print(f"model: {size / 1e9:.2f} GB\n\n| what | seconds | peak GB | of the file |\n|---|---|---|---|")
        for what, body in {
            "runtime: load and run the original, twice": _RUN.format(**names),
            "optimize and save, structure only": _OPTIMIZE.format(verify=False, **names),
            "optimize, verify and save": _OPTIMIZE.format(verify=True, **names),
        }.items():
            seconds, peak = measure(body)
            print(f"| {what} | {seconds:.1f} | {peak / 1e9:.2f} | {peak / size:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
