"""Operators as torch functions: `domain::op -> (since version, function, static inputs)`.

A function takes the node's inputs in order (None where one is missing) and its attributes by their own
names, and gives a tensor or a tuple of them. A function that has a parameter `ctx` is told the node's
`Context`. Inputs at `static` positions come as a tuple of Python numbers, whatever device the rest is on.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

__all__ = ["Context", "Operator", "Table", "find", "op", "same", "versions"]


@dataclass(frozen=True)
class Context:
    """What a function may ask about its node.

    version: of the operator set. outputs: how many are asked for, up to the last one that is named.
    inputs, results: element types, None where unknown. site: what messages call the node.
    """

    version: int
    outputs: int
    inputs: tuple[ir.DataType | None, ...]
    results: tuple[ir.DataType | None, ...]
    site: str = ""


@dataclass(frozen=True)
class Operator:
    """One version of an operator.

    run: the function. static: positions that it gets as numbers. raw: it gets all inputs as they come, on the
    host or not. host: it is computed on the host where all inputs are there. since: the first version.
    either: positions that it gets on the host where they are there.
    Attributes go to the parameters of their name: also to those of inputs, which older versions have instead.
    """

    run: Callable[..., Any]
    static: tuple[int, ...] = ()
    raw: bool = False
    host: bool = True
    since: int = 1
    key: str = ""
    either: tuple[int, ...] = ()

    @functools.cached_property
    def wants_context(self) -> bool:
        """Whether the function has a parameter `ctx`."""
        return "ctx" in _parameters(self.run)

    @functools.cached_property
    def attributes(self) -> frozenset[str] | None:
        """Attributes that the function takes; None: all."""
        found = _parameters(self.run).values()
        if any(one.kind == one.VAR_KEYWORD for one in found):
            return None
        return frozenset(one.name for one in found if one.kind != one.VAR_POSITIONAL)

    def __reduce__(self) -> tuple[Any, ...]:
        """Functions in tables have no name to be pickled by: the row has. Others are objects."""
        if self.key:
            return _row, (self.key, self.since)
        return Operator, (self.run, self.static, self.raw, self.host)


Table = Mapping[str, Operator | tuple[Operator, ...]]


def op(
    run: Callable[..., Any],
    *static: int,
    since: int = 1,
    raw: bool = False,
    host: bool = True,
    either: tuple[int, ...] = (),
) -> Operator:
    """A row of a table."""
    return Operator(run, static, raw, host and not raw, since, either=either)


def same(functions: Mapping[str, Callable[..., Any]], *static: int) -> dict[str, Operator]:
    """Rows that differ in nothing but their function."""
    return {name: op(run, *static) for name, run in functions.items()}


def find(domain: str, op_type: str, version: int) -> Operator | None:
    """The operator as it is in that version of its domain's operator set."""
    rows = _rows().get(f"{domain}::{op_type}" if domain else op_type, ())
    return max((row for row in rows if row.since <= version), key=lambda row: row.since, default=None)


def versions() -> dict[str, tuple[int, ...]]:
    """Every operator that has a function, with the versions from which each holds."""
    return {key: tuple(row.since for row in rows) for key, rows in _rows().items()}


@functools.cache
def _rows() -> dict[str, tuple[Operator, ...]]:
    from onnxopt.training.interpreter.ops import TABLES

    return {key: tuple(_named(key, rows)) for table in TABLES for key, rows in table.items()}


def _named(key: str, rows: Operator | tuple[Operator, ...]) -> Iterator[Operator]:
    for row in rows if isinstance(rows, tuple) else (rows,):
        yield replace(row, key=key)


def _row(key: str, since: int) -> Operator:
    return next(row for row in _rows()[key] if row.since == since)


def _parameters(run: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(run).parameters
    except ValueError:  # builtins of torch have no signature: they take no attribute
        return {}
