"""Sizes that are not numbers: polynomials with integer coefficients in the names of unknown ones.

Two sizes are equal if they are written the same; of any others nothing is known.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["ARITHMETIC", "Dim", "Shape", "Size", "broadcast", "divide", "is_natural", "named", "product"]

_Monomial = tuple[str, ...]


@dataclass(frozen=True)
class Size:
    """A sum of products of names; each term is the names, sorted, and a coefficient that is not 0."""

    terms: tuple[tuple[_Monomial, int], ...]

    def __add__(self, other: object) -> Dim:
        mine, theirs = _terms(self), _terms(other)
        return NotImplemented if theirs is None else _sum((mine or {}, theirs))

    def __mul__(self, other: object) -> Dim:
        theirs = _terms(other)
        if theirs is None:
            return NotImplemented
        return _sum({tuple(sorted(a + b)): i * j} for a, i in self.terms for b, j in theirs.items())

    def __sub__(self, other: object) -> Dim:
        return NotImplemented if _terms(other) is None else self + (-1) * other  # type: ignore[operator]

    def __rsub__(self, other: object) -> Dim:
        return (-1) * self + other  # type: ignore[operator]

    __radd__ = __add__
    __rmul__ = __mul__

    def __str__(self) -> str:
        return " + ".join("*".join((*names, str(count))) for names, count in self.terms)


Dim = int | Size
Shape = tuple[Dim, ...]


def named(name: str) -> Size:
    """The size of this name; one that starts with `?` may be negative."""
    return Size((((name,), 1),))


def product(sizes: Iterable[Dim]) -> Dim:
    """All of them multiplied."""
    return math.prod(sizes)


def divide(a: Dim, b: Dim) -> Dim | None:
    """The quotient that is exact whatever the names stand for, unless `b` is 0; None where there is none."""
    if a == b != 0:
        return 1
    divisor = _terms(b) or {}
    if len(divisor) != 1:
        return None
    (names, count), found = next(iter(divisor.items())), []
    for mine, coefficient in (_terms(a) or {}).items():
        left = Counter(mine)
        left.subtract(names)
        if coefficient % count or any(times < 0 for times in left.values()):
            return None
        found.append({tuple(sorted(left.elements())): coefficient // count})
    return _sum(found)


def is_natural(size: Dim) -> bool:
    """Whether it is surely 0 or more."""
    if isinstance(size, int):
        return size >= 0
    return all(n > 0 and not any(name.startswith("?") for name in names) for names, n in size.terms)


def _terms(size: object) -> Mapping[_Monomial, int] | None:
    if isinstance(size, Size):
        return dict(size.terms)
    try:
        number = size.__index__()  # type: ignore[attr-defined]
    except AttributeError:
        return None
    return {(): number} if number else {}


def _sum(parts: Iterable[Mapping[_Monomial, int]]) -> Dim:
    total: Counter[_Monomial] = Counter()
    for part in parts:
        for names, count in part.items():
            total[names] += count
    terms = tuple(sorted((names, count) for names, count in total.items() if count))
    if not terms:
        return 0
    return terms[0][1] if len(terms) == 1 and not terms[0][0] else Size(terms)


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """The shape of an element-wise operator's result."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(_joint(sizes) for sizes in zip(*padded, strict=True))


def _joint(sizes: Sequence[Dim]) -> Dim:
    """Where a number above 1 meets a name, what the name stands for is that number or 1."""
    large = list(dict.fromkeys(size for size in sizes if size != 1))
    large = [size for size in large if not any(_is_part(size, other) for other in large)]
    numbers = [size for size in large if isinstance(size, int)]
    if len(large) < 2 or numbers:
        return numbers[0] if numbers else large[0] if large else 1
    return named(f"joint({', '.join(sorted(map(str, large)))})")


def _is_part(size: Dim, whole: Dim) -> bool:
    """Whether it is the least of the other and a positive number: broadcast to each other, they are equal."""
    return bool(re.fullmatch(rf"least\(\d+, {re.escape(str(whole))}\)\*1", str(size)))


def _equal(a: Dim, b: Dim) -> bool | None:
    if a == b or (isinstance(a, int) and isinstance(b, int)):
        return a == b
    number, other = (a, b) if isinstance(a, int) else (b, a)
    return False if isinstance(number, int) and number < 0 and is_natural(other) else None


def _quotient(a: Dim, b: Dim) -> Dim | None:
    if isinstance(a, int) and isinstance(b, int):
        return None if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    exact = divide(a, b)
    if exact is None and is_natural(a) and is_natural(b):
        return named(f"floor(({a}) / ({b}))")
    return exact


def _largest(a: Dim | None, b: Dim) -> Dim | None:
    if a is None:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    number, other = (a, b) if isinstance(a, int) else (b, a)
    return a if a == b else other if isinstance(number, int) and number <= 0 and is_natural(other) else None


ARITHMETIC: dict[str, Callable[..., object]] = {
    "Add": lambda a, b: a + b,
    "Cast": lambda a: int(a) if isinstance(a, bool) else a,
    "Div": _quotient,
    "Equal": _equal,
    "Max": lambda a, *more: functools.reduce(_largest, more, a),
    "Mul": lambda a, b: a * b,
    "Sub": lambda a, b: a - b,
    "Where": lambda condition, a, b: (a if condition else b) if isinstance(condition, bool) else None,
}
"""What is done to integers, element by element; None where the result is not known."""
