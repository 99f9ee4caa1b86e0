"""The report of one `prune` on a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from onnxopt.claims import spelling
from onnxopt.reporting.pruning import PruningReport
from onnxopt.reporting.tables import (
    amount,
    count_bytes,
    plain_table,
    print_settings,
    print_timing,
    print_written,
    size_table,
)

__all__ = ["print_pruning"]


def print_pruning(
    report: PruningReport, console: Console, *, written: Path | None, list_layers: bool = False
) -> None:
    """Print what went, what it saves and what it costs, and where the result is."""
    best = report.searched.best
    console.print(f"[bold]{escape(report.source)}[/]  target {report.target}")
    console.print()
    table = size_table(report.before, report.after)
    if report.packed is not None:
        table.add_row(
            "packed", *map(count_bytes, report.packed), f"{report.packed[1] / report.packed[0] - 1:+.1%}"
        )
    console.print(table)
    console.print()
    for one, step in zip(best.passes, best.steps, strict=True):
        console.print(Text(f"{spelling(one)}: {step.changes} changes"))
        for reason, sites in step.declined.items():
            console.print(Text(f"  left: {len(sites)} x {reason}, first {sites[0]}", style="yellow"))
    if list_layers:
        _print_layers(report, console)
    for trial in report.searched.trials if len(report.searched.trials) > 1 else ():
        time = "" if trial.time is None else f"{trial.time:.3f} of the time, "
        said = Text(time + trial.summary, style="green" if trial.ok else "red")
        how = ", by what parts matter" if trial.weighted else ""
        console.print(Text(f"tried    {trial.share:.0%} of the strength{how}: ") + said)
    style = "green" if best.judgement.ok else "red"
    console.print(Text("accuracy ", style="bold") + Text(best.judgement.summary, style=style))
    for sentence in report.savings:
        console.print(Text("saves    ", style="bold") + Text(sentence))
    if report.timing is not None:
        print_timing(report.timing, console)
    print_settings(report.settings, console)
    for note in report.notes:
        console.print(Text(f"note     {note}", style="dim"))
    if report.reason:
        console.print(Text(f"nothing was written: {report.reason}", style="red"))
    if written is not None:
        print_written(written, report.settings, console)


def _print_layers(report: PruningReport, console: Console) -> None:
    """Channels by group, zeros by weight, and what each part of the model costs alone, as far as measured."""
    cut = report.searched.best.cut
    groups = plain_table("channels of", ">before", ">after", ">MACs")
    for group in cut.groups if cut else ():
        share = f"{group.macs_after / group.macs:.0%}" if group.macs else ""
        groups.add_row(Text(group.name), str(group.channels), str(group.channels_after), share)
    if groups.row_count:
        console.print(groups)
    layers = plain_table("weight", ">elements", ">zeros")
    for layer in report.layers:
        layers.add_row(Text(layer.weight), amount(layer.elements), f"{layer.share:.1%}")
    console.print(layers)
    parts = plain_table("pruned alone", ">dB")
    for name, level in report.sensitivity.items():
        parts.add_row(Text(name), "no noise" if level is None else f"{level:.1f}")
    if parts.row_count:
        console.print(parts)
