"""`onnxopt passes`"""

from __future__ import annotations

import dataclasses
from typing import Any

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

    listing: list[dict[str, Any]] = []
    table = plain_table("pass", "promise", "what it does", "options")
    for name, one in known_passes().items():
        kind = getattr(one, "kind", "reorder")
        about = (one.__doc__ or "").strip().split("\n")[0]
        options: dict[str, Any] = {}
        if dataclasses.is_dataclass(one):
            options = {field.name: field.default for field in dataclasses.fields(one)}
        options = {key: "required" if v is dataclasses.MISSING else v for key, v in options.items()}
        listing.append({"name": name, "kind": kind, "about": about, "options": options})
        table.add_row(name, kind, about, ", ".join(f"{key}={value}" for key, value in options.items()))
    shipped = plain_table("recipe", "what it is for")
    for name, about in recipes().items():
        shipped.add_row(name, about)
    out = console(json_file)
    out.print(table)
    out.print()
    out.print(shipped)
    write_json({"schema": "onnxopt.passes/1", "passes": listing, "recipes": recipes()}, json_file)
    return 0
