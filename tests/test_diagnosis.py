import functools
import json
import platform
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import pytest

import onnxopt
from onnxopt.benchmarking import Machine
from onnxopt.diagnosis import Diagnosis, diagnose
from onnxopt.errors import RuntimeMissingError
from onnxopt.runtimes import Provider

Probe = Callable[[], tuple[Provider, ...]]
CPU_BUILD = "onnxruntime 1.31.1"
GPU_BUILD = "onnxruntime-gpu 1.31.1 (CUDA 13.0)"
FINE = Machine("Some EPYC 9", "x86_64", 8, frozenset({"avx2", "avx512f", "avx512_vnni"}), 16 << 30)


def install(folder: Path, name: str, version: str = "1.0", *files: str, entry: str = "") -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    if entry:
        (info / "entry_points.txt").write_text(f"[onnxopt.passes]\n{entry}\n")


def found_in(folder: Path) -> Callable[[], Iterable[metadata.Distribution]]:
    return functools.partial(metadata.distributions, path=[str(folder)])


def probe(version: str = CPU_BUILD, **reasons: str) -> Probe:
    names = {
        "cpu": "CPUExecutionProvider",
        "cuda": "CUDAExecutionProvider",
        "tensorrt": "TensorrtExecutionProvider",
    }
    return lambda: tuple(
        Provider(name, ep_name, name not in reasons, reasons.get(name, ""), version)
        for name, ep_name in names.items()
    )


ON_CPU = probe(cuda="built without it", tensorrt="built without it")
DEAD_GPU = probe(GPU_BUILD, cuda="libcublasLt.so.13: no such file", tensorrt="libnvinfer.so.10: no such file")


def see(folder: Path, *, probe: Probe = ON_CPU, here: Machine = FINE, has_gpu: bool = False) -> Diagnosis:
    return diagnose(distributions=found_in(folder), probe=probe, here=here, has_gpu=has_gpu)


def names(diagnosis: Diagnosis) -> list[str]:
    return [check.name for check in diagnosis.checks]


def test_this_installation_is_seen_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    found = diagnose()
    assert capfd.readouterr() == ("", "")
    assert found["python"].detail == platform.python_version()
    assert found["onnxopt"].detail == onnxopt.__version__
    assert found["onnx"].detail == metadata.version("onnx")
    assert found["numpy"].detail == metadata.version("numpy")
    assert found["provider cpu"].status == "ok"
    assert found["onnxruntime"].detail.startswith("onnxruntime")
    read = json.loads(json.dumps(found.to_dict()))
    assert read["healthy"] is found.healthy
    assert [check["name"] for check in read["checks"]] == names(found)
    assert set(read["checks"][0]) == {"name", "status", "detail", "mend"}


def test_a_plain_cpu_installation_has_nothing_to_mend(tmp_path: Path) -> None:
    for name in ("onnx", "onnx_ir", "numpy"):
        install(tmp_path, name, "1.2")
    install(tmp_path, "onnxruntime", "1.31.1", "onnxruntime/__init__.py")
    install(tmp_path, "onnxruntime-extensions", "0.9", "onnxruntime_extensions/__init__.py")
    found = see(tmp_path)
    assert found.healthy
    assert {check.status for check in found.checks} == {"ok", "off"}
    assert not any(check.mend for check in found.checks)
    assert "onnxruntime clash" not in names(found)
    assert found["onnx-ir"].detail == "1.2"
    assert found["provider cuda"].status == "off"


def test_a_missing_library_fails_with_the_command(tmp_path: Path) -> None:
    found = see(tmp_path)
    assert found["numpy"].status == "fail"
    assert found["numpy"].mend == "pip install numpy"
    assert not found.healthy


def test_two_distributions_of_one_package_clash(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime", "1.31.1", "onnxruntime/__init__.py")
    install(tmp_path, "onnxruntime_gpu", "1.30.0", "onnxruntime/__init__.py")
    clash = see(tmp_path)["onnxruntime clash"]
    assert clash.status == "fail"
    assert "onnxruntime 1.31.1 and onnxruntime-gpu 1.30.0" in clash.detail
    assert clash.mend == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"


def no_runtime() -> tuple[Provider, ...]:
    raise RuntimeMissingError("onnxruntime is not installed: pip install 'onnxopt[cpu]'")


def test_no_runtime_is_one_check_with_the_command(tmp_path: Path) -> None:
    found = see(tmp_path, probe=no_runtime)
    assert found["onnxruntime"].status == "fail"
    assert found["onnxruntime"].mend == "pip install 'onnxopt[cpu]'"
    assert not any(name.startswith("provider") for name in names(found))


def test_files_gone_under_an_installed_runtime_ask_for_a_reinstall(tmp_path: Path) -> None:
    """What `pip uninstall onnxruntime` leaves of onnxruntime-gpu beside it: an empty namespace."""
    install(tmp_path, "onnxruntime-gpu", "1.31.1", "onnxruntime/__init__.py")
    found = see(tmp_path, probe=no_runtime)
    assert "onnxruntime-gpu is installed" in found["onnxruntime"].detail
    assert found["onnxruntime"].mend == "pip install --force-reinstall --no-deps onnxruntime-gpu"


def test_a_gpu_build_on_a_machine_without_a_gpu_is_no_fault(tmp_path: Path) -> None:
    cuda = see(tmp_path, probe=DEAD_GPU)["provider cuda"]
    assert (cuda.status, cuda.mend) == ("off", "")
    assert "libcublasLt.so.13" in cuda.detail


def test_a_gpu_that_a_cpu_build_leaves_idle_is_told(tmp_path: Path) -> None:
    cuda = see(tmp_path, has_gpu=True)["provider cuda"]
    assert cuda.status == "warn"
    assert "onnxopt[gpu]" in cuda.mend


def test_cuda_libraries_of_another_version_are_named(tmp_path: Path) -> None:
    install(tmp_path, "nvidia-cudnn-cu12", "9.1")
    install(tmp_path, "nvidia-cudnn-cu13", "9.9")
    cuda = see(tmp_path, probe=DEAD_GPU, has_gpu=True)["provider cuda"]
    assert cuda.status == "warn"
    assert cuda.mend.startswith("nvidia-cudnn-cu12 do not fit")
    assert "CUDA 13" in cuda.mend
    assert "onnxruntime-gpu<1.27" in cuda.mend


def test_a_gpu_without_its_libraries_gets_them_by_name(tmp_path: Path) -> None:
    found = see(tmp_path, probe=DEAD_GPU, has_gpu=True)
    assert found["provider cuda"].detail == "libcublasLt.so.13: no such file"
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in found["provider cuda"].mend
    assert "TensorRT" in found["provider tensorrt"].mend


def test_working_providers_are_ok(tmp_path: Path) -> None:
    found = see(tmp_path, probe=probe(GPU_BUILD), has_gpu=True)
    assert [found[f"provider {name}"].status for name in ("cpu", "cuda", "tensorrt")] == ["ok"] * 3
    assert found["onnxruntime"].detail == GPU_BUILD


def test_a_cpu_provider_that_fails_is_a_fault(tmp_path: Path) -> None:
    assert see(tmp_path, probe=probe(cpu="no kernel"))["provider cpu"].status == "fail"


@pytest.mark.parametrize(
    ("flags", "status", "detail"),
    [
        (frozenset({"avx2", "avx_vnni"}), "ok", "AVX2, VNNI"),
        (frozenset({"avx2", "avx512f"}), "warn", "AVX2, AVX512; no 8-bit dot product"),
        (frozenset({"asimd", "asimddp"}), "ok", "NEON, dot product"),
        (None, "ok", "unknown"),
    ],
)
def test_vector_units(tmp_path: Path, flags: frozenset[str] | None, status: str, detail: str) -> None:
    found = see(tmp_path, here=Machine("a cpu", "x86_64", 2, flags, None))
    assert found["vector units"].status == status
    assert found["vector units"].detail.startswith(detail)
    assert found["memory"].detail == "unknown"
    assert found["processor"].detail == "a cpu, x86_64, 2 cores"


def test_third_party_passes_are_listed_without_importing_them(tmp_path: Path) -> None:
    install(tmp_path, "my-passes", "0.3", entry="fuse-swish = does_not_exist:FuseSwish")
    found = see(tmp_path)["third-party passes"]
    assert (found.status, found.detail) == ("ok", "fuse-swish (my-passes 0.3)")
