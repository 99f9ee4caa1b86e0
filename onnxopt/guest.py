"""What runs inside the emulator of `emulation`: it opens one model and answers samples until its input ends.

A message is a line of JSON and then the raw elements of its arrays, in the order in which the line names
them. Importing anything is slow here: this file and all that it needs stay light.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from onnxopt.errors import OnnxoptError

__all__ = ["main", "receive", "send"]


def send(stream: BinaryIO, values: Mapping[str, Any], **told: Any) -> None:
    """Write one message: arrays, lists of them or None by name, and `told`, which JSON must hold."""
    elements: list[np.ndarray] = []
    forms = {name: _form(value, elements) for name, value in values.items()}
    stream.write(json.dumps({**told, "values": forms}).encode() + b"\n")
    for array in elements:
        stream.write(array.tobytes())
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read one message: its values by name, and the rest of it. Raises EOFError where it ends early."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    told = json.loads(line)
    forms = told.pop("values")
    return {name: _value(form, stream) for name, form in forms.items()}, told


def main() -> None:
    """Serve `open_session(**told)` of the first message; each further message is a sample to run."""
    from onnxopt.runtimes import RunError, open_session

    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get in between
    try:
        session = open_session(**receive(requests)[1])
    except OnnxoptError as error:
        return _refuse(answers, error)
    send(answers, {})
    with session, contextlib.suppress(EOFError):
        while True:
            feeds, _ = receive(requests)
            try:
                send(answers, session.run(feeds))
            except RunError as error:
                _refuse(answers, error)


def _refuse(answers: BinaryIO, error: OnnxoptError) -> None:
    send(answers, {}, error=type(error).__name__, message=str(error))


def _form(value: Any, elements: list[np.ndarray]) -> Any:
    if value is None:
        return None
    if isinstance(value, list):
        return [_form(item, elements) for item in value]
    array = np.asarray(value)
    if array.dtype.kind in "OU":
        return {"strings": array.ravel().tolist(), "shape": array.shape}
    elements.append(array)
    return {"dtype": array.dtype.name, "shape": array.shape}


def _value(form: Any, stream: BinaryIO) -> Any:
    if form is None:
        return None
    if isinstance(form, list):
        return [_value(item, stream) for item in form]
    if "strings" in form:
        return np.array(form["strings"], object).reshape(form["shape"])
    dtype = np.dtype(getattr(ml_dtypes, form["dtype"], form["dtype"]))
    array = np.empty(form["shape"], dtype)
    memory = array.reshape(-1).view(np.uint8)
    if stream.readinto(memory) != memory.nbytes:  # type: ignore[attr-defined]  # streams of pipes have it
        raise EOFError
    return array
