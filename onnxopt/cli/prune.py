"""`onnxopt prune`"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from onnx_ir.passes import PassBase

__all__ = ["command", "spelled"]


_AMOUNTS: Mapping[str, Mapping[str, tuple[Any, str]]] = {
    "channels": {
        "macs": (float, "Share of multiply-adds to keep."),
        "parameters": (float, "Instead, share of parameters to keep."),
        "ratio": (float, "Instead, share of the channels that go."),
    },
    "weights": {
        "sparsity": (float, "Share of zeros to reach."),
        "threshold": (float, "Instead, zero what is smaller than this."),
        "percentile": (float, "Instead, zero what is smaller than this percentile (0 to 100)."),
        "nm": (str, "Instead, N of M in a row stay, as 2:4."),
        "scope": (click.Choice(["global", "layer", "row"]), "What competes for the zeros."),
        "protect": (str, "Layers that stay: first, last, depthwise (the default), or none: first+last."),
        "small": (click.IntRange(0), "Weights of fewer elements stay.  [default: 64]"),
    },
}
"""Flag -> the options of its pass: what they are, and what they say."""


def _amounts_of(flag: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """The options of a flag's pass."""

    def decorate(function: Callable[..., int]) -> Callable[..., int]:
        for name, (kind, said) in reversed(list(_AMOUNTS[flag].items())):
            function = click.option(f"--{name}", type=kind, help=said)(function)
        return function

    return decorate


@click.command("prune")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write the result.")
@click.option("--channels", is_flag=True, help="Cut channels out of the graph: smaller and faster.")
@_amounts_of("channels")
@click.option("--latency", type=float, help="Share of the time to keep, as measured, by the least pruning.")
@click.option("--weights", is_flag=True, help="Set weights to zero: smaller once packed, not faster.")
@_amounts_of("weights")
@click.option(
    "--score", help="What goes first: l1, l2, random (by --seed), wanda, obs; channels: bn-gamma, energy."
)
@click.option(
    "--layers", type=click.IntRange(1), metavar="N", help="Drop the N residual blocks that matter least."
)
@click.option("--rank", metavar="OPTIONS", help="Factorize weights: energy=0.95.")
@click.option("--kernels", metavar="OPTIONS", help="Crop weak borders of kernels: energy=0.99.")
@click.option("--cluster", metavar="OPTIONS", help="Share weights: bits=5.")
@click.option(
    "--pass", "passes", multiple=True, metavar="PASS", help="A pass as a recipe spells it. Repeatable."
)
@click.option("--recipe", help="The passes of a TOML file, behind those of other options.")
@click.option("--masks", type=click.Path(path_type=Path), help="Zero what a file of --save-masks says.")
@click.option("--save-masks", metavar="FILE", callback=writable, help="Write what is not zero, as .npz.")
@data_option
@click.option("--target", default="cpu", show_default=True, help="cpu, cuda, tensorrt or generic.")
@click.option("--metric", help="file.py:function called as metric(run), or agreement, mse, sqnr.")
@click.option("--max-drop", help="Prune less where more of the metric would be lost: 0.005, or 1%.")
@click.option("--recover", is_flag=True, help="Train what is left to say what MODEL says on --data.")
@click.option("--recover-with", type=click.Path(path_type=Path), help="How: options of train prune, in TOML.")
@click.option(
    "--freeze-initializers", is_flag=True, help="Prune initializers that callers could override, too."
)
@shape_option
@seed_option
@click.option("--no-bench", is_flag=True, help="Do not measure speed.")
@click.option("--no-metadata", is_flag=True, help="Record nothing in the model's metadata.")
@click.option("--list-layers", is_flag=True, help="Name groups of channels, weights, and what parts cost.")
@json_option
def command(
    model: Path,
    output: Path | None,
    channels: bool,
    latency: float | None,
    weights: bool,
    score: str | None,
    layers: int | None,
    rank: str | None,
    kernels: str | None,
    cluster: str | None,
    passes: tuple[str, ...],
    recipe: str | None,
    masks: Path | None,
    save_masks: str | None,
    data: FeedSource | None,
    target: str,
    metric: str | None,
    max_drop: str | None,
    recover: bool,
    recover_with: Path | None,
    freeze_initializers: bool,
    shape: tuple[str, ...],
    seed: int,
    no_bench: bool,
    no_metadata: bool,
    list_layers: bool,
    json_file: str | None,
    **amounts: Any,
) -> int:
    """Prune MODEL: cut what matters least, say what that saves and what it costs.

    \b
    onnxopt prune model.onnx -o half.onnx --channels --macs 0.5 --data samples/
    onnxopt prune model.onnx -o fast.onnx --channels --latency 0.65 --data samples/
    onnxopt prune model.onnx -o sparse.onnx --weights --sparsity 0.9 --cluster bits=5
    onnxopt prune model.onnx -o sparse.onnx --weights --percentile 80 --protect first+last+depthwise
    onnxopt prune model.onnx -o out.onnx --channels --macs 0.5 --data samples/ --max-drop 1%
    onnxopt prune model.onnx -o half.onnx --channels --macs 0.5 --data samples/ --recover

    Exit codes: 0 written, 1 nothing was pruned or the budget was not kept, 2 bad input.
    """
    from onnxopt import prune
    from onnxopt.pruning.masks import read_masks, write_masks
    from onnxopt.pruning.weights import kept_elements
    from onnxopt.recipe import load_recipe
    from onnxopt.reporting.pruning_tables import print_pruning
    from onnxopt.reporting.training_tables import print_training
    from onnxopt.storage import check_target

    keep_apart(json_file, model, output, masks)
    keep_apart(save_masks, model, output, masks, Path(json_file or ""), option="--save-masks")
    if output is None:
        raise click.UsageError("say where to write: -o OUT")
    check_target(output)
    if amounts["protect"] is not None:
        amounts["protect"] = amounts["protect"].replace(",", "+").replace("none", "")
    of_channels, of_weights = ({name: amounts[name] for name in names} for names in _AMOUNTS.values())
    drawn = seed if score == "random" else None
    asked = spelled(
        {
            "drop-layers": _options(number=layers) if layers else None,
            "prune-channels": _options(**of_channels, score=score, seed=drawn) if channels else None,
            "factorize-weights": rank,
            "shrink-kernels": kernels,
            "prune-weights": _options(**of_weights, score=score, seed=drawn) if weights else None,
            "cluster-weights": cluster,
        }
    )
    _require_use(of_channels, "--channels", channels)
    _require_use(of_weights, "--weights", weights)
    more = load_recipe(recipe).passes if recipe is not None else ()
    chosen: list[str | PassBase] = [*asked, *passes, *more]
    _require_use({"masks": masks}, "--weights", any("prune-weights" in str(one) for one in chosen))
    _require_use({"score": score}, "--weights and --channels", weights or channels)
    trained = None
    _require_use({"recover-with": recover_with}, "--recover", recover)
    if recover:
        if any("cluster" in str(one) for one in chosen):
            raise click.UsageError("--recover trains apart what --cluster makes equal: cluster the result")
        from onnxopt.cli.train import recovery

        learn = recovery(model, data, metric, recover_with, seed)
    with progress() as show:
        result = prune(
            model,
            chosen,
            data=data,
            target=target,
            metric=metric,
            max_drop=max_drop,
            latency=latency,
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
            trained = replace(trained, report=replace(trained.report, source=str(model)))
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


def _require_use(options: Mapping[str, object], of: str, given: bool) -> None:
    for name, value in options.items():
        if value is not None and not given:
            raise click.UsageError(f"--{name} is of {of}, which is not given")


def _options(**values: object) -> str:
    return ",".join(f"{name}={value}" for name, value in values.items() if value is not None)
