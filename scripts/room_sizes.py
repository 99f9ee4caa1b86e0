"""Lines of Python by folder of onnxopt/; fails above the budget.

python scripts/room_sizes.py --budget 20000
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=int, required=True, help="lines that onnxopt/ may have in all")
    budget = parser.parse_args().budget
    root = Path(__file__).resolve().parents[1] / "onnxopt"
    lines: Counter[str] = Counter()
    for file in sorted(root.rglob("*.py")):
        lines[file.parent.relative_to(root.parent).as_posix()] += len(
            file.read_text(encoding="utf-8").splitlines()
        )
    for folder, count in sorted(lines.items()):
        print(f"{count:6} {folder}")
    total = sum(lines.values())
    print(f"{total:6} of {budget} lines")
    return int(total > budget)


if __name__ == "__main__":
    sys.exit(main())
