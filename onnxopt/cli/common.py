"""What the commands share: options of more than one command, progress, JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from onnxopt.data import Images, parse_shape, read_preprocess
from onnxopt.errors import ModelError, UsageError

__all__ = [
    "config_of",
    "console",
    "data_option",
    "json_option",
    "keep_apart",
    "progress",
    "seed_option",
    "session_option",
    "shape_option",
    "shapes_of",
    "writable",
    "write_json",
]

Command = TypeVar("Command", bound=Callable[..., Any])

_PREPROCESS = "onnxopt.preprocess"
"""Where the context of a command keeps what `--preprocess` says."""

shape_option = click.option(
    "--shape", "shape", multiple=True, metavar="NAME=1x3x224x224", help="Size of a dynamic input. Repeatable."
)
session_option = click.option(
    "--session-config",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting of the runtime's sessions (bench: of AFTER's alone). Repeatable.",
)
seed_option = click.option("--seed", default=0, show_default=True, help="Seed of synthetic samples.")


def data_option(command: Command) -> Command:
    """`--data`, and `--preprocess` for what it takes to read images; the command gets both as its `data`."""
    data = click.option(
        "--data",
        metavar="PATH",
        callback=_preprocessed,
        help="Samples: a folder of .npz, .npy or images, one .npz, or file.py:function.",
    )
    preprocess = click.option(
        "--preprocess",
        metavar="STEPS",
        is_eager=True,
        expose_value=False,
        callback=lambda context, _option, steps: context.meta.update({_PREPROCESS: steps}),
        help="How images become arrays: resize=256,crop=224,scale=1/255,mean=0.5,std=0.5, or a .toml file.",
    )
    return data(preprocess(command))


def _preprocessed(context: click.Context, _option: click.Parameter, data: str | None) -> str | Images | None:
    """The samples that `--data` names, read as `--preprocess` says."""
    steps = context.meta.get(_PREPROCESS)
    if steps is None:
        return data
    if data is None:
        raise UsageError("--preprocess says how --data is read: give --data with a folder of images")
    return Images(data, read_preprocess(steps))


def writable(_context: click.Context, _option: click.Parameter, json_file: str | None) -> str | None:
    """Refuse a place that cannot be written to, before any work is done for it."""
    if json_file is None or json_file == "-":
        return json_file
    path = Path(json_file)
    if path.is_dir():
        raise ModelError(f"{path}: cannot be written: it is a folder")
    if not path.parent.is_dir():
        raise ModelError(f"{path}: cannot be written: there is no folder {str(path.parent)!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ModelError(f"{path}: cannot be written: it is write-protected")
    return json_file


json_option = click.option(
    "--json",
    "json_file",
    metavar="FILE",
    callback=writable,
    help="Write the report as JSON; - for standard output.",
)


def shapes_of(given: Sequence[str]) -> Mapping[str, Sequence[int]] | None:
    """The `--shape` options as input name -> shape."""
    return dict(parse_shape(text) for text in given) or None


def config_of(given: Sequence[str]) -> dict[str, str]:
    """The `--session-config` options as key -> value."""
    config = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UsageError(f"--session-config {text!r}: expected KEY=VALUE")
        config[key.strip()] = value.strip()
    return config


def keep_apart(json_file: str | None, *others: Path | None, option: str = "--json") -> None:
    """Refuse a report that would be written over one of the other files, or over what is no report."""
    if json_file is None or json_file == "-":
        return
    place = Path(json_file).resolve()
    taken = any(other is not None and other.resolve() == place for other in others)
    if place.is_file() and option == "--json":
        with place.open("rb") as stream:
            taken = taken or stream.read(2) not in (b"", b"{\n")  # as reports begin
    if taken:
        raise UsageError(
            f"{option} {json_file}: this is no report, but a file of something else; give it one of its own"
        )


def console(json_file: str | None) -> Console:
    """Where tables go: standard output, or standard error while JSON goes to standard output."""
    return Console(stderr=json_file == "-", highlight=False, soft_wrap=False)


def write_json(report: Mapping[str, Any], json_file: str | None) -> None:
    """Write a report to a file or to standard output; do nothing where none is asked for."""
    if json_file is None:
        return
    text = json.dumps(report, indent=2, allow_nan=False)
    if json_file == "-":
        click.echo(text)
        return
    try:
        Path(json_file).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{json_file}: cannot be written: {error.strerror}") from None


@contextmanager
def progress() -> Iterator[Callable[[str, float | None], None]]:
    """A line on standard error that says what is being done; nothing where that is no terminal."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        console=Console(file=sys.stderr),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task("", total=None)

        def show(what: str, share: float | None) -> None:
            bar.update(task, description=what, total=None if share is None else 1.0, completed=share or 0.0)

        yield show
