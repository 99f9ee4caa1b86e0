"""Whole channels that are held at zero while the rest is trained, and are cut out of what is written.

A channel is gone where the weights of all that sums it up are zero: then it adds nothing, whatever its own
layer, bias, normalization and activation make of it, and is cut exactly. Theirs are held at zero, too.

Groups of channels: see `onnxopt.pruning.structure`. First-order scores: Molchanov et al., "Importance
Estimation for Neural Network Pruning", 2019 (1906.10771): the square of what weights times their gradients
come to, over the weights that read a channel. That is the channel times its own gradient: their gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from onnxopt.errors import UsageError
from onnxopt.graph import FLOATS, set_constant
from onnxopt.model import ModelLike, clone, opener
from onnxopt.passes.prune.prune_channels import PruneChannels
from onnxopt.pipeline import Pipeline
from onnxopt.pruning.cut import cut
from onnxopt.pruning.scores import score_channels
from onnxopt.pruning.structure import survey
from onnxopt.recipe import parse_pass, parse_passes
from onnxopt.rewrite import Declined
from onnxopt.targets import find_target
from onnxopt.training.interpreter.state import MOVES, NUMBER, Options, collect, nodes_of
from onnxopt.training.loop.trainer import Trainer
from onnxopt.training.masks import Masks

__all__ = ["ChannelMasks", "followable"]

_CLEAN = (
    "inline-functions,lift-constants,eliminate-identity,infer-shapes,fold-constants,inline-if,fold-shapes,"
    "eliminate-noop,merge-pad,eliminate-dead"
)
_LOOKED_AT = 128
"""Samples that channels are scored on, by scores that take samples."""


def followable(model: ModelLike) -> ir.Model:
    """The model with shapes worked out, so that its channels can be followed, and its layers as they are.

    Constants that training may draw apart are apart: what is shared cannot be cut for one reader alone.
    """
    found = Pipeline(parse_passes(_CLEAN), rounds=2).run(opener(model)).model
    for number, node in enumerate(nodes_of(found)):
        node.meta[NUMBER] = number  # which `collect` goes by
    collect(found, Options())
    return found


class ChannelMasks(Masks):
    """Holds whole channels; `model` is `followable`. Channels that are gone do not come back."""

    def written(self, model: ir.Model) -> None:
        """Cut out what is gone; before the last ones are, what would go by the weights as they are."""
        self._cut(model, self._gone if self.final else self._selected(1.0))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "gone": torch.from_numpy(self._gone)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._gone = state["gone"].numpy()

    def _find(self, trained: Mapping[str, nn.Parameter], trainer: Trainer) -> None:
        one = parse_pass(f"prune-channels{{{self.recipe.channels}}}")
        assert isinstance(one, PruneChannels)
        self._pass = one if one.multiple else replace(one, multiple=find_target("cpu").multiple)
        self._twin = clone(self.model)
        states = collect(self._twin, Options())
        self._structure = survey(self._twin)
        axes = self._structure.elements.known()
        self._gone = np.zeros(len(self._structure.solution.pinned), bool)
        self._values: dict[str, ir.Value] = {}  # of the twin, by the names of weights
        for state in states:
            divides = any(user.op_type == "Div" for user, _ in state.value.uses())
            if state.name in trained and axes.get(state.value) and not divides:
                self.weights[state.name], self._values[state.name] = trained[state.name], state.value
        names: dict[ir.Value | None, str] = {value: name for name, value in self._values.items()}
        read = [(one.node.inputs[one.weight], one.reads) for one in self._structure.elements.layers]
        # weights, and their axes that channels are summed up along
        self._readers = [(names[_source(one)], axis) for one, axis in read if _source(one) in names]
        self._samples = trainer.data.samples()[:_LOOKED_AT]
        self._open = self._cuttable()
        stay = len(self._structure.groups) - len(self._open)
        if stay:
            self.notes = (f"{stay} groups of channels stay: what sums them up is frozen, or no weight",)
        if not self._open:
            why = self.notes or ("onnxopt prune --channels --list-layers says why",)
            raise UsageError(f"prune: no channels can be cut: {why[0]}")

    def _cuttable(self) -> tuple[str, ...]:
        """The groups of which all that sums channels up has a weight that is held."""
        held, s = set[ir.Value | None](self._values.values()), self._structure
        stays = np.zeros_like(self._gone)
        for one in s.elements.contractions:
            factors = [one.node.inputs[one.index], *one.node.inputs[1 : 2 - one.index]]
            if held.isdisjoint(map(_source, factors)):
                stays[s.channels_of(one.node.inputs[one.index], one.axis)] = True
        return tuple(group.name for group in s.groups if not stays[group.channels].any())

    def _floor(self) -> ir.Model:
        model = clone(self.model)
        self._cut(model, self._selected(1.0))
        return model

    def _cut(self, model: ir.Model, gone: np.ndarray) -> None:
        """Cut channels out of a model of the same layers, whose numbers for them are its own."""
        ours, theirs = self._structure, survey(model)
        there = np.zeros(len(theirs.solution.pinned), bool)
        for a, b in zip(ours.elements.layers, theirs.elements.layers, strict=True):
            mine = ours.channels_of(a.node.inputs[a.weight], a.writes)
            there[theirs.channels_of(b.node.inputs[b.weight], b.writes)] |= gone[mine]
        cut(theirs, there)

    def _chosen(self, share: float) -> dict[str, Tensor]:
        """Let the channels of that share go; the masks of all that are gone."""
        self._gone = self._selected(share)
        found = {}
        for name, weight in self.weights.items():
            kept = np.ones(weight.shape, bool)
            for axis, channels in self._axes(name):
                shape = [-1 if n == axis else 1 for n in range(weight.ndim)]
                kept &= ~self._gone[channels].reshape(shape)
            if not kept.all():
                found[name] = torch.from_numpy(kept).to(weight.device)
        return found

    def _axes(self, name: str) -> list[tuple[int, np.ndarray]]:
        """The axes of a weight that have channels, and which one each element is of."""
        axes = self._structure.elements.known()[self._values[name]] or []
        channel = self._structure.solution.channel
        return [(axis, channel[ids]) for axis, ids in enumerate(axes) if ids is not None]

    def _selected(self, share: float) -> np.ndarray:
        """The channels that are gone at that share of those that go, by the weights as they are now.

        Which ones go in all is chosen anew each time, so that the budget and multiples are met at the end.

        Raises:
            UsageError: there are no channels to cut, or not so many.
        """
        gone = self._gone
        for name, value in self._values.items():
            if value.dtype in FLOATS:
                set_constant(value, self.weights[name].detach().float().cpu().numpy())
        scores = np.where(gone, -np.inf, self._scores())
        one = replace(self._pass, scored=lambda _, group: scores[group.channels], only=self._open)
        try:
            going = np.flatnonzero(one.selected(self._structure, self._twin))
        except Declined as reason:
            raise UsageError(f"prune: {reason}") from None
        first = going[np.argsort(scores[going], kind="stable")][: round(share * len(going))]
        return np.isin(np.arange(len(gone)), first) | gone

    def _scores(self) -> np.ndarray:
        """Of each channel, what was heard, else as the pass scores it."""
        for heard in self._heard.values():
            return heard.double().cpu().numpy()
        seed, s, how = self.recipe.seed, self._structure, self._pass.score
        if how == "auto":
            how = "l2" if self.recipe.score == "taylor" else self.recipe.score
        found = score_channels(s, how, seed=seed, model=self._twin, samples=self._samples)
        scores = np.zeros(len(self._gone))
        for group, own in zip(s.groups, found, strict=True):
            scores[group.channels] = own
        return scores

    def _first_order(self, products: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of each channel, under the name of the first weight: where that is, it is summed up."""
        first, weight = next(iter(self.weights.items()))
        total = torch.zeros(len(self._gone), device=weight.device)
        for name, axis in self._readers:
            channels = dict(self._axes(name)).get(axis)
            if name in products and channels is not None:
                sums = products[name].float().movedim(axis, 0).flatten(1).sum(1)
                total.index_add_(0, torch.from_numpy(channels).to(total.device), sums.to(total.device))
        return {first: total.square()}


def _source(value: ir.Value | None) -> ir.Value | None:
    """Where a value comes from, moved or not."""
    while value is not None and (node := value.producer()) is not None and node.op_type in MOVES:
        value = node.inputs[0]
    return value
