"""`onnxopt optimize`"""

from __future__ import annotations

from pathlib import Path

import click

from onnxopt.cli.common import (
    console,
    data_option,
    json_option,
    keep_apart,
    progress,
    seed_option,
    shape_option,
    shapes_of,
    write_json,
)
from onnxopt.data import FeedSource

__all__ = ["command"]


@click.command("optimize")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write the result.")
@click.option("--target", default="cpu", show_default=True, help="cpu, cuda, tensorrt or generic.")
@click.option("--recipe", help="A shipped recipe or a TOML file, instead of the target's.")
@click.option(
    "--pass", "passes", multiple=True, metavar="PASS", help="Run this pass only. Repeatable, in order."
)
@click.option("--skip", multiple=True, metavar="PASS", help="Leave this pass out. Repeatable.")
@click.option("--stop-after", type=click.IntRange(0), metavar="N", help="Make N rewrites, then stop.")
@click.option(
    "--freeze-initializers", is_flag=True, help="Fold initializers that callers could override, too."
)
@shape_option
@data_option
@seed_option
@click.option("--no-verify", is_flag=True, help="Check structure only, not the numbers.")
@click.option("--no-bench", is_flag=True, help="Do not measure speed.")
@click.option("--no-metadata", is_flag=True, help="Record nothing in the model's metadata.")
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@click.option(
    "--strict",
    is_flag=True,
    help="Exit 1 and write nothing where a rewrite was left out or nothing was gained.",
)
@click.option("--list-declined", is_flag=True, help="Name each place where a pass declined.")
@json_option
def command(
    model: Path,
    output: Path | None,
    target: str,
    recipe: str | None,
    passes: tuple[str, ...],
    skip: tuple[str, ...],
    stop_after: int | None,
    freeze_initializers: bool,
    shape: tuple[str, ...],
    data: FeedSource | None,
    seed: int,
    no_verify: bool,
    no_bench: bool,
    no_metadata: bool,
    dry_run: bool,
    strict: bool,
    list_declined: bool,
    json_file: str | None,
) -> int:
    """Rewrite MODEL, prove that its numbers hold, measure its speed, and save it.

    \b
    onnxopt optimize model.onnx -o model.opt.onnx
    onnxopt optimize model.onnx -o small.onnx --shape input=1x3x224x224 --no-bench
    onnxopt optimize model.onnx --dry-run --list-declined --pass fold-batchnorm

    Exit codes: 0 done and proved, 1 with --strict where something was left out, 2 bad input.
    """
    from onnxopt import optimize
    from onnxopt.reporting import session_file
    from onnxopt.reporting.tables import print_report
    from onnxopt.storage import check_target

    keep_apart(json_file, model, output)
    if output is None and not dry_run:
        raise click.UsageError("say where to write: -o OUT (or --dry-run)")
    if output is not None:
        check_target(output)
        keep_apart(json_file, session_file(output))
    with progress() as show:
        result = optimize(
            model,
            target=target,
            recipe=recipe,
            passes=passes,
            skip=skip,
            freeze_initializers=freeze_initializers,
            stop_after=stop_after,
            data=data,
            shapes=shapes_of(shape),
            seed=seed,
            verify=not no_verify,
            bench=not no_bench,
            metadata=not no_metadata,
            progress=show,
        )
        refused = strict and not result.report.clean
        written = None if dry_run or refused or output is None else result.save(output)
    print_report(result.report, console(json_file), written=written, list_declined=list_declined)
    write_json(result.report.to_dict(), json_file)
    return int(refused)
