"""Drop the residual blocks that the outputs miss least.

Before: y = Add(x, f(x))    where f has a layer: Conv, Gemm, MatMul, Attention, LSTM and such
After:  y = x
Declines: a value of the branch is read elsewhere, too; type or shapes are not known to be the same; a graph
    input would not be read any more; a graph output would be constant; others are missed less; a function.

What the outputs lose without a block is measured on samples, with those that were dropped before it dropped;
the least is dropped, and what is left is measured again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxopt.claims import Kind, Pass, unspelled
from onnxopt.data import Feeds
from onnxopt.errors import UsageError
from onnxopt.graph import nested
from onnxopt.ledger import Ledger, Rewrite, site_of
from onnxopt.passes.infer_shapes import InferShapes
from onnxopt.pruning.blocks import Block, Influence, Sizes, find_block, require_flow
from onnxopt.rewrite import Declined, Edit
from onnxopt.scope import scopes

__all__ = ["DropLayers"]

_RULE = "residual block"


@dataclass(frozen=True)
class DropLayers(Pass):
    """Drop the residual blocks that the outputs miss least.

    number: how many blocks to drop, at most; an attention and the layers behind it are two.
    energy: share that the outputs keep on the samples; no block is dropped that would leave less.
    samples: complete feeds; needed where there are more blocks than are dropped, or the energy counts.

    A run of a pipeline drops once, however often the pass comes round.
    """

    name: ClassVar[str] = "drop-layers"
    kind: ClassVar[Kind] = "lossy"
    operators: ClassVar[tuple[str, ...]] = ("Add",)
    example: ClassVar[str] = """
agraph (float[1, 2] x) => (float[1, 2] y) <float[2, 2] w = {0.1, 0.2, 0.3, 0.4}> {
    a = Relu(x)
    f = MatMul(a, w)
    b = Add(a, f)
    y = Sigmoid(b)
}
    """

    number: int = 1
    energy: float = 0.0
    samples: Sequence[Feeds] | None = unspelled(None)

    def __post_init__(self) -> None:
        if self.number < 0:
            raise UsageError(f"{self.name}: number is {self.number}; expected at least 0")
        if not 0 <= self.energy < 1:
            raise UsageError(f"{self.name}: energy is {self.energy}; expected a share, from 0 to below 1")

    def require_samples(self, model: ir.Model) -> None:
        """Raise UsageError where there are none to choose by; blocks of the model may be dropped."""
        if not self.samples:
            self.apply(model, Ledger(pass_name=self.name))

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        if ledger.has_granted(_RULE) or not self.number:
            return
        InferShapes().apply(model, ledger)
        blocks = [
            block
            for block in _blocks(model, self.samples or (), ledger)
            if not ledger.leaves_out(_rewrite(block))
        ]
        if len(blocks) <= self.number and not self.energy:
            for block in blocks:
                _drop(block, model, ledger)
        elif not self.samples:
            raise UsageError(f"{self.name}: which of {len(blocks)} blocks are missed least needs samples")
        elif blocks:
            self._measured(blocks, model, self.samples, ledger)

    def _measured(
        self, blocks: Sequence[Block], model: ir.Model, samples: Sequence[Feeds], ledger: Ledger
    ) -> None:
        left, dropped = dict(enumerate(blocks)), list[int]()
        with Influence(model, blocks, samples) as noise:
            while len(dropped) < self.number and not ledger.exhausted:
                missed = sorted((noise([*dropped, one]), one) for one in left)
                wanted = (one for lost, one in missed if 1 - lost >= self.energy)
                number = next((one for one in wanted if _drop(left.pop(one), model, ledger)), None)
                if number is None:
                    break
                dropped.append(number)
                left = {one: block for one, block in left.items() if block.add.graph is not None}
        for block in left.values():
            ledger.decline(_RULE, site_of(block.add), "other blocks are missed less")


def _rewrite(block: Block) -> Rewrite:
    return Rewrite(DropLayers.name, _RULE, site_of(block.add))


def _blocks(model: ir.Model, samples: Sequence[Feeds], ledger: Ledger) -> list[Block]:
    """The blocks that can be dropped; those of functions are declined."""
    found, sizes = [], Sizes.of(model, samples)
    for scope in scopes(model):
        for graph in (scope.graph, *nested(scope.graph)):
            order = list(graph)
            places = {node: place for place, node in enumerate(order)}
            for add in order:
                if add.op_type != "Add" or add.domain:
                    continue
                try:
                    block = find_block(add, order, places, sizes)
                    if block is not None and scope.graph is not model.graph:
                        raise Declined("it is in a function, where it cannot be measured: inline that first")
                except Declined as reason:
                    ledger.decline(_RULE, site_of(add), str(reason))
                    continue
                found += [block] if block is not None else []
    return found


def _drop(block: Block, model: ir.Model, ledger: Ledger) -> bool:
    """Let x take the place of the block, with leave of the ledger."""
    edit = Edit(block.add, next(scopes(model))).replace(block.output, block.kept)
    site = site_of(block.add)
    try:
        require_flow(model.graph, block)
        edit.check()
    except Declined as reason:
        ledger.decline(_RULE, site, str(reason))
        return False
    if not ledger.claim(_RULE, site):
        return False
    new, near = edit.commit()
    ledger.touch((*new, *near))
    return True
