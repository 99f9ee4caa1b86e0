"""Who may change what: each rewrite is asked for, counted, and can be refused.

This is what makes bisection possible: a run that grants only the first n rewrites, or all but some, is the
same run up to there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import onnx_ir as ir

from onnxopt.index import Index

__all__ = ["Ledger", "Rewrite", "site_of"]


def site_of(node: ir.Node) -> str:
    """How the place of a rewrite at this node is called: by its first output that has a name."""
    return next((value.name for value in node.outputs if value.name), node.name or node.op_type)


class Rewrite(NamedTuple):
    """One change to the graph: which pass and rule made it, and where."""

    pass_name: str
    rule: str
    site: str

    def __str__(self) -> str:
        return f"{self.pass_name}: {self.rule}" + (f" at {self.site!r}" if self.site else "")


@dataclass
class Ledger:
    """Gives leave for each rewrite, counts them, and keeps the reasons of those that were declined.

    limit: grant this many rewrites in all, then no more; None for no limit.
    left_out: rewrites that are never granted.
    veto: asked with the name of a pass that is about to rewrite, and where; why it may not, or None.
    """

    limit: int | None = None
    left_out: frozenset[Rewrite] = frozenset()
    veto: Callable[[str, str], str | None] | None = None
    pass_name: str = ""
    granted: list[Rewrite] = field(default_factory=list)
    declined: dict[Rewrite, str] = field(default_factory=dict)
    opsets_wanted: set[int] = field(default_factory=set)
    """The opsets that declined rewrites would have needed."""
    touched: dict[ir.Node, None] = field(default_factory=dict)
    visiting: Rewrite | None = None
    """The rule that raised at a place, so that it can be named."""
    _index: Index | None = None

    @property
    def exhausted(self) -> bool:
        """Whether the limit is reached."""
        return self.limit is not None and len(self.granted) >= self.limit

    def leaves_out(self, rewrite: Rewrite) -> bool:
        """Whether this rewrite is one that is never granted."""
        return bool(self.left_out) and rewrite in self.left_out

    def index(self, model: ir.Model) -> Index:
        """The model's nodes by operator; all passes share it until the next change."""
        if self._index is None or self._index.model is not model:
            self._index = Index(model)
        return self._index

    def claim(self, rule: str, site: str) -> bool:
        """Ask for leave before a change; False: leave the graph as it is there."""
        rewrite = Rewrite(self.pass_name, rule, site)
        if self.exhausted or self.leaves_out(rewrite):
            return False
        vetoed = self.veto(self.pass_name, site) if self.veto else None
        if vetoed is not None:
            self.declined[rewrite] = vetoed
            return False
        self.granted.append(rewrite)
        self._index = None
        self.retract(rule, site)
        return True

    def has_granted(self, rule: str) -> bool:
        """Whether the pass that runs has made such a rewrite before, in an earlier round."""
        return any((one.pass_name, one.rule) == (self.pass_name, rule) for one in self.granted)

    def retract(self, rule: str, site: str) -> None:
        """Forget why a rewrite was declined before, which now is made, or no longer applies."""
        if self.declined:
            self.declined.pop(Rewrite(self.pass_name, rule, site), None)

    def decline(self, rule: str, site: str, reason: str) -> None:
        """Record why a rewrite that applies is not made."""
        self.declined[Rewrite(self.pass_name, rule, site)] = reason

    def touch(self, nodes: Iterable[ir.Node]) -> None:
        """Record nodes that are new or have new inputs, so that they are checked."""
        self.touched.update(dict.fromkeys(nodes))
        self._index = None
