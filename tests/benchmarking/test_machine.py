import os
import platform
from pathlib import Path

import pytest

from onnxopt.benchmarking.machine import Machine, load_average, machine

X86 = "processor\t: 0\nmodel name\t: Some EPYC 9\nflags\t\t: fpu avx2 {more}\n\nmodel name\t: second\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd asimddp\n\n"


@pytest.mark.parametrize(
    ("more", "vnni"), [("avx512f", False), ("avx512f avx512_vnni", True), ("avx_vnni", True)]
)
def test_x86(tmp_path: Path, more: str, vnni: bool) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(X86.format(more=more))
    found = machine(file)
    assert found.cpu == "Some EPYC 9"
    assert found.flags == frozenset({"fpu", "avx2", *more.split()})
    assert found.has_vnni is vnni


def test_arm_names_its_flags_features(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(ARM)
    found = machine(file)
    assert found.flags == frozenset({"fp", "asimd", "asimddp"})
    assert found.has_vnni is True


def test_what_the_system_does_not_tell_is_unknown(tmp_path: Path) -> None:
    found = machine(tmp_path / "none")
    assert found.flags is None
    assert found.has_vnni is None
    assert found.cpu == (platform.processor() or "unknown")
    assert found.architecture == platform.machine()
    assert 1 <= found.cores <= (os.cpu_count() or 1)


def test_load_is_a_number_where_it_is_counted() -> None:
    load = load_average()
    assert (load is None) == (not hasattr(os, "getloadavg"))
    assert load is None or load >= 0


def test_the_fingerprint_is_of_the_processor() -> None:
    one = Machine("a", "x86_64", 2, frozenset({"avx2", "fma"}), 8)
    assert one.fingerprint == Machine("a", "x86_64", 4, frozenset({"fma", "avx2"}), 16).fingerprint
    others = [Machine("b", "x86_64", 2, one.flags, 8), Machine("a", "arm64", 2, one.flags, 8)]
    others += [Machine("a", "x86_64", 2, flags, 8) for flags in (None, frozenset({"avx2"}))]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert len(one.fingerprint) == 12
