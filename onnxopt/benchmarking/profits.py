"""Whether a rewrite pays on a runtime: by measurement, not by belief.

What a runtime's own kernels and optimizer make of a pattern changes with its version: a fused operator may
be six times faster in one and seven times slower in the next. A guarded pass therefore has a `pattern`, a
model of realistic size; its profit is the time of the pattern after the pass, to that before it. Profits
are read from what was recorded on this machine, then from the table that ships, and else measured, where
that is allowed, and recorded. What is not known to pay is left out.

A pattern is ONNX text, with two liberties: a value that is declared and given by no node is a weight, whose
numbers are made up, and a dynamic size is measured at the number its name ends in: `float[rows_128, 768]`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import json
import os
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from onnxopt.benchmarking.latency import bench
from onnxopt.benchmarking.machine import machine
from onnxopt.claims import Pass, pass_name
from onnxopt.errors import ModelError, ProviderError, RuntimeMissingError
from onnxopt.examples import rewritten, text_model
from onnxopt.protobuf import dump
from onnxopt.runtimes import UnsupportedModelError, runtime_version
from onnxopt.storage import staging

__all__ = ["Guard", "Profit", "find_profit", "pattern_of", "shipped_profits", "sizes_of"]

Source = Literal["shipped table", "recorded", "measured", "unknown"]

_SECONDS = 1.5
_SCHEMA = "onnxopt.profits/1"
_UNMEASURED = "run without --no-bench to measure it"


@dataclass(frozen=True)
class Profit:
    """What a guarded pass gains on one provider of one version of ONNX Runtime.

    name: the pass, as a recipe spells it. ratio: time of its pattern after / before; None where unknown.
    interval: 95 %. source: where that is known from. reason: why it is not known.
    """

    name: str
    provider: str
    runtime: str
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    source: Source = "unknown"
    reason: str = ""

    @property
    def pays(self) -> bool:
        """Whether the whole interval says that it is faster."""
        return self.interval is not None and self.interval[1] < 1

    @property
    def figure(self) -> str:
        """The figure in words: ``7.1x slower on onnxruntime 1.31.1 cpu (shipped table)``."""
        where = f"on onnxruntime {self.runtime} {self.provider}"
        if self.ratio is None or self.interval is None:
            return f"its speed {where} is unknown: {self.reason}"
        if self.interval[0] > 1:
            return f"{self.ratio:.2g}x slower {where} ({self.source})"
        return f"{'' if self.pays else 'no gain: '}{self.ratio:.2f}x the time {where} ({self.source})"

    @property
    def summary(self) -> str:
        """What was decided, and why, in one line."""
        return f"{self.name} {'kept' if self.pays else 'left out'}: {self.figure}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        return {
            "pass": self.name,
            "provider": self.provider,
            "runtime": self.runtime,
            "ratio": self.ratio,
            "interval": None if self.interval is None else list(self.interval),
            "source": self.source,
            "kept": self.pays,
            "summary": self.summary,
        }


class Guard:
    """The veto of a pipeline: asked when a pass is about to rewrite; a guarded pass must pay first.

    `profits` are those that were asked for, in that order: passes that find nothing to do are not measured.
    """

    def __init__(
        self,
        passes: Sequence[ir.passes.PassBase],
        provider: str,
        *,
        measure: bool,
        on_measure: Callable[[str], None] | None = None,
    ) -> None:
        self._guarded = {pass_name(one): one for one in passes if isinstance(one, Pass) and one.pattern}
        self._provider, self._measure, self._on_measure = provider, measure, on_measure
        self.profits: dict[str, Profit] = {}

    def __call__(self, name: str, _site: str = "") -> str | None:
        if name not in self._guarded:
            return None
        if name not in self.profits:
            one = self._guarded[name]
            found = find_profit(one, self._provider, measure=self._measure, on_measure=self._on_measure)
            self.profits[name] = found
        found = self.profits[name]
        return None if found.pays else found.figure


def find_profit(
    one: Pass, provider: str, *, measure: bool, on_measure: Callable[[str], None] | None = None
) -> Profit:
    """What a guarded pass gains on the runtime that is installed; measured only if `measure` allows it."""
    name = str(one)
    try:
        runtime = runtime_version().split()[1]
    except RuntimeMissingError as error:
        return Profit(name, provider, "", reason=str(error))
    before = pattern_of(one)
    after = dump(rewritten(one, before))
    pair = hashlib.sha256(before.SerializeToString() + after.SerializeToString(deterministic=True))
    key = f"{name} {provider} {runtime} {machine().fingerprint} {pair.hexdigest()[:12]}"
    recorded = _recorded().get(key)
    if recorded is not None:
        return Profit(name, provider, runtime, recorded[0], recorded[1:], "recorded")
    for profit in shipped_profits():
        if (profit.name, profit.provider, profit.runtime) == (name, provider, runtime):
            return profit
    if not measure:
        return Profit(name, provider, runtime, reason=_UNMEASURED)
    if on_measure is not None:
        on_measure(name)
    try:
        timing = bench(before, after, provider=provider, shapes=sizes_of(before), seconds=_SECONDS)
    except (ProviderError, UnsupportedModelError) as error:
        return Profit(name, provider, runtime, reason=str(error))
    _record(key, (timing.ratio, *timing.interval))
    return Profit(name, provider, runtime, timing.ratio, timing.interval, "measured")


def shipped_profits() -> Sequence[Profit]:
    """The table that ships: what was measured for known versions of the runtime."""
    text = (importlib.resources.files("onnxopt.benchmarking") / "profits.toml").read_text(encoding="utf-8")
    return [
        Profit(
            row["pass"],
            row["provider"],
            row["runtime"],
            row["ratio"],
            tuple(row["interval"]),
            "shipped table",
        )
        for row in tomllib.loads(text).get("profits", [])
    ]


def pattern_of(one: Pass) -> onnx.ModelProto:
    """The pattern of a guarded pass, with weights; the same for each call."""
    proto, rng = text_model(one.pattern), np.random.default_rng(0)
    given = {name for node in proto.graph.node for name in node.output}
    given |= {tensor.name for tensor in proto.graph.initializer}
    for info in proto.graph.value_info:
        if info.name not in given:
            kind = info.type.tensor_type
            values = rng.uniform(0.01, 0.1, [dim.dim_value for dim in kind.shape.dim])
            tensor = numpy_helper.from_array(values.astype(ir.DataType(kind.elem_type).numpy()), info.name)
            proto.graph.initializer.append(tensor)
    return proto


def sizes_of(proto: onnx.ModelProto) -> dict[str, list[int]]:
    """The sizes of the graph inputs; of a dynamic one, the number that its name ends in."""
    return {
        info.name: [
            dim.dim_value or int(re.sub(r".*\D", "", dim.dim_param) or 1)
            for dim in info.type.tensor_type.shape.dim
        ]
        for info in proto.graph.input
    }


def _cache() -> Path:
    """Where profits are recorded: the user's cache folder, as the XDG base directories say."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxopt" / "profits.json"


def _recorded() -> dict[str, tuple[float, float, float]]:
    """Ratio and interval by key; a file that cannot be read holds none."""
    try:
        held = json.loads(_cache().read_text(encoding="utf-8"))
        rows = held["profits"] if held["schema"] == _SCHEMA else {}
        return {key: (float(ratio), float(low), float(high)) for key, (ratio, low, high) in rows.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _record(key: str, figures: tuple[float, float, float]) -> None:
    """Put a profit on record; where the folder cannot be written to, it is measured anew each time."""
    place = _cache()
    text = json.dumps({"schema": _SCHEMA, "profits": {**_recorded(), key: figures}}, indent=1, sort_keys=True)
    with contextlib.suppress(OSError, ModelError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with staging(place) as folder:
            staged = folder / place.name
            staged.write_text(text + "\n", encoding="utf-8")
            staged.replace(place)
