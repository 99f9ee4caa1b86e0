"""What the machine is: figures without it mean nothing."""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Machine", "load_average", "machine"]


@dataclass(frozen=True)
class Machine:
    """The processor and the memory; None where the system does not tell."""

    cpu: str
    architecture: str
    cores: int
    """Logical cores this process may use."""
    flags: frozenset[str] | None
    """Instruction set flags in Linux's spelling: ``avx2``, ``avx512_vnni``, ``asimddp``."""
    memory_bytes: int | None

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that name the processor: its model, architecture and instruction sets."""
        text = "\n".join([self.cpu, self.architecture, *sorted(self.flags or ())])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def has_vnni(self) -> bool | None:
        """Whether 8-bit dot products are one instruction (x86 VNNI, ARM dot product)."""
        if self.flags is None:
            return None
        return bool(self.flags & {"avx512_vnni", "avx_vnni", "asimddp"})


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> Machine:
    """The machine this process runs on; `cpuinfo` is Linux's description of the first processor."""
    fields = _fields(cpuinfo)
    words = fields.get("flags") or fields.get("Features")
    return Machine(
        cpu=fields.get("model name") or platform.processor() or "unknown",
        architecture=platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        flags=frozenset(words.split()) if words else None,
        memory_bytes=_memory_bytes(),
    )


def load_average() -> float | None:
    """Processes that want a core, over the last minute; None where the system does not count them."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _fields(cpuinfo: Path) -> dict[str, str]:
    """``key : value`` of the first processor; empty where there is no such file."""
    if not cpuinfo.is_file():
        return {}
    first = cpuinfo.read_text(errors="replace").split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory_bytes() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(names):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
