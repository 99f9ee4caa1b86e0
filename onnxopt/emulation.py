"""CPUs that are not here: ONNX Runtime as it runs on them, by QEMU's user-mode emulation.

The runtime picks its kernels by what the CPU says of itself, and kernels differ in their numbers: without
VNNI, products of U8 activations and S8 weights are added in 16 bits, which saturate. Speed says nothing here.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Self

import onnxopt
from onnxopt.errors import ProviderError, RuntimeMissingError, UsageError, did_you_mean, one_line
from onnxopt.guest import receive, send
from onnxopt.model import ModelLike
from onnxopt.runtimes import Level, RunError, UnsupportedModelError
from onnxopt.storage import materialize

__all__ = ["ISAS", "EmulatedSession", "Isa", "find_isa", "open_emulated", "run_emulated"]

_EMULATOR = "qemu-x86_64"
_NOTHING: Mapping[str, str] = MappingProxyType({})
_ERRORS = {one.__name__: one for one in (RunError, RuntimeMissingError, UnsupportedModelError, UsageError)}


@dataclass(frozen=True)
class Isa:
    """An instruction set, and the CPU of QEMU that has it and nothing newer."""

    name: str
    cpu: str


ISAS = {isa.name: isa for isa in (Isa("avx", "IvyBridge"), Isa("avx2", "Haswell"))}
"""Not AVX-512, which QEMU does not emulate, and nothing older, on which NumPy does not run."""


def find_isa(name: str) -> Isa:
    """The instruction set of that name.

    Raises:
        UsageError: there is none.
        ProviderError: it cannot be emulated here, and what to do.
    """
    if name not in ISAS:
        raise UsageError(f"unknown instruction set {name!r}{did_you_mean(name, ISAS)}")
    here = f"{platform.system()} on {platform.machine()}"
    if here != "Linux on x86_64":
        raise ProviderError(f"{name}: CPUs are emulated on Linux on x86_64, this is {here}: run it there")
    if shutil.which(_EMULATOR) is None:
        raise ProviderError(
            f"{name}: {_EMULATOR} is not installed; apt install qemu-user, or your system's package of it"
        )
    return ISAS[name]


class EmulatedSession:
    """A model that is open on an emulated CPU, in a process of its own. Close it, or drop it."""

    _release: Callable[[], object]

    def __init__(self, isa: Isa, process: subprocess.Popen[bytes], log: IO[bytes], timeout: float) -> None:
        self._isa, self._process, self._log, self._timeout = isa, process, log, timeout

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run one sample, as `runtimes.Session.run` does. Raises RunError, also where it takes too long."""
        return self._ask(feeds)

    def close(self) -> None:
        """End the process and remove its files."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, values: Mapping[str, Any], **told: Any) -> dict[str, Any]:
        process, start = self._process, time.monotonic()
        if process.poll() is not None:
            raise RunError(f"{self._isa.name}: the emulated session has ended")
        assert process.stdin
        assert process.stdout
        watch = threading.Timer(self._timeout, process.kill)
        watch.start()
        try:
            send(process.stdin, values, **told)  # type: ignore[arg-type]  # its pipes are of bytes
            found, answer = receive(process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError) as error:
            late = time.monotonic() - start >= self._timeout
            why = f"took more than {self._timeout:g} s" if late else f"ended early: {self._last_words()}"
            raise RunError(f"{self._isa.name}: the run on an emulated {self._isa.cpu} {why}") from error
        finally:
            watch.cancel()
        if "error" in answer:
            raise _ERRORS.get(answer["error"], RunError)(f"{self._isa.name}: {answer['message']}")
        return found

    def _last_words(self) -> str:
        """The last line on the process's stderr, without QEMU's warnings of what it lacks."""
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        said = [line for line in lines if line.strip() and " warning: " not in line]
        return one_line(RuntimeError(said[-1])) if said else f"exit status {code}"


def open_emulated(
    model: ModelLike,
    *,
    isa: str = "avx2",
    level: Level = "all",
    session_config: Mapping[str, str] = _NOTHING,
    timeout: float = 600.0,
) -> EmulatedSession:
    """Open `model` on an emulated CPU, with the Python and the packages of this process.

    `level` and `session_config` as for `runtimes.open_session`; `timeout`: seconds that opening or one run
    may take. Raises what `find_isa` and `open_session` raise, and RunError where the emulator fails.
    """
    found = find_isa(isa)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxopt-")))
        source = stack.enter_context(materialize(model))
        if isinstance(source, bytes):
            path = folder / "model.onnx"
            path.write_bytes(source)
        else:
            path = source.absolute()
        log = stack.enter_context(tempfile.TemporaryFile())
        # In the folder, where it leaves its core if it crashes.
        process = subprocess.Popen(
            _command(found), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=folder
        )
        stack.callback(_end, process)
        session = EmulatedSession(found, process, log, timeout)
        session._ask({}, model=str(path), level=level, session_config=dict(session_config))
        session._release = weakref.finalize(session, stack.pop_all().close)
    return session


def run_emulated(
    model: ModelLike,
    samples: Iterable[Mapping[str, Any]],
    *,
    isa: str = "avx2",
    level: Level = "all",
    session_config: Mapping[str, str] = _NOTHING,
    timeout: float = 600.0,
) -> Iterator[dict[str, Any]]:
    """The outputs of each sample on an emulated CPU, one after the other: see `open_emulated`."""
    with open_emulated(
        model, isa=isa, level=level, session_config=session_config, timeout=timeout
    ) as session:
        yield from map(session.run, samples)


def _command(isa: Isa) -> list[str]:
    """The guest in this Python, with this process's module path, so that it is this onnxopt."""
    path = [os.path.abspath(entry) for entry in (*sys.path, os.path.join(onnxopt.__path__[0], ".."))]
    code = f"import sys; sys.path[:] = {path!r}; from onnxopt.guest import main; main()"
    return [_EMULATOR, "-cpu", isa.cpu, sys.executable, "-c", code]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            with contextlib.suppress(BrokenPipeError):  # what was not sent to it
                stream.close()
