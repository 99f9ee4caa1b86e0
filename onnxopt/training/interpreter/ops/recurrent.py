"""LSTM, GRU and RNN: torch's own where it computes the same, a loop over time for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import Tensor

from onnxopt.training.interpreter.registry import Table, op

__all__ = ["TABLE"]

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_USUAL = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
_ACTIVATIONS: dict[str, tuple[tuple[float, ...], Callable[..., Tensor]]] = {
    "affine": ((1.0, 0.0), lambda x, a, b: a * x + b),
    "elu": ((1.0,), F.elu),
    "hardsigmoid": ((0.2, 0.5), lambda x, a, b: (a * x + b).clamp(0, 1)),
    "leakyrelu": ((0.01,), F.leaky_relu),
    "relu": ((), torch.relu),
    "scaledtanh": ((1.0, 1.0), lambda x, a, b: a * torch.tanh(b * x)),
    "sigmoid": ((), torch.sigmoid),
    "softplus": ((), F.softplus),
    "softsign": ((), F.softsign),
    "tanh": ((), torch.tanh),
    "thresholdedrelu": ((1.0,), lambda x, a: torch.where(x > a, x, 0)),
}
"""By name in lower case: the defaults of alpha and beta, as far as it has them, and the function."""

Cell = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _with(run: Callable[..., Tensor], numbers: Sequence[float]) -> Callable[[Tensor], Tensor]:
    return lambda x: run(x, *numbers)


def _activations(
    names: Sequence[str], alphas: Sequence[float] | None, betas: Sequence[float] | None
) -> list[Callable[[Tensor], Tensor]]:
    """The functions, each with its own numbers: the lists hold those of functions that have any."""
    left = [list(alphas or ()), list(betas or ())]
    found: list[Callable[[Tensor], Tensor]] = []
    for name in names:
        defaults, run = _ACTIVATIONS[name.lower()]
        numbers = [given.pop(0) if given else usual for given, usual in zip(left, defaults, strict=False)]
        found.append(_with(run, numbers))
    return found


def _clipped(x: Tensor, clip: float | None) -> Tensor:
    return x if clip is None else x.clamp(-clip, clip)


def _lstm(
    r: Tensor,
    bias: Tensor | None,
    peepholes: Tensor | None,
    acts: Any,
    clip: float | None,
    couple: int,
    **_: Any,
) -> Cell:
    f, g, h = acts
    p = peepholes.chunk(3) if peepholes is not None else None

    def cell(gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, kept = state
        i, o, forget, new = (gates + F.linear(hidden, r, bias)).chunk(4, -1)
        if p is not None:
            i, forget = i + p[0] * kept, forget + p[2] * kept
        i = f(_clipped(i, clip))
        forget = 1 - i if couple else f(_clipped(forget, clip))
        kept = forget * kept + i * g(_clipped(new, clip))
        o = o if p is None else o + p[1] * kept
        return f(_clipped(o, clip)) * h(kept), kept

    return cell


def _gru(
    r: Tensor, bias: Tensor | None, _: Any, acts: Any, clip: float | None, linear: int, **__: Any
) -> Cell:
    f, g = acts
    size = r.shape[1]
    rest = bias if bias is not None else r.new_zeros(3 * size)

    def cell(gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (hidden,) = state
        z, reset = f(
            _clipped(gates[..., : 2 * size] + F.linear(hidden, r[: 2 * size], rest[: 2 * size]), clip)
        ).chunk(2, -1)
        if linear:
            new = reset * F.linear(hidden, r[2 * size :], rest[2 * size :])
        else:
            new = F.linear(reset * hidden, r[2 * size :], rest[2 * size :])
        new = g(_clipped(gates[..., 2 * size :] + new, clip))
        return ((1 - z) * new + z * hidden,)

    return cell


def _rnn(r: Tensor, bias: Tensor | None, _: Any, acts: Any, clip: float | None, **__: Any) -> Cell:
    (f,) = acts

    def cell(gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (f(_clipped(gates + F.linear(state[0], r, bias), clip)),)

    return cell


_CELLS: dict[str, Callable[..., Cell]] = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}


def _backwards(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Time turned round, for each sequence within its length."""
    if lengths is None:
        return x.flip(0)
    at = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    ends = lengths.long().unsqueeze(0)
    where = torch.where(at < ends, ends - 1 - at, at)
    return x.gather(0, where.reshape(*where.shape, *[1] * (x.dim() - 2)).expand(x.shape))


def _over_time(
    x: Tensor, cell: Cell, gates: Tensor, state: tuple[Tensor, ...], lengths: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    rows = []
    for time in range(x.shape[0]):
        new = cell(gates[time], state)
        shown = new[0]
        if lengths is not None:
            going = (time < lengths).unsqueeze(1)
            new = tuple(torch.where(going, a, b) for a, b in zip(new, state, strict=True))
            shown = torch.where(going, shown, 0)
        state = new
        rows.append(shown)
    return torch.stack(rows), state


_ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
"""ONNX's gates in torch's order."""


def _native(
    kind: str, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None, state: Sequence[Tensor], both: bool
) -> tuple[Tensor, ...]:
    """All directions by torch's own kernel."""
    weights = []
    for d in range(w.shape[0]):
        given = [w[d], r[d], *(b[d].chunk(2) if b is not None else ())]
        for one in given:
            parts = one.chunk(_GATES[kind])
            weights.append(torch.cat([parts[i] for i in _ORDER[kind]]))
    options: tuple[Any, ...] = (weights, b is not None, 1, 0.0, False, both, False)
    if kind == "LSTM":
        return torch.lstm(x, list(state), *options)
    found: tuple[Tensor, ...] = (torch.gru if kind == "GRU" else torch.rnn_tanh)(x, state[0], *options)
    return found


def _recurrent(kind: str) -> Callable[..., tuple[Tensor, ...]]:
    def run(
        x: Tensor,
        w: Tensor,
        r: Tensor,
        b: Tensor | None = None,
        lengths: Tensor | None = None,
        h0: Tensor | None = None,
        c0: Tensor | None = None,
        p: Tensor | None = None,
        *,
        activation_alpha: Sequence[float] | None = None,
        activation_beta: Sequence[float] | None = None,
        activations: Sequence[str] | None = None,
        clip: float | None = None,
        direction: str = "forward",
        input_forget: int = 0,
        layout: int = 0,
        linear_before_reset: int = 0,
    ) -> tuple[Tensor, ...]:
        if layout:
            x = x.transpose(0, 1)
            h0, c0 = (one if one is None else one.transpose(0, 1) for one in (h0, c0))
        count, size = w.shape[0], r.shape[-1]
        empty = x.new_zeros(count, x.shape[1], size)
        start = [empty if one is None else one for one in ((h0, c0) if kind == "LSTM" else (h0,))]
        usual = _USUAL[kind] * count
        names = tuple(activations or usual)
        special = lengths is not None or p is not None or clip is not None or input_forget
        same = [name.lower() for name in names] == [name.lower() for name in usual]
        if same and not special and direction != "reverse" and (linear_before_reset or kind != "GRU"):
            y, *last = _native(kind, x, w, r, b, start, count == 2)
            y = y.reshape(*y.shape[:2], count, size).transpose(1, 2)
        else:
            each = len(_USUAL[kind])
            acts = _activations(names, activation_alpha, activation_beta)
            rows, states = [], []
            for d in range(count):
                turned = direction == "reverse" or d == 1
                own = _backwards(x, lengths) if turned else x
                wb, rb = (None, None) if b is None else b[d].chunk(2)
                cell = _CELLS[kind](
                    r[d],
                    rb,
                    None if p is None else p[d],
                    acts[d * each : (d + 1) * each],
                    clip,
                    couple=input_forget,
                    linear=linear_before_reset,
                )
                first = tuple(one[d] for one in start)
                row, state = _over_time(own, cell, F.linear(own, w[d], wb), first, lengths)
                rows.append(_backwards(row, lengths) if turned else row)
                states.append(state)
            y = torch.stack(rows, 1)
            last = [torch.stack(group) for group in zip(*states, strict=True)]
        if layout:
            y, last = y.permute(2, 0, 1, 3), [one.transpose(0, 1) for one in last]
        return (y, *last)

    return run


TABLE: Table = {kind: op(_recurrent(kind), host=False) for kind in _GATES}
