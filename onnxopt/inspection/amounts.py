"""Sizes that are numbers or formulas in a model's own dimension symbols."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["UNKNOWN", "ZERO", "Amount", "product"]


@dataclass(frozen=True)
class Amount:
    """A polynomial in dimension symbols: ``{("batch",): 9, (): 2}`` is ``9*batch + 2``.

    The symbol ``?`` stands for a size that no shape gives; all terms that hold it print as one ``?``.
    """

    terms: Mapping[tuple[str, ...], int]

    @classmethod
    def of(cls, number: int) -> Amount:
        return cls({(): number} if number else {})

    @classmethod
    def symbol(cls, name: str) -> Amount:
        return cls({(name,): 1})

    @classmethod
    def total(cls, amounts: Iterable[Amount]) -> Amount:
        """The sum, in time linear in the number of terms."""
        terms: dict[tuple[str, ...], int] = {}
        for amount in amounts:
            for symbols, factor in amount.terms.items():
                terms[symbols] = terms.get(symbols, 0) + factor
        return cls({symbols: factor for symbols, factor in terms.items() if factor})

    def __add__(self, other: Amount) -> Amount:
        return Amount.total((self, other))

    def __sub__(self, other: Amount) -> Amount:
        return self + Amount({symbols: -factor for symbols, factor in other.terms.items()})

    def __mul__(self, other: Amount) -> Amount:
        return Amount.total(
            Amount({tuple(sorted(left + right)): factor * f})
            for left, factor in self.terms.items()
            for right, f in other.terms.items()
        )

    @property
    def weight(self) -> int:
        """The value with every symbol at 1, to compare amounts that share no symbol."""
        return sum(self.terms.values())

    def value(self) -> int | str:
        """An int where every size is known, else readable text such as ``'9*batch + 2 + ?'``."""
        if not any(self.terms):
            return self.terms.get((), 0)
        known = {symbols: factor for symbols, factor in self.terms.items() if "?" not in symbols}
        ordered = sorted(known.items(), key=lambda term: (-len(term[0]), term[0]))
        parts = [_monomial(symbols, factor) for symbols, factor in ordered]
        return " + ".join(parts + ["?"] * (len(known) < len(self.terms)))


ZERO = Amount({})
UNKNOWN = Amount.symbol("?")


def _monomial(symbols: tuple[str, ...], factor: int) -> str:
    powers = {symbol: symbols.count(symbol) for symbol in symbols}
    names = [symbol if power == 1 else f"{symbol}**{power}" for symbol, power in powers.items()]
    return "*".join(names if factor == 1 and names else [str(factor), *names])


def product(dims: Iterable[Amount] | None) -> Amount:
    """The product of dimensions, each of which is a number or one symbol; unknown where the rank is."""
    if dims is None:
        return UNKNOWN
    factor = 1
    symbols: list[str] = []
    for dim in dims:
        if not dim.terms:
            return ZERO
        ((names, number),) = dim.terms.items()
        factor *= number
        symbols.extend(names)
    return Amount({tuple(sorted(symbols)): factor})
