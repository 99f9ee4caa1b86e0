"""The samples that a recipe names."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from onnxopt.data.contract import contract_of
from onnxopt.errors import UsageError
from onnxopt.training.recipe import Recipe
from onnxopt.training.samples.dataset import Dataset
from onnxopt.training.samples.sources import open_source
from onnxopt.training.samples.transforms import parse_transforms

__all__ = ["datasets_of"]


def datasets_of(recipe: Recipe, model: ir.Model) -> tuple[Dataset, Dataset, Dataset | None]:
    """The samples to train on, to choose by, and for the last word."""
    if recipe.data is None:
        raise UsageError("train: there is nothing to train on: give --data (data=)")
    contract, transforms = contract_of(model), parse_transforms(recipe.transforms)

    def opened(source: Any) -> Dataset:
        found = open_source(source, labels=recipe.labels, preprocess=recipe.preprocess)
        return Dataset(
            found, contract, recipe.labels, transforms, recipe.seed, recipe.workers, recipe.shuffle
        )

    data = opened(recipe.data)
    test = opened(recipe.test) if recipe.test is not None else None
    if recipe.validation is not None:
        return data, opened(recipe.validation), test
    data, held_out = data.split(recipe.holdout)
    return data, held_out or data, test
