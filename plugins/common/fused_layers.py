"""Linear layers of a block that read the same input, which engines run as one product."""

from __future__ import annotations

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""The fused layer's name -> the Hugging Face layers that it holds, in order."""

_FUSED_OF = {part: fused for fused, parts in FUSED.items() for part in parts}


def fused_name(name: str) -> str:
    """The name of the layer that the layer `name` becomes or becomes part of."""
    block, dot, last = name.rpartition(".")
    return f"{block}{dot}{_FUSED_OF.get(last, last)}"


def fused_parts(name: str) -> tuple[str, ...]:
    """The Hugging Face names of the layers that the layer of this name holds; its own where it is not a fused one."""
    block, dot, last = name.rpartition(".")
    return tuple(f"{block}{dot}{part}" for part in FUSED.get(last, (last,)))
