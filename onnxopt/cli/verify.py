"""`onnxopt verify`"""

from __future__ import annotations

import math
from pathlib import Path

import click

from onnxopt.cli.common import (
    config_of,
    console,
    data_option,
    json_option,
    keep_apart,
    seed_option,
    session_option,
    shape_option,
    shapes_of,
    write_json,
)
from onnxopt.data import FeedSource

__all__ = ["command"]


@click.command("verify")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option(
    "--kind",
    type=click.Choice(["exact", "reorder", "lossy"]),
    default="reorder",
    show_default=True,
    help="The claim: bit-equal, equal up to float re-association, or just measured.",
)
@click.option("--provider", default="cpu", show_default=True, help="cpu, cuda or tensorrt.")
@click.option(
    "--isa", metavar="NAME", help="Also run on an emulated CPU: avx2 has no VNNI. Needs Linux and qemu-user."
)
@click.option(
    "--frozen", is_flag=True, help="AFTER may have lost initializers that BEFORE let callers override."
)
@shape_option
@data_option
@seed_option
@session_option
@json_option
def command(
    before: Path,
    after: Path,
    kind: str,
    provider: str,
    isa: str | None,
    frozen: bool,
    shape: tuple[str, ...],
    data: FeedSource | None,
    seed: int,
    session_config: tuple[str, ...],
    json_file: str | None,
) -> int:
    """Prove that AFTER computes what BEFORE does.

    \b
    onnxopt verify model.onnx model.opt.onnx
    onnxopt verify model.onnx model.opt.onnx --data samples/ --kind exact
    onnxopt verify model.onnx model.int8.onnx --data samples/ --kind lossy --isa avx2

    Exit codes: 0 proved, 1 not proved, 2 bad input, 3 the provider cannot run here, or the CPU be emulated.
    """
    from onnxopt import verify
    from onnxopt.data import read_feeds
    from onnxopt.reporting.tables import plain_table, print_verdict

    keep_apart(json_file, before, after)
    verdict = verify(
        before,
        after,
        feeds=None if data is None else read_feeds(data, before),
        seed=seed,
        shapes=shapes_of(shape),
        kind=kind,  # type: ignore[arg-type]  # click has checked the choice
        provider=provider,
        frozen=frozen,
        session_config=config_of(session_config),
        isa=isa,
    )
    out = console(json_file)
    table = plain_table(
        "output", ">SQNR dB", ">floor dB", ">needed dB", ">max error", ">cosine", ">top-1", ""
    )

    def number(value: float | None, digits: str = ".1f") -> str:
        return "" if value is None else "equal" if value == math.inf else f"{value:{digits}}"

    rows = [(output, output.name) for output in verdict.outputs]
    rows += [(output, f"{output.name} ({isa})") for output in getattr(verdict.emulated, "outputs", ())]
    for output, shown in rows:
        table.add_row(
            shown,
            number(output.sqnr),
            number(output.floor),
            "" if output.required is None else number(output.required),
            f"{output.max_error:.2g}",
            number(output.cosine, ".6f"),
            number(output.top1, ".4f"),
            "" if output.sight == "compared" else output.sight,
        )
    if verdict.outputs:
        out.print(table)
        out.print()
    print_verdict(verdict, out)
    write_json({"schema": "onnxopt.verify/1", **verdict.to_dict()}, json_file)
    return int(not verdict.ok)
