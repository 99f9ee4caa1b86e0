"""Take whole channels out of the graph: neurons, filters, heads, with all that writes and reads them.

Before: a = MatMul(x, u); b = Relu(a); y = MatMul(b, v)          float[8, 16] u, float[16, 4] v
After:  a = MatMul(x, u'); b = Relu(a); y = MatMul(b, v')        float[8, 8] u', float[8, 4] v'
Declines: the channels reach a graph input or output, or an operator that mixes them or is not understood; how
    many there are is read at run time; the budget is below what all groups at their least come to; the model
    calls functions.

What is left computes what it did with zeros in place of the channels where they are summed up. ONNX Runtime
on AVX-512 goes through channels of convolutions in blocks of 16: 80 of 128 take as long as 80, 72 as 80.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Kind, Pass, unspelled
from onnxopt.data import Feeds
from onnxopt.ledger import Ledger
from onnxopt.model import clone
from onnxopt.pruning.cut import cut
from onnxopt.pruning.outcome import CUT, channel_cut, outcome_of
from onnxopt.pruning.reconstruct import reconstruct
from onnxopt.pruning.scores import Score, score_channels
from onnxopt.pruning.select import Budget, select
from onnxopt.pruning.structure import Structure, survey
from onnxopt.quantization.keep import kept_sites
from onnxopt.rewrite import Declined

__all__ = ["PruneChannels"]

_RULE = "channels"


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Take out the channels that matter least: half the multiply-accumulates, where nothing else is said.

    macs: fraction of the multiply-accumulates that is kept, at most.
    parameters: instead, fraction of the elements of constants that is kept.
    ratio: instead, fraction of the channels that goes, of all that can.
    score: l1 or l2, norms of the weights that write a channel; bn-gamma; random; on samples, energy, the mean
        square of what a channel carries, and obs, what the layers that read it lose with it when others make
        up for it; auto: obs where there are samples, else l2.
    seed: of random scores.
    multiple: a group keeps a multiple of this many, where the budget can be met so; None: of 8. What `prune`
        takes for None, the target says.
    least: fraction of its channels that a group keeps.
    keep: patterns of nodes whose channels stay: by first output, name or operator.
    importance: name of a group -> what its scores are multiplied with; 1 where it has none.
    only: names of groups that may lose channels; None: all.
    scored: from the structure and a group to scores of its channels, in place of `score`.
    samples: complete feeds; where there are some, layers are fitted to what they wrote before.
    shapes: of graph inputs, at which multiply-accumulates are counted; of the samples where there are some.
    """

    name: ClassVar[str] = "prune-channels"
    kind: ClassVar[Kind] = "lossy"
    example: ClassVar[str] = """agraph (float[N, 2] x) => (float[N, 1] y)
    <float[2, 4] u = {1, -5, 2, 6, 3, 7, -1, 8}, float[4, 1] v = {1, 2, 3, 4}> {
        a = MatMul(x, u)
        b = Relu(a)
        y = MatMul(b, v)
    }"""

    macs: float | None = None
    parameters: float | None = None
    ratio: float | None = None
    score: str = "auto"
    seed: int = 0
    multiple: int | None = None
    least: float = 0.1
    keep: tuple[str, ...] = ()
    importance: Mapping[str, float] | None = unspelled(None)
    only: tuple[str, ...] | None = unspelled(None)
    scored: Score | None = unspelled(None)
    samples: Sequence[Feeds] | None = unspelled(None)
    shapes: Mapping[str, Sequence[int]] | None = unspelled(None)

    def __post_init__(self) -> None:
        _ = self._budget  # which refuses what makes no sense

    @property
    def _budget(self) -> Budget:
        macs = 0.5 if (self.macs, self.parameters, self.ratio) == (None, None, None) else self.macs
        return Budget(
            macs, self.parameters, self.ratio, 8 if self.multiple is None else self.multiple, self.least
        )

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        done = channel_cut(model)
        if done is not None and model.meta[_SPELLED] == str(self):
            return
        if model.functions:
            ledger.decline(_RULE, "", "the model calls functions: inline-functions goes before")
            return
        structure = self._survey(model)
        for site, pin in structure.pinned.items():
            ledger.decline(_RULE, site, f"its channels stay: {pin.reason}")
        try:
            gone = self.selected(structure, model)
        except Declined as reason:
            ledger.decline(_RULE, "", str(reason))
            return
        for group in structure.groups:
            if gone[group.channels].any() and not ledger.claim(_RULE, group.name):
                gone[group.channels] = False
        model.meta[CUT], model.meta[_SPELLED] = outcome_of(structure, gone), str(self)
        whole = clone(model) if self.samples and gone.any() else None
        ledger.touch(cut(structure, gone))
        if whole is not None and self.samples:
            ledger.touch(reconstruct(model, whole, _kept(structure, gone), self.samples))

    def parts(self, model: ir.Model) -> Mapping[str, PruneChannels]:
        """Name of a group -> a pass that prunes it alone, by as much as all would have to lose on average."""
        structure = self._survey(model)
        budget = self._budget
        ratio = budget.ratio or 1 - (budget.macs or budget.parameters or 1.0) ** 0.5
        alone = replace(self, macs=None, parameters=None, ratio=ratio)
        return {group.name: replace(alone, only=(group.name,)) for group in structure.groups}

    def _survey(self, model: ir.Model) -> Structure:
        first = self.samples[0] if self.samples else {}
        return survey(model, {**{name: array.shape for name, array in first.items()}, **(self.shapes or {})})

    def selected(self, structure: Structure, model: ir.Model) -> np.ndarray:
        """The channels that go of a model of that structure, bool [channels]. Raises Declined as `select`."""
        kept = kept_sites(model, self.keep)
        fixed = [
            any(site in kept for site in group.layers)
            or (self.only is not None and group.name not in self.only)
            for group in structure.groups
        ]
        score = self.scored or (self.score if self.score != "auto" else "obs" if self.samples else "l2")
        scores = score_channels(
            structure, score, seed=self.seed, model=model, samples=self.samples or (), fixed=fixed
        )
        weights = self.importance or {}
        scores = tuple(
            one * weights.get(g.name, 1.0) for one, g in zip(scores, structure.groups, strict=True)
        )
        return select(structure, scores, self._budget, fixed)


def _kept(structure: Structure, gone: np.ndarray) -> dict[str, np.ndarray]:
    """Name of what a layer writes -> which of its channels are left, bool [channels before]."""
    return {
        layer.node.outputs[0].name or "": ~gone[structure.channels_of(layer.node.inputs[1], layer.writes)]
        for layer in structure.elements.layers
        if layer.weight == 1
    }


_SPELLED = "prune-channels as spelled"
"""Where a model in memory says by which pass it was cut: one that runs again finds its work done."""
