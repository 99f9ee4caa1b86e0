"""`onnxopt pack`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxopt.cli.common import console, json_option, keep_apart, progress, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from onnxopt import Package

__all__ = ["command", "print_package"]


@click.command("pack")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Where to write the pack."
)
@json_option
def command(model: Path, output: Path, json_file: str | None) -> int:
    """Write MODEL and its external data as one small file; nothing is lost.

    \b
    onnxopt pack model.onnx -o model.onnxpack
    onnxopt unpack model.onnxpack -o back.onnx

    All commands read a pack as they read a model. Needs zstandard: pip install 'onnxopt[pack]'.
    """
    from onnxopt import pack

    keep_apart(json_file, model, output)
    with progress() as show:
        package = pack(model, output, progress=show)
    print_package(package, console(json_file))
    write_json({"schema": "onnxopt.pack/1", **package.to_dict()}, json_file)
    return 0


def print_package(package: Package, out: Console) -> None:
    """The files and the codings of a pack, with their sizes."""
    from rich.text import Text

    from onnxopt.reporting.tables import count_bytes, plain_table

    table = plain_table("coding", ">blocks", ">bytes", ">packed", ">times smaller")
    for coding, (blocks, size, packed) in package.codings.items():
        row = (str(blocks), count_bytes(size), count_bytes(packed), f"{size / max(packed, 1):.2f}")
        table.add_row(Text(coding), *row)
    out.print(table)
    out.print()
    names = ", ".join(name for name, _ in package.files)
    sizes = f"{count_bytes(package.bytes)}, packed {count_bytes(package.packed_bytes)}"
    out.print(Text(f"{names}: {sizes}, {package.ratio:.2f} times smaller"))
