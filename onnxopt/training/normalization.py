"""BatchNormalization for the time of training: put in after each Conv, folded back into it at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.calibration.exposing import cut
from onnxopt.data import Feeds
from onnxopt.graph import constant_of, value_names
from onnxopt.ledger import Ledger
from onnxopt.model import clone
from onnxopt.passes.fold.fold_batchnorm import FoldBatchnorm
from onnxopt.runtimes import open_session

__all__ = ["with_batchnorm"]

_EPSILON = 1e-5


def with_batchnorm(
    model: ir.Model, samples: Sequence[Feeds]
) -> tuple[ir.Model, Callable[[ir.Model], ir.Model]]:
    """A copy with a BatchNormalization after each Conv that has none, and a function that folds them back.

    Its mean and variance are those of the samples, its scale and bias undo them: the model computes what it
    did before. A Conv of the main graph counts if its weight is constant and its output no graph output.
    """
    model = clone(model)
    convs = [node for node in model.graph if _lacks(node)]
    places = dict(zip(convs, _moments(model, convs, samples), strict=True))
    taken, sites = value_names(model), set()
    for node, (mean, variance) in places.items():
        value = node.outputs[0]
        scale = np.sqrt(variance + _EPSILON)
        parts = []
        for part, array in (("scale", scale), ("bias", mean), ("mean", mean), ("var", variance)):
            name = _unused(f"{value.name}_bn_{part}", taken)
            tensor = ir.tensor(array.astype(np.float32), name=name)
            parts.append(
                ir.Value(
                    name=name,
                    type=ir.TensorType(tensor.dtype),
                    shape=ir.Shape(array.shape),
                    const_value=tensor,
                )
            )
            model.graph.register_initializer(parts[-1])
        inner = ir.Value(name=_unused(f"{value.name}_before_bn", taken), type=value.type, shape=value.shape)
        norm = ir.Node(
            "",
            "BatchNormalization",
            [inner, *parts],
            [ir.AttrFloat32("epsilon", _EPSILON)],
            outputs=[ir.Value(name=value.name, type=value.type, shape=value.shape)],
            name=_unused(f"{value.name}_bn", taken),
        )
        value.replace_all_uses_with(norm.outputs[0])
        value.name = inner.name
        norm.replace_input_with(0, value)
        model.graph.insert_after(node, norm)
        sites.add(norm.outputs[0].name)

    def folded(trained: ir.Model) -> ir.Model:
        leave = Ledger(pass_name="fold-batchnorm", veto=lambda _, site: None if site in sites else "not ours")
        FoldBatchnorm().apply(trained, leave)
        return trained

    return model, folded


def _lacks(node: ir.Node) -> bool:
    """Whether it is a Conv without a BatchNormalization, where one can be put."""
    if node.op_type != "Conv" or node.domain or constant_of(node.inputs[1]) is None:
        return False
    value = node.outputs[0]
    return not value.is_graph_output() and all(
        use.node.op_type != "BatchNormalization" for use in value.uses()
    )


def _moments(
    model: ir.Model, convs: Sequence[ir.Node], samples: Sequence[Feeds]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and variance by channel of what each Conv gives."""
    if not convs:
        return []
    names = [node.outputs[0].name or "" for node in convs]
    sums: dict[str, list[np.ndarray]] = {}
    with open_session(cut(clone(model), names), level="none") as session:
        for feeds in samples:
            for name, array in session.run(feeds).items():
                rows = np.moveaxis(array, 1, 0).reshape(array.shape[1], -1).astype(np.float64)
                new = [np.full(len(rows), rows.shape[1]), rows.sum(1), (rows**2).sum(1)]
                sums[name] = [a + b for a, b in zip(sums[name], new, strict=True)] if name in sums else new
    means = [(sums[name][1] / sums[name][0], sums[name][2] / sums[name][0]) for name in names]
    return [(mean, np.maximum(square - mean**2, 0)) for mean, square in means]


def _unused(name: str, taken: set[str]) -> str:
    """The name, or one like it that is not taken; it is from now on."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name
