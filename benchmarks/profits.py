"""What guarded passes gain on the ONNX Runtime that is installed: rows for onnxopt/benchmarking/profits.toml.

    python benchmarks/profits.py                    on the CPU
    python benchmarks/profits.py --provider cuda
    pip install --target ort-1.27.0 --no-deps onnxruntime==1.27.0
    PYTHONPATH=ort-1.27.0 python benchmarks/profits.py

Each pass is timed on its own pattern, in pairs with an A/A control, at the runtime's default level.
"""

from __future__ import annotations

import argparse

from onnxopt.benchmarking import bench, machine
from onnxopt.benchmarking.profits import pattern_of, sizes_of
from onnxopt.examples import rewritten
from onnxopt.recipe import known_passes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--only", nargs="*", default=[], help="names of passes")
    asked = parser.parse_args()
    for name, factory in known_passes().items():
        if not getattr(factory, "pattern", "") or (asked.only and name not in asked.only):
            continue
        one = factory()
        before = pattern_of(one)  # type: ignore[arg-type]  # only a Pass has a pattern
        timing = bench(
            before,
            rewritten(one, before),
            provider=asked.provider,
            shapes=sizes_of(before),
            seconds=asked.seconds,
        )
        low, high = timing.interval
        print(
            f'  {{ pass = "{one}", provider = "{asked.provider}", runtime = "{timing.runtime.split()[1]}", '
            f"ratio = {timing.ratio:.3f}, interval = [{low:.3f}, {high:.3f}], "
            f'machine = "{machine().cpu}" }},',
            flush=True,
        )


if __name__ == "__main__":
    main()
