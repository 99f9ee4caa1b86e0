"""What a cut of channels came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxopt.pruning.elements import Pin
from onnxopt.pruning.structure import Structure

__all__ = ["ChannelCut", "TrimmedGroup", "outcome_of"]


@dataclass(frozen=True)
class TrimmedGroup:
    """A group of channels, before and after.

    name: of the first of `layers`, which write the channels. macs, macs_after: of the layers that write or
    read them; layers between two groups count in both.
    """

    name: str
    layers: tuple[str, ...]
    channels: int
    channels_after: int
    macs: float
    macs_after: float


@dataclass(frozen=True)
class ChannelCut:
    """pinned: site of a layer that keeps its channels -> why. macs: at the shapes that were given."""

    groups: tuple[TrimmedGroup, ...]
    pinned: Mapping[str, Pin]
    macs: float
    macs_after: float
    parameters: float
    parameters_after: float


def outcome_of(structure: Structure, gone: np.ndarray) -> ChannelCut:
    """What is left of each group, and of the whole, without the channels that are gone."""
    channel = structure.solution.channel
    kept = ~gone[channel]
    before, after = np.zeros(len(structure.groups)), np.zeros(len(structure.groups))
    for term in structure.layers:
        share = float(np.prod([kept[ids].mean() for ids in term.axes if len(ids)]))
        touched = np.unique(np.concatenate([structure.group_of[channel[ids]] for ids in term.axes]))
        for number in touched[touched >= 0]:
            before[number] += term.amount
            after[number] += term.amount * share
    groups = tuple(
        TrimmedGroup(
            group.name,
            group.layers,
            len(group.channels),
            int((~gone[group.channels]).sum()),
            float(before[number]),
            float(after[number]),
        )
        for number, group in enumerate(structure.groups)
    )
    return ChannelCut(
        groups,
        structure.pinned,
        structure.macs(),
        structure.macs(gone),
        structure.parameters(),
        structure.parameters(gone),
    )
