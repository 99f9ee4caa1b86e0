"""Prune and train: weights that are set to zero stay zero, and the rest learns to do without them.

How the share of zeros grows: Zhu & Gupta, "To prune, or not to prune", 2017 (1710.01878). First-order scores:
Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019 (1906.10771). Rewinding: Frankle et
al., "Stabilizing the Lottery Ticket Hypothesis", 2019 (1903.01611).
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from onnxopt.errors import UsageError
from onnxopt.job import Progress
from onnxopt.ledger import Ledger
from onnxopt.model import ModelLike, clone, load, reusable
from onnxopt.passes.prune.prune_weights import PruneWeights
from onnxopt.pruning.saliency import Score, lamp, magnitude, noise
from onnxopt.pruning.weights import kept_elements, sparsity
from onnxopt.recipe import parse_pass
from onnxopt.reporting.training import TrainingReport
from onnxopt.result import Result
from onnxopt.training.distillation import train_taught
from onnxopt.training.interpreter.module import GraphModule
from onnxopt.training.kinds import PruneRecipe
from onnxopt.training.loop.hooks import Hook
from onnxopt.training.loop.trainer import Trainer
from onnxopt.training.recipe import read_recipe

__all__ = ["Masks", "prune", "ramp", "recover"]

_LISTENED = 16
"""Steps that gradients are listened to before the first zeros, where they say what goes."""


def prune(
    model: ModelLike,
    data: Any = None,
    *,
    recipe: PruneRecipe | str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Result[TrainingReport]:
    """Set weights to zero while training what is left; the result is the same graph.

        prune("m.onnx", "train.npz", labels="y", sparsity=0.9, ramp="cubic")

    Arguments are those of `finetune`; options are the fields of `PruneRecipe`. Without labels and teachers
    the model as it was is the teacher.

    Returns:
        The best epoch's model, with its zeros; the model as it was, and `report.ok` false, where that is
        worse than pruning alone, or lost more of the metric than `max_drop`.

    Raises:
        ModelError, UsageError: input that cannot be used, an unknown option, or nothing to prune.
        DivergedError: the loss is no finite number any more.
    """
    given = {"data": data, **options} if data is not None else options
    chosen = read_recipe(PruneRecipe, recipe, given)
    model = reusable(model)
    if not chosen.labels and not chosen.teachers:
        chosen = dataclasses.replace(chosen, teacher=model)
    return _train("prune", model, chosen, folder=folder, resume=resume, progress=progress)


def recover(
    pruned: ModelLike,
    original: ModelLike,
    data: Any,
    *,
    recipe: PruneRecipe | str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result[TrainingReport]:
    """Train a pruned model to say what it said before; what is zero stays zero.

    Data, teachers and all else that the recipe names comes before `data` and the original.

    Raises: as `prune` does.
    """
    asked = read_recipe(PruneRecipe, recipe, options)
    chosen = dataclasses.replace(
        asked,
        data=data if asked.data is None else asked.data,
        teacher=asked.teachers or (reusable(original),),
        sparsity=0.0,
        nm="",
        max_drop="0",
    )
    return _train("recover", reusable(pruned), chosen, progress=progress)


def _train(command: str, model: ModelLike, recipe: PruneRecipe, **options: Any) -> Result[TrainingReport]:
    masks = Masks(recipe, load(model))
    floor = masks.pruned(recipe.sparsity, None) if recipe.sparsity or recipe.nm else None
    result = train_taught(command, model, recipe, hooks=[masks], floor=floor, **options)
    layers = sparsity(result.graph)
    zeros = sum(one.zeros for one in layers) / max(sum(one.elements for one in layers), 1)
    if not result.report.ok or not zeros:
        return result
    said = f"{zeros:.1%} of the weights are zero: no faster in ONNX Runtime, and smaller once packed"
    report = dataclasses.replace(result.report, notes=(*result.report.notes, said))
    return dataclasses.replace(result, report=report)


def ramp(recipe: PruneRecipe, total: int) -> dict[int, float]:
    """Steps made -> the share of zeros that is reached there, in a training of `total` steps.

    s(t) = s (1 - (1 - t)^p), t from 0 to 1 over the ramp, p = 1 (linear) or 3 (cubic); all at once at its
    begin where it is none.
    """
    first = round(recipe.ramp_begin * total)
    if recipe.score == "taylor":
        first = max(first, min(_LISTENED, total // 2))
    last = min(round(recipe.ramp_end * total), total - 1)
    if recipe.ramp == "one-shot" or last <= first:
        return {first: recipe.sparsity}
    power = 3 if recipe.ramp == "cubic" else 1
    times = np.unique(np.linspace(first, last, recipe.ramp_updates + 1).round().astype(int))
    share = 1 - (1 - (times - first) / (last - first)) ** power
    return {int(time): recipe.sparsity * float(one) for time, one in zip(times, share, strict=True) if one}


@dataclass
class Masks(Hook):
    """Holds elements of weights at zero, and chooses them anew while their share grows.

    model: that is trained; it is only looked at. kept: by weight, True where an element is not held.
    """

    recipe: PruneRecipe
    model: ir.Model
    kept: dict[str, Tensor] = field(default_factory=dict)
    final: bool = False
    notes: tuple[str, ...] = ()
    _times: dict[int, float] = field(default_factory=dict)
    _heard: dict[str, Tensor] = field(default_factory=dict)
    """By weight, the sum of |w times its gradient| since zeros were chosen last."""
    _early: dict[str, Tensor] = field(default_factory=dict)
    _weights: dict[str, nn.Parameter] = field(default_factory=dict)

    def start(self, trainer: Trainer) -> None:
        module = trainer.module
        assert isinstance(module, GraphModule)
        named = dict(module.named_parameters())
        keys = {name: module.keys.get(name, "") for name in kept_elements(self.model)}
        self._weights = {name: named[key] for name, key in keys.items() if key in named}
        self._times = ramp(self.recipe, trainer.total)
        for name, one in self._weights.items():
            one.register_hook(functools.partial(self._held, name))
        self._choose(self._times.get(0, 0.0))
        if self.recipe.rewind == 0:
            self._early = {name: one.detach().clone() for name, one in module.named_parameters()}
        if 0 in self._times:
            self.final = len(self._times) == 1
        with torch.no_grad():
            self._hold()

    def stepped(self, trainer: Trainer) -> None:
        done = trainer.step + 1
        if self.recipe.score == "taylor" and not self.final:
            for name, one in self._weights.items():
                if one.grad is not None:
                    heard = (one * one.grad).abs()
                    self._heard[name] = self._heard[name] + heard if name in self._heard else heard
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
        kept = self.kept if self.final else self._chosen(self.recipe.sparsity)
        masks = {name: one.cpu().numpy() for name, one in kept.items()}
        _apply(PruneWeights(masks=masks), model)

    def pruned(self, share: float, score: Score | None) -> ir.Model:
        """A copy of the model with so many zeros, by these scores, else by the magnitudes of what it has.

        Raises:
            UsageError: there is nothing to prune.
        """
        model = clone(self.model)
        _apply(self._pass(share, score), model)
        if share and all(one.all() for one in kept_elements(model).values()):
            raise UsageError("prune: no weight could be pruned; options=small=0 takes small ones")
        return model

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept, "final": self.final, "heard": self._heard, "early": self._early}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.final, self._early = state["final"], state["early"]
        self.kept, self._heard = (
            {name: one.to(self._weights[name].device) for name, one in state[part].items()}
            for part in ("kept", "heard")
        )

    def _pass(self, share: float, score: Score | None) -> PruneWeights:
        """The pass `prune-weights` as the recipe asks; its names are those of the weights."""
        recipe = self.recipe
        by = f"nm={recipe.nm}" if recipe.nm and share else f"sparsity={share},scope={recipe.scope}"
        base = recipe.score if recipe.score in ("l1", "l2", "random") else "l1"
        spelled = ",".join(filter(None, [by, f"score={base}", f"seed={recipe.seed}", recipe.options]))
        one = parse_pass(f"prune-weights{{{spelled}}}")
        assert isinstance(one, PruneWeights)
        return dataclasses.replace(one, saliency=score)

    def _choose(self, share: float) -> None:
        self.kept = self._chosen(share)
        self._heard.clear()

    def _chosen(self, share: float) -> dict[str, Tensor]:
        """What stays at that share, by the weights as they are now; what is zero already goes first."""
        formulas: dict[str, Score] = {"l1": magnitude, "l2": lamp, "random": noise(self.recipe.seed)}
        formula = formulas.get(self.recipe.score)

        def score(name: str, numbers: np.ndarray) -> np.ndarray:
            if name not in self._weights:
                return np.asarray(np.abs(numbers))
            now = self._weights[name].detach().float().cpu().numpy()
            if formula is not None:
                return np.where(now == 0, -1.0, formula(name, now))
            heard = self._heard.get(name)
            return np.abs(now) if heard is None else np.where(now == 0, -1.0, heard.float().cpu().numpy())

        kept = kept_elements(self.pruned(share, score))
        return {
            name: torch.from_numpy(one).to(self._weights[name].device)
            for name, one in kept.items()
            if name in self._weights and not one.all()
        }

    def _held(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.masked_fill(~self.kept[name], 0) if name in self.kept else tensor

    def _hold(self) -> None:
        for name, kept in self.kept.items():
            self._weights[name].masked_fill_(~kept, 0)

    def _rewind(self, trainer: Trainer) -> None:
        """The weights of an early step again, with a fresh optimizer and moving average."""
        named = dict(trainer.module.named_parameters())
        for name, early in self._early.items():
            named[name].copy_(early)
        trainer.optimizer.state.clear()
        if trainer.ema is not None:
            trainer.ema.n_averaged.zero_()
        self._early = {}


def _apply(one: PruneWeights, model: ir.Model) -> None:
    one.apply(model, Ledger(pass_name=one.name))
