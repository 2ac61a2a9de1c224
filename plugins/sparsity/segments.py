"""A weight [out_features N, in_features K] as segments along its rows or its inputs, each sparse or dense. No torch.

A hybrid layer has both kinds: the channels that pruning harms least hold a pattern, the others are dense. Channels are
ordered so that each kind is contiguous, so that a kernel reads slices and gathers nothing (Lee et al., SpenseGPT, 2026,
arXiv:2606.10445, splits a weight so; here the channels of coupled layers share one order). With tensor parallelism each
rank holds its share of both kinds: the sparse segment of rank 0, its dense one, the sparse one of rank 1, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from plugins.common.errors import UserError
from plugins.common.patterns import TENSOR_CORE, Pattern

Axis = Literal["rows", "inputs"]
Dense = Literal["dense"]
Kind = Pattern | Dense

ALIGNMENT = 32  # of every boundary: cuSPARSELt's for 8-bit rows and inputs; holds whole groups and bytes of indices


@dataclass(frozen=True)
class Segment:
    """Rows or inputs from `start` up to, without, `end`."""

    kind: Kind
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def slice(self) -> slice:
        return slice(self.start, self.end)


@dataclass(frozen=True)
class Segments:
    """All segments of one weight, in order and without a gap. Neighbours differ in kind; all sparse ones are alike."""

    axis: Axis
    parts: tuple[Segment, ...]

    @classmethod
    def of(cls, axis: Axis, sizes: Sequence[tuple[Kind, int]]) -> Segments:
        """From kinds and sizes in order; empty segments are dropped and neighbours of one kind joined."""
        parts: list[Segment] = []
        end = 0
        for kind, size in sizes:
            start, end = end, end + size
            if size and parts and parts[-1].kind == kind:
                parts[-1] = Segment(kind, parts[-1].start, end)
            elif size:
                parts.append(Segment(kind, start, end))
        return cls(axis, tuple(parts))

    @classmethod
    def split(cls, axis: Axis, size: int, sparse: int, ranks: int = 1, pattern: Pattern = TENSOR_CORE) -> Segments:
        """Of `size` channels the first `sparse` in the pattern, or so on each of `ranks` tensor-parallel ranks."""
        assert size % ranks == 0
        assert sparse % ranks == 0
        shares: list[tuple[Kind, int]] = [(pattern, sparse // ranks), ("dense", (size - sparse) // ranks)]
        return cls.of(axis, shares * ranks)

    @classmethod
    def parse(cls, layer: str, content: Any, pattern: Pattern = TENSOR_CORE) -> Segments:
        """From sparsity.json: {"axis": "rows", "segments": [["2:4", 96], ["dense", 32]]}.

        Raises UserError, also for a sparse segment of another pattern.
        """
        try:
            axis, sizes = content["axis"], [(kind, size) for kind, size in content["segments"]]
        except (TypeError, KeyError, ValueError):
            raise UserError(f'{layer!r} is not of the form {{"axis": ..., "segments": [[kind, size], ...]}}') from None
        if axis not in ("rows", "inputs"):
            raise UserError(f"{layer!r} is split along {axis!r}: an axis is 'rows' or 'inputs'")
        for kind, size in sizes:
            if kind not in (pattern, "dense"):
                raise UserError(f"{layer!r} has a segment of kind {kind!r}: a kind is '{pattern}' or 'dense'")
            if type(size) is not int or size <= 0 or size % ALIGNMENT:
                raise UserError(f"{layer!r} has a segment of {size!r} {axis}: it must be a multiple of {ALIGNMENT}")
        return cls.of(axis, sizes)

    def to_json(self) -> dict[str, Any]:
        """What `parse` reads."""
        return {"axis": self.axis, "segments": [[part.kind, part.size] for part in self.parts]}

    @property
    def size(self) -> int:
        """Rows or inputs in all."""
        return self.parts[-1].end if self.parts else 0

    @property
    def fraction(self) -> float:
        """The share of the weight that is sparse."""
        return sum(part.size for part in self.sparse) / self.size

    @property
    def pattern(self) -> Pattern:
        """Of the sparse segments; 2:4 where there are none."""
        return next((part.kind for part in self.parts if part.kind != "dense"), TENSOR_CORE)

    @property
    def in_two(self) -> bool:
        """Whether there are two segments, the sparse one first: a kernel takes each as a slice."""
        return [part.kind == "dense" for part in self.parts] == [False, True]

    @property
    def sparse(self) -> tuple[Segment, ...]:
        return tuple(part for part in self.parts if part.kind != "dense")

    @property
    def dense(self) -> tuple[Segment, ...]:
        return tuple(part for part in self.parts if part.kind == "dense")

    @staticmethod
    def indices(parts: Sequence[Segment]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The rows or inputs of `parts`, such as those of `sparse`."""
        ranges = [np.arange(part.start, part.end) for part in parts]
        return np.concatenate(ranges) if ranges else np.arange(0)

    def rank(self, rank: int, ranks: int) -> Segments:
        """What rank `rank` of `ranks` holds of a weight that is cut along the axis of the segments.

        Raises UserError where a segment would be cut at no multiple of ALIGNMENT, or ranks would hold unequal shares.
        """
        if self.size % (ranks * ALIGNMENT):
            raise UserError(f"{self.size} {self.axis} over {ranks} ranks are not a multiple of {ALIGNMENT} each")
        share = self.size // ranks
        cut = [
            self.of(self.axis, [(p.kind, max(0, min(p.end, start + share) - max(p.start, start))) for p in self.parts])
            for start in range(0, self.size, share)
        ]
        if len(set(cut)) > 1:
            shares = ", ".join(f"{each.fraction:.0%}" for each in cut)
            raise UserError(
                f"of its {self.axis} {shares} are {self.pattern} on {ranks} ranks: prune for engine.tensor_parallel"
            )
        return cut[rank]
