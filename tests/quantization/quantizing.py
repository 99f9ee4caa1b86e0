"""Small float models, and all or some of their units quantized with the ranges of the samples themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt.calibration import calibrate, exposable
from onnxopt.data import Feeds
from onnxopt.model import clone
from onnxopt.protobuf import dump
from onnxopt.quantization.emit import emit
from onnxopt.quantization.formats import find_format
from onnxopt.quantization.fusion import Fusion, fusion_of
from onnxopt.quantization.judge import Judge, Judgement
from onnxopt.quantization.plan import Plan, params_of_tensors
from onnxopt.quantization.saturation import find_saturation
from onnxopt.quantization.static import tensors_of
from onnxopt.quantization.units import Survey, Unit, survey
from onnxopt.runtimes import open_session
from onnxopt.structure import checker_complaint, signature_of
from onnxopt.targets import PLACEMENTS, Placement
from tests.support import sqnr, text_model

X86 = PLACEMENTS["x86"]

LAYER_KERNELS = (
    "ConvInteger",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
)


@dataclass(frozen=True)
class Quantized:
    """A model in floats and in integers."""

    floats: ir.Model
    model: ir.Model
    surveyed: Survey
    sites: Mapping[str, ir.Node]
    plan: Plan
    samples: Sequence[Feeds]

    @property
    def fusion(self) -> Fusion:
        return fusion_of(self.model, self.sites)

    @property
    def layer_kernels(self) -> int:
        """How many integer kernels that multiply and add run."""
        return sum(count for name, count in self.fusion.kernels.items() if name in LAYER_KERNELS)

    @property
    def layers(self) -> int:
        """How many layers were chosen."""
        return sum(node.op_type in ("Conv", "Gemm", "MatMul") for node in self.sites.values())

    def array(self, name: str) -> np.ndarray:
        """An initializer of the quantized model."""
        tensor = self.model.graph.initializers[name].const_value
        assert tensor is not None
        return tensor.numpy()

    def runs(self, level: str = "all") -> list[dict[str, np.ndarray]]:
        return runs_of(self.model, self.samples, level)

    def least_sqnr(self, level: str = "all") -> float:
        """Of all float outputs and samples, in dB."""
        pairs = zip(runs_of(self.floats, self.samples), self.runs(level), strict=True)
        return min(
            sqnr(want[name], have[name])
            for want, have in pairs
            for name in want
            if want[name].dtype.kind == "f" and want[name].any()
        )

    def check(self) -> None:
        """The structure holds, and inputs and outputs are what they were."""
        if checker_complaint(self.floats) is None:
            assert checker_complaint(self.model) is None
        assert signature_of(self.model) == signature_of(self.floats)


def runs_of(model: ir.Model, samples: Sequence[Feeds], level: Any = "all") -> list[dict[str, np.ndarray]]:
    with open_session(model, level=level) as session:
        return [session.run(feeds) for feeds in samples]


def model_of(text: str, *, opset: Any = 17, **constants: Any) -> ir.Model:
    """A model from text, whose constants are arrays or numbers, with the shapes that can be inferred."""
    proto = text_model(f'<ir_version: 10, opset_import: ["" : {opset}, "my" : 1]>\n{text}')
    arrays = {name: np.asarray(a, np.float32) if isinstance(a, float) else a for name, a in constants.items()}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in arrays.items())
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    assert isinstance(model, ir.Model)
    return model


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def samples_for(model: ir.Model, count: int = 3, **sizes: int) -> list[dict[str, np.ndarray]]:
    """Standard normal floats for each graph input; `sizes` of the symbols, 2 where there is none."""
    found = []
    for number in range(count):
        feeds: dict[str, np.ndarray] = {}
        for value in model.graph.inputs:
            assert value.shape is not None
            shape = [d if isinstance(d, int) else sizes.get(str(d), 2) for d in value.shape.dims]
            feeds[value.name or ""] = random(*shape, seed=number + len(feeds))
        found.append(feeds)
    return found


def surveyed(model: ir.Model, placement: Placement = X86) -> Survey:
    return survey(model, placement, frozenset(exposable(model)))


def reasons(model: ir.Model, placement: Placement = X86) -> list[str]:
    """Why heavy nodes are left."""
    return list(surveyed(model, placement).left)


def quantized(
    model: ir.Model,
    samples: Sequence[Feeds] | None = None,
    *,
    placement: Placement = X86,
    activation: str | None = None,
    pick: Callable[[Unit], bool] = lambda _: True,
    **options: Any,
) -> Quantized:
    """The units that `pick` takes, in integers. `options`: fields of the plan."""
    samples = samples_for(model) if samples is None else samples
    possible = surveyed(model, placement)
    statistics = calibrate(model, samples, tensors_of(possible.units))
    ranges = {
        name: (one.minimum, one.maximum)
        for name, one in statistics.items()
        if one.count and not one.nonfinite
    }
    found = survey(model, placement, ranges)
    params = params_of_tensors(
        found.units,
        ranges,
        placement,
        activation=activation,
        power_of_two=options.get("power_of_two", False),
    )
    chosen = [unit for unit in found.units if pick(unit)]
    tensors = frozenset(v.name or "" for unit in chosen for v in (*unit.sources, unit.output))
    plan = Plan(frozenset(u.site for u in chosen), tensors, params, find_format(placement.weight))
    plan = replace(plan, **options)
    own = clone(model)
    sites = emit(own, survey(own, placement, params).units, plan, placement)
    return Quantized(model, own, found, sites, plan, samples)


def bytes_of(model: ir.Model) -> bytes:
    return bytes(dump(model).SerializeToString())


def judge_without_emulator(monkeypatch: pytest.MonkeyPatch, *, within: bool = False) -> list[ir.Model]:
    """As if the budget was kept elsewhere where no sum can saturate, or always; what was judged there."""
    judged: list[ir.Model] = []

    def judge_on(_self: Judge, model: ir.Model, _isa: str, _split: str = "search") -> Judgement:
        judged.append(model)
        return Judgement(within or not find_saturation(model), 0.0, None, "as foreseen")

    monkeypatch.setattr(Judge, "on", judge_on)
    monkeypatch.setattr("onnxopt.api.quantization.find_isa", lambda _: None)
    return judged
