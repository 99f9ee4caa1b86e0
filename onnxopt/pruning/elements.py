"""Every element of every axis has a number; what operators say relates them; what is related is one channel.

The idea of groups that are cut together: Fang et al., "DepGraph: Towards Any Structural Pruning", 2023.
Here it is kept by the elements of axes, so that Concat, Slice, Reshape and grouped convolutions need
nothing of their own: two elements that can only be there or gone together are united, and an axis that is
laid out from others (the channels of a Flatten, of heads, of groups) is a product of them, of which one
factor can lose elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxopt.evaluation import Dims
from onnxopt.ledger import site_of

__all__ = ["Contraction", "Elements", "Ids", "Layer", "Pin", "Solution", "Term"]

Ids = np.ndarray | None
"""The numbers of an axis's elements, int64 [size]; None where the size is not known."""

_LARGEST = 1 << 20
"""Elements of an axis that is looked at: no longer one has channels."""


@dataclass(frozen=True)
class Pin:
    """Why elements stay: the reason, and where it holds."""

    reason: str
    site: str


@dataclass(frozen=True)
class Layer:
    """A node that multiplies with a weight: which input that is, and its axes that write and read."""

    node: ir.Node
    weight: int
    writes: int
    reads: int


@dataclass(frozen=True)
class Contraction:
    """An input of a node that is summed up along an axis: where it is zero, nothing is added."""

    node: ir.Node
    index: int
    axis: int


@dataclass(frozen=True)
class Term:
    """A share of a node's cost that grows with the product of the sizes of axes."""

    node: ir.Node
    share: float
    axes: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class _Product:
    """An axis whose elements are the pairs, triples... of its factors' elements, the last factor fastest."""

    flat: np.ndarray
    factors: tuple[np.ndarray, ...]
    pin: Pin

    def spread(self, choice: int) -> np.ndarray:
        """The factor's element that each element of the flat axis stands for."""
        sizes = [len(factor) for factor in self.factors]
        shape = [size if axis == choice else 1 for axis, size in enumerate(sizes)]
        return np.broadcast_to(self.factors[choice].reshape(shape), sizes).ravel()


@dataclass(frozen=True)
class Solution:
    """channel: int64 [elements], the elements that are one channel bear its number. pinned: bool [channels].

    why: the number of the first of `pins` that holds a channel, -1 where none does; int64 [channels].
    """

    channel: np.ndarray
    pinned: np.ndarray
    why: np.ndarray
    pins: tuple[Pin, ...]


@dataclass
class Elements:
    """The elements of the axes of one graph's values, and what relates them."""

    dims: Dims
    opset: int
    layers: list[Layer] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    unrelated: dict[str, Pin] = field(default_factory=dict)
    """The sites of nodes that multiply, whose axes are not related -> why."""
    _count: int = 0
    _axes: dict[ir.Value, list[Ids] | None] = field(default_factory=dict)
    _virtual: dict[ir.Node, np.ndarray] = field(default_factory=dict)
    _same: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _products: list[_Product] = field(default_factory=list)
    _pins: list[tuple[np.ndarray, Pin]] = field(default_factory=list)
    site: str = ""

    def axes(self, value: ir.Value | None) -> list[Ids] | None:
        """The elements of each of a value's axes; None where even their number is not known."""
        if value is None:
            return None
        if value not in self._axes:
            sizes = self.dims.of(value)
            self._axes[value] = None if sizes is None else [self.numbered(size) for size in sizes]
        return self._axes[value]

    def known(self) -> Mapping[ir.Value, list[Ids] | None]:
        """The axes of all values that were asked about."""
        return self._axes

    def numbered(self, size: object) -> Ids:
        """A new axis."""
        if not isinstance(size, int) or not 0 <= size <= _LARGEST:
            return None
        first, self._count = self._count, self._count + size
        self.sizes.append(size)
        return np.arange(first, self._count)

    def groups_of(self, node: ir.Node) -> np.ndarray | None:
        """The groups of a node that has some, as an axis of their own."""
        return self._virtual.get(node)

    def set_groups(self, node: ir.Node, count: int) -> np.ndarray:
        """A new axis for the groups of a node."""
        ids = self.numbered(count)
        assert ids is not None
        self._virtual[node] = ids
        return ids

    def same(self, left: Ids, right: Ids) -> None:
        """The elements of two axes are there or gone together."""
        if left is None or right is None or len(left) != len(right):
            self.pin("the size of an axis is not known", left, right)
        else:
            self._same.append((left, right))

    def product(self, flat: Ids, factors: Sequence[Ids], reason: str) -> None:
        """An axis is laid out from others, the last fastest; at most one of them can lose elements."""
        known = [factor for factor in factors if factor is not None]
        if flat is None or len(known) < len(factors) or len(flat) != np.prod([len(one) for one in known]):
            self.pin("the size of an axis is not known", flat, *factors)
        else:
            self._products.append(_Product(flat, tuple(known), Pin(reason, self.site)))

    def pin(self, reason: str, *axes: Ids) -> None:
        """These elements stay."""
        known = [ids for ids in axes if ids is not None and len(ids)]
        if known:
            self._pins.append((np.concatenate(known), Pin(reason, self.site)))

    def pin_value(self, reason: str, value: ir.Value | None) -> None:
        """All elements of a value's axes stay."""
        self.pin(reason, *(self.axes(value) or ()))

    def pin_node(self, reason: str, node: ir.Node) -> None:
        """All elements of what a node reads and writes stay."""
        self.site = site_of(node)
        for value in (*node.inputs, *node.outputs):
            self.pin_value(reason, value)

    def solve(self) -> Solution:
        """What is one channel, and what stays.

        A product gives its elements to the first factor that nothing else pins; where that leaves nothing
        to cut, to the next.
        """
        base = self._united({})
        choices = {n: self._open_factors(product, base) for n, product in enumerate(self._products)}
        while True:
            found = self._united({n: options[0] for n, options in choices.items()})
            stuck = (
                n
                for n, options in choices.items()
                if len(options) > 1 and self._is_stuck(n, options[0], found)
            )
            first = next(stuck, None)
            if first is None:
                return found
            del choices[first][0]

    def _is_stuck(self, number: int, choice: int, found: Solution) -> bool:
        return bool(found.pinned[found.channel[self._products[number].factors[choice]]].all())

    def _open_factors(self, product: _Product, base: Solution) -> list[int]:
        """The factors that can lose elements for all that is known without products, outer ones first.

        Where there are none, the longest: the reason that holds it is the one to tell.
        """
        sizes = [len(factor) for factor in product.factors]
        open_ = [n for n, ids in enumerate(product.factors) if not base.pinned[base.channel[ids]].all()]
        return open_ or [int(np.argmax(sizes))]

    def _united(self, chosen: dict[int, int]) -> Solution:
        """The channels where products give their elements to the chosen factor."""
        same, pins = list(self._same), list(self._pins)
        for number, choice in chosen.items():
            product = self._products[number]
            same.append((product.flat, product.spread(choice)))
            pins += [(ids, product.pin) for n, ids in enumerate(product.factors) if n != choice]
        left = np.concatenate([a for a, _ in same]) if same else np.arange(0)
        right = np.concatenate([b for _, b in same]) if same else np.arange(0)
        return self._judged(_components(self._count, left, right), pins)

    def _judged(self, channel: np.ndarray, pins: list[tuple[np.ndarray, Pin]]) -> Solution:
        """Which channels are pinned: by a reason, or as they are all that an axis has."""
        count, none = int(channel.max(initial=-1)) + 1, len(pins) + 1
        why = np.full(count, none)
        for number, (ids, _) in enumerate(pins):
            np.minimum.at(why, channel[ids], number)
        axis = np.repeat(np.arange(len(self.sizes)), self.sizes)
        pairs, members = np.unique(channel * len(self.sizes) + axis, return_counts=True)
        whole = members == np.asarray(self.sizes)[pairs % len(self.sizes)] if len(pairs) else pairs
        np.minimum.at(why, pairs[whole] // max(len(self.sizes), 1), len(pins))
        every = (*(pin for _, pin in pins), Pin("no channel of an axis would be left", ""))
        return Solution(channel, why < none, np.where(why < none, why, -1), every)


def _components(count: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The components of an undirected graph, numbered from 0: int64 [count].

    Each root is hooked to the smallest one that it meets, then paths are made short, until nothing changes.
    """
    root = np.arange(count)
    while True:
        a, b = root[left], root[right]
        if (a == b).all():
            return np.unique(root, return_inverse=True)[1]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(root, root[root]):
            root = root[root]
