"""The `onnxopt` command: finds the subcommand, loads only that, and turns errors into exit codes."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from onnxopt import __version__
from onnxopt.errors import OnnxoptError, did_you_mean

__all__ = ["cli", "main"]

_COMMANDS = {
    "bench": "Measure two models side by side.",
    "doctor": "Say what is installed, what really works, and how to mend the rest.",
    "inspect": "Say what a model is.",
    "optimize": "Rewrite a model, prove it, measure it, save it.",
    "quantize": "Quantize a model, and save it if it keeps its accuracy and gains.",
    "pack": "Write a model as one small file, without loss.",
    "passes": "List passes and recipes.",
    "prune": "Prune a model: fewer channels, zeros, shared weights, lower rank.",
    "train": "Train the graph itself: finetune it on your data.",
    "unpack": "Write the model that a pack holds.",
    "verify": "Prove that two models compute the same.",
}


class _Commands(click.Group):
    """Commands are imported when they are named, so that `--help` and bad usage answer at once."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"onnxopt.cli.{cmd_name}").command
        return command

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"unknown command {args[0]!r}{did_you_mean(args[0], _COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="onnxopt")
@click.option("-v", "--verbose", is_flag=True, help="On an error, show the traceback too.")
def cli(verbose: bool) -> None:
    """Optimize ONNX models: rewrite, prove, measure.

    \b
    onnxopt optimize model.onnx -o model.opt.onnx
    """


def main(arguments: Sequence[str] | None = None) -> Any:
    """Run the command line; exits with 0, or 1 to 4 as `onnxopt.errors` says."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = cli.main(given, prog_name="onnxopt", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("onnxopt: interrupted", err=True)
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        click.echo(f"onnxopt: {_one_line(error.format_message())}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        if "-v" in given or "--verbose" in given:
            traceback.print_exc()
        click.echo(f"onnxopt: {_one_line(_describe(error))}", err=True)
        sys.exit(_exit_code(error))
    sys.exit(code if isinstance(code, int) else 0)


def _describe(error: Exception) -> str:
    if isinstance(error, OnnxoptError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}; give smaller inputs with --shape or --data"
    return f"internal error: {type(error).__name__}: {error} (-v before the command shows the traceback)"


def _exit_code(error: Exception) -> int:
    if isinstance(error, OnnxoptError):
        return error.exit_code
    return 2 if isinstance(error, MemoryError) else 4


def _one_line(text: str) -> str:
    """A file name may hold line ends: they are shown as they are written in Python."""
    return "\\n".join(text.splitlines())
