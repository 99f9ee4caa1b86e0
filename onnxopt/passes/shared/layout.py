"""What Transpose, Reshape, Squeeze and Unsqueeze in a row do to the axes.

Each axis is a row of leaves, the sizes that no op of the row takes apart; the ops put the leaves in another
order and group them into other axes. An axis of size 1 has none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from onnxopt.evaluation import Dim, divide, product

__all__ = ["Axes", "Layout", "Shape", "flat", "layout_between"]

Axes = tuple[tuple[int, ...], ...]
Shape = tuple[Dim, ...]


@dataclass(frozen=True)
class Layout:
    """Leaves by number: their sizes, and how they make up the axes of what goes in and of what comes out."""

    sizes: tuple[Dim, ...]
    source: Axes
    target: Axes

    @classmethod
    def identity(cls, shape: Shape) -> Layout:
        """What leaves a value of this shape as it is."""
        axes = tuple((axis,) if size != 1 else () for axis, size in enumerate(shape))
        return cls(shape, axes, axes)

    @property
    def source_shape(self) -> Shape:
        return self.shape_of(self.source)

    @property
    def target_shape(self) -> Shape:
        return self.shape_of(self.target)

    @property
    def moves(self) -> bool:
        """Whether elements change their order."""
        return flat(self.source) != flat(self.target)

    @property
    def inverse(self) -> Layout:
        return Layout(self.sizes, self.target, self.source)

    def shape_of(self, axes: Axes) -> Shape:
        return tuple(product(self.sizes[leaf] for leaf in axis) for axis in axes)

    def transposed(self, perm: Sequence[int]) -> Layout:
        """This, and then a Transpose."""
        return Layout(self.sizes, self.source, tuple(self.target[axis] for axis in perm))

    def reshaped(self, shape: Shape) -> Layout | None:
        """This, and then a Reshape; None where its sizes do not line up with the leaves."""
        sizes, split, rest = list(self.sizes), dict[int, tuple[int, int]](), list(reversed(flat(self.target)))
        axes: list[tuple[int, ...]] = []
        if 0 in shape:
            return None
        for need in shape:
            axis: list[int] = []
            while need != 1:
                if not rest:
                    return None
                leaf = rest.pop()
                left, over = divide(need, sizes[leaf]), divide(sizes[leaf], need)
                if left is None and over is not None:
                    sizes += [need, over]
                    split[leaf] = len(sizes) - 2, len(sizes) - 1
                    rest.append(len(sizes) - 1)
                    leaf, left = len(sizes) - 2, 1
                if left is None:
                    return None
                axis.append(leaf)
                need = left
            axes.append(tuple(axis))
        return None if rest else Layout(tuple(sizes), _refined(self.source, split), tuple(axes))

    def then(self, other: Layout) -> Layout | None:
        """This, and then the other."""
        leaves, ordered = flat(other.source), flat(other.target)
        parted = self.reshaped(tuple(other.sizes[leaf] for leaf in leaves))
        moved = None if parted is None else parted.transposed([leaves.index(leaf) for leaf in ordered])
        whole = None if moved is None else moved.reshaped(other.target_shape)
        return None if whole is None else whole.coarse()

    def coarse(self) -> Layout:
        """The same with leaves joined that stay beside each other within an axis on both sides, in order."""
        after = dict(_pairs(self.source) & _pairs(self.target))
        joined, sizes = set(after.values()), list[Dim]()
        numbers: dict[int, int] = {}
        for leaf in flat(self.source):
            if leaf in joined:
                continue
            row = [leaf]
            while row[-1] in after:
                row.append(after[row[-1]])
            numbers[leaf] = len(sizes)
            sizes.append(product(self.sizes[part] for part in row))
        sides = (self.source, self.target)
        return Layout(tuple(sizes), *(_renumbered(_without(axes, joined), numbers) for axes in sides))

    def resized(self, sizes: Mapping[int, Dim]) -> Layout:
        """The same where some leaves have other sizes; those of size 1 go."""
        new = tuple(sizes.get(leaf, size) for leaf, size in enumerate(self.sizes))
        ones = {leaf for leaf, size in enumerate(new) if size == 1}
        return Layout(new, _without(self.source, ones), _without(self.target, ones))


def layout_between(source: Shape, target: Shape) -> Layout | None:
    """What a Reshape from one shape to the other does."""
    return Layout.identity(source).reshaped(target)


def flat(axes: Axes) -> list[int]:
    return [leaf for axis in axes for leaf in axis]


def _pairs(axes: Axes) -> set[tuple[int, int]]:
    return {pair for axis in axes for pair in itertools.pairwise(axis)}


def _renumbered(axes: Axes, numbers: Mapping[int, int]) -> Axes:
    return tuple(tuple(numbers[leaf] for leaf in axis) for axis in axes)


def _without(axes: Axes, gone: Iterable[int]) -> Axes:
    return tuple(tuple(leaf for leaf in axis if leaf not in gone) for axis in axes)


def _refined(axes: Axes, split: dict[int, tuple[int, int]]) -> Axes:
    """Each leaf that was taken apart replaced by its parts."""

    def parts(leaf: int) -> tuple[int, ...]:
        return parts(split[leaf][0]) + parts(split[leaf][1]) if leaf in split else (leaf,)

    return tuple(tuple(part for leaf in axis for part in parts(leaf)) for axis in axes)
