"""The recipes of distillation, pruning and quantization with training; they are read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from onnxopt.errors import UsageError
from onnxopt.training.recipe import Recipe

__all__ = ["DistillRecipe", "PruneRecipe", "QatRecipe"]


@dataclass(frozen=True)
class DistillRecipe(Recipe):
    """How to learn from teachers: with labels their loss is mixed with that of the task.

    `teacher` is a model or several: paths, and in Python whatever else `onnxopt.model.load` takes.
    """

    schedule: str = "cosine"
    teacher: Any = ()
    temperature: float = 0.0
    mix: float = 0.9
    soft: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    match: tuple[str, ...] = ()
    attend: tuple[str, ...] = ()
    match_weight: float = 1.0
    teacher_in: Literal["onnxruntime", "torch"] = "onnxruntime"
    cache: int = 512

    meanings: ClassVar[Mapping[str, str]] = {
        **Recipe.meanings,
        "teacher": "The model to learn from; of several, the mean.",
        "temperature": "Softens both distributions, as 1503.02531; 0: 4, for outputs that are distributions.",
        "mix": "The teachers' share of the loss where there are labels; the rest is --loss.",
        "soft": "How outputs are compared: kl, mse, bce, cosine or l1; by default by what the output is.",
        "inputs": "STUDENT=TEACHER: inputs of other names.",
        "outputs": "STUDENT=TEACHER: outputs of other names.",
        "match": "STUDENT=TEACHER: hidden tensors to be equal; widths may differ; *Relu*: all of both.",
        "attend": "STUDENT=TEACHER: hidden tensors that are to attend to the same places (1612.03928).",
        "match_weight": "Weight of each --match and --attend in the loss.",
        "teacher_in": "onnxruntime or torch: the latter on --devices, nothing is kept.",
        "cache": "MiB of what teachers said that are kept, where samples come again unchanged.",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.mix <= 1 and min(self.match_weight, self.cache) >= 0 and self.temperature >= 0):
            raise UsageError("mix is from 0 to 1; temperature, match_weight and cache are at least 0")

    @property
    def teachers(self) -> tuple[Any, ...]:
        """The models to learn from."""
        return tuple(self.teacher) if isinstance(self.teacher, list | tuple) else (self.teacher,)


@dataclass(frozen=True)
class PruneRecipe(DistillRecipe):
    """How to set weights to zero and train what is left; without labels the dense original is the teacher."""

    max_drop: str = ""
    sparsity: float = 0.5
    nm: str = ""
    channels: str = ""
    scope: Literal["global", "layer", "row"] = "global"
    score: Literal["l1", "l2", "random", "taylor"] = "l1"
    options: str = ""
    ramp: Literal["one-shot", "linear", "cubic"] = "one-shot"
    ramp_begin: float = 0.0
    ramp_end: float = 0.5
    ramp_updates: int = 20
    rewind: int = -1

    meanings: ClassVar[Mapping[str, str]] = {
        **DistillRecipe.meanings,
        "max_drop": "How much of the metric of the dense model may be lost: 0.005, or 1%.",
        "sparsity": "Share of zeros to reach; 0: only what is zero already stays zero.",
        "nm": "N of M in a row stay, as 2:4, instead of a share.",
        "channels": "Instead whole channels, cut out of what is written: options of prune-channels: macs=0.5",
        "scope": "What competes for the zeros: global, layer or row.",
        "score": "What goes first: l1, l2 (LAMP), random, or taylor: |w times its gradient| (1906.10771).",
        "options": "Other options of the pass prune-weights: small=128,protect=first.",
        "ramp": "one-shot, linear or cubic (1710.01878): how the share of zeros grows.",
        "ramp_begin": "When zeros begin, as a share of the training.",
        "ramp_end": "When all zeros are there, as a share of the training.",
        "ramp_updates": "How often zeros are chosen anew on the way.",
        "rewind": "Step whose weights come back once all zeros are there (1903.01611); -1: none.",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1 or not 0 <= self.ramp_begin <= self.ramp_end < 1:
            raise UsageError("sparsity, ramp_begin and, after it, ramp_end are from 0 to less than 1")
        if self.ramp_updates < 1:
            raise UsageError(f"ramp_updates: {self.ramp_updates} is less than 1")
        if self.channels and any(getattr(self, name) != getattr(PruneRecipe, name) for name in _OF_WEIGHTS):
            raise UsageError(f"channels: {', '.join(_OF_WEIGHTS)} are of single weights: give no such option")
        if self.nm and self.ramp != "one-shot":
            raise UsageError("ramp: the share of zeros of a pattern N:M does not grow: it takes one-shot")


_OF_WEIGHTS = ("sparsity", "nm", "scope", "options")
"""Options that say which single weights go."""


@dataclass(frozen=True)
class QatRecipe(DistillRecipe):
    """How to train with few bits; without labels the float model is the teacher."""

    max_drop: str = ""
    groups: tuple[str, ...] = ("scales{lr=10}",)
    weights: str = "int8"
    activations: str = ""
    per_channel: bool = True
    target: str = "cpu"
    keep: tuple[str, ...] = ()
    calibration: int = 128
    observe: int = 0
    scale_epochs: int = 0

    meanings: ClassVar[Mapping[str, str]] = {
        **DistillRecipe.meanings,
        "max_drop": "How much of the float model's metric may be lost: 0.005, or 1%; by default anything.",
        "weights": "Of a float model: int8, int7 (CPUs without VNNI), int4, int3, int2, float8e4m3fn, ...",
        "activations": "Of a float model: uint8, int8, uint16, ... or none; by default the target's.",
        "per_channel": "Of a float model: a scale for each output channel of a weight.",
        "target": "Of a float model: what its integers are for: cpu, arm, tensorrt or generic.",
        "keep": "Of a float model: outputs, nodes or operators that stay in floating point.",
        "calibration": "Of a float model: samples that ranges are found on, at most.",
        "teacher": "A model to learn from; of a quantized model the float one, to compare with, too.",
        "observe": "Batches at the start that set scales of activations by moving averages of their range.",
        "scale_epochs": "Epochs in which scales are trained; then they stay; 0: all.",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration < 1 or self.observe < 0 or self.scale_epochs < 0:
            raise UsageError("calibration is at least 1, observe and scale_epochs are at least 0")
