"""Lines of code by folder of onnxopt/; fails above the budget.

    python scripts/room_sizes.py --budget 40000

A line of code is neither blank nor only a comment, and no part of a docstring: what a pass says of
itself is printed by `onnxopt passes NAME`, and is to be as long as it needs.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

_SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def code_lines(text: str) -> int:
    """Lines of a Python source that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _SILENT and token.string:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=int, required=True, help="lines of code that onnxopt/ may have in all"
    )
    budget = parser.parse_args().budget
    root = Path(__file__).resolve().parents[1] / "onnxopt"
    lines: Counter[str] = Counter()
    whole = 0
    for file in sorted(root.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        lines[file.parent.relative_to(root.parent).as_posix()] += code_lines(text)
        whole += text.count("\n")
    for folder, count in sorted(lines.items()):
        print(f"{count:6} {folder}")
    total = sum(lines.values())
    print(f"{total:6} of {budget} lines of code; {whole} with docstrings, comments and blank lines")
    return int(total > budget)


if __name__ == "__main__":
    sys.exit(main())
