"""Sessions on ONNX Runtime: the only file that imports it.

`providers` says what can really run here, `open_session` opens a model, `Session.run` runs one sample. A
provider that was asked for and did not take the nodes is an error, never a silent run on the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np

from onnxopt.errors import (
    ModelError,
    OnnxoptError,
    ProviderError,
    RuntimeMissingError,
    UsageError,
    did_you_mean,
    one_line,
)
from onnxopt.ortvalues import TensorInfo, array_from, describe, is_foreign, value_for
from onnxopt.packing import is_packed

if TYPE_CHECKING:
    from onnxopt.model import ModelLike

__all__ = [
    "Level",
    "Provider",
    "RunError",
    "Session",
    "TensorInfo",
    "UnsupportedModelError",
    "open_session",
    "providers",
    "runtime_version",
]

Level = Literal["none", "basic", "extended", "all"]

_NOTHING: Mapping[str, str] = MappingProxyType({})
_EP_NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_LEVELS = {"none": "DISABLE_ALL", "basic": "ENABLE_BASIC", "extended": "ENABLE_EXTENDED", "all": "ENABLE_ALL"}
# TF32 keeps 10 bits of a float's mantissa: no number measured with it proves anything.
_EP_DEFAULTS: Mapping[str, Mapping[str, str]] = {"cuda": {"use_tf32": "0"}}
_SAME_NODE_NAME = "two nodes with same node name"
_NEEDS = "it needs an NVIDIA GPU, its driver, and the CUDA (and TensorRT) that onnxruntime-gpu is built for"
_PROBE = '<ir_version: 8, opset_import: ["": 13]> probe (float[4] x) => (float[4] y) { y = Add(x, x) }'


class UnsupportedModelError(ModelError):
    """The runtime refuses the model: no kernel for an operator, or a graph it calls invalid."""


class RunError(OnnxoptError):
    """The runtime failed on one sample."""


@dataclass(frozen=True)
class Provider:
    """An execution provider, and whether it can run a model on this machine at this moment.

    `reason` says why it cannot and what to do (empty when it can); `version` is the runtime it belongs to,
    such as ``onnxruntime-gpu 1.31.1 (CUDA 13.0)``.
    """

    name: str
    ep_name: str
    available: bool
    reason: str
    version: str


def runtime_version() -> str:
    """The build that is imported: ``onnxruntime 1.31.1``. Raises RuntimeMissingError where there is none."""
    ort = _onnxruntime()
    cuda = f" (CUDA {ort.cuda_version})" if getattr(ort, "cuda_version", "") else ""
    return f"{getattr(ort, 'package_name', 'onnxruntime')} {ort.__version__}{cuda}"


def providers() -> tuple[Provider, ...]:
    """What runs here: cpu, cuda and tensorrt, each tried on a graph of one node.

    A build lists providers that cannot run on the machine, so only a session that took the node and ran
    it counts. Raises RuntimeMissingError.
    """
    import onnx.parser

    version, probe = runtime_version(), onnx.parser.parse_model(_PROBE)
    found = []
    for name, ep_name in _EP_NAMES.items():
        reason = ""
        try:
            with open_session(probe, provider=name, strict=name != "cpu") as session:
                session.run({"x": np.ones(4, np.float32)})
        except (ProviderError, RunError) as error:
            reason = str(error).removeprefix(f"{name}: ")
        found.append(Provider(name, ep_name, not reason, reason, version))
    return tuple(found)


class Session:
    """An open model. Close it, use it as a context manager, or drop it: temporary files go with it.

    `raw` is the `onnxruntime.InferenceSession`, for io-binding; `overridable`: initializers that may be fed.
    """

    def __init__(self, raw: Any, provider: str, label: str, resources: contextlib.ExitStack) -> None:
        self.raw = raw
        self.provider = provider
        self.label = label
        self.inputs = tuple(map(describe, raw.get_inputs()))
        self.overridable = tuple(map(describe, raw.get_overridable_initializers()))
        self.outputs = tuple(map(describe, raw.get_outputs()))
        self._types = {info.name: info.type for info in (*self.inputs, *self.overridable)}
        self._foreign_outputs = any(is_foreign(info.type) for info in self.outputs)
        self._release = weakref.finalize(self, resources.close)

    @property
    def assignment(self) -> Mapping[str, int]:
        """Nodes by execution provider, as they were assigned, before the provider fuses them."""
        counts: Counter[str] = Counter()
        for part in self.raw.get_provider_graph_assignment_info():
            counts[part.ep_name] += len(part.get_nodes())
        return counts

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run one sample; feeds that the model does not know are left out.

        Returns every output by name, in the model's order: an array (of ml_dtypes for bfloat16 and float8), a
        list of arrays for a sequence, None for an empty optional. Raises RunError.
        """
        names = [info.name for info in self.outputs]
        return dict(zip(names, self._guarded(feeds, self._values), strict=True))

    def stream(self, feeds: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
        """Run one sample; its outputs, all tensors, one by one, each freed when the next is taken.

        It takes half the memory of `run`. Raises RunError.
        """
        values = self._guarded(feeds, self._ort_values)[::-1]
        for info in self.outputs:
            yield info.name, array_from(values.pop())

    def _guarded(
        self, feeds: Mapping[str, Any], run: Callable[[list[str], Mapping[str, Any]], list[Any]]
    ) -> list[Any]:
        given = {name: value for name, value in feeds.items() if name in self._types}
        names = [info.name for info in self.outputs]
        try:
            return run(names, {name: self._feed(name, value) for name, value in given.items()})
        except Exception as error:  # ONNX Runtime's classes have no common base below Exception
            shown = ", ".join(f"{name} {np.asarray(v).dtype}{list(np.shape(v))}" for name, v in given.items())
            raise RunError(f"{self.label}: the run on [{shown}] failed: {one_line(error)}") from error

    def close(self) -> None:
        """Free the session and the temporary files it was opened from."""
        self.raw = None
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _values(self, names: list[str], feeds: Mapping[str, Any]) -> list[Any]:
        if not self._foreign_outputs:
            return list(self.raw.run(names, feeds))
        return [array_from(value) for value in self._ort_values(names, feeds)]

    def _ort_values(self, names: list[str], feeds: Mapping[str, Any]) -> list[Any]:
        create = _onnxruntime().OrtValue.ortvalue_from_numpy
        values = {name: create(v) if isinstance(v, np.ndarray) else v for name, v in feeds.items()}
        return list(self.raw.run_with_ort_values(names, values))

    def _feed(self, name: str, value: Any) -> Any:
        """`value` as ONNX Runtime takes it: an OrtValue where numpy has no such type."""
        if not is_foreign(self._types[name]) or not isinstance(value, np.ndarray):
            return value
        return value_for(value, self._types[name], _onnxruntime().OrtValue)


def open_session(
    model: ModelLike,
    *,
    provider: str = "cpu",
    level: Level = "all",
    threads: int = 1,
    session_config: Mapping[str, str] = _NOTHING,
    provider_options: Mapping[str, str] = _NOTHING,
    strict: bool = False,
    graph_file: Path | None = None,
    arena: bool = True,
) -> Session:
    """Open `model` for `provider`: sequential, `threads` threads that do not spin, nothing logged.

    `level` is the runtime's graph optimization level. `strict` refuses a model of which a node stays on the
    CPU when another provider was asked for; without it at least one node must leave the CPU. Without `arena`
    memory goes back to the system when a tensor is freed: slower for small ones, but no more than is needed.
    The graph as it will run is written to `graph_file`. Raises UsageError, RuntimeMissingError,
    ProviderError, UnsupportedModelError and what `load` raises.
    """
    if provider not in _EP_NAMES:
        raise UsageError(f"unknown provider {provider!r}" + did_you_mean(provider, _EP_NAMES))
    if level not in _LEVELS:
        raise UsageError(f"unknown optimization level {level!r}" + did_you_mean(level, get_args(Level)))
    ort = _onnxruntime()
    options = _session_options(ort, level, threads, session_config)
    if graph_file is not None:
        options.optimized_model_filepath = os.fspath(graph_file)
    options.enable_cpu_mem_arena = arena
    wanted: list[Any] = [(_EP_NAMES[provider], {**_EP_DEFAULTS.get(provider, _NOTHING), **provider_options})]
    if provider != "cpu":
        _require(ort, provider)
        if strict:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        else:
            wanted.append(_EP_NAMES["cpu"])
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(_source(model))
        label = source.name if isinstance(source, Path) else "model"
        opened = source if isinstance(source, bytes) else os.fspath(source)
        try:
            raw = ort.InferenceSession(opened, options, providers=wanted, enable_fallback=False)
        except Exception as error:  # ONNX Runtime's classes have no common base below Exception
            why = one_line(error)
            renamed = _renamed(source) if _SAME_NODE_NAME in why else None
            if renamed is not None:
                return open_session(
                    renamed,
                    provider=provider,
                    level=level,
                    threads=threads,
                    session_config=session_config,
                    provider_options=provider_options,
                    strict=strict,
                    graph_file=graph_file,
                    arena=arena,
                )
            if provider == "cpu" or type(error).__name__ in ("InvalidGraph", "InvalidProtobuf"):
                raise UnsupportedModelError(f"{label}: onnxruntime cannot open it: {why}") from error
            raise ProviderError(f"{provider}: {label}: {why}{_why_not(ort, provider)}") from error
        session = Session(raw, provider, label, stack.pop_all())
    _check_assignment(ort, session)
    return session


def _source(model: ModelLike) -> contextlib.AbstractContextManager[Path | bytes]:
    """What is neither a model's file nor bytes needs ONNX, whose import an emulated CPU would feel."""
    if isinstance(model, str | os.PathLike) and not is_packed(model):
        return contextlib.nullcontext(Path(model))
    from onnxopt.storage import materialize

    return materialize(model)


def _renamed(source: Path | bytes) -> ModelLike | None:
    """The model with node names that differ, None where they do already."""
    from onnxopt.graph import rename_nodes_apart
    from onnxopt.model import load

    model = load(source)
    return model if rename_nodes_apart(model) else None


def _session_options(ort: ModuleType, level: Level, threads: int, config: Mapping[str, str]) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{_LEVELS[level]}")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return options


def _check_assignment(ort: ModuleType, session: Session) -> None:
    """Refuse a session that fell to another provider; a graph without nodes has nothing to take."""
    wanted, first, assigned = _EP_NAMES[session.provider], session.raw.get_providers()[0], session.assignment
    if first == wanted and (assigned.get(wanted) or not assigned):
        return
    session.close()
    found = f"took none of {sum(assigned.values())} nodes" if first == wanted else f"fell back to {first}"
    raise ProviderError(f"{session.provider}: {session.label}: {found}{_why_not(ort, session.provider)}")


def _onnxruntime() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        hint = "pip install 'onnxopt[cpu]' (or 'onnxopt[gpu]')"
        raise RuntimeMissingError(f"onnxruntime is not installed: {hint}") from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise RuntimeMissingError(
            "onnxruntime is broken: it and onnxruntime-gpu overwrote each other; pip uninstall both, "
            "then pip install 'onnxopt[cpu]' (or 'onnxopt[gpu]')"
        )
    module: ModuleType = onnxruntime
    return module


def _require(ort: ModuleType, provider: str) -> None:
    """Raise ProviderError before ONNX Runtime prints that it cannot load the provider."""
    if _EP_NAMES[provider] not in ort.get_available_providers():
        raise ProviderError(
            f"{provider}: {runtime_version()} is built without {_EP_NAMES[provider]}; "
            "pip uninstall onnxruntime, then pip install 'onnxopt[gpu]'"
        )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it misses
        ort.preload_dlls()
    if not sys.platform.startswith("linux"):
        return
    for library in ("libcuda.so.1", f"libcublasLt.so.{ort.cuda_version.partition('.')[0]}"):
        try:
            ctypes.CDLL(library)
        except OSError as error:
            raise ProviderError(f"{provider}: {one_line(error)}; {_NEEDS}") from error


def _why_not(ort: ModuleType, provider: str) -> str:
    """The library that the provider misses, in the words of the system's loader, or an empty string."""
    library = Path(str(ort.__file__)).parent / "capi" / f"libonnxruntime_providers_{provider}.so"
    if not library.exists():
        return ""
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return f"; {one_line(error)}; {_NEEDS}"
    return ""
