"""Pipelines as text: `fold-constants{max_growth=65536},fold-batchnorm`, or the same list in a TOML file.

    description = "what it is for"
    passes = ["fold-constants{max_growth=65536}", "fold-batchnorm"]

A recipe may build on another one: `base` names it, `skip` leaves passes of it out, `after` puts passes
behind one of them, and `passes` come at the end.

    base = "default"
    skip = ["merge-matmul"]
    after.fold-constants = ["merge-cast"]

Options have one spelling, that of the dataclass field, in Python, here and on the command line.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.resources
import os
import re
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import onnx_ir as ir

from onnxopt.claims import options_of, pass_name
from onnxopt.errors import UsageError, did_you_mean
from onnxopt.pipeline import Pipeline

__all__ = [
    "ENTRY_POINTS",
    "build_pipeline",
    "known_passes",
    "load_recipe",
    "parse_pass",
    "parse_passes",
    "parse_spelled",
    "read_value",
    "recipes",
    "unknown_pass",
]

ENTRY_POINTS = "onnxopt.passes"
"""The entry-point group in which other packages offer passes."""

_KEYS = ("description", "base", "skip", "after", "passes", "rounds")

Made = TypeVar("Made")
PassFactory = Callable[..., ir.passes.PassBase]


def known_passes() -> dict[str, PassFactory]:
    """Pass name -> class: those that ship with onnxopt, then those of installed packages."""
    from onnxopt.passes import BUILTIN

    known: dict[str, PassFactory] = {one.name: one for one in BUILTIN}
    for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda e: e.name):
        if entry.name in known:
            raise UsageError(f"pass {entry.name!r} of {entry.value} has the name of another pass")
        try:
            known[entry.name] = entry.load()
        except Exception as error:
            raise UsageError(f"pass {entry.name!r} cannot be loaded from {entry.value}: {error}") from error
    return known


def recipes() -> dict[str, str]:
    """The recipes that ship with onnxopt: name -> what it is for."""
    folder = importlib.resources.files("onnxopt.passes") / "recipes"
    found = {
        f.name.removesuffix(".toml"): f.read_text() for f in folder.iterdir() if f.name.endswith(".toml")
    }
    return {name: str(tomllib.loads(text).get("description", "")) for name, text in sorted(found.items())}


def load_recipe(name: str | os.PathLike[str]) -> Pipeline:
    """A pipeline from a TOML file, or from a recipe that ships with onnxopt, by its name.

    Raises:
        UsageError: no such recipe, not TOML, it names an unknown pass or option, or builds on itself.
    """
    return _built(str(name), ())


def _built(name: str, above: tuple[str, ...]) -> Pipeline:
    """The pipeline of a recipe; `above` are the recipes that build on it."""
    who, table = f"recipe {name}", _table(name)
    for word in sorted(set(table) - set(_KEYS)):
        raise UsageError(f"{who}: unknown key {word!r}{did_you_mean(word, _KEYS)}")
    base, after, below = table.get("base"), table.get("after", {}), Pipeline(())
    if base is None and not {"skip", "after"}.isdisjoint(table):
        raise UsageError(f"{who}: 'skip' and 'after' change another recipe: name it, base = \"default\"")
    if not isinstance(base, str | None) or not isinstance(after, dict):
        raise UsageError(f'{who}: expected base = "default" and after.fold-constants = ["merge-cast", ...]')
    if base is not None:
        place = str((Path(name).parent / base).resolve()) if base.endswith(".toml") else base
        if place in (name, *above):
            raise UsageError(f"{who}: builds on itself")
        below = _built(place, (name, *above))
    passes = _without(below.passes, _strings(who, "skip", table.get("skip", [])), f"{who}: cannot skip")
    parse = functools.partial(parse_pass, known=known_passes())
    for anchor, added in after.items():
        names = [pass_name(one) for one in passes]
        if anchor not in names:
            raise UsageError(f"{who}: after {anchor!r}: there is no such pass{did_you_mean(anchor, names)}")
        place_after = names.index(anchor) + 1
        passes[place_after:place_after] = map(parse, _strings(who, f"after.{anchor}", added))
    passes += map(parse, _strings(who, "passes", table.get("passes", [])))
    rounds = table.get("rounds", below.rounds)
    if not passes:
        raise UsageError(f'{who}: expected a list: passes = ["fold-constants", ...]')
    if type(rounds) is not int or rounds < 1:
        raise UsageError(f"{who}: rounds must be a positive integer, not {rounds!r}")
    return Pipeline(tuple(passes), rounds)


def _table(name: str) -> Mapping[str, Any]:
    """What a recipe's TOML says."""
    if Path(name).suffix == ".toml":
        try:
            text = Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"recipe {name}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UsageError(f"recipe {name}: not TOML: it is not UTF-8 text") from None
    else:
        shipped = recipes()
        if name not in shipped:
            raise UsageError(f"unknown recipe {name!r}{did_you_mean(name, shipped)}")
        text = (importlib.resources.files("onnxopt.passes") / "recipes" / f"{name}.toml").read_text()
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe {name}: not TOML: {error}") from None


def _strings(who: str, key: str, found: object) -> Sequence[str]:
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise UsageError(f'{who}: expected a list: {key} = ["fold-constants", ...]')
    return found


def _without(
    passes: Sequence[ir.passes.PassBase], skip: Sequence[str], complaint: str
) -> list[ir.passes.PassBase]:
    """The passes but for those of these names, which must be there."""
    names = [pass_name(one) for one in passes]
    for name in skip:
        if name not in names:
            raise UsageError(
                f"{complaint} {name!r}: the pipeline has no such pass{did_you_mean(name, names)}"
            )
    return [one for one in passes if pass_name(one) not in skip]


def build_pipeline(
    recipe: str | os.PathLike[str] | Pipeline,
    *,
    passes: str | Sequence[str | ir.passes.PassBase] = (),
    skip: Sequence[str] = (),
    freeze_initializers: bool = False,
) -> Pipeline:
    """The pipeline of a recipe, or of `passes` where any are given, without those in `skip`.

    Raises:
        UsageError: an unknown recipe, pass or option, or a name in `skip` that the pipeline does not have.
    """
    pipeline = recipe if isinstance(recipe, Pipeline) else load_recipe(recipe)
    if isinstance(passes, str):
        pipeline = dataclasses.replace(pipeline, passes=parse_passes(passes))
    elif passes:
        given = tuple(parse_pass(one) if isinstance(one, str) else one for one in passes)
        pipeline = dataclasses.replace(pipeline, passes=given)
    kept = _without(pipeline.passes, skip, "cannot skip")
    if freeze_initializers:
        kept.insert(0, parse_pass("freeze-initializers"))
    return dataclasses.replace(pipeline, passes=tuple(kept))


def parse_passes(text: str) -> tuple[ir.passes.PassBase, ...]:
    """The passes of a comma-separated list such as `eliminate-dead,fold-constants{max_bytes=0}`."""
    return tuple(parse_pass(part) for part in re.split(r",(?![^{]*\})", text) if part.strip())


def parse_pass(text: str, known: Mapping[str, PassFactory] | None = None) -> ir.passes.PassBase:
    """One pass from its spelling `name` or `name{option=value,...}`; `known` saves looking for passes again.

    Raises:
        UsageError: unknown pass or option, or a value of the wrong type; with the nearest known word.
    """
    return parse_spelled(text, known_passes() if known is None else known, "pass")


def parse_spelled(text: str, known: Mapping[str, Callable[..., Made]], what: str) -> Made:
    """What the dataclass of that name makes of `name` or `name{option=value,...}`.

    Raises:
        UsageError: unknown name or option, or a value of the wrong type; `what` says what was looked for.
    """
    match = re.fullmatch(r"\s*([\w.-]+)\s*(?:\{(.*)\})?\s*", text)
    if match is None:
        raise UsageError(f"{what} {text!r}: expected name or name{{option=value}}")
    name, options = match[1], match[2] or ""
    if name not in known:
        hint = unknown_pass(name, known) if what == "pass" else None
        raise UsageError(hint or f"unknown {what} {name!r}{did_you_mean(name, known)}")
    given = {}
    for part in filter(None, (p.strip() for p in options.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"{name}: expected option=value, found {part!r}")
        if key.strip() in given:
            raise UsageError(f"{name}: option {key.strip()!r} is given twice")
        given[key.strip()] = value.strip()
    typed = _typed(name, known[name], given)
    try:
        return known[name](**typed)
    except TypeError as error:
        raise UsageError(f"{name}: {error}") from None


def unknown_pass(name: str, known: Iterable[str]) -> str:
    """What is said of a name that no pass has."""
    return f"unknown pass {name!r}{did_you_mean(name, known) or ': `onnxopt passes` lists them'}"


def _typed(name: str, factory: Callable[..., Any], given: Mapping[str, str]) -> dict[str, object]:
    if not given:
        return {}
    if not dataclasses.is_dataclass(factory):
        raise UsageError(f"{name}: takes no options")
    hints = typing.get_type_hints(factory)
    fields = {f.name: hints[f.name] for f in options_of(factory)}
    typed = {}
    for key, text in given.items():
        if key not in fields:
            raise UsageError(f"{name}: unknown option {key!r}{did_you_mean(key, fields) or ': it has none'}")
        typed[key] = read_value(f"{name}: {key}", fields[key], text)
    return typed


def read_value(who: str, kind: object, text: str) -> object:
    """Text as the type of a field: bool, int, float, str, a Literal of strings, or a tuple (`a+b`)."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in arguments:
        rest = [argument for argument in arguments if argument is not type(None)]
        return None if text == "none" else read_value(who, rest[0], text)
    if origin is typing.Literal:
        if text not in arguments:
            raise UsageError(f"{who}: unknown value {text!r}{did_you_mean(text, arguments)}")
        return text
    if origin is tuple:
        return tuple(read_value(who, arguments[0], part) for part in text.split("+") if part)
    if kind is bool and text in ("true", "false"):
        return text == "true"
    readers: Sequence[type] = (int, float, str)
    for reader in readers:
        if kind is reader:
            try:
                return reader(text)
            except ValueError:
                break
    raise UsageError(f"{who}: expected {getattr(kind, '__name__', kind)}, found {text!r}")
