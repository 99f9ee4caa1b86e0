"""Distil: train a model to say what others say, with labels or without.

Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (1503.02531); hidden tensors as in Jiao et
al., "TinyBERT", 2020 (1909.10351): a learned linear map where the widths differ, which is not written;
attention as in Zagoruyko & Komodakis, "Paying More Attention to Attention", 2017 (1612.03928).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from onnxopt.data.contract import contract_of
from onnxopt.errors import UsageError
from onnxopt.graph import FLOATS
from onnxopt.job import Progress
from onnxopt.metric import Metric, Run, Split
from onnxopt.model import ModelLike, load, reusable
from onnxopt.recipe import parse_spelled
from onnxopt.reporting.training import TrainingReport
from onnxopt.result import Result
from onnxopt.training.interpreter.module import GraphModule
from onnxopt.training.interpreter.values import array_tensor
from onnxopt.training.kinds import DistillRecipe
from onnxopt.training.likeness import Answer, Match, differing
from onnxopt.training.loop.hooks import Hook
from onnxopt.training.loop.losses import LOSSES, CrossEntropy, Kl, Loss, parse_loss
from onnxopt.training.loop.scoring import INVERSES, final_activations, outputs_of
from onnxopt.training.loop.trainer import Trainer
from onnxopt.training.recipe import read_recipe
from onnxopt.training.samples.dataset import Dataset
from onnxopt.training.samples.transforms import Normalize, parse_transforms
from onnxopt.training.teachers import Teacher, fitting, known, looks_random, paired, pairs
from onnxopt.training.work import train

__all__ = ["Distiller", "distill", "train_taught"]

_LOOKED_AT = 16
"""Samples that the scale of hidden tensors is taken from."""
_NOISE = (
    "the samples look like independent random numbers: what a model says to noise teaches little about real "
    "inputs; give real ones"
)


def distill(
    model: ModelLike,
    data: Any = None,
    *,
    recipe: DistillRecipe | str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Result[TrainingReport]:
    """Train a model to say what its teachers say; the result is the same graph.

        distill("small.onnx", "inputs.npz", teacher="large.onnx", epochs=20)

    Without labels the teachers' outputs are all there is to learn from, and any real inputs serve; made-up
    ones do not. Arguments are those of `finetune`; options are the fields of `DistillRecipe`.

    Returns:
        The best epoch's model; the model as it was, and `report.ok` false, where that lost more of the
        metric than `max_drop`. Without labels the metric is the distance to the teachers' outputs, negated.

    Raises:
        ModelError, UsageError: input that cannot be used, or an unknown option.
        DivergedError: the loss is no finite number any more.
    """
    given = {"data": data, **options} if data is not None else options
    chosen = read_recipe(DistillRecipe, recipe, given)
    if not chosen.teachers:
        raise UsageError("distill: there is nobody to learn from: give --teacher (teacher=)")
    return train_taught("distill", reusable(model), chosen, folder=folder, resume=resume, progress=progress)


def train_taught(
    command: str, model: ModelLike, recipe: DistillRecipe, *, hooks: Sequence[Hook] = (), **options: Any
) -> Result[TrainingReport]:
    """`work.train` with what the recipe's teachers say in the loss, if it has any."""
    taught = bool(recipe.teachers)
    student = options.get("start") or load(model)
    return train(
        command,
        model,
        recipe,
        hooks=[*hooks, *([Distiller(recipe, student)] if taught else [])],
        share=1 - recipe.mix * taught if recipe.labels else 0.0,
        reference=recipe.teachers[0] if taught else None,
        **options,
    )


@dataclass
class Distiller(Hook):
    """Adds the distance to what teachers say.

    weight: of the outputs in the loss. student: the model that is trained, which is only looked at.
    """

    recipe: DistillRecipe
    student: ir.Model
    teachers: list[Teacher] = field(default_factory=list)
    answers: list[tuple[Answer, list[str]]] = field(default_factory=list)
    """What is compared, and what each teacher calls it."""
    notes: tuple[str, ...] = ()
    whole = False
    _matches: list[list[Match]] = field(default_factory=list)

    def start(self, trainer: Trainer) -> None:
        module = trainer.module
        assert isinstance(module, GraphModule)
        self._open(trainer.world.device)
        self.answers = [(self._seen(one, module), theirs) for one, theirs in self.answers]
        module.expose(*(match.mine for match in self._matches[0]))
        if self._matches[0]:
            self._project(trainer, module)
        self.notes = (_NOISE,) if looks_random(trainer.data) else ()

    def loss(self, trainer: Trainer, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        weight = self.recipe.mix if self.recipe.labels else 1.0
        parts = []
        for number, told in enumerate(teacher(arrays) for teacher in self.teachers):
            parts += [weight * one for one in self._distances(number, outputs, told)]
            parts += [self.recipe.match_weight * one(outputs, told) for one in self._matches[number]]
        return _sum(parts) / len(self.teachers)

    def metric(self, data: Dataset, test: Dataset | None) -> Metric | None:
        """The distance to the teachers' outputs, negated; None where there are labels."""
        if self.recipe.labels:
            return None
        splits: dict[Split, Dataset] = {"search": data, "final": test or data}

        def measured(run: Run, split: Split = "search") -> float:
            found, sizes = [], []
            for batch, outputs in outputs_of(splits[split], run):
                arrays = {name: array_tensor(array) for name, array in batch.arrays.items()}
                given = {}
                for one, _ in self.answers:
                    y = outputs[one.name]
                    given[one.seen] = torch.from_numpy(INVERSES[one.activation](y) if one.activation else y)
                parts = [
                    part
                    for number, teacher in enumerate(self.teachers)
                    for part in self._distances(number, given, teacher(arrays))
                ]
                found.append(-float(_sum(parts).mean()) / len(self.teachers))
                sizes.append(batch.size)
            return float(np.average(found, weights=sizes))

        return Metric("likeness", measured, test is not None)

    def _distances(
        self, number: int, outputs: Mapping[str, Tensor], told: Mapping[str, Tensor]
    ) -> Iterator[Tensor]:
        for one, theirs in self.answers:
            activation = self.teachers[number].activations.get(theirs[number], "")
            y, target = outputs[one.seen], told[theirs[number]]
            if y.numel() != target.numel():
                raise UsageError(
                    f"distill: {one.name!r} is of shape {tuple(y.shape)}, a teacher's {theirs[number]!r} of "
                    f"{tuple(target.shape)}: give one of the same task, or outputs=STUDENT=TEACHER"
                )
            yield one(y, target, activation)

    def _open(self, device: torch.device) -> None:
        """Open the teachers, and find what of them goes with which output."""
        if self.teachers:
            return
        recipe = self.recipe
        models = [reusable(one) for one in recipe.teachers]
        theirs = [{value.name for node in load(one).graph for value in node.outputs} for one in models]
        computed = (value.name or "" for node in self.student.graph for value in node.outputs)
        shared = [name for name in computed if all(name in one for one in theirs)]
        kinds = [(recipe.match, False), (recipe.attend, True)]
        hidden = [(*names, attends) for specs, attends in kinds for names in fitting(specs, shared)]
        inputs = [item.name for item in contract_of(self.student).required]
        again = all(isinstance(one, Normalize) for one in parse_transforms(recipe.transforms))
        for model in models:
            wanted = [item.name for item in contract_of(load(model)).required]
            fed_by = paired("input", wanted, inputs, {b: a for a, b in pairs(recipe.inputs)})
            self.teachers.append(
                Teacher(
                    model,
                    [name for _, name, _ in hidden],
                    {name: fed_by[name] for name in wanted},
                    device=device if recipe.teacher_in == "torch" else None,
                    memory=recipe.cache << 20 if again else 0,
                )
            )
            self._matches.append([Match(*one) for one in hidden])
        known("inputs", (mine for mine, _ in pairs(recipe.inputs)), inputs)
        taken = [name for one in self.teachers for name in one.inputs]
        known("inputs", (theirs for _, theirs in pairs(recipe.inputs)), taken)
        floats = [one.name or "" for one in self.student.graph.outputs if one.dtype in FLOATS]
        renamed = dict(pairs(recipe.outputs))
        known("outputs", renamed, floats)
        names = [
            paired("output", list(renamed) or floats, teacher.outputs, renamed) for teacher in self.teachers
        ]
        self.answers = [
            (Answer(name, name, self._loss(name)), [one[name] for one in names])
            for name in (list(renamed) or floats)
        ]

    def _loss(self, output: str) -> Loss:
        """By what the output is: a distribution, the probability of something, or numbers."""
        recipe = self.recipe
        activation = final_activations(self.student).get(output, "")
        soft = recipe.soft
        if not soft:
            first = parse_loss(recipe.loss).terms[:1] if recipe.labels else ()
            of_classes = any(isinstance(term.loss, CrossEntropy) for term in first)
            soft = "kl" if recipe.temperature or of_classes or activation.endswith("Softmax") else "mse"
            soft = "bce" if activation == "Sigmoid" else soft
        loss = parse_spelled(soft, LOSSES, "soft loss")
        if isinstance(loss, Kl) and loss == Kl():
            return Kl(recipe.temperature or 4.0)
        return loss

    def _seen(self, one: Answer, module: GraphModule) -> Answer:
        """The answer, of what its final activation is computed from where the loss takes that."""
        through = one.loss.looks_through
        found = module.logits_of(one.name, through) if through else None
        if found is None:
            return one
        axis = found.axis if isinstance(one.loss, Kl) else -1
        return Answer(one.name, found.name, one.loss, found.activation, axis)

    def _project(self, trainer: Trainer, module: GraphModule) -> None:
        """Find the scale of hidden tensors; those of other widths are given behind linear maps, too."""
        samples = [
            {name: array_tensor(a).to(module.device) for name, a in batch.arrays.items()}
            for batch in itertools.islice(trainer.data.evaluated(1), _LOOKED_AT)
        ]
        with torch.no_grad():
            outputs = module({name: samples[0][name] for name in module.input_names})
        random = torch.Generator().manual_seed(self.recipe.seed)
        maps = nn.ModuleList()
        axes: list[tuple[str, str, int]] = []
        for teacher, matches in zip(self.teachers, self._matches, strict=True):
            told = [teacher(arrays) for arrays in samples]
            for match in matches:
                squares = [float(one[match.theirs].float().square().mean()) for one in told]
                match.scale = max(float(np.mean(squares)), float(np.finfo(np.float32).tiny))
                found = differing(match, outputs[match.mine].shape, told[0][match.theirs].shape)
                if found is None:
                    continue
                axis, mine, theirs = found
                linear = nn.Linear(mine, theirs, bias=False)
                nn.init.xavier_uniform_(linear.weight, generator=random)
                match.key = f"{match.mine} -> {len(maps)}"
                axes.append((match.key, match.mine, axis))
                maps.append(linear)
        if not axes:
            return
        maps.to(module.device)
        name = "distillation"
        while hasattr(module, name):
            name += "_"
        module.add_module(name, maps)

        def mapped(_module: nn.Module, _feeds: Any, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
            for (key, mine, axis), linear in zip(axes, maps, strict=True):
                outputs[key] = linear(outputs[mine].movedim(axis, -1)).movedim(-1, axis)
            return outputs

        module.register_forward_hook(mapped)  # in the forward, so that parallel training sees the maps


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """Of losses of each sample, or of their means where outputs, such as states, have other first axes."""
    alike = len({one.shape for one in parts}) == 1
    return torch.stack([one if alike else one.mean() for one in parts]).sum(0)
