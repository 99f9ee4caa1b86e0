"""Sizes that are not numbers: polynomials with integer coefficients in the names of unknown ones.

Two sizes are equal if they are written the same; of any others nothing is known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["Dim", "Size", "divide", "is_natural", "named", "product"]

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
