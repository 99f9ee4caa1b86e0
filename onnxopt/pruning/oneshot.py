"""Pruning in one shot: those elements that are kept make up for those that go.

Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023,
after Hassibi and Stork, "Optimal Brain Surgeon", 1993: element j of a row costs w_j^2 / [H^-1]_jj, where H is
the second moment of what the row is multiplied with; summands are decided on one after the other, in blocks,
and those behind take up the error. As in Boza, "Fast and Effective Weight Update for Pruned Large Language
Models", 2024, what is kept is then solved for once more, now that it is known: here by conjugate gradients,
of all rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onnxopt.calibration.compensation import change_summands, damped, square_error

__all__ = ["prune_rows"]

_BLOCK = 128
"""Summands among which the elements that go are chosen together."""
_TURNS = 30
_TINY = float(np.finfo(np.float64).tiny)


def prune_rows(
    rows: np.ndarray,
    moments: np.ndarray,
    gone: np.ndarray,
    stretches: np.ndarray | None = None,
    kept: int = 0,
) -> np.ndarray:
    """The rows with as many zeros as `gone` has, and the rest changed so that nearly the same sums come out.

    Args:
        rows: float64 [groups, rows, summands].
        moments: float64 [groups, summands, summands], the second moments of what is multiplied.
        gone: bool of the shape of the rows: the choice to be better than. Zeros of the rows are among them.
        stretches: for N:M patterns, the summands of each stretch, [stretches, M], -1 where it is shorter.
        kept: N, elements that are kept of each stretch.

    In all, the mean square of the difference is at most that of plainly setting the `gone` elements to zero.
    """
    if stretches is None:
        found = _unstructured(rows, moments, int(gone.sum()))
    else:
        order = stretches[stretches >= 0]
        ends = np.cumsum((stretches >= 0).sum(1)).tolist()
        moved = _in_stretches(rows[..., order], moments[:, order[:, None], order], ends, kept)
        found = np.empty_like(rows)
        found[..., order] = moved
    found = _refitted(rows, moments, found)
    plain = np.where(gone, 0, rows)
    better = square_error(found - rows, moments).sum() < square_error(plain - rows, moments).sum()
    return found if better else plain


def _refitted(rows: np.ndarray, moments: np.ndarray, found: np.ndarray) -> np.ndarray:
    """What is found, its elements that are not zero changed so that the sums are as near as they can be."""
    kept, moments = found != 0, damped(moments)
    scale = np.diagonal(moments, axis1=1, axis2=2)[:, None]
    left = ((rows - found) @ moments) * kept
    step = left / scale
    size = (left * step).sum(-1, keepdims=True)
    for _ in range(_TURNS):
        bent = (step @ moments) * kept
        length = size / np.maximum((step * bent).sum(-1, keepdims=True), _TINY)
        found, left = found + length * step, left - length * bent
        before, size = size, (left * left / scale).sum(-1, keepdims=True)
        step = left / scale + size / np.maximum(before, _TINY) * step
    return found


def _unstructured(rows: np.ndarray, moments: np.ndarray, count: int) -> np.ndarray:
    """Each block gives up the zeros it has, and of the rest its share."""
    summands, zero = rows.shape[2], rows == 0
    ends = [*range(_BLOCK, summands, _BLOCK), summands]
    filled = np.cumsum((~zero).sum((0, 1)))[np.array(ends) - 1]
    more = (count - int(zero.sum())) * filled // max(1, int(filled[-1]))
    extra = dict(zip((0, *ends), np.diff(more, prepend=0).tolist(), strict=False))
    stops = dict(zip((0, *ends), ends, strict=False))

    def choose(start: int, scores: np.ndarray) -> np.ndarray:
        gone = zero[..., start : stops[start]].copy()
        flat, part = gone.reshape(-1), np.where(gone, np.inf, scores).reshape(-1)
        flat[np.argsort(part, kind="stable")[: extra[start]]] = True
        return np.asarray(gone)

    return _swept(rows, moments, ends, stops, choose)


def _in_stretches(rows: np.ndarray, moments: np.ndarray, ends: Sequence[int], kept: int) -> np.ndarray:
    zero = rows == 0
    stops = dict(zip((0, *ends), ends, strict=False))
    bounds = [end for number, end in enumerate(ends, 1) if number % _BLOCK == 0 or number == len(ends)]

    def choose(start: int, scores: np.ndarray) -> np.ndarray:
        part = np.where(zero[..., start : stops[start]], -1, scores)
        gone = zero[..., start : stops[start]].copy()
        worst = np.argsort(part, axis=-1, kind="stable")[..., : max(0, part.shape[-1] - kept)]
        np.put_along_axis(gone, worst, True, axis=-1)
        return np.asarray(gone)

    return _swept(rows, moments, bounds, stops, choose)


def _swept(
    rows: np.ndarray,
    moments: np.ndarray,
    ends: Sequence[int],
    stops: dict[int, int],
    choose: Callable[[int, np.ndarray], np.ndarray],
) -> np.ndarray:
    """The rows pruned: at the start of each stretch its elements that go are chosen by their scores."""
    gone = np.zeros(rows.shape, bool)
    alive = np.diagonal(moments, axis1=1, axis2=2)[:, None] > 0

    def change(i: int, left: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
        stop = stops.get(i)
        if stop is not None:
            scores = np.square(left[..., i:stop] / diagonal[:, None, i:stop]) * alive[..., i:stop]
            gone[..., i:stop] = choose(i, scores)
        return np.where(gone[..., i], 0, left[..., i])

    return change_summands(rows, moments, ends, change)
