"""What a reader of the proof should know about the original and the samples."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.errors import OnnxoptError
from onnxopt.graph import nodes
from onnxopt.model import clone
from onnxopt.verification.contract import Contract
from onnxopt.verification.distance import is_finite
from onnxopt.verification.judge import is_noise
from onnxopt.verification.original import Noises, Sample
from onnxopt.verification.reference import Runner
from onnxopt.verification.verdict import Sight

__all__ = ["remarks", "unseen"]


def remarks(
    samples: Sequence[Sample], contract: Contract, noises: Noises, sights: Mapping[str, Sight]
) -> Iterator[str]:
    """On the outputs: what they cannot show, and what the runtime's own levels make of them."""
    yield from (f"output {name!r} is {sight}" for name, sight in sights.items() if sight != "compared")
    if sum(sample.group == "given" for sample in samples) == 1 and contract.inputs:
        yield "one sample only: an output that ignores its inputs goes unseen"
    for (group, name), noise in noises.items():
        floor = noise.levels
        if floor.odd and group == "given":
            yield f"output {name!r}: NaN or infinity in {floor.odd} elements of the original"
        if not is_noise(floor) and sights[name] != "random":
            yield (
                f"output {name!r}: the runtime's default level computes something else than its lowest "
                f"({floor.mismatch:.0%} of the elements differ), so nothing is compared at the default level"
            )


def unseen(
    model: ir.Model, samples: Sequence[Sample], open_model: Callable[[ir.Model], Runner]
) -> Iterator[str]:
    """On the graph: what it does only for inputs that no sample holds."""
    asked = sorted({node.op_type for node in nodes(model) if node.op_type in ("IsNaN", "IsInf")})
    if asked and all(map(is_finite, (array for sample in samples for array in sample.feeds.values()))):
        verb = "asks" if len(asked) == 1 else "ask"
        yield f"no sample holds NaN or infinity, which {' and '.join(asked)} {verb} for"
    yield from _idle_branches(model, samples, open_model)


def _idle_branches(
    model: ir.Model, samples: Sequence[Sample], open_model: Callable[[ir.Model], Runner]
) -> Iterator[str]:
    """The branches of the main graph that no sample took: its conditions become the only outputs."""
    shown = clone(model)
    ifs = {f"condition {i}": n for i, n in enumerate(shown.graph) if n.op_type == "If" and not n.domain}
    if not ifs:
        return
    for name, node in ifs.items():
        condition = ir.Value(name=name, type=ir.TensorType(ir.DataType.BOOL))
        shown.graph.append(ir.Node("", "Identity", node.inputs[:1], outputs=[condition]))
        shown.graph.outputs.append(condition)
    del shown.graph.outputs[: -len(ifs)]
    taken: dict[str, set[bool]] = defaultdict(set)
    try:
        with contextlib.closing(open_model(shown)) as runner:
            for sample in samples:
                for name, value in runner.run(sample.feeds).items():
                    taken[name].add(bool(np.any(value)))
    except OnnxoptError as error:
        yield f"which branches ran was not found out: {error}"
        return
    for name, node in ifs.items():
        for branch, value in (("then_branch", True), ("else_branch", False)):
            if value not in taken[name]:
                yield f"{branch} of {node.outputs[0].name!r} never ran on the samples"
