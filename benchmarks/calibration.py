"""Time, memory and ranges of calibration, beside ONNX Runtime's percentile calibrater.

    python benchmarks/calibration.py MODEL.onnx DATA        DATA: a folder of .npz, or one .npz

Each row is a process of its own; its peak includes Python, the runtime and the model. ONNX Runtime takes
samples of one shape only and keeps all tensors of all of them: it gets the first few of the commonest shape,
and onnxopt is measured on those as well.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxopt.data import Feeds, Samples, read_feeds

Row = dict[str, Any]


def ours(model: Path, samples: Sequence[Feeds]) -> Row:
    from onnxopt.calibration import METHODS, calibrate, choose_range
    from onnxopt.quantization.formats import FORMATS

    started = time.process_time()
    statistics = calibrate(model, samples)
    row: Row = {"calibrate": time.process_time() - started, "tensors": len(statistics)}
    for method in METHODS:
        started = time.process_time()
        found = {
            name: choose_range(one, method, FORMATS["uint8"], symmetric=False)
            for name, one in statistics.items()
        }
        row[method] = time.process_time() - started
        row[f"ranges of {method}"] = {name: (one.low, one.high) for name, one in found.items()}
    row["methods"] = Counter(one.method for one in found.values())
    return row


def theirs(model: Path, samples: Sequence[Feeds]) -> Row:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.samples = iter(samples)

        def get_next(self) -> Feeds | None:
            return next(self.samples, None)

    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        calibrator = create_calibrator(
            model,
            None,
            f"{folder}/augmented.onnx",
            CalibrationMethod.Percentile,
            extra_options={"symmetric": False},
        )
        calibrator.collect_data(Reader())
        data = calibrator.compute_data().data
    ranges = {name: [float(end) for end in one.range_value] for name, one in data.items()}
    return {
        "calibrate": time.process_time() - started,
        "tensors": len(ranges),
        "ranges of percentile": ranges,
    }


def noisy(samples: Sequence[Feeds], times: int) -> Samples:
    """The samples, over and over, each float array with another noise of 1 % of its spread."""

    def read(index: int) -> Feeds:
        rng = np.random.default_rng(index)
        return {
            name: (x + rng.standard_normal(x.shape) * 0.01 * x.std()).astype(x.dtype)
            if x.dtype.kind == "f"
            else x
            for name, x in samples[index % len(samples)].items()
        }

    return Samples(len(samples) * times, read)


def child(what: str, model: Path, data: str, count: int) -> None:
    samples: Sequence[Feeds] = read_feeds(data, model)
    if what == "repeated":
        samples = noisy(samples, 10)
    elif what.startswith("few"):
        shapes = [tuple(x.shape for x in sample.values()) for sample in samples]
        common = Counter(shapes).most_common(1)[0][0]
        samples = [samples[i] for i, shape in enumerate(shapes) if shape == common][:count]
    row = (theirs if what == "few theirs" else ours)(model, samples)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line.split()[1] for line in status if line.startswith("VmHWM"))
    print(json.dumps(row | {"samples": len(samples), "peak": int(peak) / 1024}))


def measured(what: str, arguments: argparse.Namespace) -> Row:
    command = [sys.executable, __file__, str(arguments.model), arguments.data, "--child", what]
    done = subprocess.run([*command, "--few", str(arguments.few)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    row: Row = json.loads(done.stdout)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("--few", type=int, default=8, help="samples that ONNX Runtime gets (8)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.model, arguments.data, arguments.few)
        return
    names = {
        "few ours": "onnxopt, few samples",
        "few theirs": "onnxruntime percentile, few samples",
        "all": "onnxopt, all samples",
        "repeated": "onnxopt, 10 times the samples",
    }
    print(f"{'':36}{'samples':>9}{'tensors':>9}{'CPU s':>9}{'s/sample':>10}{'peak MB':>9}")
    rows = {}
    for what, name in names.items():
        row = rows[what] = measured(what, arguments)
        each = row["calibrate"] / row["samples"]
        print(
            f"{name:36}{row['samples']:>9}{row['tensors']:>9}{row['calibrate']:>9.1f}{each:>10.3f}{row['peak']:>9.0f}"
        )
    ours_, theirs_ = rows["few ours"], rows["few theirs"]
    print(
        "\nchoosing the ranges, CPU s:", *(f"{m} {ours_[m]:.1f}" for m in ours_ if f"ranges of {m}" in ours_)
    )
    print("auto chose, on all samples:", dict(rows["all"]["methods"]))
    other = theirs_["ranges of percentile"]
    for method in (key.removeprefix("ranges of ") for key in ours_ if key.startswith("ranges of ")):
        own = ours_[f"ranges of {method}"]
        widths = [
            (own[n][1] - own[n][0]) / (max(other[n][1], 0) - min(other[n][0], 0))
            for n in own
            if n in other and max(other[n][1], 0) > min(other[n][0], 0)
        ]
        low, middle, high = np.quantile(widths, [0.05, 0.5, 0.95])
        print(
            f"width of {method:10} beside onnxruntime's: median {middle:.3f}, 5-95 % {low:.3f}-{high:.3f}, "
            f"of {len(widths)} tensors"
        )


if __name__ == "__main__":
    main()
