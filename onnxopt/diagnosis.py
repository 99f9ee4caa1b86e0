"""What is installed, what of it works, what clashes, and how to mend it: `onnxopt doctor`."""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import onnxopt
from onnxopt.benchmarking.machine import Machine, machine
from onnxopt.errors import OnnxoptError, RuntimeMissingError
from onnxopt.runtimes import Provider, providers

__all__ = ["Check", "Diagnosis", "Status", "diagnose"]

Status = Literal["ok", "off", "warn", "fail"]

_LIBRARIES = ("onnx", "onnx-ir", "numpy")
_OWNED = "onnxruntime/__init__.py"
_PASSES = "onnxopt.passes"
_FRESH = "pip install 'onnxopt[cpu]'"


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis. `off`: not there, and nothing is wrong with that."""

    name: str
    status: Status
    detail: str
    mend: str = ""
    """The command, or what else to do; empty where there is nothing to mend."""


@dataclass(frozen=True)
class Diagnosis:
    """All checks, in the order to show them."""

    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing failed."""
        return all(check.status != "fail" for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        return {"healthy": self.healthy, "checks": [asdict(check) for check in self.checks]}


def diagnose(
    *,
    distributions: Callable[[], Iterable[metadata.Distribution]] = metadata.distributions,
    probe: Callable[[], Sequence[Provider]] = providers,
    here: Machine | None = None,
    has_gpu: bool | None = None,
) -> Diagnosis:
    """Look at this installation: versions, ONNX Runtime's distributions and providers, the machine, passes.

    Each provider runs a model of one node, so `ok` means that it works. The arguments stand in for the real
    world: installed distributions, the providers' probe, the machine, and whether it has an NVIDIA GPU.
    """
    installed = _by_name(distributions())
    owners = _owners(installed)
    gpu = _has_nvidia_driver() if has_gpu is None else has_gpu
    checks = [Check("python", "ok", platform.python_version()), Check("onnxopt", "ok", onnxopt.__version__)]
    checks += [_library(name, installed) for name in _LIBRARIES]
    checks += _runtime(owners, installed, probe, gpu)
    checks.append(_torch(installed))
    checks += _machine(machine() if here is None else here)
    checks.append(_third_party(installed))
    return Diagnosis(tuple(checks))


def _has_nvidia_driver() -> bool:
    """Containers may have the device without the tool."""
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidiactl").exists()


def _by_name(found: Iterable[metadata.Distribution]) -> dict[str, metadata.Distribution]:
    """Distributions by normalized name; of two with one name, the first is the one that is imported."""
    named: dict[str, metadata.Distribution] = {}
    for dist in found:
        name = dist.metadata["Name"]
        if name:
            named.setdefault(re.sub(r"[-_.]+", "-", name).lower(), dist)
    return named


def _library(name: str, installed: Mapping[str, metadata.Distribution]) -> Check:
    if name not in installed:
        return Check(name, "fail", "not installed", f"pip install {name}")
    return Check(name, "ok", installed[name].version)


def _torch(installed: Mapping[str, metadata.Distribution]) -> Check:
    """What `onnxopt train` runs on; it is not imported for this, which takes seconds."""
    if "torch" not in installed:
        return Check("torch", "off", "not installed; onnxopt train needs it: pip install 'onnxopt[train]'")
    version = installed["torch"].version
    _, plus, build = version.partition("+")
    gpu = "CPU only" if build == "cpu" else f"for {build}" if plus else "with CUDA where its wheels have it"
    return Check("torch", "ok", f"{version} ({gpu})")


def _owners(installed: Mapping[str, metadata.Distribution]) -> list[str]:
    """The distributions whose files make up ``onnxruntime/``."""
    suspects = (name for name in installed if name.startswith(("onnxruntime", "ort-")))
    return sorted(
        name for name in suspects if any(file.as_posix() == _OWNED for file in installed[name].files or ())
    )


def _runtime(
    owners: Sequence[str],
    installed: Mapping[str, metadata.Distribution],
    probe: Callable[[], Sequence[Provider]],
    has_gpu: bool,
) -> list[Check]:
    checks = []
    if len(owners) > 1:
        checks.append(_clash(owners, installed))
    try:
        found = probe()
    except RuntimeMissingError as error:
        return [*checks, _missing(owners, str(error))]
    except OnnxoptError as error:
        return [*checks, Check("onnxruntime", "fail", str(error), _reinstall(owners))]
    checks.insert(0, Check("onnxruntime", "ok", found[0].version))
    checks += [_provider(provider, has_gpu, installed) for provider in found]
    return checks


def _clash(owners: Sequence[str], installed: Mapping[str, metadata.Distribution]) -> Check:
    shown = " and ".join(f"{name} {installed[name].version}" for name in owners)
    return Check(
        "onnxruntime clash",
        "fail",
        f"{shown} overwrite each other's files: the last one installed is imported, and to uninstall one "
        "breaks the other",
        f"pip uninstall -y {' '.join(owners)} && pip install {_kept(owners)}",
    )


def _kept(owners: Sequence[str]) -> str:
    """The one to keep: a special build holds the CPU provider too."""
    return next((name for name in owners if name != "onnxruntime"), "onnxruntime")


def _missing(owners: Sequence[str], reason: str) -> Check:
    if not owners:
        return Check("onnxruntime", "fail", reason, _FRESH)
    detail = f"{', '.join(owners)} is installed, but its files are broken or gone"
    return Check("onnxruntime", "fail", detail, _reinstall(owners))


def _reinstall(owners: Sequence[str]) -> str:
    return f"pip install --force-reinstall --no-deps {_kept(owners)}" if owners else _FRESH


def _provider(provider: Provider, has_gpu: bool, installed: Mapping[str, metadata.Distribution]) -> Check:
    name = f"provider {provider.name}"
    if provider.available:
        return Check(name, "ok", f"{provider.ep_name} ran a model")
    if provider.name == "cpu":
        return Check(name, "fail", provider.reason)
    major = _cuda_major(provider.version)
    if major is None:
        mend = "pip uninstall -y onnxruntime && pip install 'onnxopt[gpu]'" if has_gpu else ""
        seen = "this machine seems to have an NVIDIA GPU, but " if has_gpu else ""
        return Check(
            name, "warn" if has_gpu else "off", f"{seen}{provider.version} is built without it", mend
        )
    if not has_gpu:
        return Check(name, "off", f"built in, but no NVIDIA driver was found: {provider.reason}")
    return Check(name, "warn", provider.reason, _cuda_mend(provider.name, major, installed))


def _cuda_major(version: str) -> int | None:
    """``onnxruntime-gpu 1.31.1 (CUDA 13.0)`` -> 13; None for a build without CUDA."""
    found = re.search(r"\(CUDA (\d+)", version)
    return int(found[1]) if found else None


def _cuda_mend(provider: str, major: int, installed: Mapping[str, metadata.Distribution]) -> str:
    """What the build needs; wheels from 1.27 on are made for CUDA 13, those before for CUDA 12."""
    others = sorted(
        name
        for name in installed
        if (cuda := re.fullmatch(r"nvidia-.+-cu(\d+)", name)) and int(cuda[1]) != major
    )
    if others:
        pin = " or pin 'onnxruntime-gpu<1.27', the last for CUDA 12" if major == 13 else ""
        return (
            f"{', '.join(others)} do not fit: pip install 'onnxruntime-gpu[cuda,cudnn]' for CUDA {major}{pin}"
        )
    if provider == "tensorrt":
        return f"install the TensorRT release whose library is named here, for CUDA {major}"
    return f"pip install 'onnxruntime-gpu[cuda,cudnn]', and a driver for CUDA {major}"


def _machine(here: Machine) -> list[Check]:
    memory = "unknown" if here.memory_bytes is None else f"{here.memory_bytes / 2**30:.1f} GiB"
    return [
        Check("processor", "ok", f"{here.cpu}, {here.architecture}, {here.cores} cores"),
        _vector_units(here),
        Check("memory", "ok", memory),
    ]


def _vector_units(here: Machine) -> Check:
    if here.flags is None:
        return Check("vector units", "ok", "unknown")
    named = {
        "AVX2": {"avx2"},
        "AVX512": {"avx512f"},
        "VNNI": {"avx512_vnni", "avx_vnni"},
        "AMX int8": {"amx_int8"},
        "NEON": {"asimd"},
        "dot product": {"asimddp"},
        "int8 matrix": {"i8mm"},
        "SVE": {"sve"},
    }
    present = ", ".join(name for name, flags in named.items() if flags & here.flags) or "none known"
    if here.has_vnni:
        return Check("vector units", "ok", present)
    detail = f"{present}; no 8-bit dot product: int8 gains little, and on x86 u8 x s8 products may saturate"
    return Check("vector units", "warn", detail)


def _third_party(installed: Mapping[str, metadata.Distribution]) -> Check:
    """Passes that other packages bring, from their metadata: nothing of them is imported."""
    found = sorted(
        f"{entry.name} ({name} {dist.version})"
        for name, dist in installed.items()
        if name != "onnxopt"
        for entry in dist.entry_points
        if entry.group == _PASSES
    )
    return Check("third-party passes", "ok" if found else "off", ", ".join(found) or "none")
