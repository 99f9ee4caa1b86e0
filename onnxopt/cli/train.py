"""`onnxopt train`"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxopt.cli.common import console, json_option, keep_apart, progress, write_json
from onnxopt.training.kinds import DistillRecipe, PruneRecipe, QatRecipe
from onnxopt.training.recipe import Recipe

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxopt.data import FeedSource
    from onnxopt.job import Progress
    from onnxopt.reporting.training import TrainingReport
    from onnxopt.result import Result

__all__ = ["command", "recovery"]

Command = typing.TypeVar("Command", bound=Callable[..., Any])


@click.group("train")
def command() -> None:
    """Train the graph itself; the result is the same graph with other weights.

    \b
    onnxopt train finetune model.onnx -o tuned.onnx --data train.npz --labels y
    """


def training_options(kind: type[Recipe]) -> Callable[[Command], Command]:
    """The options of every training, and one for each field of its recipe, all spelled as there."""

    def decorate(function: Command) -> Command:
        decorated: Any = json_option(function)
        for f in reversed(dataclasses.fields(kind)):
            flag = f"--{f.name.replace('_', '-')}"
            option: dict[str, Any] = {"help": kind.meanings[f.name], "default": None}
            if f.type == "bool":
                flag = f"{flag}/--no-{flag[2:]}"
            elif isinstance(f.default, tuple):
                shown = f"  [default: {' '.join(f.default)}]" if f.default else ""
                option |= {"help": f"{option['help']} Repeatable.{shown}", "multiple": True}
            elif f.default not in (None, "", "0", 0):
                option["help"] += f"  [default: {f.default}]"
            decorated = click.option(flag, f.name, **option)(decorated)
        for option_ in (
            click.option("--resume", is_flag=True, help="Go on from the checkpoint in OUT.train."),
            click.option("--recipe", type=click.Path(path_type=Path), help="A TOML file with these options."),
            click.option(
                "-o", "--output", type=click.Path(path_type=Path), help="Where to write the result."
            ),
            click.argument("model", type=click.Path(path_type=Path)),
        ):
            decorated = option_(decorated)
        return typing.cast(Command, decorated)

    return decorate


def run_training(
    function: str,
    model: Path,
    output: Path | None,
    recipe: Path | None,
    resume: bool,
    json_file: str | None,
    given: dict[str, Any],
) -> int:
    """Call the function of that name of `onnxopt.training`; print, and write what it gives."""
    import onnxopt.training
    from onnxopt.model import load
    from onnxopt.reporting.training_tables import print_training
    from onnxopt.storage import check_target, source_files

    if output is None:
        raise click.UsageError("say where to write: -o OUT")
    train = getattr(onnxopt.training, function)
    check_target(output)
    asked = {name: value for name, value in given.items() if value not in (None, ())}
    models = [model, *(Path(one) for one in _all_of(asked.get("teacher")) if one is not None)]
    others = (recipe, *(asked.get(name) for name in ("data", "validation", "test")))
    read = [*models, *(Path(one) for one in others if one is not None)]
    keep_apart(json_file, output, *read)
    weights = (file for one in models for file in source_files(load(one)) or ())
    if output.resolve() in (*(one.resolve() for one in read), *weights):
        raise click.UsageError(f"-o {output}: the training reads this file: give another one")
    folder = output.with_name(f"{output.name}.train")
    with progress() as show:
        result = train(model, recipe=recipe, folder=folder, resume=resume, progress=show, **asked)
        report = result.report
        if report.process[0]:
            return int(not report.ok)
        written = result.save(output) if report.ok else None
    print_training(report, console(json_file), written=written)
    write_json(report.to_dict(), json_file)
    return int(not report.ok)


def _all_of(given: Any) -> tuple[Any, ...]:
    """Of an option that may be given several times."""
    return given if isinstance(given, tuple) else (given,)


def recovery(
    model: Path, data: FeedSource | None, metric: str | None, recipe: Path | None, seed: int
) -> Callable[[ir.Model, Progress], Result[TrainingReport]]:
    """What trains a pruned model; what it needs is looked for before anything is pruned."""
    from onnxopt.data import read_feeds
    from onnxopt.model import load
    from onnxopt.training import recover

    if data is None:
        raise click.UsageError("--recover learns from real inputs, made-up ones teach nothing: give --data")
    samples = read_feeds(data, load(model))
    given = {} if metric is None else {"metric": metric}
    return lambda pruned, show: recover(
        pruned, model, samples, recipe=recipe, progress=show, **{"seed": seed, **given}
    )


@command.command("finetune")
@training_options(Recipe)
def finetune(
    model: Path, output: Path | None, recipe: Path | None, resume: bool, json_file: str | None, **given: Any
) -> int:
    """Train MODEL with a loss of its task, and save the epoch that is best in ONNX Runtime.

    \b
    onnxopt train finetune model.onnx -o tuned.onnx --data train.npz --labels y --epochs 5
    onnxopt train finetune model.onnx -o tuned.onnx --recipe recipe.toml --resume
    torchrun --nproc-per-node 2 -m onnxopt train finetune model.onnx -o tuned.onnx --recipe recipe.toml

    Log, checkpoint and best model lie in OUT.train. Exit codes: 0 written, 1 it got worse or diverged, 2 bad
    input.
    """
    return run_training("finetune", model, output, recipe, resume, json_file, given)


@command.command("distill")
@training_options(DistillRecipe)
def distill(
    model: Path, output: Path | None, recipe: Path | None, resume: bool, json_file: str | None, **given: Any
) -> int:
    """Train MODEL to say what its teachers say, with labels or without.

    \b
    onnxopt train distill small.onnx --teacher large.onnx -o out.onnx --data inputs.npz --epochs 20
    onnxopt train distill small.onnx --teacher large.onnx -o out.onnx --data train.npz --labels y
    onnxopt train distill small.onnx --teacher large.onnx -o out.onnx --data in.npz --match hidden=hidden_t

    Inputs have to be real ones: what a model says to noise teaches little.
    Exit codes: 0 written, 1 it got worse or diverged, 2 bad input.
    """
    return run_training("distill", model, output, recipe, resume, json_file, given)


@command.command("prune")
@training_options(PruneRecipe)
def prune(
    model: Path, output: Path | None, recipe: Path | None, resume: bool, json_file: str | None, **given: Any
) -> int:
    """Set weights of MODEL to zero, or cut its channels, and train the rest to do without them.

    \b
    onnxopt train prune model.onnx -o out.onnx --data train.npz --labels y --sparsity 0.9 --ramp cubic
    onnxopt train prune model.onnx -o out.onnx --data inputs.npz --nm 2:4
    onnxopt train prune model.onnx -o half.onnx --data inputs.npz --channels macs=0.5 --ramp cubic

    Without labels the model itself, as it was, is the teacher. `onnxopt prune --recover` trains what is left
    when channels or layers are cut at once. Exit codes: 0 written, 1 it got worse or diverged, 2 bad input.
    """
    return run_training("prune", model, output, recipe, resume, json_file, given)


@command.command("qat")
@training_options(QatRecipe)
def qat(
    model: Path, output: Path | None, recipe: Path | None, resume: bool, json_file: str | None, **given: Any
) -> int:
    """Train MODEL with its weights and activations in few bits, their scales included.

    \b
    onnxopt train qat model.onnx -o int4.onnx --data train.npz --labels y --weights int4 --epochs 10
    onnxopt train qat model.onnx -o int8.onnx --data unlabelled.npz
    onnxopt train qat quantized.onnx -o trained.onnx --data train.npz --labels y

    A float model is quantized first, all that can be, and what that gives is written where training gains
    nothing over it. Without labels it learns to give what the float model gives. Exit codes: 0 written, 1 a
    quantized model gained nothing, or training diverged, 2 bad input.
    """
    return run_training("train_qat", model, output, recipe, resume, json_file, given)
