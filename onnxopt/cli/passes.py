"""`onnxopt passes`"""

from __future__ import annotations

import dataclasses

import click

from onnxopt.cli.common import console, json_option, write_json

__all__ = ["command"]


@click.command("passes")
@json_option
def command(json_file: str | None) -> int:
    """List passes with their promise and options, and the recipes that ship.

    \b
    onnxopt passes
    onnxopt optimize model.onnx -o out.onnx --pass eliminate-dead --pass "fold-constants{max_growth=0}"
    """
    from onnxopt.recipe import known_passes, recipes
    from onnxopt.reporting.tables import plain_table

    rows = []
    for name, one in known_passes().items():
        fields = dataclasses.fields(one) if dataclasses.is_dataclass(one) else ()
        about = (one.__doc__ or "").strip().split("\n")[0]
        options = {f.name: f.default for f in fields}
        rows.append({"name": name, "kind": getattr(one, "kind", "reorder"), "about": about, "options": options})
    out = console(json_file)
    table = plain_table("pass", "promise", "what it does", "options")
    for row in rows:
        spelled = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        table.add_row(row["name"], row["kind"], row["about"], spelled)
    out.print(table)
    out.print()
    shipped = plain_table("recipe", "what it is for")
    for name, about in recipes().items():
        shipped.add_row(name, about)
    out.print(shipped)
    write_json({"schema": "onnxopt.passes/1", "passes": rows, "recipes": recipes()}, json_file)
    return 0
