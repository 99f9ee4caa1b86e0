"""Masks that hold while a model is trained: when they are chosen, by what, and how they grow.

How the share of zeros grows: Zhu & Gupta, "To prune, or not to prune", 2017 (1710.01878). First-order scores:
Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019 (1906.10771). Rewinding: Frankle et
al., "Stabilizing the Lottery Ticket Hypothesis", 2019 (1903.01611).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from onnxopt.errors import UsageError
from onnxopt.ledger import Ledger
from onnxopt.model import clone
from onnxopt.passes.prune.prune_weights import PruneWeights
from onnxopt.pruning.saliency import Score, lamp, magnitude, noise
from onnxopt.pruning.weights import kept_elements
from onnxopt.recipe import parse_pass
from onnxopt.training.interpreter.module import GraphModule
from onnxopt.training.kinds import PruneRecipe
from onnxopt.training.loop.hooks import Hook
from onnxopt.training.loop.optimizers import frozen
from onnxopt.training.loop.trainer import Trainer

__all__ = ["Masks", "ramp"]

_LISTENED = 16
"""Steps that gradients are listened to before the first zeros, where they say what goes."""


def ramp(recipe: PruneRecipe, total: int) -> dict[int, float]:
    """Steps made -> how much of what is asked for is reached there, in a training of `total` steps.

    1 - (1 - t)^p, t from 0 to 1 over the ramp, p = 1 (linear) or 3 (cubic); all at once at its begin where
    it is none.
    """
    first = round(recipe.ramp_begin * total)
    if recipe.score == "taylor":
        first = max(first, min(_LISTENED, total // 2))
    last = min(round(recipe.ramp_end * total), total - 1)
    if recipe.ramp == "one-shot" or last <= first:
        return {first: 1.0}
    power = 3 if recipe.ramp == "cubic" else 1
    times = np.unique(np.linspace(first, last, recipe.ramp_updates + 1).round().astype(int))
    share = 1 - (1 - (times - first) / (last - first)) ** power
    return {int(time): float(one) for time, one in zip(times, share, strict=True) if one}


@dataclass
class Masks(Hook):
    """Holds elements of weights at zero, and chooses them anew while their share grows.

    model: that is trained; it is only looked at. kept: by weight, True where an element is not held. floor:
    the model with all its zeros and no training, by scores of what it has; None where nothing is asked for.
    Frozen weights are left out, and do not count.
    """

    recipe: PruneRecipe
    model: ir.Model
    kept: dict[str, Tensor] = field(default_factory=dict)
    final: bool = False
    floor: ir.Model | None = None
    notes: tuple[str, ...] = ()
    _times: dict[int, float] = field(default_factory=dict)
    _heard: dict[str, Tensor] = field(default_factory=dict)
    """By weight, the sum of |w times its gradient| since zeros were chosen last."""
    _early: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, nn.Parameter] = field(default_factory=dict)
    _still: int = 0
    """Weights that are frozen."""

    def start(self, trainer: Trainer) -> None:
        module = trainer.module
        assert isinstance(module, GraphModule)
        named = dict(module.named_parameters())
        still = set(frozen(named, self.recipe.freeze))
        trained = {name: named[key] for name, key in module.keys.items() if key in named and key not in still}
        self._find(trained, trainer)
        self.floor = self._floor()
        self._times = ramp(self.recipe, trainer.total)
        for name, one in self.weights.items():
            one.register_hook(functools.partial(self._held, name))
        self._choose(self._times.get(0, 0.0))
        if self.recipe.rewind == 0:
            self._early = {name: one.detach().clone() for name, one in module.named_parameters()}
        self.final = list(self._times) == [0]
        with torch.no_grad():
            self._hold()

    def backward(self, trainer: Trainer) -> None:
        if self.recipe.score == "taylor" and not self.final:
            grads = {name: one * one.grad for name, one in self.weights.items() if one.grad is not None}
            for name, heard in self._first_order(grads).items():  # where float16 overflows there is no step
                heard = heard.nan_to_num(0.0, 0.0, 0.0)
                self._heard[name] = self._heard[name] + heard if name in self._heard else heard

    def stepped(self, trainer: Trainer) -> None:
        done = trainer.step + 1
        if done == self.recipe.rewind and not self.final:
            self._early = {name: one.clone() for name, one in trainer.module.named_parameters()}
        if done in self._times:
            self._choose(self._times[done])
            self.final = done == max(self._times)
            if self.final and self._early:
                self._rewind(trainer)
        self._hold()

    def written(self, model: ir.Model) -> None:
        """What is judged and written has all its zeros, also where training has not come to them yet."""
        kept = self.kept if self.final else self._chosen(1.0)
        masks = {name: one.cpu().numpy() for name, one in kept.items()}
        PruneWeights(masks=masks).apply(model, Ledger(pass_name=PruneWeights.name))
        zeros = sum(int((~one).sum()) for one in masks.values())
        if zeros:
            share = zeros / sum(one.numel() for one in self.weights.values())
            more = f"; {self._still} frozen ones stay as they are, and do not count" if self._still else ""
            said = "of the weights are zero: no faster in ONNX Runtime, and smaller once packed"
            self.notes = (f"{share:.1%} {said}{more}",)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept, "final": self.final, "heard": self._heard, "early": self._early}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.final, self._early = state["final"], state["early"]
        self.kept, self._heard = (
            {name: one.to(self.weights[name].device) for name, one in state[part].items()}
            for part in ("kept", "heard")
        )

    def _find(self, trained: Mapping[str, nn.Parameter], trainer: Trainer) -> None:
        """The weights that may be held, of what is trained."""
        every = kept_elements(self.model)
        self.weights = {name: trained[name] for name in every if name in trained}
        self._still = len(every) - len(self.weights) if self.recipe.freeze else 0

    def _floor(self) -> ir.Model | None:
        """Raises UsageError where there is nothing to prune."""
        if not (self.recipe.sparsity or self.recipe.nm):
            return None
        ledger = Ledger(pass_name=PruneWeights.name)
        model = self._pruned(1.0, None, ledger)
        if all(one.all() for name, one in kept_elements(model).items() if name in self.weights):
            reasons = "; ".join(dict.fromkeys(ledger.declined.values())) or "it has none"
            hint = "; options=small=0 takes small ones" if "fewer than" in reasons else ""
            raise UsageError(f"prune: no weight could be pruned: {reasons}{hint}")
        return model

    def _pruned(self, share: float, score: Score | None, ledger: Ledger | None = None) -> ir.Model:
        """A copy of the model with its zeros, as `prune-weights` chooses them by these scores."""
        recipe, model = self.recipe, clone(self.model)
        by = f"sparsity={recipe.sparsity * share},scope={recipe.scope}"
        by = f"nm={recipe.nm}" if recipe.nm and share else by
        base = recipe.score if recipe.score in ("l1", "l2", "random") else "l1"
        spelled = ",".join(filter(None, [by, f"score={base}", f"seed={recipe.seed}", recipe.options]))
        one = parse_pass(f"prune-weights{{{spelled}}}")
        assert isinstance(one, PruneWeights)
        one = dataclasses.replace(one, saliency=score, only=tuple(self.weights))
        one.apply(model, ledger or Ledger(pass_name=one.name))
        return model

    def _choose(self, share: float) -> None:
        self.kept = self._chosen(share)
        self._heard.clear()

    def _chosen(self, share: float) -> dict[str, Tensor]:
        """What stays at that share, by the weights as they are now; what is zero already goes first."""
        formulas: dict[str, Score] = {"l1": magnitude, "l2": lamp, "random": noise(self.recipe.seed)}
        formula = formulas.get(self.recipe.score)

        def score(name: str, _: np.ndarray) -> np.ndarray:
            now = self.weights[name].detach().float().cpu().numpy()
            if formula is not None:
                return np.where(now == 0, -1.0, formula(name, now))
            heard = self._heard.get(name)
            return np.abs(now) if heard is None else np.where(now == 0, -1.0, heard.float().cpu().numpy())

        return {
            name: torch.from_numpy(one).to(self.weights[name].device)
            for name, one in kept_elements(self._pruned(share, score)).items()
            if name in self.weights and not one.all()
        }

    def _first_order(self, products: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What a step adds to what is heard, from each weight times its gradient."""
        return {name: one.abs() for name, one in products.items()}

    def _held(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.masked_fill(~self.kept[name], 0) if name in self.kept else tensor

    def _hold(self) -> None:
        for name, kept in self.kept.items():
            self.weights[name].masked_fill_(~kept, 0)

    def _rewind(self, trainer: Trainer) -> None:
        """The weights of an early step again, with a fresh optimizer and moving average."""
        named = dict(trainer.module.named_parameters())
        for name, early in self._early.items():
            named[name].copy_(early)
        trainer.optimizer.state.clear()
        if trainer.ema is not None:
            trainer.ema.n_averaged.zero_()
        self._early = {}
