"""Models as small files for shipping, lossless over the files of the model.

A pack holds the bytes of the model's file and of its external data, cut into blocks. A block is a piece of
one weight, several small weights of one type, or what lies between the weights. Each is coded by itself in
the smallest of several ways, see `onnxopt.packing.coding`, so that neither way needs more than one in memory.
"""

from __future__ import annotations

import os

__all__ = ["MAGIC", "is_packed"]

MAGIC = b"\x89ONNXPK\n"
"""The first bytes of a pack. No model starts so: as a protobuf, it is field 1265, of eight bytes."""


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether the file is a pack; a path that cannot be read is none."""
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False
