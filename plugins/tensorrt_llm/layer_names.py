"""What TensorRT-LLM calls a layer of a pipeline stage, which numbers its blocks from 0.

Imported inside TensorRT-LLM's processes too: standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_BLOCK = re.compile(r"(?P<before>.*\.layers)\.(?P<number>\d+)\.(?P<after>.*)")


def local_name(name: str, held: Sequence[int], blocks: int) -> str | None:
    """What a stage that holds the blocks `held`, of `blocks` in all, calls the layer; None where it is not there.

    Layers outside the blocks that may be 2:4 (lm_head) are in the last stage.
    """
    match = _BLOCK.fullmatch(name)
    if match is None:
        return name if blocks - 1 in held else None
    number = int(match["number"])
    return f"{match['before']}.{held.index(number)}.{match['after']}" if number in held else None
