"""`onnxopt unpack`"""

from __future__ import annotations

from pathlib import Path

import click

from onnxopt.cli.common import console, json_option, keep_apart, progress, write_json
from onnxopt.cli.pack import print_package

__all__ = ["command"]


@click.command("unpack")
@click.argument("package", metavar="PACK", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Where to write the model."
)
@json_option
def command(package: Path, output: Path, json_file: str | None) -> int:
    """Write the model that PACK holds, the same bytes, and its external data beside it.

    \b
    onnxopt unpack model.onnxpack -o model.onnx

    Nothing is written unless all checksums hold.
    """
    from onnxopt import unpack

    keep_apart(json_file, package, output)
    with progress() as show:
        found = unpack(package, output, progress=show)
    print_package(found, console(json_file))
    write_json({"schema": "onnxopt.unpack/1", **found.to_dict()}, json_file)
    return 0
