"""Random models, rich where passes have preconditions; each is valid and runs.

A model grows node by node. Each node is tried in the runtime, alone, on the arrays that its inputs have for
samples of different sizes, and taken only if it runs and gives tame numbers. Whatever the steps propose
(wrong axes, odd broadcasts, negative steps), the model as a whole has an answer for every sample. Each sample
also runs with half a unit in the last place of noise on what is rounded: a node that makes much of it is not
taken, so that a rewrite which rounds otherwise has no excuse.
"""

from __future__ import annotations

import random

from tests.random_graphs.chains import FAMILIES
from tests.random_graphs.growing import Model, RandomModel

__all__ = ["FAMILIES", "RandomModel", "random_model"]


def random_model(seed: int, steps: int, family: str = "all") -> RandomModel:
    """A model of about `steps` nodes or small patterns; the same arguments give the same model."""
    return Model(random.Random(seed), FAMILIES[family]).build(steps)
