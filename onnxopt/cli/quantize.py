"""`onnxopt quantize`"""

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
    writable,
    write_json,
)
from onnxopt.data import FeedSource

__all__ = ["command"]


@click.command("quantize")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write the result.")
@data_option
@click.option("--scheme", default="int8", show_default=True, help="int8, dynamic, weight-int8, float16, ...")
@click.option("--target", default="cpu", show_default=True, help="cpu, arm, cuda, tensorrt or generic.")
@click.option(
    "--for",
    "goal",
    type=click.Choice(["speed", "size"]),
    default="speed",
    show_default=True,
    help="What has to be gained.",
)
@click.option("--metric", help="file.py:function called as metric(run), or agreement, mse, sqnr.")
@click.option("--max-drop", help="How much of the metric may be lost: 0.005, or 1%.")
@click.option(
    "--calibration",
    default="auto",
    show_default=True,
    help="min-max, average, percentile, entropy, mse or auto.",
)
@click.option(
    "--activation", help="Type of activations: uint8, int8, uint16, int16, float8e4m3fn, float8e5m2."
)
@click.option("--per-tensor", is_flag=True, help="One scale for a whole weight.")
@click.option("--symmetric", is_flag=True, help="Zero in the middle of the integers of activations.")
@click.option("--power-of-two", is_flag=True, help="Scales are powers of two.")
@click.option(
    "--keep", multiple=True, metavar="PATTERN", help="Nodes or operators to leave in float. Repeatable."
)
@click.option(
    "--plan",
    type=click.Path(path_type=Path),
    help="Take ranges and choice of nodes from a file of --save-plan, perhaps edited.",
)
@click.option(
    "--save-plan",
    metavar="FILE",
    callback=writable,
    help="Write what was chosen, what each node costs in accuracy, and the ranges, as JSON.",
)
@click.option(
    "--also-isa",
    multiple=True,
    metavar="ISA",
    help="Keep the budget on this emulated CPU, too: avx2. Repeatable.",
)
@click.option(
    "--freeze-initializers", is_flag=True, help="Quantize initializers that callers could override, too."
)
@shape_option
@seed_option
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Folder that keeps calibration for the next time."
)
@click.option(
    "--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes that calibrate."
)
@click.option(
    "--executor",
    type=click.Choice(["process", "ray"]),
    default="process",
    show_default=True,
    help="Where they run.",
)
@click.option("--no-bench", is_flag=True, help="Do not measure speed; trust the table of kernel costs.")
@click.option("--no-metadata", is_flag=True, help="Record nothing in the model's metadata.")
@click.option("--list-nodes", is_flag=True, help="Name each node, and what it costs in accuracy.")
@json_option
def command(
    model: Path,
    output: Path | None,
    data: FeedSource | None,
    scheme: str,
    target: str,
    goal: str,
    metric: str | None,
    max_drop: str | None,
    calibration: str,
    activation: str | None,
    per_tensor: bool,
    symmetric: bool,
    power_of_two: bool,
    keep: tuple[str, ...],
    plan: Path | None,
    save_plan: str | None,
    also_isa: tuple[str, ...],
    freeze_initializers: bool,
    shape: tuple[str, ...],
    seed: int,
    cache: Path | None,
    workers: int,
    executor: str,
    no_bench: bool,
    no_metadata: bool,
    list_nodes: bool,
    json_file: str | None,
) -> int:
    """Quantize MODEL, and save it if it keeps its accuracy and is faster, or smaller.

    \b
    onnxopt quantize model.onnx -o model.int8.onnx --data samples/
    onnxopt quantize model.onnx -o small.onnx --scheme weight-int4 --for size
    onnxopt quantize model.onnx -o model.int8.onnx --data images/ --metric eval.py:accuracy --max-drop 0.01

    Exit codes: 0 written, 1 the budget was not kept, nothing was gained or quantized, 2 bad input.
    """
    from onnxopt import quantize
    from onnxopt.reporting import session_file
    from onnxopt.reporting.quantization_tables import print_quantization
    from onnxopt.storage import check_target

    keep_apart(json_file, model, output, plan)
    keep_apart(save_plan, model, output, option="--save-plan")
    if output is None:
        raise click.UsageError("say where to write: -o OUT")
    check_target(output)
    keep_apart(json_file, session_file(output))
    with progress() as show:
        result = quantize(
            model,
            data=data,
            scheme=scheme,
            target=target,
            goal=goal,  # type: ignore[arg-type]  # click has checked the choice
            metric=metric,
            max_drop=max_drop,
            calibration=calibration,
            activation=activation,
            per_channel=not per_tensor,
            symmetric=symmetric,
            power_of_two=power_of_two,
            keep=keep,
            plan=plan,
            sensitivity=list_nodes or save_plan is not None,
            also_isa=also_isa,
            freeze_initializers=freeze_initializers,
            shapes=shapes_of(shape),
            seed=seed,
            bench=not no_bench,
            metadata=not no_metadata,
            cache=cache,
            workers=workers,
            executor=executor,  # type: ignore[arg-type]  # likewise
            progress=show,
        )
        written = result.save(output) if result.report.ok else None
    print_quantization(result.report, console(json_file), written=written, list_nodes=list_nodes)
    write_json(result.report.to_dict(), json_file)
    if result.report.plan is not None:
        write_json(result.report.plan, save_plan)
    return int(not result.report.ok)
