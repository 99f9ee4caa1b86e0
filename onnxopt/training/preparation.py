"""What a model needs before it is trained, done on a copy; `write_back` finds the originals by name."""

from __future__ import annotations

import onnx_ir as ir
import torch

from onnxopt.calibration.exposing import cut
from onnxopt.errors import UsageError, did_you_mean
from onnxopt.graph import constant_of
from onnxopt.ledger import Ledger
from onnxopt.passes.freeze_initializers import FreezeInitializers
from onnxopt.passes.inline_functions import InlineFunctions
from onnxopt.training.quantized import floats_of, reading
from onnxopt.training.state import Options, State
from onnxopt.training.values import tensor_of

__all__ = ["initial", "prepare"]


def prepare(model: ir.Model, options: Options) -> ir.Model:
    """Bring a model that is the caller's own to the form that is trained.

    Initializers that could be fed are constants, functions are put in place, and what the outputs that are
    asked for do not need is gone.

    Raises:
        UsageError: there is no such output.
    """
    for name in options.outputs or ():
        known = [value.name or "" for value in model.graph.outputs]
        if name not in known:
            raise UsageError(f"training: there is no output {name!r}{did_you_mean(name, known)}")
    if options.outputs is not None:
        cut(model, options.outputs)
    for one in (FreezeInitializers(), InlineFunctions()):
        one.apply(model, Ledger(pass_name=one.name))
    return model


def initial(state: State) -> torch.Tensor:
    """What a state holds before training."""
    tensor = constant_of(state.value)
    assert tensor is not None
    one = None if state.form == "float" else reading(state.value)
    if one is not None:
        return floats_of(tensor, one)
    return tensor_of(tensor.numpy(), tensor.dtype)
