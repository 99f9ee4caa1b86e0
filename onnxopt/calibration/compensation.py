"""Change the summands of a layer one after the other; those not yet changed take up the error.

Source: Hassibi and Stork, "Optimal Brain Surgeon", 1993, in the blocks of Frantar et al., "GPTQ", 2022: with
H the second moments of what the rows are multiplied with and U the upper Cholesky factor of the inverse of
H, an error e in summand i is best made up for by taking e U[i, j] / U[i, i] from each summand j behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["change_summands", "damped", "square_error"]

_DAMPING = 0.01
_TINY = float(np.finfo(np.float32).tiny)

Change = Callable[[int, np.ndarray, np.ndarray], np.ndarray]


def change_summands(rows: np.ndarray, moments: np.ndarray, ends: Sequence[int], change: Change) -> np.ndarray:
    """Rows whose summands are changed, so that nearly the same sums come out.

    Args:
        rows: float64 [groups, rows, summands].
        moments: float64 [groups, summands, summands].
        ends: where blocks of summands end, the last one behind all. Errors reach other blocks once a block is
            done.
        change: from the number of a summand, the rows as they are by then (right up to the end of its block)
            and the diagonal of U, [groups, summands], to the new summand, [groups, rows].
    """
    left, found = rows.copy(), np.empty_like(rows)
    factor = np.linalg.cholesky(np.linalg.inv(damped(moments))).swapaxes(1, 2)
    diagonal = np.diagonal(factor, axis1=1, axis2=2)
    for start, stop in zip((0, *ends), ends, strict=False):
        errors = np.empty_like(left[..., start:stop])
        for i in range(start, stop):
            found[..., i] = change(i, left, diagonal)
            error = (left[..., i] - found[..., i]) / diagonal[:, i, None]
            left[..., i:stop] -= error[..., None] * factor[:, i, None, i:stop]
            errors[..., i - start] = error
        left[..., stop:] -= errors @ factor[:, start:stop, stop:]
    return found


def damped(moments: np.ndarray, damping: float = _DAMPING) -> np.ndarray:
    """The moments with this share of their mean added to all on the diagonal: what samples lack may come."""
    more = damping * np.diagonal(moments, axis1=1, axis2=2).mean(1) + _TINY
    return np.asarray(moments + more[:, None, None] * np.eye(moments.shape[2]))


def square_error(error: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """The mean square of what an error of the rows does to the sums: [groups, rows, 1]."""
    return np.asarray(((error @ moments) * error).sum(-1, keepdims=True))
