"""`onnxopt doctor`"""

from __future__ import annotations

import click
from rich.text import Text

from onnxopt.cli.common import console, json_option, progress, write_json

__all__ = ["command"]

_STYLES = {"ok": "green", "off": "dim", "warn": "yellow", "fail": "red"}


@click.command("doctor")
@json_option
def command(json_file: str | None) -> int:
    """Say what is installed, what really works, what clashes, and how to mend it.

    \b
    onnxopt doctor

    Exit codes: 0 nothing failed, 1 something did.
    """
    from onnxopt import diagnose
    from onnxopt.reporting.tables import plain_table

    with progress() as show:
        show("trying the providers", None)
        diagnosis = diagnose()
    table = plain_table("", "", "found", "to mend it")
    for check in diagnosis.checks:
        table.add_row(
            check.name, Text(check.status, style=_STYLES[check.status]), Text(check.detail), Text(check.mend)
        )
    console(json_file).print(table)
    write_json({"schema": "onnxopt.doctor/1", **diagnosis.to_dict()}, json_file)
    return int(not diagnosis.healthy)
