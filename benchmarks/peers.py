"""The tools that onnxopt is measured beside: each in an environment and a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ENVIRONMENTS", "ORT", "PEERS", "Peer", "Ran", "command", "run"]

ENVIRONMENTS = Path.home() / ".cache" / "onnxopt" / "peers"
"""Where the tools are installed, unless told otherwise."""

_MEMORY = 14 << 30
"""Bytes a tool may take: some take all there are, and whatever else runs beside them."""
_FRAME = """
import json, resource, sys, time
source, target, *more = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_DATA, ({memory}, {memory}))
{imports}
started, wall = time.process_time(), time.perf_counter()
{body}
spent = [time.process_time() - started, time.perf_counter() - wall]
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
children = resource.getrusage(resource.RUSAGE_CHILDREN)
spent[0] += children.ru_utime + children.ru_stime
print(json.dumps([*spent, max(int(peak), children.ru_maxrss) / 1024]))
"""
_IR_SAVE = """
weights = (value.const_value for value in model.graph.initializers.values())
stored = any(isinstance(weight, (ir.ExternalTensor, ir.LazyTensor)) for weight in weights)
ir.save(model, target, external_data="data" if stored else None)
"""
_IR_PASSES = """
model = ir.load(source)
for name in (
    "Inline", "LiftConstantsToInitializers", "LiftSubgraphInitializersToMainGraph", "DeduplicateInitializers",
    "IdentityElimination", "CommonSubexpressionElimination", "RemoveUnusedNodes", "RemoveUnusedFunctions",
    "RemoveUnusedOpsets", "OutputFix", "NameFix", "TopologicalSort",
):
    model = getattr(common, name + "Pass")()(model).model
"""
_ORT_SAVE = """
options = ort.SessionOptions()
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_{level}
options.optimized_model_filepath, options.log_severity_level = target, 4
ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
"""


@dataclass(frozen=True)
class Peer:
    """A tool: what pip installs, what it imports, and how it makes `target` of `source`.

    home: its environment; tools with the same requirements share one. body: finds in `more` what `run` was
    given beyond the two paths. contrib: it may write operators outside the ONNX standard.
    """

    home: str
    requires: tuple[str, ...]
    imports: str
    body: str
    contrib: bool = False


@dataclass(frozen=True)
class Ran:
    """How a run went: CPU and wall seconds without imports, peak MB; or why there is nothing to tell.

    CPU seconds and peak count the processes that the tool started, the peak that of the largest.
    """

    cpu: float = 0.0
    wall: float = 0.0
    peak: float = 0.0
    fault: str = ""


ORT = ("onnxruntime==1.31.1", "onnx==1.23.2")
_IMPORT = "import onnxopt, onnxopt.api, onnxopt.passes"
_OURS = "onnxopt.optimize(source, target={target!r}, verify=False, bench=False).save(target)"

PEERS = {
    "onnxopt": Peer("", (), _IMPORT, _OURS.format(target="generic")),
    "onnxopt-cpu": Peer("", (), _IMPORT, _OURS.format(target="cpu"), contrib=True),
    "onnxsim": Peer(
        "onnxsim",
        ("onnxsim==0.8.1", *ORT),
        "import onnx, onnxsim",
        "onnx.save(onnxsim.simplify(source)[0], target)",
    ),
    "onnxslim": Peer(
        "onnxslim", ("onnxslim==0.1.98", *ORT), "import onnxslim", "onnxslim.slim(source, target)"
    ),
    "onnxoptimizer": Peer(
        "onnxoptimizer",
        ("onnxoptimizer==0.4.2", *ORT),
        "import onnx, onnxoptimizer",
        "onnx.save(onnxoptimizer.optimize(onnx.load(source)), target)",
    ),
    "onnxscript": Peer(
        "onnxscript",
        ("onnxscript==0.7.2", "onnx-ir==1.1.0", *ORT),
        "import onnx_ir as ir, onnxscript.optimizer as optimizer",
        "model = ir.load(source)\noptimizer.optimize_ir(model)" + _IR_SAVE,
    ),
    "onnx-ir": Peer(
        "onnx-ir",
        ("onnx-ir==1.1.0", *ORT),
        "import onnx_ir as ir, onnx_ir.passes.common as common",
        _IR_PASSES + _IR_SAVE,
    ),
    "ort-basic": Peer("ort", ORT, "import onnxruntime as ort", _ORT_SAVE.format(level="BASIC")),
    "ort-extended": Peer(
        "ort", ORT, "import onnxruntime as ort", _ORT_SAVE.format(level="EXTENDED"), contrib=True
    ),
    "ort-transformers": Peer(
        "ort-transformers",
        (*ORT, "sympy", "coloredlogs", "psutil", "torch==2.13.0"),
        "from onnxruntime.transformers.optimizer import optimize_model",
        "optimize_model(source, model_type='bert').save_model_to_file(target)",
        contrib=True,
    ),
    "graphsurgeon": Peer(
        "graphsurgeon",
        ("onnx-graphsurgeon==0.6.1", *ORT),
        "import onnx, onnx_graphsurgeon as gs",
        "graph = gs.import_onnx(onnx.load(source)).fold_constants().cleanup().toposort()\n"
        "onnx.save(gs.export_onnx(graph), target)",
    ),
}


def interpreter(peer: Peer, folder: Path) -> Path:
    """The Python that has the tool; an environment in `folder` is made the first time."""
    if not peer.requires:
        return Path(sys.executable)
    home = folder / peer.home
    python = home / "bin" / "python"
    if not (home / "installed").exists():
        venv.create(home, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *peer.requires], check=True)
        (home / "installed").touch()
    return python


def command(peer: Peer, folder: Path) -> list[str]:
    """The command line of a tool, but for the paths at its end."""
    program = _FRAME.format(imports=peer.imports, body=peer.body, memory=_MEMORY)
    return [str(interpreter(peer, folder)), "-c", program]


def run(peer: Peer, folder: Path, source: Path, target: Path, *more: Path, seconds: float = 120) -> Ran:
    """Let a tool make `target` of `source`, and of what else it is given; what it litters goes."""
    paths = [str(path.resolve()) for path in (source, target, *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as place:
        try:
            done = subprocess.run(
                [*command(peer, folder.resolve()), *paths],
                capture_output=True,
                text=True,
                timeout=seconds,
                env=environment,
                cwd=place if peer.requires else None,
            )
        except subprocess.TimeoutExpired:
            return Ran(fault=f"over {seconds:.0f} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        crashed = "Traceback" in done.stderr or done.returncode < 0 or not last
        return Ran(fault=f"crash: {last[:110] or done.returncode}" if crashed else last[:110])
    return Ran(*json.loads(done.stdout.strip().splitlines()[-1]))
