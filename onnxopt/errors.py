"""What can go wrong, and the exit code the command line gives it.

    OnnxoptError                 4  an internal error: a bug in onnxopt
    ├── UsageError               2  an option, pass, recipe or data source that cannot be used
    │   └── NoSamplesError       2  no valid input for a model could be made up
    ├── ModelError               2  a file that is no usable ONNX model, or a place it cannot be written to
    ├── ProviderError            3  an execution provider that was asked for cannot run here
    ├── DivergedError            1  a training whose loss is no finite number any more
    └── RuntimeMissingError      2  onnxruntime is not installed

Each message says who, what was found, and what to do, in one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

__all__ = [
    "DivergedError",
    "ModelError",
    "NoSamplesError",
    "OnnxoptError",
    "ProviderError",
    "RuntimeMissingError",
    "UsageError",
    "did_you_mean",
    "one_line",
]


class OnnxoptError(Exception):
    """Base of every error that onnxopt raises on purpose."""

    exit_code: ClassVar[int] = 4


class UsageError(OnnxoptError, ValueError):
    """An option, pass, recipe or data source that cannot be used."""

    exit_code = 2


class NoSamplesError(UsageError):
    """No valid input for a model could be made up: sizes or data are needed from the user."""


class ModelError(OnnxoptError, ValueError):
    """A file that is no usable ONNX model, or a place it cannot be written to."""

    exit_code = 2


class ProviderError(OnnxoptError):
    """An execution provider that was asked for cannot run here."""

    exit_code = 3


class DivergedError(OnnxoptError):
    """A training whose loss or gradients are no finite numbers any more."""

    exit_code = 1


class RuntimeMissingError(OnnxoptError, ImportError):
    """onnxruntime is not installed."""

    exit_code = 2


_LISTED = 12
"""Known words that a message lists, at most."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The tail of a message about an unknown word: `` (did you mean 'x'?)``, or the known words, if few."""
    words = sorted(known)
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if near:
        return f" (did you mean {near[0]!r}?)"
    return f" (known: {', '.join(words)})" if 0 < len(words) <= _LISTED else ""


def one_line(error: BaseException) -> str:
    """An error's text in one line of at most 300 characters, without ONNX Runtime's code in front."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.split(" : ", 3)[-1] if text.startswith("[ONNXRuntimeError]") else text
    return text if len(text) <= 300 else text[:297] + "..."
