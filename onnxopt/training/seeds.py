"""Seeds for the generators of torch, of which that of the CPU takes no more than the lower 32 bits."""

from __future__ import annotations

import numpy as np

__all__ = ["seed_of"]


def seed_of(*numbers: int) -> int:
    """32 bits that depend on all of these numbers, none of them negative, and on their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
