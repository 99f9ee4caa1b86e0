"""What a model needs before it is trained, done on a copy; `write_back` finds the originals by name."""

from __future__ import annotations

import onnx_ir as ir
import torch

from onnxopt.graph import constant_of
from onnxopt.ledger import Ledger
from onnxopt.passes.freeze_initializers import FreezeInitializers
from onnxopt.passes.inline_functions import InlineFunctions
from onnxopt.training.state import State
from onnxopt.training.values import tensor_of

__all__ = ["initial", "prepare"]


def prepare(model: ir.Model) -> ir.Model:
    """Bring a model that is the caller's own to the form that is trained.

    Initializers that could be fed are constants, functions are put in place.
    """
    for one in (FreezeInitializers(), InlineFunctions()):
        one.apply(model, Ledger(pass_name=one.name))
    return model


def initial(state: State) -> torch.Tensor:
    """What a state holds before training."""
    tensor = constant_of(state.value)
    assert tensor is not None
    return tensor_of(tensor.numpy(), tensor.dtype)
