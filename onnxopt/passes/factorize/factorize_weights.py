"""Make two small layers of a large one, where its weight is nearly a product of two.

Before: y = MatMul(x, w)                         w: [K, N]
After:  y = MatMul(MatMul(x, u), v)              u: [K, r], v: [r, N]

Before: y = Conv<pads = [1, 1, 1, 1]>(x, w, b)   w: [M, C, 3, 3]
After:  t = Conv<pads = [1, 0, 1, 0]>(x, u)      u: [r, C, 3, 1]
        y = Conv<pads = [0, 1, 0, 1]>(t, v, b)   v: [M, r, 1, 3]
        or 3 x 3 to r channels and then 1 x 1, or 1 x 1 to r channels and then 3 x 3: what is cheapest
Declines: no rank that keeps the energy saves a tenth of the multiply-adds; the convolution has groups; the
    Gemm transposes what it reads; the weight is a graph input, not finite, or no matrix; with samples, the
    bias is no constant. Layers that are such factors already are passed over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.calibration.moments import layers_with_moments
from onnxopt.claims import Kind, Pass, unspelled
from onnxopt.data import Feeds
from onnxopt.errors import UsageError
from onnxopt.graph import constant_of, float_attr, ints_attr, nodes, sole_user, walk
from onnxopt.inspection.costs import costs, macs_of, sizes_read
from onnxopt.inspection.sizes import sized
from onnxopt.ledger import Ledger, site_of
from onnxopt.passes.shared.layer import Layer, layer_of
from onnxopt.passes.shared.weight import rounded
from onnxopt.passes.shared.window import window_of
from onnxopt.pruning.lowrank import Decomposition, Factors, Spread, best_factors, decompositions
from onnxopt.rewrite import AttributeValue, Declined, Edit, Rule, drive
from onnxopt.scope import Scope

__all__ = ["FactorizeWeights"]

_RULE = "weight of low rank"
_OPS = ("Conv", "Gemm", "MatMul")
_PER_AXIS = {"strides": 1, "dilations": 1, "pads": 0}
"""Attributes of a Conv that have a number for each axis of the kernel, and which does nothing."""
_STEPS, _DECADES = 12, 6.0
"""Halvings of the range of energies in search of a budget, and the least share of it that is lost: 10^-6."""


@dataclass(frozen=True)
class FactorizeWeights(Pass):
    """Make two small layers of a large one, where its weight is nearly a product of two.

    energy: share that each weight keeps of its squared elements; with samples, its outputs of their variance.
    macs: a budget instead: the share of the model's multiply-adds that stays. The energy is the same for all
        layers, the largest that meets it.
    multiple: ranks are multiples of this where that still saves, as kernels like.
    samples: complete feeds; then what counts is what comes out of the layers, and biases make up for the mean
        of what is lost; not so for layers with more than 2048 summands, and those in bodies and functions.

    importance: output of a layer -> what the share that it may lose is divided by.
    only: outputs of layers that may be factorized; None: all.

    With samples or a budget, a run of a pipeline factorizes once, however often the pass comes round.
    """

    name: ClassVar[str] = "factorize-weights"
    kind: ClassVar[Kind] = "lossy"
    example: ClassVar[str] = """
agraph (float[N, 4] x) => (float[N, 4] y)
    <float[4, 4] w = {1, 2, 3, 4, 2, 4, 6, 8, 3, 6, 9, 12, 4, 8, 12, 16}> {
    y = MatMul(x, w)
}
    """

    energy: float = 0.95
    macs: float | None = None
    multiple: int = 8
    samples: Sequence[Feeds] | None = unspelled(None)
    importance: Mapping[str, float] | None = unspelled(None)
    only: tuple[str, ...] | None = unspelled(None)

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise UsageError(f"{self.name}: energy is {self.energy}; expected a share, above 0")
        if self.macs is not None and not 0 < self.macs < 1:
            raise UsageError(f"{self.name}: macs is {self.macs}; expected the share that stays, below 1")
        if self.multiple < 1:
            raise UsageError(f"{self.name}: multiple is {self.multiple}; expected at least 1")

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        if (self.samples or self.macs is not None) and ledger.has_granted(_RULE):
            return  # what follows from factors would be measured anew, and lose more
        drive(model, [Rule(_RULE, _OPS, partial(_factorized, self._chosen(model)))], ledger)

    def parts(self, model: ir.Model) -> Mapping[str, FactorizeWeights]:
        """Output of a layer -> a pass that factorizes it alone, by the energy."""
        sites = (site_of(node) for node in nodes(model) if _eligible(node) is not None)
        return {site: replace(self, macs=None, only=(site,)) for site in sites}

    def _ways(self, model: ir.Model) -> Iterator[tuple[ir.Node, list[Decomposition]]]:
        """The layers that could be factorized, with moments where there are samples for them."""
        asked = (node for node in nodes(model) if self.only is None or site_of(node) in self.only)
        layers = {node: layer for node in asked if (layer := _eligible(node)) is not None}
        known = [node for node in model.graph if node in layers and _is_measurable(layers[node])]
        for one in layers_with_moments(model, known, self.samples) if self.samples else ():
            yield one.node, _decomposed(layers.pop(one.node), one.covariance[0], one.mean[0])
        for node, layer in layers.items():
            yield node, _decomposed(layer)

    def _chosen(self, model: ir.Model) -> dict[ir.Node, Factors | None]:
        """The layers that could be factorized, and how; None: it would not save."""
        if self.macs is None:
            return {node: _factors(self._best(node, ways, self.energy)) for node, ways in self._ways(model)}
        found = dict(self._ways(model))
        energy = self._affordable(model, found) if found else self.energy
        return {node: _factors(self._best(node, ways, energy)) for node, ways in found.items()}

    def _best(
        self, node: ir.Node, ways: Sequence[Decomposition], energy: float
    ) -> tuple[Decomposition, int] | None:
        """The cheapest way that keeps the energy of a layer, and its rank; None where none saves."""
        lost = (1 - energy) / (self.importance or {}).get(site_of(node), 1.0)
        return best_factors(ways, max(1 - lost, 0.0), self.multiple)

    def _affordable(self, model: ir.Model, found: Mapping[ir.Node, Sequence[Decomposition]]) -> float:
        """The largest energy that meets the budget, sought by the order of magnitude of what is lost."""
        if model.functions:
            raise UsageError(
                f"{self.name}: macs of a model with functions are not counted: inline them first"
            )
        first = self.samples[0] if self.samples else {}
        size = sized(model, {name: np.shape(array) for name, array in first.items()}, sizes_read)
        rows = zip(walk(size.graph), costs(size.graph, size.shapes), strict=True)
        work = {node: row.macs.weight for node, row in rows}
        counted = macs_of(size.graph, size.shapes)
        if any("?" in symbols for symbols in counted.terms):
            raise UsageError(
                f"{self.name}: macs cannot be counted, as sizes are not known: give an energy instead"
            )
        total = counted.weight

        def left(energy: float) -> Fraction:
            saved = Fraction(0)
            for node, ways in found.items():
                best = self._best(node, ways, energy)
                if best is not None:
                    saved += work.get(node, 0) * (1 - best[0].share * best[1])
            return 1 - saved / total if total else Fraction(1)

        least = float(left(0.0))
        if least > (self.macs or 0):
            what = f"macs is {self.macs}, but the smallest ranks leave {least:.3f} of the multiply-adds"
            raise UsageError(f"{self.name}: {what}")
        low, high = 0.0, _DECADES
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if left(1 - 10**-middle) <= (self.macs or 0) else (low, middle)
        return 1 - 10**-low


def _eligible(node: ir.Node) -> Layer | None:
    """The layer, where it could be factorized; None where the rule declines it or passes over it."""
    try:
        return _layer(node)
    except Declined:
        return None


def _layer(node: ir.Node) -> Layer | None:
    """The layer that a node is.

    Raises:
        Declined: it cannot be factorized, whatever its elements are.
    """
    layer = layer_of(node)
    if node.op_type not in _OPS or layer is None or not layer.stored or _is_factor(node):
        return None
    weight = layer.weight()
    if weight.groups > 1:
        raise Declined("the convolution has groups")
    if layer.transposes:
        raise Declined("the Gemm transposes what it reads")
    if not np.isfinite(weight.tensor.numpy()).all():
        raise Declined("the weight is not finite")
    return layer


def _is_factor(node: ir.Node) -> bool:
    """Whether the layer is one of two that are a product of low rank."""
    source, after = node.inputs[0], sole_user(node.outputs[0])
    before = source.producer() if source is not None else None
    return _are_factors(before, node) or _are_factors(node, after)


def _are_factors(first: ir.Node | None, second: ir.Node | None) -> bool:
    one, two = layer_of(first), layer_of(second)
    if one is None or two is None or one.add or two.add or one.bias is not None:
        return False
    if two.source is not one.node.outputs[0] or sole_user(two.source) is not two.node:
        return False
    if (one.node.op_type == "Conv") != (two.node.op_type == "Conv") or not (one.stored and two.stored):
        return False
    try:
        u, v = one.weight(), two.weight()
    except Declined:
        return False
    height, width = (math.prod(w.shape) // u.outputs for w in (u, v))
    return u.groups == v.groups == 1 and u.outputs < min(height, width)


def _is_measurable(layer: Layer) -> bool:
    return constant_of(layer.source) is None


def _decomposed(
    layer: Layer, covariance: np.ndarray | None = None, mean: np.ndarray | None = None
) -> list[Decomposition]:
    weight = layer.weight()
    array = weight.tensor.numpy().astype(np.float64)
    array = array.T if weight.inputs_first else array
    return list(decompositions(array, _spread(layer), covariance, mean))


def _spread(layer: Layer) -> Spread:
    """Of each axis of the kernel, the input's extent over the output's, where known."""
    kernel = layer.weight().shape[2:]
    if not kernel:
        return ()
    kept = window_of(layer.node, kernel).keeps
    shapes = (layer.source.shape, layer.node.outputs[0].shape)
    extents = [shape.dims[2:] if shape is not None else (None,) * len(kernel) for shape in shapes]
    return [
        Fraction(1) if same else Fraction(a, b) if isinstance(a, int) and isinstance(b, int) and b else None
        for same, a, b in zip(kept, *extents, strict=True)
    ]


def _factors(best: tuple[Decomposition, int] | None) -> Factors | None:
    return best and best[0].factors(best[1])


def _factorized(chosen: Mapping[ir.Node, Factors | None], node: ir.Node, scope: Scope) -> Edit | None:
    layer = _layer(node)
    if layer is None or node not in chosen:
        return None
    factors = chosen[node]
    if factors is None:
        raise Declined("less than a tenth of the multiply-adds would be saved")
    weight, edit, name = layer.weight(), Edit(node, scope), node.name and f"{node.name}/low_rank"
    swaps = (node.op_type != "Conv", weight.inputs_first)
    first, second = (
        edit.constant(rounded(w.T if swap else w, weight.tensor.dtype), weight.value.name)
        for w, swap in zip((factors.first, factors.second), swaps, strict=True)
    )
    if node.op_type == "Conv":
        inner = edit.op("Conv", [layer.source, first], _half(node, factors.first, factors.along), name=name)
        late = tuple(not one for one in factors.along)
        attributes = _half(node, factors.second, late)
    else:
        inner = edit.op("MatMul", [layer.source, first], name=name)
        attributes = dict(node.attributes)
    bias = list(node.inputs[2:])
    if factors.shift is not None:
        attributes.pop("beta", None)
        bias = [_shifted(layer, factors.shift, edit, scope)]
    added = bias if node.op_type == "MatMul" else []
    output = edit.op(node.op_type, [inner, second, *bias[len(added) :]], attributes)
    return edit.replace(node.outputs[0], edit.op("Add", [output, *added]) if added else output)


def _shifted(layer: Layer, shift: np.ndarray, edit: Edit, scope: Scope) -> ir.Value:
    """The bias of a layer that also makes up for what its product loses on average."""
    if scope.opset < 7 and layer.node.op_type != "Conv":
        raise Declined("a bias before opset 7 broadcasts by rules of its own")
    weight = layer.weight()
    like = f"{weight.value.name}_bias" if layer.bias is None else layer.bias.name
    alpha = float_attr(layer.node, "alpha", 1.0)
    return edit.constant(rounded(layer.bias_array() + alpha * shift, weight.tensor.dtype), like)


def _half(node: ir.Node, weight: np.ndarray, along: tuple[bool, ...]) -> dict[str, AttributeValue]:
    """The attributes of one of two convolutions, which does its part along some of the axes."""
    found: dict[str, AttributeValue] = {"kernel_shape": weight.shape[2:]}
    for name, idle in _PER_AXIS.items():
        values = ints_attr(node, name)
        if values is not None:
            mine = along * (len(values) // len(along))
            found[name] = [value if one else idle for value, one in zip(values, mine, strict=True)]
    mode = node.attributes.get("auto_pad")
    return found if mode is None else {**found, "auto_pad": mode}
