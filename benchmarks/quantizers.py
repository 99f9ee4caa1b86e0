"""The tools that quantize, as `benchmarks.peers` runs them: on a folder of feeds, one .npz a sample.

Each is called as its documentation calls it, for 8 bit on a CPU where it lets its user say so.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.peers import ORT, Peer

__all__ = ["PREPARE", "PREPROCESS", "QUANTIZERS"]

_TORCH = "torch==2.13.0"

_READ = """
import glob, numpy as np
paths = sorted(glob.glob(more[0] + "/*.npz"))
def feeds():
    return ({k: v for k, v in np.load(path).items()} for path in paths)
"""
_READER = """
from onnxruntime.quantization import CalibrationDataReader
class Reader(CalibrationDataReader):
    def __init__(self):
        self.left = feeds()
    def get_next(self):
        return next(self.left, None)
    def get_first(self):
        return next(feeds())
    def rewind(self):
        self.left = feeds()
"""

_PREPARE = """
def prepare(graph):
    held = {tensor.name for tensor in graph.initializer}
    for port in [port for port in graph.input if port.name in held]:
        graph.input.remove(port)
    constants = [node for node in graph.node if node.op_type == "Constant"]
    for node in [node for node in constants if node.attribute[0].name == "value"]:
        tensor = node.attribute[0].t
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
        graph.node.remove(node)
model = onnx.load(source)
model.ir_version = max(model.ir_version, 4)
prepare(model.graph)
opset = next(opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx"))
if opset < 13:
    model = onnx.version_converter.convert_version(model, 13)
    model.ir_version = max(model.ir_version, 7)
onnx.save(model, target)
"""
PREPARE = Peer("q-ort", (*ORT, "sympy"), "import onnx, onnx.version_converter", _PREPARE)
"""What several tools ask for: opset 13, weights as initializers and not as inputs."""

_PREPROCESS = """
try:
    quant_pre_process(source, target)
except Exception:  # its symbolic shape inference gives up on some models
    quant_pre_process(source, target, skip_symbolic_shape=True)
"""
PREPROCESS = replace(
    PREPARE,
    imports="from onnxruntime.quantization.shape_inference import quant_pre_process",
    body=_PREPROCESS,
)
"""What ONNX Runtime asks for before it quantizes, on top."""

_U8S8 = "per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8"


def _ort(options: str) -> Peer:
    imports = "from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static"
    body = f"quantize_static(source, target, Reader(), {options})"
    return replace(PREPARE, imports=imports + _READ + _READER, body=body)


def _onnxsim(options: str) -> Peer:
    body = f"onnx.save(onnxsim.quantize_static(source, calibration_data=list(feeds()), {options}), target)"
    return Peer("onnxsim", ("onnxsim==0.8.1", *ORT), "import onnx, onnxsim" + _READ, body)


_OURS = """
command = [sys.executable, "-m", "onnxopt", "quantize", source, "-o", target, "--data", more[0]]
command += ["--target", "cpu", "--json", target + ".json"]
done = subprocess.run(command, capture_output=True, text=True)
if done.returncode:
    raise SystemExit(f"exit {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}")
"""
_NNCF = """
model = nncf.quantize(onnx.load(source), nncf.Dataset(list(feeds())), subset_size=len(paths))
onnx.save(model, target)
"""
_MODELOPT = """
quantize(source, "int8", calibration_data_reader=Reader(), calibration_eps=["cpu"], output_path=target,
         high_precision_dtype="fp32")
"""
_AIMET = """
sim = QuantizationSimModel(onnx.load(source), dummy_input=next(feeds()))
sim.compute_encodings(feeds())
onnx.save(sim.to_onnx_qdq(prequantize_constants=True), target)
"""
_QUARK = """
config = QConfig.get_default_config("U8S8_AAWS")
ModelQuantizer(config).quantize_model(source, target, Reader())
"""

QUANTIZERS = {
    "onnxopt": Peer("", (), "import subprocess", _OURS),
    "ort-u8s8": _ort(_U8S8),
    "ort-u8s8-linear": _ort(f"{_U8S8}, op_types_to_quantize=['Conv', 'MatMul', 'Gemm']"),
    "ort-percentile": _ort(f"{_U8S8}, calibrate_method=CalibrationMethod.Percentile"),
    "ort-defaults": _ort(""),
    "ort-dynamic": replace(
        PREPARE,
        imports="from onnxruntime.quantization import quantize_dynamic",
        body="quantize_dynamic(source, target)",
    ),
    "nncf": Peer("q-nncf", ("nncf==3.4.0", *ORT), "import nncf, onnx" + _READ, _NNCF),
    "onnxsim-minmax": _onnxsim("method='minmax'"),
    "onnxsim-auto": _onnxsim("method='auto'"),
    "onnxsim-full": _onnxsim("method='auto', full_graph=True"),
    "modelopt": Peer(
        "q-modelopt",
        (
            *(_TORCH, "nvidia-modelopt==0.47.0", "onnx==1.21.0", "onnxruntime==1.24.4", "onnxslim==0.1.98"),
            *("onnxscript", "onnx-ir", "onnx-graphsurgeon", "onnxconverter-common", "polygraphy", "lief"),
            *("cppimport", "ml_dtypes"),
        ),
        "from modelopt.onnx.quantization import quantize" + _READ + _READER,
        _MODELOPT,
    ),
    "aimet": Peer(
        "q-aimet",
        (_TORCH, "aimet-onnx==2.42.0", *ORT),
        "import onnx\nfrom aimet_onnx import QuantizationSimModel" + _READ,
        _AIMET,
    ),
    "quark": Peer(
        "q-quark",
        (_TORCH, "amd-quark==0.13", "onnx==1.22.0", "onnxruntime==1.31.1"),
        "from quark.onnx import ModelQuantizer, QConfig" + _READ + _READER,
        _QUARK,
    ),
}
"""modelopt without what its extra asks of a GPU (cupy, onnxruntime-gpu)."""
