"""The patterns of pruned weights: n:m leaves at most n nonzeros in each group of m consecutive inputs. No torch.

2:4 has sparse tensor cores and CPU kernels. The kernels of n:8, on a GPU up to 64 tokens, expand the weight in
registers and multiply it as a dense one: they save bytes and no multiplications.
"""

from __future__ import annotations

from typing import Literal, get_args

Pattern = Literal["2:4", "4:8", "5:8", "6:8"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
TENSOR_CORE: Pattern = "2:4"  # what sparse tensor cores multiply
HYBRID: tuple[Pattern, ...] = ("2:4", "4:8")  # that a GPU multiplies beside dense weights in one launch
OF_EIGHT = tuple(pattern for pattern in PATTERNS if pattern != TENSOR_CORE)


def keep_and_group(pattern: str) -> tuple[int, int]:
    """n and m of "n:m"."""
    keep, _, group = pattern.partition(":")
    return int(keep), int(group)


def bytes_per_weight(pattern: str, dense: float) -> float:
    """Bytes of a packed weight's element for `dense` bytes of a dense one's: n of m values, and a bit for the places.

    At 8 bit 0.625 with 2:4 and 4:8, 0.75 with 5:8, 0.875 with 6:8.
    """
    keep, group = keep_and_group(pattern)
    return dense * keep / group + 1 / 8


def short_name(pattern: str) -> str:
    """ "2of4", as the names of presets, formats and kernels have it."""
    return pattern.replace(":", "of")


def skinny_kernel(pattern: str) -> str:
    """The skinny kernel of a GPU, as libtwofour and tactics.json name it: "skinny-6of8", of 2:4 "skinny"."""
    return "skinny" if pattern == TENSOR_CORE else f"skinny-{short_name(pattern)}"


def hybrid_kernel(pattern: str) -> str:
    """A GPU's kernel for a weight that is sparse in part, by its pattern: "hybrid-4of8", of 2:4 "hybrid"."""
    return "hybrid" if pattern == TENSOR_CORE else f"hybrid-{short_name(pattern)}"


def cpu_kernel(pattern: str) -> str:
    """The CPU kernel of packed weights, as tactics.json names it: "cpu-6of8"."""
    return f"cpu-{short_name(pattern)}"
