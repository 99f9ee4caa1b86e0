"""Measure models against themselves: how far from 1 does the same file come out?

    python benchmarks/aa_control.py FOLDER_OR_MODEL ... [--seconds 10] [--threads 1] [--provider cpu]

Prints a markdown table. `ratio` times a model as if it were its own optimized form, `control` is the one that
every report carries; both should stay within 2 % of 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from onnxopt.benchmarking import bench
from onnxopt.errors import OnnxoptError

HEADER = """\
| model | ratio | control | ms | wall ratio | repeats x rounds x runs | load | verdict |
|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure models against themselves.")
    parser.add_argument("models", nargs="+", type=Path, help="model files, or folders of them")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for one model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    worst = 0.0
    print(HEADER)
    for path in (file for given in options.models for file in files(given)):
        try:
            timing = bench(
                path,
                path,
                provider=options.provider,
                threads=options.threads,
                seconds=options.seconds,
                seed=options.seed,
            )
        except OnnxoptError as error:
            print(f"| {path.stem} | {error} | | | | | | |", flush=True)
            continue
        worst = max(worst, abs(timing.ratio - 1), abs(timing.control_ratio - 1))
        figures = timing.figures
        load = timing.load_average[1]
        print(
            f"| {path.stem} | {figures.ratio} | {figures.control} | {timing.before_ms:.3g} "
            f"| {timing.wall.ratio} | {timing.repeats} x {timing.rounds} x {timing.batch} "
            f"| {'?' if load is None else f'{load:.1f}'} | {timing.verdict} |",
            flush=True,
        )
    print(f"\nFurthest from 1: {worst:.2%}")


def files(given: Path) -> list[Path]:
    return sorted(given.glob("*.onnx")) if given.is_dir() else [given]


if __name__ == "__main__":
    main()
