"""A pass is a claim about a graph: its name, its options, and what it promises of the numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from onnxopt.ledger import Ledger
from onnxopt.rewrite import Rule, drive

__all__ = ["KINDS", "Kind", "Pass", "kind_of", "options_of", "pass_name", "spelling", "unspelled"]

Kind = Literal["exact", "reorder", "lossy"]
"""The promise of a pass: bit-equal, equal but for the order of float operations, worse within a budget."""

KINDS: tuple[Kind, ...] = ("exact", "reorder", "lossy")
"""From the strongest promise to the weakest."""


@dataclass(frozen=True)
class Pass(ir.passes.InPlacePass):
    """A claim about a graph. Subclasses are frozen dataclasses whose fields are the options,
    but for those that are `unspelled`.

    A pass of rules overrides `rules`; another overrides `apply` and asks `ledger.claim` before each change.
    `example` is a small model in ONNX text syntax that the pass rewrites; IR version 10 and opset 17 where
    it does not say. `pattern` makes it a guarded pass: a model of realistic size that the pass rewrites,
    and it rewrites others only where the result is measured to be faster, see `benchmarking.profits`.
    `operators`: the pipeline passes over models that have none of these, as the pass has nothing to do there;
    rules name theirs themselves.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind] = "exact"
    example: ClassVar[str] = ""
    pattern: ClassVar[str] = ""
    operators: ClassVar[tuple[str, ...]] = ()
    keeps_signature: ClassVar[bool] = True

    def rules(self) -> Sequence[Rule]:
        """The rules of the pass, in the order in which they are tried."""
        return ()

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        """Rewrite the model in place, each change with leave of the ledger."""
        drive(model, self.rules(), ledger)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run alone, as any onnx_ir pass."""
        ledger = Ledger(pass_name=self.name)
        self.apply(model, ledger)
        return ir.passes.PassResult(model, bool(ledger.granted))

    def __str__(self) -> str:
        """The pass as a recipe spells it: `name{option=value}`, options at their default left out."""
        options = [
            f"{f.name}={_spell(getattr(self, f.name))}"
            for f in options_of(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}{{{','.join(options)}}}" if options else self.name


def unspelled(default: object) -> Any:
    """A field that Python sets and no recipe can spell: samples, masks, a callable."""
    return field(default=default, repr=False, compare=False, metadata={"spelled": False})


def options_of(one: Any) -> tuple[dataclasses.Field[Any], ...]:
    """The options of a pass, or of its class, that a recipe can spell."""
    return tuple(f for f in dataclasses.fields(one) if f.metadata.get("spelled", True))


def _spell(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def pass_name(one: ir.passes.PassBase) -> str:
    """The name of a pass; a plain onnx_ir pass goes by its class."""
    return one.name if isinstance(one, Pass) else type(one).__name__


def kind_of(one: ir.passes.PassBase) -> Kind:
    """The promise of a pass; a plain onnx_ir pass makes none, and is taken to keep the numbers."""
    return one.kind if isinstance(one, Pass) else "reorder"


def spelling(one: ir.passes.PassBase) -> str:
    """The pass as a recipe spells it; a plain onnx_ir pass by its name alone."""
    return str(one) if isinstance(one, Pass) else pass_name(one)
