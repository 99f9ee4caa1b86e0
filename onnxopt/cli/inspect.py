"""`onnxopt inspect`"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from onnxopt.cli.common import console, json_option, keep_apart, shape_option, shapes_of, write_json
from onnxopt.errors import UsageError

if TYPE_CHECKING:
    from onnxopt import Finding, Inspection

__all__ = ["command"]

_FIRST = 3
"""Places that the table of a lint names for each rule."""


@click.command("inspect")
@click.argument("model", type=click.Path(path_type=Path))
@shape_option
@click.option(
    "--top", type=click.IntRange(0), default=8, show_default=True, help="Most expensive nodes to show."
)
@click.option(
    "--lint",
    "target",
    metavar="TARGET",
    help="Say instead what cpu or tensorrt refuses in it, or runs badly; exit code 1 if it refuses anything.",
)
@json_option
def command(model: Path, shape: tuple[str, ...], top: int, target: str | None, json_file: str | None) -> int:
    """Say what MODEL is: operators, parameters, bytes, MACs, activation memory, what it does not use.

    \b
    onnxopt inspect model.onnx
    onnxopt inspect model.onnx --shape input=1x3x224x224 --json -
    onnxopt inspect model.onnx --lint tensorrt
    """
    from onnxopt import inspect
    from onnxopt.reporting.tables import plain_table

    keep_apart(json_file, model)
    if target is not None and shape:
        raise UsageError("--shape: a lint takes the model as it is; give one of --shape and --lint")
    if target is not None:
        return _lint(model, target, json_file)
    found = inspect(model, shapes=shapes_of(shape))
    out = console(json_file)
    out.print(_facts(found, plain_table("", "")))
    out.print()
    ops = plain_table("operator", ">nodes", ">in subgraphs", ">in functions")
    names = {**found.ops, **found.subgraph_ops, **found.function_ops}
    for name in names:
        counts = (found.ops.get(name, 0), found.subgraph_ops.get(name, 0), found.function_ops.get(name, 0))
        ops.add_row(name, *(str(count or "") for count in counts))
    out.print(ops)
    if top and any(cost.macs not in (0, "?") for cost in found.costs):
        out.print()
        out.print(_dearest(found, top, plain_table("dearest nodes", "operator", ">MACs", ">output", ">live")))
    write_json({"schema": "onnxopt.inspect/1", **found.to_dict()}, json_file)
    return 0


def _lint(model: Path, target: str, json_file: str | None) -> int:
    from onnxopt import lint
    from onnxopt.reporting.tables import plain_table

    found = lint(model, target)
    errors = sum(finding.severity == "error" for finding in found)
    out = console(json_file)
    groups: dict[str, list[Finding]] = {}
    for finding in found:
        groups.setdefault(finding.rule, []).append(finding)
    table = plain_table("", "rule", ">places", "the first")
    for name, group in groups.items():
        style = "red" if group[0].severity == "error" else "yellow"
        sites = ", ".join(finding.site for finding in group[:_FIRST]) + ", ..." * (len(group) > _FIRST)
        about = Text.assemble(group[0].message, ("\n" + f"at {sites}" + "\n" + group[0].basis, "dim"))
        table.add_row(Text(group[0].severity, style=style), Text(name), str(len(group)), about)
    if found:
        out.print(table)
    out.print(f"{target}: {errors} errors, {len(found) - errors} warnings")
    counts = {"errors": errors, "warnings": len(found) - errors}
    findings = [finding.to_dict() for finding in found]
    write_json({"schema": "onnxopt.lint/1", "target": target, **counts, "findings": findings}, json_file)
    return 1 if errors else 0


def _facts(found: Inspection, table: Table) -> Table:
    from onnxopt.reporting.tables import amount, count_bytes

    def listing(items: Iterable[object]) -> str:
        return ", ".join(map(str, items))

    def counts(items: Mapping[str, int]) -> str:
        return listing(f"{name} {number}" for name, number in items.items())

    rows = {
        "producer": found.producer,
        "IR version": str(found.ir_version),
        "opsets": counts({name or "ai.onnx": version for name, version in found.opsets.items()}),
        "nodes": f"{amount(found.totals.nodes)}; {found.subgraphs} subgraphs, {found.functions} functions",
        "parameters": amount(found.totals.parameters),
        "initializers": amount(found.totals.initializers),
        "tensors": listing(
            f"{dtype} {count_bytes(number)}" for dtype, number in found.bytes_by_dtype.items()
        ),
        "file": "" if found.file_bytes is None else count_bytes(found.file_bytes),
        "external data": listing(
            f"{name} {count_bytes(number)}" for name, number in found.external_data.items()
        ),
        "MACs": _formula(found.macs),
        "activations": f"{_formula(found.peak_activation_bytes, 'B')} at most, at {found.peak_node}"
        if found.peak_node
        else "",
        "quantization": counts(found.quantization) or "none",
        "not counted": counts(found.uncounted_ops),
        "inputs": listing(f"{p.name} {p.dtype}{_shape(p.shape)}" for p in found.inputs),
        "outputs": listing(f"{p.name} {p.dtype}{_shape(p.shape)}" for p in found.outputs),
        "overridable": f"{len(found.overridable_initializers)} initializers are graph inputs too"
        if found.overridable_initializers
        else "",
        "unused": counts({kind: len(names) for kind, names in vars(found.unused).items() if names}),
        "shape inference": found.shape_inference_failure or "",
    }
    for name, text in rows.items():
        if text:
            table.add_row(Text(name, style="bold"), Text(text))
    return table


def _shape(shape: tuple[int | str | None, ...] | None) -> str:
    return "" if shape is None else "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"


def _dearest(found: Inspection, top: int, table: Table) -> Table:
    costly = [cost for cost in found.costs if cost.macs not in (0, "?")]
    for cost in sorted(costly, key=lambda cost: _rank(cost.macs))[:top]:
        row = (_formula(cost.macs), _formula(cost.output_bytes, "B"), _formula(cost.live_bytes, "B"))
        table.add_row(Text(cost.name), Text(cost.op), *map(Text, row))
    return table


def _rank(macs: int | str) -> tuple[bool, int]:
    """What is partly unknown last, the others by their size with every symbol at 1, largest first."""
    if isinstance(macs, int):
        return False, -macs
    terms = re.sub(r"\([^()]*\)", "", macs).split(" + ")
    factors = [re.match(r"\d+", term) for term in terms]
    return "?" in terms, -sum(int(factor[0]) if factor else 1 for factor in factors)


def _formula(value: int | str, unit: str = "") -> str:
    """A count as `amount` spells it, or a whole formula: ``40.8M*batch``, with its unit at the end."""
    from onnxopt.reporting.tables import amount

    if isinstance(value, int):
        return amount(value, unit)
    text = re.sub(r"\b\d{6,}\b", lambda number: amount(int(number[0])).replace(" ", ""), value)
    return f"({text}) {unit}" if unit and " + " in text else f"{text} {unit}".rstrip()
