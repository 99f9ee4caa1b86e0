"""The nodes that a user wants to stay in floating point."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from onnxopt.errors import UsageError
from onnxopt.graph import nodes
from onnxopt.ledger import site_of

__all__ = ["kept_sites", "veto_of"]


def kept_sites(model: ir.Model, patterns: Sequence[str]) -> frozenset[str]:
    """The sites of the nodes that patterns name: by their first output, their name or their operator.

    Raises UsageError where a pattern names none.
    """
    found: set[str] = set()
    for pattern in patterns:
        hits = {
            site_of(node)
            for node in nodes(model)
            if any(
                fnmatch.fnmatchcase(text or "", pattern) for text in (site_of(node), node.name, node.op_type)
            )
        }
        if not hits:
            raise UsageError(
                f"--keep {pattern!r}: no node has that name, output or operator once the model is prepared"
            )
        found |= hits
    return frozenset(found)


def veto_of(kept: Mapping[str, str]) -> Callable[[str, str], str | None]:
    """What keeps passes from rewriting these nodes: site -> why."""
    return lambda _pass, site: kept.get(site)
