"""The report of one training on a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from onnxopt.reporting.tables import amount, plain_table, print_written, size_table
from onnxopt.reporting.training import TrainingReport

__all__ = ["print_training"]

_ROWS = 12
"""Evaluations that are shown, at most."""


def print_training(report: TrainingReport, console: Console, *, written: Path | None) -> None:
    """Print how the training went, what it gained, and where the result is."""
    trained, known = (amount(one) for one in report.trained)
    of = f"trained {trained} of {known} parameters on {report.device}"
    console.print(f"[bold]{escape(report.source)}[/]  {report.command}  {of}")
    console.print()
    each = "step" if report.recipe["evaluate"] else "epoch"
    table = plain_table(f">{each}", ">loss", ">lr", f">{report.choice.metric}", "")
    rows = list(zip(*(report.curves[name] for name in ("loss", "lr", "score")), strict=True))
    every = max(-(-len(rows) // _ROWS), 1)
    for number, (loss, lr, score) in enumerate(rows, 1):
        best = number == report.best_epoch
        if best or number % every == 0:
            at = report.curves["step"][number - 1] if each == "step" else number
            table.add_row(str(at), f"{loss:.4g}", f"{lr:.3g}", f"{score:.4g}", "best" if best else "")
    console.print(table)
    console.print()
    console.print(size_table(report.before, report.after))
    console.print()
    for label, one in {"chosen by": report.choice, "score    ": report.final}.items():
        if label.startswith("score") or one != report.final:
            reference = one.before if one.start is None else one.start
            style = "green" if one.after > reference else "red" if one.after < reference else ""
            console.print(Text(f"{label} ", style="bold") + Text(one.summary, style=style))
    console.print(f"{report.steps} steps in {report.seconds:.1f} s")
    for note in report.notes:
        console.print(Text(f"note     {note}", style="dim"))
    if report.reason:
        said = "nothing was written" if written is None else "what is written was not trained"
        console.print(Text(f"{said}: {report.reason}", style="red"))
    if written is not None:
        print_written(written, (), console)
