"""The loop: batches in, optimizer steps, an evaluation and a checkpoint after each epoch or so many steps.

All that is random in a step (dropout, transforms, order) is drawn anew from the seed and the number of the
step, so that a checkpoint needs no state of generators and a resumed run is the run, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from onnxopt.errors import OnnxoptError, UsageError, one_line
from onnxopt.training.interpreter.values import array_tensor, whole
from onnxopt.training.loop.batching import takes_batches, tensors_of
from onnxopt.training.loop.checkpoints import read_checkpoint, write_checkpoint
from onnxopt.training.loop.divergence import diverged
from onnxopt.training.loop.hooks import Hook, Judge
from onnxopt.training.loop.logs import Curves, Log
from onnxopt.training.loop.losses import Objective
from onnxopt.training.loop.optimizers import averaged, frozen, make_optimizer, penalize
from onnxopt.training.loop.parallel import World
from onnxopt.training.loop.sharding import like_parts
from onnxopt.training.recipe import Recipe
from onnxopt.training.samples.dataset import Batch, Dataset
from onnxopt.training.samples.sizes import parse_sizes
from onnxopt.training.schedules import Clock, parse_schedule

__all__ = ["Trainer"]

_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(eq=False)
class Trainer:
    """Trains a module that maps a dict of inputs to a dict of outputs.

    objective: None where hooks give the loss. folder: where checkpoint and log go; None: nowhere. made_for:
    stands for model and recipe in checkpoints.

    `step` counts optimizer steps, `epoch` and `batch` say where in the data it is, `piece` what samples the
    loss is being worked out for. `trained` are the parameters that are, by name; `forward` is what runs.
    """

    module: nn.Module
    objective: Objective | None
    data: Dataset
    recipe: Recipe
    judge: Judge
    world: World
    hooks: Sequence[Hook] = ()
    folder: Path | None = None
    made_for: str = ""
    progress: Callable[[str, float | None], None] = lambda _what, _share: None
    step: int = field(default=0, init=False)
    epoch: int = field(default=0, init=False)
    batch: int = field(default=0, init=False)
    piece: Batch | None = field(default=None, init=False)
    curves: Curves = field(default_factory=Curves, init=False)
    trained: dict[str, nn.Parameter] = field(init=False)
    _losses: list[float] = field(default_factory=lambda: [0.0, 0.0], init=False)
    """Sum of the losses since the last evaluation, and how many samples they are of."""

    def __post_init__(self) -> None:
        recipe, module, world = self.recipe, self.module.eval(), self.world  # hooks may run it
        data = self.data = replace(self.data, apart=not takes_batches(module, self.data))
        self._schedule = parse_schedule(recipe.schedule, recipe.warmup)
        self._sizes = parse_sizes(recipe.batch_size, parse_schedule(recipe.batch_schedule), recipe.seed)
        steps = data.steps(self._sizes, recipe.epochs)
        if not steps and not recipe.steps:
            raise UsageError("steps: a stream has no length: say how many steps to train, with steps=")
        self.total = min(steps or recipe.steps, recipe.steps or steps)
        if world.sharded and (recipe.precision == "float16" or any(hook.whole for hook in self.hooks)):
            raise UsageError("shard: it is for finetune and distill, in float32 or bfloat16")
        world.place(module, self._sample)
        for hook in self.hooks:
            hook.start(self)
        named = dict(module.named_parameters())
        for name in frozen(named, recipe.freeze):
            named[name].requires_grad_(False)
        self.forward: Any = world.wrapped(module, self._sample)
        self.trained = own = {name: one for name, one in module.named_parameters() if one.requires_grad}
        self.optimizer = make_optimizer(
            own, recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay, groups=recipe.groups
        )
        self._parameters = nn.ParameterList(self.trained.values())  # them, not copies
        average = get_ema_multi_avg_fn(recipe.ema)
        self.ema = AveragedModel(self._parameters, multi_avg_fn=average) if recipe.ema else None
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.precision == "float16")
        if recipe.compile:
            self.forward = torch.compile(self.forward)

    @property
    def clock(self) -> Clock:
        """Where the training is."""
        return Clock(self.step, self.total, self.epoch, tuple(self.curves.score))

    @property
    def done(self) -> bool:
        """Whether all steps are made, or the score has not become better for too long."""
        scores = self.curves.score
        waited = len(scores) - 1 - scores.index(max(scores)) if scores else 0
        stopped = bool(self.recipe.patience) and waited >= self.recipe.patience
        return stopped or self.step >= self.total or self.epoch >= self.recipe.epochs

    def fit(self, *, resume: bool = False) -> Curves:
        """Train to the end; with `resume` from the checkpoint in the folder on, if there is one.

        Raises:
            DivergedError: the loss or a gradient is no finite number.
            UsageError: data, labels or a checkpoint that do not fit.
        """
        logged = self._restore() if resume else 0
        log = Log(self.folder if self.world.first else None, keep=logged, tensorboard=self.recipe.tensorboard)
        devices = [one for one in (self.world.device, *self.world.stages) if one.type == "cuda"]
        with torch.random.fork_rng(devices), contextlib.closing(log):
            while not self.done:
                self._run_epoch(log)
        return self.curves

    def batches(self, start: int = 0) -> Generator[tuple[int, list[Batch]]]:
        """Of this epoch: the size of each, and what this process has of it."""
        part, pieces, epochs = (self.world.rank, self.world.size), self.recipe.accumulate, self.recipe.epochs
        return self.data.batches(self._sizes, self.epoch, epochs, start=start, part=part, pieces=pieces)

    def _sample(self) -> dict[str, Tensor]:
        """The inputs of a batch, on the CPU."""
        _, pieces = next(self.data.batches(self._sizes, 0, self.recipe.epochs, pieces=self.recipe.accumulate))
        return {name: self._tensor(pieces[0].arrays[name], "cpu") for name in self.module.input_names}  # type: ignore[union-attr]

    def _run_epoch(self, log: Log) -> None:
        recipe = self.recipe
        for hook in self.hooks:
            hook.epoch(self, self.epoch)
        self.module.train()
        self.world.seed(recipe.seed, 0, self.epoch)  # for loaders of torch: alike in all processes
        with contextlib.closing(self.batches(self.batch)) as batches:
            for size, pieces in batches:
                loss, rate = self._train_on(size, pieces)
                self.step, self.batch = self.step + 1, self.batch + 1
                self._losses = [self._losses[0] + loss * size, self._losses[1] + size]
                log(self.step, epoch=self.epoch + 1, loss=loss, lr=rate)
                self.progress(
                    f"epoch {self.epoch + 1}/{recipe.epochs} loss {loss:.4g}", self.step / self.total
                )
                if self.step >= self.total:
                    break
                due = bool(recipe.evaluate) and self.step % recipe.evaluate == 0
                if due:
                    self._evaluate(log)
                if due or self.step % recipe.interval == 0:
                    self._save(log)
                if self.done:
                    return
        if not self.batch:
            raise UsageError(
                f"data: epoch {self.epoch + 1} gives no samples: a source is read anew in each epoch"
            )
        over = self.step >= self.total or self.epoch + 1 == recipe.epochs
        if not recipe.evaluate or (over and self.curves.step[-1:] != [self.step]):
            self._evaluate(log)
        self.epoch, self.batch = self.epoch + 1, 0
        self._save(log)

    def _train_on(self, size: int, pieces: Sequence[Batch]) -> tuple[float, float]:
        """One step of the optimizer; the mean loss over all processes, and the learning rate."""
        self.world.seed(self.recipe.seed, 1, self.step, self.world.rank)
        rate = self.recipe.lr * self._schedule(self.clock)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.world.device)
        for number, piece in enumerate(pieces):
            self.piece, last = piece, number == len(pieces) - 1
            arrays = tensors_of(piece, self.module, self.world.device)
            with self.world.joined(self.forward, last):
                loss = self._loss(piece, arrays) * (piece.size * self.world.size / size)
                self._scaler.scale(loss).backward()
            total = total + loss.detach()
        self.world.share(self.trained.values())
        self._scaler.unscale_(self.optimizer)
        with torch.no_grad():
            for hook in self.hooks:
                hook.backward(self)
        total = self.world.mean(total)
        total = total + penalize(self.trained.values(), self.recipe.l1, self.recipe.l2, self.world.device)
        found, norm = torch.stack((total, self._clip())).tolist()  # all that a step waits for
        if not math.isfinite(found + norm):
            raise diverged(self.module, self.forward, self.step + 1, found, self.trained, arrays)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        with torch.no_grad():
            for hook in self.hooks:
                hook.stepped(self)
        if self.ema is not None:
            self.ema.update_parameters(self._parameters)
        return found, rate

    def _loss(self, piece: Batch, arrays: dict[str, Tensor]) -> Tensor:
        """The mean loss of one piece."""
        shares = None if piece.shares is None else self._tensor(piece.shares)
        if shares is not None:  # mixup: each sample with the one as far from the other end
            names = [name for name in self.module.input_names if arrays[name].is_floating_point()]  # type: ignore[union-attr]
            for name in names:
                own = shares.reshape(-1, *[1] * (arrays[name].ndim - 1))
                arrays[name] = own * arrays[name] + (1 - own) * arrays[name].flip(0)
        dtype = _TYPES.get(self.recipe.precision)
        try:
            with torch.autocast(self.world.device.type, dtype, enabled=dtype is not None):
                outputs = self.forward({name: arrays[name] for name in self.module.input_names})  # type: ignore[union-attr]
            parts = [] if self.objective is None else [self.objective(outputs, arrays)]
            if shares is not None and parts:
                mirrored = {**arrays, **{name: arrays[name].flip(0) for name in self.data.labels}}
                other = self.objective(outputs, mirrored)  # type: ignore[misc]
                parts = [shares * parts[0] + (1 - shares) * other]
            parts += [one for hook in self.hooks if (one := hook.loss(self, outputs, arrays)) is not None]
            loss = torch.stack([part.mean() for part in parts]).sum()
        except OnnxoptError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            shown = ", ".join(f"{name} {'x'.join(map(str, a.shape))}" for name, a in arrays.items())
            raise UsageError(f"train: step {self.step + 1} on {shown} failed: {one_line(error)}") from error
        if not loss.requires_grad:
            raise UsageError("train: the loss depends on nothing that is trained: look at loss and freeze")
        return loss

    def _tensor(self, array: np.ndarray, device: str | torch.device | None = None) -> Tensor:
        return array_tensor(array).to(device or self.world.device)

    def _clip(self) -> Tensor:
        """Clip the gradients, and give their norm; 0 where the scaler of float16 looks after them."""
        members = [one for one in self.trained.values() if one.grad is not None]
        if self.recipe.clip_value:
            nn.utils.clip_grad_value_(members, self.recipe.clip_value)
        norm = nn.utils.get_total_norm([one.grad for one in members if one.grad is not None])
        if self.recipe.clip_norm:
            nn.utils.clip_grads_with_norm_(members, self.recipe.clip_norm, norm)
        norm = whole(norm).to(self.world.device)
        return torch.zeros_like(norm) if self._scaler.is_enabled() else norm

    def _evaluate(self, log: Log) -> None:
        """Score what would be written now, and keep it if it is the best."""
        self.progress(f"epoch {self.epoch + 1}: evaluating in ONNX Runtime", self.step / self.total)
        self.module.eval()
        with averaged(self._parameters, self.ema):
            for hook in self.hooks:
                hook.evaluated(self)
            score = self.world.agreed(self.judge.score(self.module))
            if score >= max(self.curves.score, default=-torch.inf):
                self.judge.keep()
        self.curves.step.append(self.step)
        self.curves.loss.append(self._losses[0] / self._losses[1])
        self.curves.score.append(score)
        group = self.optimizer.param_groups[0]
        self.curves.lr.append(group["lr"] / (group["factor"] or 1))
        log(self.step, epoch=self.epoch + 1, mean_loss=self.curves.loss[-1], score=score)
        self._losses = [0.0, 0.0]
        self.module.train()

    def _save(self, log: Log) -> None:
        if self.folder is None:
            return
        position = {"position": [self.step, self.epoch, self.batch], "losses": self._losses, "log": log.size}
        kept = {name: one.state_dict() for name, one in self._kept().items()}
        state = whole({**position, "made_for": self.made_for, "curves": vars(self.curves), **kept})
        if self.world.first:
            write_checkpoint(state, self.folder / "checkpoint.pt")

    def _restore(self) -> int:
        """Go to where the checkpoint was, if there is one; how much of the log there was then."""
        path = self.folder and self.folder / "checkpoint.pt"
        if path is None or (state := read_checkpoint(path, self.made_for)) is None:
            return 0
        self.step, self.epoch, self.batch = state["position"]
        self._losses, self.curves = state["losses"], Curves(**state["curves"])
        parameters = [one for group in self.optimizer.param_groups for one in group["params"]]
        for number, own in state["optimizer"]["state"].items():
            own |= {name: like_parts(one, parameters[number]) for name, one in own.items()}
        for name, one in self._kept().items():
            known = one.state_dict()
            given = {key: like_parts(value, known.get(key)) for key, value in state[name].items()}
            one.load_state_dict(given)
        return int(state["log"])

    def _kept(self) -> dict[str, Any]:
        """What has a state of its own, by its name in checkpoints."""
        own = {"module": self.module, "optimizer": self.optimizer, "scaler": self._scaler}
        average = {} if self.ema is None else {"ema": self.ema}
        return {**own, **average, **{f"hook {i}": hook for i, hook in enumerate(self.hooks)}}
