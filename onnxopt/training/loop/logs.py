"""What happened when: a line of JSON for each event, and the same for TensorBoard where that is asked for."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxopt.errors import UsageError
from onnxopt.reporting.training import plain

__all__ = ["Curves", "Log"]


@dataclass
class Curves:
    """A number for each evaluation: the steps made, the mean loss since the one before, the score of the
    written file, and the learning rate."""

    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)

    @property
    def best(self) -> int:
        """The evaluation with the best score, the last of equals; -1 before the first."""
        return max(range(len(self.score)), key=lambda one: (self.score[one], one), default=-1)


class Log:
    """The log of a training in its folder; without a folder nothing is written.

    `size` is how much of `log.jsonl` there is: a resumed training goes on from where its checkpoint was.
    """

    def __init__(self, folder: Path | None, *, keep: int = 0, tensorboard: bool = False) -> None:
        self._stream = None
        self._board = _board(folder) if tensorboard and folder is not None else None
        if folder is not None:
            self._stream = (folder / "log.jsonl").open("a+b")
            self._stream.truncate(keep)
            self._stream.seek(0, 2)

    @property
    def size(self) -> int:
        return self._stream.tell() if self._stream is not None else 0

    def __call__(self, step: int, **figures: Any) -> None:
        """Note the figures of a step."""
        if self._stream is not None:
            self._stream.write(json.dumps({"step": step, **plain(figures)}).encode() + b"\n")
            self._stream.flush()
        if self._board is not None:
            for name, figure in figures.items():
                if isinstance(figure, float) and math.isfinite(figure):
                    self._board.add_scalar(name, figure, step)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._board is not None:
            self._board.close()


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard: it is not installed: pip install tensorboard") from None
    return SummaryWriter(str(folder))
