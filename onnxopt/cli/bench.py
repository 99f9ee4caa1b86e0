"""`onnxopt bench`"""

from __future__ import annotations

from pathlib import Path

import click

from onnxopt.cli.common import (
    config_of,
    console,
    data_option,
    json_option,
    keep_apart,
    progress,
    seed_option,
    session_option,
    shape_option,
    shapes_of,
    write_json,
)
from onnxopt.data import FeedSource

__all__ = ["command"]


@click.command("bench")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--provider", default="cpu", show_default=True, help="cpu, cuda or tensorrt.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of a session.")
@click.option(
    "--seconds", type=click.FloatRange(0.1), default=10.0, show_default=True, help="Time to spend, about."
)
@shape_option
@data_option
@seed_option
@session_option
@json_option
def command(
    before: Path,
    after: Path,
    provider: str,
    threads: int,
    seconds: float,
    shape: tuple[str, ...],
    data: FeedSource | None,
    seed: int,
    session_config: tuple[str, ...],
    json_file: str | None,
) -> int:
    """Measure AFTER against BEFORE, and BEFORE against itself as the control.

    \b
    onnxopt bench model.onnx model.opt.onnx
    onnxopt bench model.onnx model.opt.onnx --provider cuda --shape input=8x3x224x224
    onnxopt bench m.onnx m.onnx --session-config optimization.disable_specified_optimizers=GeluFusionL2

    Exit codes: 0 measured, 2 bad input, 3 the provider cannot run here.
    """
    from onnxopt import bench
    from onnxopt.data import read_feeds
    from onnxopt.reporting.tables import plain_table, print_timing

    keep_apart(json_file, before, after)
    with progress() as show:
        timing = bench(
            before,
            after,
            provider=provider,
            feeds=None if data is None else list(read_feeds(data, before)),
            seed=seed,
            shapes=shapes_of(shape),
            threads=threads,
            seconds=seconds,
            session_config=config_of(session_config),
            progress=lambda share: show("measuring the speed", share),
        )
    out = console(json_file)
    table = plain_table("", ">before ms", ">after ms", ">after / before", ">control")
    for name, figures in (("CPU time", timing.cpu), ("wall time", timing.wall)):
        table.add_row(
            name,
            f"{figures.before_ms.value:.4g}",
            f"{figures.after_ms.value:.4g}",
            str(figures.ratio),
            str(figures.control),
        )
    out.print(table)
    out.print()
    print_timing(timing, out)
    write_json({"schema": "onnxopt.bench/1", **timing.to_dict()}, json_file)
    return 0
