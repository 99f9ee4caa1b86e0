"""How to train, stated whole: one spelling of every option in TOML, on the command line and in Python.

    loss = "cross-entropy"
    labels = ["y"]
    epochs = 20
    optimizer = "adamw"
    schedule = "cosine{end=0.01}"
    transforms = ["shift{by=1}", "noise{std=0.05}"]
    groups = ["*.bias{lr=2,weight_decay=0}"]

On the command line `batch_size` is `--batch-size`; a list is an option given several times.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from onnxopt.errors import UsageError, did_you_mean
from onnxopt.recipe import read_value

__all__ = ["Recipe", "read_recipe"]

Kind = TypeVar("Kind", bound="Recipe")
DataSource = Any
"""What `sources.open_source` takes."""


@dataclass(frozen=True)
class Recipe:
    """The options of a training; `meanings` documents them, here and in `--help`.

    In Python, `data`, `validation` and `test` may be anything that `sources.open_source` takes, and `loss`
    and `metric` functions.

    Raises:
        UsageError: numbers out of their range. Names are looked up when the training starts.
    """

    data: DataSource = None
    labels: tuple[str, ...] = ()
    validation: DataSource = None
    holdout: float = 0.1
    test: DataSource = None
    preprocess: str | None = None
    transforms: tuple[str, ...] = ()
    metric: str | Callable[..., Any] | None = None
    max_drop: str = "0"
    loss: str | Callable[..., Any] = "cross-entropy"
    l1: float = 0.0
    l2: float = 0.0
    epochs: int = 5
    steps: int = 0
    batch_size: str = "32"
    batch_schedule: str = "constant"
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    groups: tuple[str, ...] = ()
    schedule: str = "constant"
    warmup: int = 0
    freeze: tuple[str, ...] = ()
    clip_norm: float = 0.0
    clip_value: float = 0.0
    ema: float = 0.0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    init: tuple[str, ...] = ()
    batchnorm: bool = False
    statistics: Literal["auto", "frozen", "batch", "estimate"] = "auto"
    patience: int = 0
    seed: int = 0
    devices: str = "auto"
    shard: bool = False
    workers: int = 1
    interval: int = 200
    evaluate: int = 0
    shuffle: int = 0
    tensorboard: bool = False

    meanings: ClassVar[Mapping[str, str]] = {
        "data": ".npz, a folder, .csv, hf:NAME:SPLIT or file.py:function.",
        "labels": "An array of the data that is a label.",
        "validation": "Samples to choose the best epoch by, as --data.",
        "holdout": "Without --validation: the share of --data kept for it; 0: all of --data, trained on too.",
        "test": "Samples for the last word, as --data.",
        "preprocess": "How images become arrays: resize=256,crop=224,scale=1/255,...",
        "transforms": "normalize, flip, shift, crop, noise, gain, erase or mixup: shift{by=2}.",
        "metric": "In ONNX Runtime: accuracy, loss, agreement, mse, sqnr, file.py:function; more is better.",
        "max_drop": "How much of the metric may be lost: 0.005, or 1%.",
        "loss": "cross-entropy, kl, bce, ctc, mse, l1, cosine, a sum of them, or file.py:function.",
        "l1": "Times the sum of |w| over weights, added to the loss.",
        "l2": "Times half the sum of w^2 over weights, added to the loss.",
        "epochs": "How often all samples are seen, at most.",
        "steps": "Steps of the optimizer, at most; 0: as many as the epochs have.",
        "batch_size": "Samples a step: a number, 16-64 (random), or full.",
        "batch_schedule": "How the batch size goes with epochs: exponential{gamma=1.5}, ...",
        "accumulate": "Run each batch in so many pieces, to save memory.",
        "optimizer": "sgd, adagrad, rmsprop, adam or adamw: sgd{momentum=0.9,nesterov=true}.",
        "lr": "Learning rate.",
        "weight_decay": "Of weights; of others as --groups say.",
        "groups": "Rates of their own: scales{lr=0.1}, *.bias{lr=2,weight_decay=0}, weights{relative=true}.",
        "schedule": "constant, linear, cosine, exponential, step, cyclic, inverse-sqrt or plateau.",
        "warmup": "Steps of a linear rise of the learning rate before the schedule.",
        "freeze": "Pattern of parameters that stay as they are.",
        "clip_norm": "Scale gradients down to this norm; 0: never.",
        "clip_value": "Clip gradients element by element; 0: never.",
        "ema": "Evaluate and write the moving average of the parameters, of this decay; 0: none.",
        "precision": "float32, bfloat16 or float16 (autocast).",
        "compile": "Compile the graph with torch.compile: a slow first step, then faster ones.",
        "init": "Start anew: fc.*=kaiming, fc.bias=zeros; xavier, orthogonal, normal, ones or constant.",
        "batchnorm": "Train with a BatchNormalization after each Conv, folded back at the end.",
        "statistics": "Of BatchNormalization: frozen, batch, or estimate: of the batch, then measured; auto: "
        "frozen, with --batchnorm batch.",
        "patience": "Stop after so many evaluations without a better score; 0: never.",
        "seed": "Seed of everything random.",
        "devices": "auto, cpu, cuda, cuda:1, mps, xla; cuda:0,cuda:1 has half of the graph each.",
        "shard": "Of processes of torchrun, each keeps a part of every weight (FSDP).",
        "workers": "Threads that read and transform samples.",
        "interval": "Steps between checkpoints; one is written after each evaluation, too.",
        "evaluate": "Steps between evaluations; 0: one after each epoch.",
        "shuffle": "Samples of a stream that are held, to draw the next one from; 0: none, as they come.",
        "tensorboard": "Write the curves for TensorBoard, too.",
    }

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise UsageError(f"{name}: {getattr(self, name)} is less than {least}")
        if not 0 <= self.ema < 1 or not 0 <= self.holdout < 1 or self.seed >= 1 << 31:
            raise UsageError("ema and holdout are at least 0 and less than 1, seed is less than 2^31")

    def to_dict(self) -> dict[str, Any]:
        """The options in types that JSON has; sources and functions of Python by their names."""
        return {f.name: _shown(getattr(self, f.name)) for f in dataclasses.fields(self)}


_PATHS = ("data", "validation", "test", "preprocess", "metric", "loss", "teacher")
"""Options that may be paths."""
_LEAST = {
    **dict.fromkeys(("epochs", "accumulate", "interval"), 1),
    **dict.fromkeys(("steps", "warmup", "patience", "workers", "seed", "evaluate", "shuffle"), 0),
    **dict.fromkeys(("l1", "l2", "lr", "weight_decay", "clip_norm", "clip_value"), 0),
}


def read_recipe(
    kind: type[Kind], source: str | os.PathLike[str] | Kind | None, given: Mapping[str, Any]
) -> Kind:
    """The recipe of a TOML file (or that recipe, or the defaults), with the options in `given` over it.

    Paths in a file are relative to it. Values may be text, as on the command line.

    Raises:
        UsageError: not TOML, an unknown key (with the nearest known one), or a value of a wrong type.
    """
    base: dict[str, Any] = {}
    who = "recipe" if isinstance(source, Recipe | None) else f"recipe {os.fspath(source)}"
    if isinstance(source, Recipe):
        base = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
    elif source is not None:
        table = _typed(kind, _table(Path(source), who), who)
        base = {name: _beside(Path(source), name, value) for name, value in table.items()}
    return kind(**{**base, **_typed(kind, given, "train")})


def _table(path: Path, who: str) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{who}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # tomllib's own and UnicodeDecodeError
        raise UsageError(f"{who}: not TOML: {error}") from None


def _beside(recipe: Path, name: str, value: Any) -> Any:
    """A path that a recipe names lies beside it, unless it is no path there."""
    if isinstance(value, list):
        return [_beside(recipe, name, one) for one in value]
    if name not in _PATHS or not isinstance(value, str):
        return value
    beside = recipe.parent / value
    return str(beside) if (recipe.parent / value.partition(":")[0]).exists() else value


def _typed(kind: type[Recipe], given: Mapping[str, Any], who: str) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    known = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    for name in given:
        if name not in known:
            raise UsageError(f"{who}: unknown option {name!r}{did_you_mean(name, known)}")
    return {name: _value(f"{who}: {name}", known[name], value) for name, value in given.items()}


def _value(who: str, kind: Any, value: Any) -> Any:
    """A value as its field has it; text is read, other types are checked."""
    if kind is Any or (value is None and type(None) in typing.get_args(kind)):
        return value
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        if callable(value):
            return value
        kind = str
    if typing.get_origin(kind) is tuple:
        value = (value,) if isinstance(value, str) else value
        if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
            raise UsageError(f'{who}: expected a list of texts such as ["name"], found {value!r}')
        return tuple(value)
    if isinstance(value, str):
        return read_value(who, kind, value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UsageError(f"{who}: expected {getattr(kind, '__name__', kind)}, found {value!r}")
    return value


def _shown(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return list(map(_shown, value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return f"({getattr(value, '__name__', type(value).__name__)})"
