"""From the times of a layer's kernels to its entry in tactics.json: the kernel by number of tokens, and the reason.

A sparse kernel is kept where it is faster than dense by at least LEAST_GAIN. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from plugins.common.defaults import LEAST_GAIN, SPARSE_KERNELS
from plugins.common.errors import UserError
from plugins.common.linear_shape import LinearShape
from plugins.common.patterns import HYBRID, TENSOR_CORE, Pattern, hybrid_kernel
from plugins.sparsity.segments import Axis

HELD_ONCE = 0.15  # of time: what a second, dense copy of a weight must save on a CPU
# of dense kernels in tactics.json; sparse kernels go by their own
NAMES = {"cublaslt": "dense-cublaslt", "torch": "dense-torch", "cpu-dense": "dense-cpu"}
OURS = ("cublaslt", "cpu-dense")  # what a layer can run dense


@dataclass(frozen=True)
class Hybrid:
    """A layer that is sparse in part: its product of sparse weights, that of the rest, and the dense layer's."""

    sparse: LinearShape
    rest: LinearShape
    whole: LinearShape

    @classmethod
    def of(cls, whole: LinearShape, axis: Axis, size: int) -> Hybrid:
        """With `size` of its rows or inputs sparse."""
        if axis == "rows":
            sizes = size, whole.out_features - size
            sparse, rest = (replace(whole, out_features=rows) for rows in sizes)
        else:
            sizes = size, whole.in_features - size
            sparse, rest = (replace(whole, in_features=columns) for columns in sizes)
        return cls(sparse, rest, whole)

    @property
    def pattern(self) -> Pattern:
        return self.sparse.pattern

    @property
    def axis(self) -> Axis:
        return "rows" if self.sparse.in_features == self.whole.in_features else "inputs"

    @property
    def size(self) -> int:
        """How many of the layer's rows or inputs are sparse."""
        return self.sparse.out_features if self.axis == "rows" else self.sparse.in_features

    def __str__(self) -> str:
        return f"{self.whole}, {self.sparse.pattern} in [{self.sparse.out_features}, {self.sparse.in_features}]"


@dataclass(frozen=True)
class Timing:
    """A kernel's time for one call in microseconds, the algorithm it ran, and notes on it."""

    kernel: str
    us: float
    algorithm: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()


def choose(tokens: int, timings: Iterable[Timing]) -> dict[str, Any]:
    """The bucket: the fastest sparse kernel where it beats the fastest dense one by LEAST_GAIN, else the dense one."""
    by_time = sorted(timings, key=lambda t: t.us)
    dense = next((t for t in by_time if t.kernel in NAMES), None)
    sparse = next((t for t in by_time if t.kernel not in NAMES), None)
    ours = next((t for t in by_time if t.kernel in OURS), None)
    if dense is None and sparse is None:
        raise UserError(f"no kernel ran at {tokens} tokens: see the log; `twofour doctor` lists what is missing")
    pays = sparse is not None and (dense is None or sparse.us * LEAST_GAIN <= dense.us)
    winner = sparse if pays else ours
    return {
        "tokens": tokens,
        "kernel": "reference" if winner is None else NAMES.get(winner.kernel, winner.kernel),
        "dense_us": None if dense is None else round(dense.us, 3),
        "sparse_us": None if sparse is None else round(sparse.us, 3),
        "ratio": None if dense is None or sparse is None else round(dense.us / sparse.us, 4),
        "measured": True,
        "algorithm": None if winner is None else _listed(winner.algorithm),
        "notes": [f"{NAMES.get(t.kernel, t.kernel)}: {note}" for t in by_time for note in t.notes],
    }


def choose_hybrid(
    buckets: Sequence[dict[str, Any]],
    both: Sequence[Timing],
    whole: Sequence[Timing],
    one: Sequence[Timing | None] = (),
) -> list[dict[str, Any]]:
    """The buckets of a hybrid layer from those of its sparse part: both products, or where it is faster `one` launch
    for both, against the dense layer's product.

    The algorithm of `both` is that of the dense part. Where neither is faster than dense by LEAST_GAIN at any number of
    tokens the layer runs dense, as one product.
    """
    chosen = []
    for bucket, parts, dense, launch in zip(buckets, both, whole, one or [None] * len(buckets), strict=True):
        us, runs = _faster(bucket["notes"], parts, launch)
        times = {"dense_us": round(dense.us, 3), "sparse_us": round(us, 3), "ratio": round(dense.us / us, 4)}
        chosen.append({**bucket, **times, **runs})
    if _pays(chosen):
        return chosen
    for bucket, dense in zip(chosen, whole, strict=True):
        kernel = NAMES[dense.kernel] if dense.kernel in OURS else "reference"
        bucket |= {"kernel": kernel, "algorithm": None, "rest_algorithm": None}
    return chosen


def _faster(notes: Sequence[str], parts: Timing, launch: Timing | None) -> tuple[float, dict[str, Any]]:
    """Microseconds of two products or of one launch, and what of the bucket follows from that."""
    if launch is None:
        return parts.us, {"rest_algorithm": _listed(parts.algorithm)}
    if launch.us < parts.us:
        notes = [*notes, f"both products take {parts.us:.3f} us", *launch.notes]
        algorithm = _listed(launch.algorithm)
        return launch.us, {"kernel": launch.kernel, "algorithm": algorithm, "rest_algorithm": None, "notes": notes}
    notes = [*notes, f"one launch takes {launch.us:.3f} us"]
    return parts.us, {"rest_algorithm": _listed(parts.algorithm), "notes": notes}


def _pays(buckets: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a hybrid layer is faster than one dense product, at any number of tokens."""
    return any(bucket["ratio"] >= LEAST_GAIN for bucket in buckets)


def _listed(algorithm: tuple[int, ...] | None) -> list[int] | None:
    return None if algorithm is None else list(algorithm)


def entry(shape: LinearShape | Hybrid, buckets: Sequence[dict[str, Any]], gpu: str) -> dict[str, Any]:
    """A layer's entry in tactics.json."""
    if isinstance(shape, Hybrid):
        products = [[part.out_features, part.in_features] for part in (shape.sparse, shape.rest)]
        pays = _pays(buckets)
        ratios = ", ".join(f"{bucket['ratio']:.2f}x at {bucket['tokens']}" for bucket in buckets)
        at_once = [str(bucket["tokens"]) for bucket in buckets if bucket["kernel"] in map(hybrid_kernel, HYBRID)]
        both = f"both products, in one launch at {', '.join(at_once)}," if at_once else "both products"
        why = f"dense time over that of {both} on {gpu}: {ratios} tokens"
        why = why if pays else f"runs dense, as one product: {why}"
        return {**entry(shape.whole, buckets, gpu), "products": products if pays else None, "reason": why}
    return {
        **shape.facts,
        "sparse": True,
        "reason": reason(buckets, gpu, shape.pattern),
        "buckets": list(buckets),
    }


def reason(buckets: Sequence[dict[str, Any]], gpu: str, pattern: str = TENSOR_CORE) -> str:
    """Why the layer runs as it does, in one sentence."""
    ratios = {b["tokens"]: b["ratio"] for b in buckets if b["ratio"] is not None}
    won = [b for b in buckets if b["kernel"] in SPARSE_KERNELS and (b["ratio"] is None or b["ratio"] >= 1)]
    held = [b for b in buckets if b["kernel"] in SPARSE_KERNELS and b not in won]
    if not won:
        if not ratios:
            return f"stays dense: no sparse kernel runs this shape on {gpu}"
        best = max(ratios, key=lambda tokens: ratios[tokens])
        return (
            f"stays dense: no sparse kernel is faster by {LEAST_GAIN - 1:.0%} on {gpu}; "
            f"the best is {ratios[best]:.2f}x at {best} tokens"
        )
    gains = [f"{b['ratio']:.2f}x at {b['tokens']}" if b["ratio"] else f"at {b['tokens']}" for b in won]
    lost = [str(b["tokens"]) for b in buckets if b not in won and b not in held]
    dense = f"; dense at {', '.join(lost)}" if lost else ""
    slower = [f"{b['ratio']:.2f}x at {b['tokens']}" for b in held]
    kept = f"; {pattern} regardless, so that the weight is held once: {', '.join(slower)}" if held else ""
    return f"{pattern} is faster on {gpu}: {', '.join(gains)} tokens{dense}{kept}"


def chosen_us(bucket: Mapping[str, Any]) -> float:
    """The time of a bucket's kernel, in microseconds."""
    return float(bucket["sparse_us" if bucket["kernel"] in SPARSE_KERNELS else "dense_us"])


def hold_once(buckets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keeps the sparse kernel where dense is barely faster, if the layer has it anyway: it then holds one weight."""
    sparse = next((bucket["kernel"] for bucket in buckets if bucket["kernel"] in SPARSE_KERNELS), None)
    if sparse is None:
        return buckets
    for bucket in buckets:
        if bucket["kernel"] == "dense-cpu" and bucket["ratio"] is not None and bucket["ratio"] > 1 - HELD_ONCE:
            note = f"dense takes {bucket['ratio']:.2f} of the sparse time: not enough to hold the weight twice"
            bucket |= {"kernel": sparse, "notes": [*bucket["notes"], note]}
    return buckets
