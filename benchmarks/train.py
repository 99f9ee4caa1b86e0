"""The trainer's figures, by section: `python benchmarks/train.py SECTION --help`."""

from __future__ import annotations

import importlib
import sys

SECTIONS = {
    **dict.fromkeys(("distill", "prune"), "benchmarks.train_distill"),
    "peer": "benchmarks.train_peer",
    "producers": "benchmarks.train_producers",
    "qat": "benchmarks.train_qat",
    "real": "benchmarks.train_real",
    "step": "benchmarks.train_step",
}
"""Section -> the module whose `main` takes the section and the other arguments."""


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in SECTIONS:
        sys.exit(f"usage: python benchmarks/train.py {'|'.join(SECTIONS)} [options]")
    importlib.import_module(SECTIONS[arguments[0]]).main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
