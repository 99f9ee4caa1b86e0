"""Reports as tables on a terminal: before and after at a glance."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from onnxopt.benchmarking import Timing
from onnxopt.benchmarking.settings import Setting
from onnxopt.pipeline import Step
from onnxopt.reporting.report import Report, Size, session_file
from onnxopt.verification import Verdict

__all__ = [
    "amount",
    "count_bytes",
    "plain_table",
    "print_report",
    "print_settings",
    "print_steps",
    "print_timing",
    "print_verdict",
    "print_written",
    "size_table",
]

_GOOD, _BAD, _DIM = "green", "red", "dim"


def plain_table(*columns: str, title: str | None = None) -> Table:
    """A table without lines; columns that start with `>` are right-aligned."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    return table


def amount(value: int | str, unit: str = "") -> str:
    """A count as people read it: `1 234`, `5.6 M`, `5.6 MB`; a formula in dynamic sizes is cut short.

    Where a part of the formula is not known, the rest is the least that it can be.
    """
    if value == "?":
        return "not known"
    if isinstance(value, str) and value.endswith(" + ?"):
        return f"at least {amount(value.removesuffix(' + ?'), unit)}"
    if isinstance(value, str):
        text = re.sub(r"\d{6,}", lambda number: amount(int(number[0])), value)
        return text if len(text) <= 32 else text[:31] + "…"
    for prefix, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if abs(value) >= max(size, 100_000):
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:,} {unit}".replace(",", " ").rstrip()


def count_bytes(value: int | str) -> str:
    """Bytes as people read them: `812 B`, `10.9 MB`."""
    return amount(value, "B")


def print_report(
    report: Report, console: Console, *, written: Path | None = None, list_declined: bool = False
) -> None:
    """Print what `optimize` did: sizes, passes, proof, speed, and where the result is."""
    console.print(f"[bold]{escape(report.source)}[/]  target {report.target}  passes {len(report.passes)}")
    console.print()
    console.print(size_table(report.before, report.after))
    if report.shapes:
        at = ", ".join(f"{name}={'x'.join(map(str, shape))}" for name, shape in report.shapes.items())
        console.print(Text(f"MACs at {at}", style=_DIM))
    console.print()
    print_steps(report, console, list_declined)
    console.print()
    if report.verdict is not None:
        print_verdict(report.verdict, console)
    if report.timing is not None:
        print_timing(report.timing, console)
    print_settings(report.settings, console)
    for note in report.notes:
        console.print(Text(f"note     {note}", style=_DIM))
    if written is not None:
        print_written(written, report.settings, console)


def print_settings(settings: Sequence[Setting], console: Console) -> None:
    """Print the settings that sessions of the result are to have."""
    for setting in settings:
        style = "yellow" if setting.purpose == "correctness" else ""
        console.print(Text("setting  ", style="bold") + Text(setting.summary, style=style))


def print_written(written: Path, settings: Sequence[Setting], console: Console) -> None:
    """Print where the result is, and the settings of its sessions."""
    console.print(f"[bold]written[/]  {escape(str(written))} ({count_bytes(written.stat().st_size)})")
    if settings:
        beside = escape(str(session_file(written)))
        console.print(f"[bold]written[/]  {beside} (settings for its sessions)")


def size_table(before: Size, after: Size) -> Table:
    """Before and after: nodes, weights, bytes, MACs."""
    table = plain_table("", ">before", ">after", ">change")
    rows: Mapping[str, tuple[int | str, int | str]] = {
        "nodes": (before.nodes, after.nodes),
        "initializers": (before.initializers, after.initializers),
        "parameters": (before.parameters, after.parameters),
        "bytes": (before.bytes, after.bytes),
        "MACs": (before.macs, after.macs),
    }
    for name, (old, new) in rows.items():
        unit = "B" if name == "bytes" else ""
        table.add_row(name, amount(old, unit), amount(new, unit), _change(old, new))
    return table


def _change(old: int | str, new: int | str) -> Text:
    if old == new:
        return Text("same", style=_DIM)
    if isinstance(old, str) or isinstance(new, str):
        return Text("changed")
    if not old:
        return Text(f"+{new}")
    share = (new - old) / old
    return Text(f"{share:+.1%}", style=_GOOD if share < 0 else "")


def print_steps(report: Report, console: Console, list_declined: bool) -> None:
    """Print what each pass did, where it declined, and what was left out."""
    quiet = [step.name for step in report.steps if not step.changes and not step.declined]
    table = plain_table("pass", ">changed", ">nodes", ">bytes", ">ms", "declined")
    for step in report.steps:
        if step.name not in quiet:
            table.add_row(
                step.name,
                str(step.changes),
                f"{step.nodes:+}" if step.nodes else "",
                _signed_bytes(step.bytes),
                f"{step.seconds * 1e3:.0f}",
                _declined(step),
            )
    if table.row_count:
        console.print(table)
    if quiet:
        console.print(Text(f"nothing to do: {', '.join(quiet)}", style=_DIM))
    if list_declined:
        for step in report.steps:
            for reason, sites in step.declined.items():
                for site in sites:
                    console.print(Text(f"  {step.name}: {site}: {reason}", style=_DIM))
    for left in report.left_out:
        console.print(Text(f"left out: {left.rewrite}: {left.reason}", style=_BAD))
    for profit in report.profits:
        console.print(Text(profit.summary, style=_DIM))


def _signed_bytes(change: int) -> str:
    return f"{'+' if change > 0 else '-'}{count_bytes(abs(change))}" if change else ""


def _declined(step: Step) -> Text:
    return Text("; ".join(f"{len(sites)}: {reason}" for reason, sites in step.declined.items()), style=_DIM)


def print_verdict(verdict: Verdict, console: Console) -> None:
    """The proof in one line, coloured by its outcome, and what has to be said about it."""
    style = _GOOD if verdict.status in ("proved", "measured") else _BAD
    console.print(Text("proof    ", style="bold") + Text(verdict.summary, style=style))
    for note in verdict.notes:
        console.print(Text(f"         {note}", style=_DIM))
    if verdict.emulated:
        print_verdict(verdict.emulated, console)


def print_timing(timing: Timing, console: Console) -> None:
    """The measurement in one line."""
    style = {"faster": _GOOD, "slower": _BAD}.get(timing.verdict, "")
    console.print(Text("speed    ", style="bold") + Text(timing.summary, style=style))
    loading = f"load {timing.open_before_ms:.3g} ms before, {timing.open_after_ms:.3g} ms after"
    where = f"{timing.runtime}, {timing.provider}, {timing.threads} thread(s), {timing.machine}"
    console.print(Text(f"         {loading}; {where}", style=_DIM))
