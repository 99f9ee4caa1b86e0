"""`onnxopt prune`"""

from __future__ import annotations

from dataclasses import replace
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

__all__ = ["command", "spelled"]


@click.command("prune")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write the result.")
@click.option("--channels", is_flag=True, help="Cut channels out of the graph: smaller and faster.")
@click.option("--macs", type=float, help="Share of multiply-adds to keep.")
@click.option("--weights", is_flag=True, help="Set weights to zero: smaller once packed, not faster.")
@click.option("--sparsity", type=float, help="Share of zeros to reach.")
@click.option("--threshold", type=float, help="Zero what is smaller than this.")
@click.option("--nm", metavar="N:M", help="N of M in a row stay, as 2:4.")
@click.option("--scope", type=click.Choice(["global", "layer"]), help="What competes for the zeros.")
@click.option("--score", help="What goes first: l1, l2, random, wanda, obs; channels: bn-gamma, energy, ...")
@click.option(
    "--layers", type=click.IntRange(1), metavar="N", help="Drop the N residual blocks that matter least."
)
@click.option("--rank", metavar="OPTIONS", help="Factorize weights: energy=0.95.")
@click.option("--kernels", metavar="OPTIONS", help="Crop weak borders of kernels: energy=0.99.")
@click.option("--cluster", metavar="OPTIONS", help="Share weights: bits=5.")
@click.option(
    "--pass", "passes", multiple=True, metavar="PASS", help="A pass as a recipe spells it. Repeatable."
)
@click.option("--masks", type=click.Path(path_type=Path), help="Zero what a file of --save-masks says.")
@click.option("--save-masks", metavar="FILE", callback=writable, help="Write what is not zero, as .npz.")
@data_option
@click.option("--target", default="cpu", show_default=True, help="cpu, cuda, tensorrt or generic.")
@click.option("--metric", help="file.py:function called as metric(run), or agreement, mse, sqnr.")
@click.option("--max-drop", help="Prune less where more of the metric would be lost: 0.005, or 1%.")
@click.option("--recover", is_flag=True, help="Train what is left to say what MODEL says on --data.")
@click.option(
    "--recipe", type=click.Path(path_type=Path), help="How to recover: options of train prune, in TOML."
)
@click.option(
    "--freeze-initializers", is_flag=True, help="Prune initializers that callers could override, too."
)
@shape_option
@seed_option
@click.option("--no-bench", is_flag=True, help="Do not measure speed.")
@click.option("--no-metadata", is_flag=True, help="Record nothing in the model's metadata.")
@click.option("--list-layers", is_flag=True, help="Name each weight and its share of zeros.")
@json_option
def command(
    model: Path,
    output: Path | None,
    channels: bool,
    macs: float | None,
    weights: bool,
    sparsity: float | None,
    threshold: float | None,
    nm: str | None,
    scope: str | None,
    score: str | None,
    layers: int | None,
    rank: str | None,
    kernels: str | None,
    cluster: str | None,
    passes: tuple[str, ...],
    masks: Path | None,
    save_masks: str | None,
    data: FeedSource | None,
    target: str,
    metric: str | None,
    max_drop: str | None,
    recover: bool,
    recipe: Path | None,
    freeze_initializers: bool,
    shape: tuple[str, ...],
    seed: int,
    no_bench: bool,
    no_metadata: bool,
    list_layers: bool,
    json_file: str | None,
) -> int:
    """Prune MODEL: cut what matters least, say what that saves and what it costs.

    \b
    onnxopt prune model.onnx -o half.onnx --channels --macs 0.5 --data samples/
    onnxopt prune model.onnx -o sparse.onnx --weights --sparsity 0.9 --cluster bits=5
    onnxopt prune model.onnx -o out.onnx --channels --macs 0.5 --data samples/ --max-drop 1%
    onnxopt prune model.onnx -o half.onnx --channels --macs 0.5 --data samples/ --recover

    Exit codes: 0 written, 1 nothing was pruned or the budget was not kept, 2 bad input.
    """
    from onnxopt import prune
    from onnxopt.pruning.masks import read_masks, write_masks
    from onnxopt.pruning.weights import kept_elements
    from onnxopt.reporting.pruning_tables import print_pruning
    from onnxopt.reporting.training_tables import print_training
    from onnxopt.storage import check_target

    keep_apart(json_file, model, output, masks)
    keep_apart(save_masks, model, output, option="--save-masks")
    if output is None:
        raise click.UsageError("say where to write: -o OUT")
    check_target(output)
    of_weights = {"sparsity": sparsity, "threshold": threshold, "nm": nm, "scope": scope}
    asked = spelled(
        {
            "drop-layers": _options(number=layers) if layers else None,
            "prune-channels": _options(macs=macs, score=score) if channels else None,
            "factorize-weights": rank,
            "shrink-kernels": kernels,
            "prune-weights": _options(**of_weights, score=score) if weights else None,
            "cluster-weights": cluster,
        }
    )
    unused = [name for name, value in of_weights.items() if value is not None and not weights]
    unused += ["macs"] if macs is not None and not channels else []
    if unused:
        flag = "--channels" if unused[0] == "macs" else "--weights"
        raise click.UsageError(f"--{unused[0]} is of {flag}, which is not given")
    trained = None
    if recover:
        if any("cluster" in one for one in (*asked, *passes)):
            raise click.UsageError(
                "--recover would train apart what --cluster makes equal: cluster the result"
            )
        from onnxopt.cli.train import recovery

        learn = recovery(model, data, metric, recipe, seed)
    elif recipe is not None:
        raise click.UsageError("--recipe is of --recover, which is not given")
    with progress() as show:
        result = prune(
            model,
            [*asked, *passes],
            data=data,
            target=target,
            metric=metric,
            max_drop=max_drop,
            masks=read_masks(masks) if masks is not None else None,
            freeze_initializers=freeze_initializers,
            shapes=shapes_of(shape),
            seed=seed,
            bench=not no_bench,
            metadata=not no_metadata,
            progress=show,
        )
        if recover and result.report.ok:
            trained = learn(result.graph, show)
            result = replace(result, graph=trained.graph)
        written = result.save(output) if result.report.ok else None
    shown = console(json_file)
    print_pruning(result.report, shown, written=None if trained else written, list_layers=list_layers)
    report = result.report.to_dict()
    if trained is not None:
        print_training(trained.report, shown, written=written)
        report["recovered"] = trained.report.to_dict()
    write_json(report, json_file)
    if save_masks is not None and written is not None:
        write_masks(kept_elements(result.graph), save_masks)
    return int(not result.report.ok)


def spelled(options: dict[str, str | None]) -> list[str]:
    """Passes as recipes spell them: those whose options are given, if only as an empty text."""
    return [f"{name}{{{text}}}" if text else name for name, text in options.items() if text is not None]


def _options(**values: object) -> str:
    return ",".join(f"{name}={value}" for name, value in values.items() if value is not None)
