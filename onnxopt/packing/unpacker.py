"""Take a pack apart: the files as they were, in a folder of their own until all of them are checked."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from onnxopt.errors import ModelError
from onnxopt.packing.coding import decode
from onnxopt.packing.container import Index, open_pack, read_block

__all__ = ["restore", "unpacked"]


def restore(pack: Path, folder: Path, progress: Callable[[str, float | None], None] | None = None) -> Index:
    """Write the files of a pack below a folder, which has to be empty; one block is in memory at a time.

    Raises:
        ModelError: the pack cannot be read or is damaged.
        OSError: the folder cannot be written to.
    """
    try:
        file = pack.open("rb")
    except OSError as error:
        raise ModelError(f"{pack}: cannot be read: {error.strerror}") from None
    with file:
        index, starts = open_pack(file, str(pack))
        for member in index.files:
            place = folder / member.name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch(exist_ok=False)
        done, total = 0, sum(member.size for member in index.files)
        for block, start, spans in zip(index.blocks, starts, index.spans(), strict=True):
            size = sum(span.size for span in spans)
            try:
                data = memoryview(decode(read_block(file, block, start), block.kind, size))
            except ValueError as error:
                raise ModelError(f"{pack}: the pack is damaged: {error}") from None
            for member, group in itertools.groupby(spans, key=lambda span: span.member):
                with (folder / index.files[member].name).open("rb+") as target:
                    for span in group:
                        target.seek(span.offset)
                        target.write(data[: span.size])
                        data = data[span.size :]
            done += size
            if progress:
                progress("unpacking", done / total)
    for restored in index.files:
        with (folder / restored.name).open("rb") as written:
            if hashlib.file_digest(written, "sha256").hexdigest() != restored.sha256:
                raise ModelError(
                    f"{pack}: the pack is damaged: {restored.name!r} is not the file that was packed"
                )
    return index


@contextmanager
def unpacked(pack: Path) -> Iterator[Path]:
    """The model's file, restored in a temporary folder that is removed at the end.

    Raises:
        ModelError: the pack cannot be read or is damaged, or there is no room for the files.
    """
    with tempfile.TemporaryDirectory(prefix="onnxopt-", ignore_cleanup_errors=True) as folder:
        try:
            index = restore(pack, Path(folder))
        except OSError as error:
            raise ModelError(f"{pack}: cannot be unpacked: {error.strerror or error}") from None
        yield Path(folder, index.files[0].name)
