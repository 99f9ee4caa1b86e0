"""Where a rewrite happens: a graph that stands for itself, its opset, and names that are still free."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxopt.graph import roots, value_names

__all__ = ["Names", "Scope", "scopes"]


class Names:
    """The value names of a model, collected when the first new one is asked for."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._numbers: Counter[str] = Counter()

    @functools.cached_property
    def _taken(self) -> set[str]:
        return value_names(self._model)

    def fresh(self, like: str) -> str:
        """A name that no value has; it starts with `like`."""
        name = like
        while name in self._taken:
            self._numbers[like] += 1
            name = f"{like}_{self._numbers[like]}"
        self._taken.add(name)
        return name


@dataclass
class Scope:
    """A graph that stands for itself (the main graph or a function's body) with all that is nested in it."""

    graph: ir.Graph
    opset: int
    """Version of the default operator set."""
    holds_initializers: bool
    """False in functions, and below IR version 4, where each initializer would have to be a graph input."""
    names: Names

    def fresh(self, like: str) -> str:
        """A name that no value has; it starts with `like`."""
        return self.names.fresh(like)


def scopes(model: ir.Model) -> Iterator[Scope]:
    """The scopes of a model: the main graph, then each function."""
    names = Names(model)
    for root in roots(model):
        opset = root.opset_imports.get("", 1)
        yield Scope(root, opset, root is model.graph and model.ir_version >= 4, names)
