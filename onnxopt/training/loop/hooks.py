"""What the loop asks of others: a judge of what it has trained, and hooks that change how it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import onnx_ir as ir
from torch import Tensor, nn

from onnxopt.metric import Metric

if TYPE_CHECKING:
    from onnxopt.training.loop.trainer import Trainer
    from onnxopt.training.samples.dataset import Dataset

__all__ = ["Hook", "Judge"]


class Judge(Protocol):
    """Says how good the module is now, and keeps it if it is the best so far."""

    def score(self, module: nn.Module) -> float:
        """Higher is better. Called in each process; that of the first counts."""
        ...

    def keep(self) -> None:
        """Keep what was scored last. Called in each process after a score that is the best so far."""
        ...


class Hook:
    """What distillation, masks or quantization add to a training; each method may be left as it is.

    notes: for the report, once the training is done. whole: whether it needs parameters that are not sharded.
    """

    notes: tuple[str, ...] = ()
    whole: ClassVar[bool] = True

    def start(self, trainer: Trainer) -> None:
        """Before the optimizer is made: parameters may be added or frozen."""

    def epoch(self, trainer: Trainer, epoch: int) -> None:
        """Before each epoch, and again where one is resumed in its middle."""

    def loss(
        self, trainer: Trainer, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]
    ) -> Tensor | None:
        """A loss of each sample, (N,), or one for all, to be added to that of the recipe."""

    def backward(self, trainer: Trainer) -> None:
        """Once a step has its gradients, of the whole batch, as the loss has them; without gradients."""

    def stepped(self, trainer: Trainer) -> None:
        """After each step of the optimizer, without gradients."""

    def evaluated(self, trainer: Trainer) -> None:
        """Before each evaluation, with the parameters that are judged."""

    def written(self, model: ir.Model) -> None:
        """A model that is to be judged or written; it may be changed."""

    def metric(self, data: Dataset, test: Dataset | None) -> Metric | None:
        """What files are judged by where the recipe names nothing; `test` is for the last word."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
