"""Set the elements of weights that matter least to zero.

Before: y = MatMul(x, w)
After:  y = MatMul(x, w), where so many elements of w are zero
Declines: the weight is a graph input, a graph output, or read by something that does not multiply with it; it
    is not finite; it is an embedding, depthwise, small, or one of the first or last layers, as options say;
    it has fewer input channels than a pattern N:M is long; its integers are compared with other weights and
    have no scale, or none of them stands for zero, or they are moved before they are scaled; what it is
    multiplied with is not known (wanda and obs take float Conv, ConvTranspose, Gemm and MatMul of the main
    graph, and of branches of its If that samples run); obs would add up more than 2048 summands, or serve
    several readers.

Names, types and shapes stay. Biases and all else of one dimension are no weights. ONNX Runtime computes with
zeros as with any other number: nothing becomes faster, and the file is smaller only once it is packed.
TensorRT has kernels for 2:4 along the input channels.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Kind, Pass, unspelled
from onnxopt.data import Feeds
from onnxopt.errors import UsageError
from onnxopt.ledger import Ledger, site_of
from onnxopt.pruning.choice import Choice, require_fit
from onnxopt.pruning.ends import first_layers, last_layers
from onnxopt.pruning.informed import Part, by_input_norm, make_up_for, parts_of, why_unseen
from onnxopt.pruning.masks import Mask
from onnxopt.pruning.saliency import Score, lamp, magnitude, noise
from onnxopt.pruning.weights import StoredWeight, find_weights
from onnxopt.quantization.keep import kept_sites

__all__ = ["PruneWeights"]

_AMOUNTS = ("sparsity", "threshold", "percentile", "nm")


@dataclass(frozen=True)
class PruneWeights(Pass):
    """Set the elements of weights that matter least to zero: half of them, where nothing else is said.

    sparsity: share of zeros, of the elements that may be pruned; met exactly, what is zero already included.
    threshold: instead, elements of a magnitude below this one.
    percentile: instead, elements of a magnitude below this percentile (0 to 100); equal ones stay.
    nm: instead, a pattern such as 2:4: of each 4 input channels in a row, at most 2 are not zero.
    scope: what is compared: a layer, all layers (global), or what one output channel adds up (row, the
        default of wanda).
    score: l1: |w|; l2: w^2 over all squares in the layer that are at least as large (LAMP); random; wanda:
        |w| times the norm of its input; obs: by what it costs, and the rest makes up for it, with the biases,
        layer after layer (SparseGPT).
    seed: of random scores.
    protect: first, last and depthwise layers.
    small: weights of fewer elements stay.
    embeddings: tables that rows are taken of may be pruned, too.
    keep: patterns of nodes whose weights stay: by first output, name or operator.
    samples: for wanda and obs, complete feeds.
    masks: name of a weight -> bool array, True where an element is kept; then nothing is scored or protected.
    importance: name of a weight -> how much it matters: its scores, in units of their norm, are multiplied
        with it and compared with those of all weights, which give the share together.
    only: names of weights that may be pruned; None: all.
    saliency: from the name of a weight and its numbers (float32) to scores of the same shape; the least go.
    """

    name: ClassVar[str] = "prune-weights"
    kind: ClassVar[Kind] = "lossy"
    example: ClassVar[str] = """agraph (float[N, 8] x) => (float[N, 8] y) <float[8, 8] w = {
        1, -2, 3, 4, 5, -6, 7, 8, 9, 10, -11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, -22, 23, 24, 25, 26, 27,
        28, 29, -30, 31, 32, 33, 34, 35, 36, -37, 38, 39, 40, 41, 42, 43, 44, -45, 46, 47, 48, 49, 50, 51, 52,
        53, 54, -55, 56, 57, 58, 59, 60, 61, 62, 63, 64}> {
        y = MatMul(x, w)
    }"""

    sparsity: float | None = None
    threshold: float | None = None
    percentile: float | None = None
    nm: str = ""
    scope: Literal["layer", "global", "row"] | None = None
    score: Literal["l1", "l2", "random", "wanda", "obs"] = "l1"
    seed: int = 0
    protect: tuple[Literal["first", "last", "depthwise"], ...] = ("depthwise",)
    small: int = 64
    embeddings: bool = False
    keep: tuple[str, ...] = ()
    samples: Sequence[Feeds] | None = unspelled(None)
    masks: Mapping[str, np.ndarray] | None = unspelled(None)
    saliency: Score | None = unspelled(None)
    importance: Mapping[str, float] | None = unspelled(None)
    only: tuple[str, ...] | None = unspelled(None)

    def __post_init__(self) -> None:
        for name, most in (("sparsity", 1), ("percentile", 100), ("threshold", 1e38)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise UsageError(f"{self.name}: {name} is {value}; expected 0 to {most}")
        kept, length = self._pattern or (1, 2)
        if not 0 < kept < length:
            raise UsageError(f"{self.name}: nm is {self.nm!r}; expected such as 2:4, two that stay of four")
        amounts = [name for name in _AMOUNTS if getattr(self, name) not in (None, "")]
        if len(amounts) > 1:
            raise UsageError(f"{self.name}: {' and '.join(amounts)} both say how much: give one of them")
        if amounts and self.masks is not None:
            raise UsageError(f"{self.name}: masks say what goes, and {amounts[0]} how much: give one of them")
        plain = self.score == "l1" and self.saliency is None and self.scope != "row"
        if (self.threshold, self.percentile) != (None, None) and not plain:
            raise UsageError(
                f"{self.name}: {amounts[0]} is one of magnitudes: it takes score=l1, and no rows"
            )
        if (self.score == "obs" or self.nm) and self.scope not in (None, "layer"):
            why = "nm compares within its pattern" if self.nm else "obs compares within a layer"
            raise UsageError(f"{self.name}: {why}; found scope={self.scope}")

    def require_samples(self, _model: ir.Model) -> None:
        """Raise UsageError where the score needs some, and there are none."""
        if self._looks and not self.samples:
            raise UsageError(
                f"{self.name}: {self.score} looks at what weights are multiplied with: give samples"
            )

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        self.require_samples(model)
        found = find_weights(model)
        if self.masks is not None:
            require_fit(found, self.masks)
        with self._seen(model) as parts:
            weights = []
            for one, reason in zip(found, self._reasons(model, found, parts), strict=True):
                if reason:
                    ledger.decline(_rule(one), one.site, f"the weight {reason}")
                else:
                    weights.append(one)
            if self._looks and self.score == "obs":
                self._make_up(weights, ledger, parts)
                return
            for one, pruned in self._pruned(weights, parts):
                if ledger.claim(_rule(one), one.site):
                    one.write(pruned)
                    ledger.touch(reader.node for reader in one.readers)

    def _seen(self, model: ir.Model) -> AbstractContextManager[Sequence[Part]]:
        return parts_of(model, (self.samples or ()) if self._looks else ())

    def _make_up(self, weights: Sequence[StoredWeight], ledger: Ledger, parts: Sequence[Part]) -> None:
        """Of each weight as much goes as by magnitude, and the rest makes up for it."""
        chosen = {
            one: gone
            for one, gone in self._gone(weights, magnitude)
            if _costs(one, gone) and ledger.claim(_rule(one), one.site)
        }
        if chosen:
            make_up_for(parts, chosen, self._pattern)
            ledger.touch(reader.node for one in chosen for reader in one.readers)

    def parts(self, model: ir.Model) -> Mapping[str, PruneWeights]:
        """Name of a weight -> a pass that prunes it alone; none where thresholds or masks tell."""
        if self.threshold is not None or self.masks is not None:
            return {}
        found = find_weights(model)
        with self._seen(model) as parts:
            reasons = self._reasons(model, found, parts)
            names = [one.name for one, reason in zip(found, reasons, strict=True) if not reason]
        return {name: replace(self, only=(name,)) for name in names}

    @property
    def _looks(self) -> bool:
        return self.score in ("wanda", "obs") and self.masks is None and self.saliency is None

    @property
    def _pattern(self) -> tuple[int, int] | None:
        if not self.nm:
            return None
        match = re.fullmatch(r"(\d+):(\d+)", self.nm)
        return (int(match[1]), int(match[2])) if match else (0, 0)

    @property
    def _choice(self) -> Choice:
        share = 0.5 if self.sparsity is None else self.sparsity
        if self.percentile is not None:
            share = self.percentile / 100
        scope = self.scope or ("row" if self.score == "wanda" else "layer")
        return Choice(share, self.percentile is None, self.threshold, self._pattern, scope)

    def _reasons(
        self, model: ir.Model, found: Sequence[StoredWeight], parts: Sequence[Part]
    ) -> Iterator[str]:
        """Why each weight stays as it is; empty where it may be pruned."""
        kept = kept_sites(model, self.keep)
        layers = {reader.node for one in found for reader in one.readers}
        first = first_layers(model, layers) if "first" in self.protect else frozenset()
        last = last_layers(model, layers) if "last" in self.protect else frozenset()
        for one in found:
            nodes = [reader.node for reader in one.readers]
            reason = one.reason or ("is kept" if any(site_of(node) in kept for node in nodes) else "")
            if self.only is not None and one.name not in self.only:
                reason = reason or "is not asked for"
            if self.masks is None:
                reason = reason or self._protection(one, nodes, first, last) or self._why_not(parts, one)
            yield reason

    def _protection(
        self,
        one: StoredWeight,
        nodes: Sequence[ir.Node],
        first: Container[ir.Node],
        last: Container[ir.Node],
    ) -> str:
        if one.is_embedding and not self.embeddings:
            return "is an embedding"
        if one.size < self.small:
            return f"has fewer than {self.small} elements"
        if one.is_depthwise and "depthwise" in self.protect:
            return "is depthwise"
        for which, ends in (("first", first), ("last", last)):
            if any(node in ends for node in nodes):
                return f"is of a {which} layer"
        return ""

    def _why_not(self, parts: Sequence[Part], one: StoredWeight) -> str:
        reason = why_unseen(parts, one, whole=self.score == "obs") if self._looks else ""
        reason = reason or self._choice.why_not(one)
        finite = reason or all(np.isfinite(one.numbers(part)).all() for part in one.parts())
        return reason or ("" if finite else "is not finite")

    def _pruned(
        self, weights: Sequence[StoredWeight], parts: Sequence[Part]
    ) -> Iterator[tuple[StoredWeight, ir.TensorProtocol]]:
        """The weights of which elements go that are not zero yet, and their new tensors."""
        if self.masks is None:
            scores = {"l1": magnitude, "l2": lamp, "random": noise(self.seed)}
            if self._looks:
                left = any(_costs(one, gone) for one, gone in self._gone(weights, magnitude))
                scores["wanda"] = by_input_norm(parts, weights) if left else magnitude
            return _zeroed(self._gone(weights, self.saliency or scores[self.score]))
        masks = self.masks
        return _zeroed((one, ~np.asarray(masks[one.name], bool)) for one in weights if one.name in masks)

    def _gone(
        self, weights: Sequence[StoredWeight], score: Score
    ) -> Iterator[tuple[StoredWeight, np.ndarray]]:
        """Each weight and which of its elements go, after what layers matter where that is known."""
        choice, importance = self._choice, self.importance
        if not importance or choice.pattern is not None:
            yield from choice.gone(weights, score)
            return

        def weighted(name: str, numbers: np.ndarray) -> np.ndarray:
            scores = score(name, numbers)
            unit = float(np.linalg.norm(scores)) or 1.0
            return np.asarray(scores * np.float32(importance.get(name, 1.0) / unit))

        together = replace(choice, scope="global")
        if choice.scope != "global":  # as many as layers would give alone, some of which have more already
            zeros = (sum(int(one.zeros(part).sum()) for part in one.parts()) for one in weights)
            given = sum(max(n, choice.share * one.size) for n, one in zip(zeros, weights, strict=True))
            together = replace(together, share=given / max(sum(one.size for one in weights), 1))
        for one, gone in together.gone(weights, weighted):
            if choice.scope == "row":
                yield from replace(choice, share=float(gone.mean())).gone([one], score)
            else:
                yield one, gone


def _zeroed(
    chosen: Iterable[tuple[StoredWeight, np.ndarray]],
) -> Iterator[tuple[StoredWeight, ir.TensorProtocol]]:
    return ((one, one.pruned(Mask.of(~gone))) for one, gone in chosen if _costs(one, gone))


def _costs(one: StoredWeight, gone: np.ndarray) -> bool:
    """Whether an element goes that is not zero."""
    before, flat = 0, gone.reshape(-1)
    for part in one.parts():
        before, start = before + part.size, before
        if (flat[start:before] & ~one.zeros(part).reshape(-1)).any():
            return True
    return False


def _rule(one: StoredWeight) -> str:
    return f"weight in input {one.readers[0].position}"
