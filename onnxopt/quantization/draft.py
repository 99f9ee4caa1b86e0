"""A quantization in the making, which the keepers of accuracy improve one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from onnxopt.calibration import ChannelStatistics, Statistics, TensorStatistics, calibrate, choose_range
from onnxopt.data import Feeds
from onnxopt.quantization.formats import Format, QuantParams, params_from_range
from onnxopt.quantization.plan import Plan, is_symmetric
from onnxopt.quantization.units import Unit, survey
from onnxopt.targets import Placement

__all__ = ["Draft"]


@dataclass(frozen=True)
class Draft:
    """A model in floating point and how it is to be quantized.

    model: prepared; never changed in place: who changes it makes another. plan: which units, with which
    numbers. statistics: of each tensor that units read or write. method: how ranges come from them.
    """

    model: ir.Model
    placement: Placement
    plan: Plan
    statistics: Statistics
    method: str

    def units(self) -> tuple[Unit, ...]:
        """What can be quantized of the model."""
        return survey(self.model, self.placement, self.plan.params).units

    def channels(self, axes: Mapping[str, int], samples: Sequence[Feeds]) -> dict[str, ChannelStatistics]:
        """The statistics of each channel of tensors, name -> axis; measured where there are none yet."""
        known = {name: self.statistics[name].channel for name in axes if name in self.statistics}
        found = {name: one for name, one in known.items() if one is not None and one.axis == axes[name]}
        missing = {name: axis for name, axis in axes.items() if name not in found}
        if missing:
            measured = calibrate(self.model, samples, list(missing), channels=missing)
            found |= {name: one.channel for name, one in measured.items() if one.channel is not None}
        return found

    def with_model(self, model: ir.Model, changed: Sequence[str], samples: Sequence[Feeds]) -> Draft:
        """With a model of the same names, of which these tensors take other values than before.

        Integers and biases of the plan were made for the old one: they are dropped.
        """
        tensors = [name for name in changed if name in self.statistics]
        channels = {name: one.axis for name in tensors if (one := self.statistics[name].channel) is not None}
        measured = calibrate(model, samples, tensors, channels=channels) if tensors else {}
        statistics = Statistics({**self.statistics, **measured})
        params = dict(self.plan.params)
        for name in tensors:
            if name in params:
                params[name] = self._params(statistics[name], params[name].format)
        draft = replace(self, model=model, statistics=statistics)
        for unit in draft.units():
            if unit.is_move:
                params[unit.output.name or ""] = params[unit.sources[0].name or ""]
        return replace(draft, plan=replace(self.plan, params=params, rounded={}, biases={}))

    def _params(self, stats: TensorStatistics, form: Format) -> QuantParams:
        symmetric = is_symmetric(self.placement, form, stats.minimum)
        how = {"symmetric": symmetric, "power_of_two": self.plan.power_of_two}
        found = choose_range(stats, self.method, form, **how)
        return params_from_range(found.low, found.high, form, **how)
