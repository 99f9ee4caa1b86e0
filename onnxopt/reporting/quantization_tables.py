"""The report of one `quantize` on a terminal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from onnxopt.quantization.judge import Judgement
from onnxopt.reporting.quantization import QuantizationReport
from onnxopt.reporting.tables import plain_table, print_settings, print_timing, print_written, size_table

__all__ = ["print_quantization"]

_DIM = "dim"


def print_quantization(
    report: QuantizationReport, console: Console, *, written: Path | None, list_nodes: bool = False
) -> None:
    """Print what became integers, what it costs and what it gains, and where the result is."""
    console.print(f"[bold]{escape(report.source)}[/]  target {report.target}  scheme {report.scheme}")
    console.print()
    console.print(size_table(report.before, report.after))
    console.print()
    if report.static is not None:
        console.print(_coverage(report))
        console.print()
    for reason, sites in report.left.items():
        console.print(Text(f"left in float: {len(sites)} x {reason}", style="yellow"))
    for one in report.finished.tried:
        what = f"{one.name} of {len(one.sites)} nodes" if one.sites else one.name
        console.print(Text(f"{'kept' if one.kept else 'left out'} {what}: {one.why}"))
    if list_nodes:
        console.print(_nodes(report))
    if report.judgement is not None:
        _print_judgement("accuracy ", report.judgement, console)
    if report.kernels:
        shown = ", ".join(f"{count} {name}" for name, count in sorted(report.kernels.items()) if _heavy(name))
        console.print(
            Text("runs     ", style="bold") + Text(f"{report.integer_kernels} integer kernels: {shown}")
        )
    if report.timing is not None:
        print_timing(report.timing, console)
    print_settings(report.settings, console)
    console.print(_lint(report), end="")
    for note in report.notes:
        console.print(Text(f"note     {note}", style=_DIM))
    if report.reason:
        console.print(Text(f"nothing was written: {report.reason}", style="red"))
    if written is not None:
        print_written(written, report.settings, console)


def _print_judgement(label: str, judgement: Judgement, console: Console) -> None:
    style = "green" if judgement.within else "red"
    console.print(Text(label, style="bold") + Text(judgement.summary, style=style))
    for name, other in judgement.elsewhere.items():
        _print_judgement(f"  on {name}  ", other, console)


def _lint(report: QuantizationReport) -> Text:
    """A line for each rule that the target's lint names, with the first place."""
    text = Text()
    for rule, count in Counter(one.rule for one in report.findings).items():
        first = next(one for one in report.findings if one.rule == rule)
        style = "red" if first.severity == "error" else "yellow"
        said = f"{first.severity} {rule} at {count} places, the first {first.site}: {first.message}"
        text.append(f"lint     {said}\n", style=style)
    return text


def _coverage(report: QuantizationReport) -> Table:
    table = plain_table("operator", ">integer", ">float", ">of")
    total, integer = Counter[str](), Counter[str]()
    for unit in report.units:
        total[unit.op_type] += 1
        integer[unit.op_type] += unit.integer
    for name, count in sorted(total.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(name, str(integer[name]), str(count - integer[name]), str(count))
    return table


def _nodes(report: QuantizationReport) -> Table:
    table = plain_table("node", "operator", "as", ">weight dB", ">output dB", "")
    for unit in report.units:
        figures = ("" if db is None else f"{db:.1f}" for db in (unit.weight_db, unit.output_db))
        table.add_row(escape(unit.site), unit.op_type, "int" if unit.integer else "float", *figures, unit.why)
    return table


def _heavy(name: str) -> bool:
    """Operators that say how a quantized graph runs."""
    return name.startswith(
        ("Q", "DequantizeLinear", "MatMul", "Conv", "Gemm", "Fused", "DynamicQ", "Transpose")
    )
