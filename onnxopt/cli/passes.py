"""`onnxopt passes`"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from onnxopt.claims import options_of
from onnxopt.cli.common import console, json_option, keep_apart, progress, write_json
from onnxopt.errors import UsageError

__all__ = ["command"]

_PROMISES = {
    "exact": "exact: the same bits",
    "reorder": "reorder: the same but for the order of float operations",
    "lossy": "lossy: worse, within a budget",
}


@click.command("passes")
@click.argument("name", required=False)
@click.option(
    "--for",
    "model",
    type=click.Path(path_type=Path),
    help="Say which passes fire on this model, and where not.",
)
@click.option(
    "--target", default="cpu", show_default=True, help="With --for: cpu, cuda, tensorrt or generic."
)
@click.option("--recipe", help="With --for: a shipped recipe or a TOML file, instead of the target's.")
@click.option("--list-declined", is_flag=True, help="With --for: name each place where a pass declined.")
@json_option
def command(
    name: str | None,
    model: Path | None,
    target: str,
    recipe: str | None,
    list_declined: bool,
    json_file: str | None,
) -> int:
    """List passes, recipes and targets; explain the pass NAME; or say which passes fire on a model.

    \b
    onnxopt passes
    onnxopt passes fold-batchnorm
    onnxopt passes --for model.onnx --list-declined
    onnxopt passes fold-batchnorm --for model.onnx
    """
    keep_apart(json_file, model)
    if model is None and (recipe is not None or list_declined):
        raise UsageError("--recipe and --list-declined say how to run the passes --for a model: name it")
    out = console(json_file)
    if model is not None:
        report = _fire(model, name, target, recipe, list_declined, out)
    else:
        report = _explain(name, out) if name is not None else _list(out)
    write_json(report, json_file)
    return 0


def _list(out: Console) -> dict[str, Any]:
    from onnxopt.recipe import known_passes, recipes
    from onnxopt.reporting.tables import plain_table
    from onnxopt.targets import TARGETS

    listing = [_facts(name, one) for name, one in known_passes().items()]
    table = plain_table("pass", "promise", "what it does", "options")
    for facts in listing:
        options = ", ".join(f"{key}={value}" for key, value in facts["options"].items())
        table.add_row(facts["name"], facts["kind"], facts["about"], options)
    shipped = plain_table("recipe", "what it is for")
    for name, about in recipes().items():
        shipped.add_row(name, about)
    targets = plain_table("target", "what it is", "recipe", "opset")
    for one in TARGETS.values():
        targets.add_row(
            one.name, one.about, one.recipe, "the model's" if one.opset is None else str(one.opset)
        )
    for number, part in enumerate((table, shipped, targets)):
        out.print(*[""] * bool(number), part, sep="\n")
    return {
        "schema": "onnxopt.passes/1",
        "passes": listing,
        "recipes": recipes(),
        "targets": [dataclasses.asdict(one) for one in TARGETS.values()],
    }


def _facts(name: str, one: Callable[..., Any]) -> dict[str, Any]:
    """What a pass says of itself in a line."""
    options: dict[str, Any] = {}
    if dataclasses.is_dataclass(one):
        options = {field.name: field.default for field in options_of(one)}
    return {
        "name": name,
        "kind": getattr(one, "kind", "reorder"),
        "about": (one.__doc__ or "").strip().split("\n")[0],
        "options": {key: "required" if v is dataclasses.MISSING else v for key, v in options.items()},
    }


def _explain(name: str, out: Console) -> dict[str, Any]:
    """A pass in full: what it does, when it declines, its options, and its example before and after."""
    from onnxopt.recipe import known_passes, unknown_pass

    known = known_passes()
    if name not in known:
        raise UsageError(unknown_pass(name, known))
    one = known[name]
    facts = _facts(name, one)
    text = inspect.getdoc(inspect.getmodule(one)) or inspect.getdoc(one) or ""
    declines = re.search(r"^Declines: (.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    notes = (inspect.getdoc(one) or "").partition("\n")[2].strip() if facts["options"] else ""
    facts |= {
        "text": text,
        "declines": " ".join(declines[1].split()) if declines else "",
        "options_text": notes,
        "example": None if "required" in facts["options"].values() else _example(one),
        "profits": _profits(name, one),
    }
    parts = [text]
    if facts["options"]:
        spelled = ", ".join(f"{key}={value}" for key, value in facts["options"].items())
        parts.append(f"Options: {spelled}\n{notes}".rstrip())
    if facts["example"]:
        before, after = (textwrap.indent(graph, "    ") for graph in facts["example"].values())
        parts.append(f"Example\n{before}\nbecomes\n{after}")
    if facts["profits"] is not None:
        parts.append("Rewrites only where that is measured to pay. Known so far:")
        parts += [f"    {profit['summary']}" for profit in facts["profits"]]
    out.print(Text(name, style="bold") + Text(f"  {_PROMISES[facts['kind']]}"))
    out.print(Text("".join(f"\n{part}\n" for part in parts)), soft_wrap=True, end="")
    return {"schema": "onnxopt.pass/1", **facts}


def _example(one: Callable[..., Any]) -> dict[str, str] | None:
    import onnx_ir as ir

    from onnxopt.examples import model_text, rewritten, text_model

    text = getattr(one, "example", "")
    if not text:
        return None
    proto = text_model(text)
    return {"before": model_text(ir.from_proto(proto)), "after": model_text(rewritten(one(), proto))}


def _profits(name: str, one: Callable[..., Any]) -> list[dict[str, Any]] | None:
    """The rows of the shipped table on a guarded pass; None for any other."""
    from onnxopt.benchmarking.profits import shipped_profits

    if not getattr(one, "pattern", ""):
        return None
    return [profit.to_dict() for profit in shipped_profits() if profit.name.split("{")[0] == name]


def _fire(
    model: Path, name: str | None, target: str, recipe: str | None, list_declined: bool, out: Console
) -> dict[str, Any]:
    """Run the passes on the model in memory, without proof or measurement, and say what each one did."""
    from onnxopt import optimize
    from onnxopt.reporting.tables import print_steps

    with progress() as show:
        report = optimize(
            model,
            target=target,
            recipe=recipe,
            passes=[name] if name is not None else (),
            verify=False,
            bench=False,
            metadata=False,
            progress=show,
        ).report
    print_steps(report, out, list_declined)
    keys = ("source", "target", "passes", "steps", "left_out", "profits", "rounds")
    done = report.to_dict()
    return {"schema": "onnxopt.passes-for/1", **{key: done[key] for key in keys}}
