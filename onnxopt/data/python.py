"""The user's own functions: found, called, and their failures told in one line."""

from __future__ import annotations

import importlib
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnxopt.errors import UsageError

__all__ = ["called", "names_target", "python_target", "told"]

_TARGET = re.compile(r"(?P<where>.+\.py|[A-Za-z_][\w.]*):(?P<what>[A-Za-z_]\w*)")


def names_target(text: str) -> bool:
    """Whether a text has the form of ``file.py:function`` or ``module:function``."""
    return _TARGET.fullmatch(text) is not None


def python_target(text: str) -> Callable[..., Any]:
    """The function that ``file.py:function`` or ``module:function`` names; the file or module is run.

    Raises:
        UsageError: no such file, module or function, or it fails when it is loaded.
    """
    match = _TARGET.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r}: expected file.py:function or module:function")
    where, what = match["where"], match["what"]
    if where.endswith(".py") and not Path(where).is_file():
        raise UsageError(f"{text}: no such file {where!r}")
    try:
        if where.endswith(".py"):
            function = runpy.run_path(where, run_name=Path(where).stem).get(what)
        else:
            function = getattr(importlib.import_module(where), what, None)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UsageError(f"{text}: loading {where!r} failed: {told(error)}") from error
    if not callable(function):
        raise UsageError(f"{text}: {where!r} has no function {what!r}")
    found: Callable[..., Any] = function
    return found


def called(function: Callable[[], Any], who: str) -> list[Any]:
    """The samples that a function of the user gives. Raises UsageError where it fails."""
    try:
        return list(function())
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UsageError(f"{who}: it failed to give samples: {told(error)}") from error


def told(error: BaseException) -> str:
    """An error of foreign code in a line: its class and its text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]
