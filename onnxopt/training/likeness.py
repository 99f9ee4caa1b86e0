"""How alike what a model says and what its teacher says are: outputs, and hidden tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as nf
from torch import Tensor

from onnxopt.errors import UsageError
from onnxopt.training.loop.losses import Bce, Kl, Loss
from onnxopt.training.loop.scoring import INVERSES

__all__ = ["Answer", "Match", "differing"]


@dataclass(frozen=True)
class Answer:
    """An output that is compared with the teachers': as what, and by which loss.

    name: of the output. seen: the tensor that the loss takes. activation: what lies between them, if any.
    axis: of the classes.
    """

    name: str
    seen: str
    loss: Loss
    activation: str = ""
    axis: int = -1

    def __call__(self, y: Tensor, target: Tensor, activation: str) -> Tensor:
        """The loss of each sample, where `activation` gives what the teacher says."""
        y, target = (one.float().movedim(self.axis, -1) for one in (y, target))
        if isinstance(self.loss, Kl) and activation in INVERSES:
            target = torch.from_numpy(INVERSES[activation](target.cpu().numpy())).to(y.device)
        if isinstance(self.loss, Bce) and activation != "Sigmoid":
            target = target.sigmoid()
        return self.loss(y, target)


@dataclass
class Match:
    """Hidden tensors that are to be alike.

    key: what the module calls its own behind a linear map. scale: mean square of the teacher's; one number
    for the whole training, so that a batch in parts is the batch.
    """

    mine: str
    theirs: str
    attends: bool
    key: str = ""
    scale: float = 1.0

    def __call__(self, outputs: Mapping[str, Tensor], told: Mapping[str, Tensor]) -> Tensor:
        """(N,): squared distance, over `scale`, or of the maps of attention."""
        y, target = outputs[self.key or self.mine].float(), told[self.theirs].float()
        if self.attends:
            return (_attention(y) - _attention(target)).square().sum(1)
        return (y - target).square().flatten(1).mean(1) / self.scale


def differing(match: Match, mine: Sequence[int], theirs: Sequence[int]) -> tuple[int, int, int] | None:
    """The axis along which a linear map is needed, and its sizes; None where none is."""
    a, b = list(mine), list(theirs)
    told = (
        f"{match.mine!r} is {'x'.join(map(str, a))}, the teacher's {match.theirs!r} {'x'.join(map(str, b))}"
    )
    if match.attends and min(len(a), len(b)) < 3:
        raise UsageError(f"distill: {told}: attention is of samples, channels or heads, and places")
    axis = 1 if match.attends or len(a) == 4 else len(a) - 1
    others = [(x, y) for i, (x, y) in enumerate(zip(a, b, strict=False)) if i != axis]
    if len(a) != len(b) or len(a) < 2 or any(x != y for x, y in others):
        raise UsageError(f"distill: {told}: only axis {axis} may differ")
    return None if a == b or match.attends else (axis, a[axis], b[axis])


def _attention(x: Tensor) -> Tensor:
    """Where a layer looks, (N, places): the mean square over channels or heads, of length 1."""
    return nf.normalize(x.square().mean(1).flatten(1), dim=1)
