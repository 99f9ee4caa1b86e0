"""The tools that onnxopt is measured beside: each in an environment and a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ENVIRONMENTS", "PEERS", "Peer", "Ran", "command", "run"]

ENVIRONMENTS = Path.home() / ".cache" / "onnxopt" / "peers"
"""Where the tools are installed, unless told otherwise."""

_FRAME = """
import json, sys, time
source, target = sys.argv[1:]
{imports}
started, wall = time.process_time(), time.perf_counter()
{body}
spent = [time.process_time() - started, time.perf_counter() - wall]
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([*spent, int(peak) / 1024]))
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

    contrib: it may write operators outside the ONNX standard.
    """

    requires: tuple[str, ...]
    imports: str
    body: str
    contrib: bool = False


@dataclass(frozen=True)
class Ran:
    """How a run went: CPU and wall seconds without imports, peak MB; or why there is nothing to tell."""

    cpu: float = 0.0
    wall: float = 0.0
    peak: float = 0.0
    fault: str = ""


_ORT = ("onnxruntime==1.31.1", "onnx==1.23.2")
_IMPORT = "import onnxopt, onnxopt.api.optimize, onnxopt.passes"
_OURS = "onnxopt.optimize(source, target={target!r}, verify=False, bench=False).save(target)"

PEERS = {
    "onnxopt": Peer((), _IMPORT, _OURS.format(target="generic")),
    "onnxopt-cpu": Peer((), _IMPORT, _OURS.format(target="cpu"), contrib=True),
    "onnxsim": Peer(
        ("onnxsim==0.8.1", *_ORT),
        "import onnx, onnxsim",
        "onnx.save(onnxsim.simplify(source)[0], target)",
    ),
    "onnxslim": Peer(("onnxslim==0.1.98", *_ORT), "import onnxslim", "onnxslim.slim(source, target)"),
    "onnxoptimizer": Peer(
        ("onnxoptimizer==0.4.2", *_ORT),
        "import onnx, onnxoptimizer",
        "onnx.save(onnxoptimizer.optimize(onnx.load(source)), target)",
    ),
    "onnxscript": Peer(
        ("onnxscript==0.7.2", "onnx-ir==1.1.0", *_ORT),
        "import onnx_ir as ir, onnxscript.optimizer as optimizer",
        "model = ir.load(source)\noptimizer.optimize_ir(model)" + _IR_SAVE,
    ),
    "onnx-ir": Peer(
        ("onnx-ir==1.1.0", *_ORT),
        "import onnx_ir as ir, onnx_ir.passes.common as common",
        _IR_PASSES + _IR_SAVE,
    ),
    "ort-basic": Peer(_ORT, "import onnxruntime as ort", _ORT_SAVE.format(level="BASIC")),
    "ort-extended": Peer(_ORT, "import onnxruntime as ort", _ORT_SAVE.format(level="EXTENDED"), contrib=True),
    "ort-transformers": Peer(
        (*_ORT, "sympy", "coloredlogs", "psutil", "torch==2.13.0"),
        "from onnxruntime.transformers.optimizer import optimize_model",
        "optimize_model(source, model_type='bert').save_model_to_file(target)",
        contrib=True,
    ),
    "graphsurgeon": Peer(
        ("onnx-graphsurgeon==0.6.1", *_ORT),
        "import onnx, onnx_graphsurgeon as gs",
        "graph = gs.import_onnx(onnx.load(source)).fold_constants().cleanup().toposort()\n"
        "onnx.save(gs.export_onnx(graph), target)",
    ),
}


def interpreter(name: str, folder: Path) -> Path:
    """The Python that has the tool; an environment in `folder` is made the first time."""
    requires = PEERS[name].requires
    if not requires:
        return Path(sys.executable)
    home = folder / name
    python = home / "bin" / "python"
    if not (home / "installed").exists():
        venv.create(home, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requires], check=True)
        (home / "installed").touch()
    return python


def command(name: str, folder: Path) -> list[str]:
    """The command line of a tool, but for the two paths at its end."""
    peer = PEERS[name]
    return [str(interpreter(name, folder)), "-c", _FRAME.format(imports=peer.imports, body=peer.body)]


def run(name: str, folder: Path, source: Path, target: Path, *, seconds: float = 120) -> Ran:
    """Let a tool make `target` of `source`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [*command(name, folder), str(source), str(target)],
            capture_output=True,
            text=True,
            timeout=seconds,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return Ran(fault=f"over {seconds:.0f} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return Ran(fault=f"crash: {last[:70]}")
    return Ran(*json.loads(done.stdout.strip().splitlines()[-1]))
