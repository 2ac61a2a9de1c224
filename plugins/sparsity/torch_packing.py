"""plugins/sparsity/pattern.py for torch tensors, and the names under which an engine stores a packed weight:

weight_values   [N, K n/m]
weight_indices  uint8 [N, ceil(K/8)]: of 2:4
weight_mask     uint8 [N, K/8]: of n:8, where n = 8 times the width of the values over that of the mask
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from plugins.common.errors import UserError
from plugins.common.patterns import PATTERNS, TENSOR_CORE, Pattern, keep_and_group
from plugins.sparsity import pattern as packing

VALUES, INDICES, MASK = PACKED = ("weight_values", "weight_indices", "weight_mask")

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


class Packed(NamedTuple):
    """A weight [N, K] in the pattern n:m without its zeros."""

    values: torch.Tensor
    positions: torch.Tensor
    pattern: Pattern = TENSOR_CORE

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Packed:
        """What an engine stores under a layer's name. Raises UserError where the shapes do not match."""
        values = tensors[VALUES]
        if MASK not in tensors:
            return cls(values, tensors[INDICES]).checked()
        mask = tensors[MASK]
        pattern = cast(Pattern, f"{values.shape[1] // max(1, mask.shape[1])}:8")
        return cls(values, mask, pattern).checked()

    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors by the names under which an engine stores them."""
        return {VALUES: self.values, INDICES if self.pattern == TENSOR_CORE else MASK: self.positions}

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        keep, group = keep_and_group(self.pattern)
        return self.values.shape[0], self.values.shape[1] // keep * group

    def checked(self) -> Packed:
        """Itself. Raises UserError for a pattern that has no packed form, or shapes that do not match."""
        if not self._fits():
            name = "indices" if self.pattern == TENSOR_CORE else "mask"
            raise UserError(
                f"values {list(self.values.shape)} and {name} {self.positions.dtype} {list(self.positions.shape)} "
                "do not match",
                "build the engine again",
            )
        return self

    def _fits(self) -> bool:
        if self.pattern not in PATTERNS or self.positions.dtype != torch.uint8:
            return False
        rows, columns = self.shape
        whole_groups = self.values.shape[1] % keep_and_group(self.pattern)[0] == 0
        return whole_groups and tuple(self.positions.shape) == (rows, -(-columns // 8))


def pack(w_NK: torch.Tensor, pattern: Pattern = TENSOR_CORE) -> Packed:
    """A weight [N, K] without the zeros of the pattern. Raises UserError where it does not hold the pattern."""
    values, positions = packing.pack(to_numpy(w_NK), pattern)
    return Packed(from_numpy(values, w_NK.dtype), torch.from_numpy(positions), pattern)


def unpack(values: torch.Tensor, positions: torch.Tensor, pattern: Pattern = TENSOR_CORE) -> torch.Tensor:
    """The weight [N, K] that `pack` took, made on the device of `values`, where it may be a GPU.

    Raises UserError for shapes that do not match, and positions that no packing gives.
    """
    rows, columns = Packed(values, positions, pattern).checked().shape
    keep, group = keep_and_group(pattern)
    kept = values.view(_INTEGERS[values.element_size()]).view(rows, columns // group, keep)
    places = _places_2of4(positions, columns) if pattern == TENSOR_CORE else _places_nof8(positions, keep)
    dense = torch.zeros(rows, columns // group, group, dtype=kept.dtype, device=values.device)
    return dense.scatter_(2, places.long(), kept).view(rows, columns).view(values.dtype)


def _places_2of4(indices: torch.Tensor, columns: int) -> torch.Tensor:
    """The two indices of each group: [N, K/4, 2]. Raises UserError where they do not ascend."""
    nibbles = torch.stack([indices & 15, indices >> 4], dim=-1).view(len(indices), -1)[:, : columns // 4]
    places = torch.stack([nibbles & 3, nibbles >> 2], dim=-1)
    ascends = places[..., 0] < places[..., 1]
    if not bool(ascends.all()):
        row, group = (~ascends).nonzero()[0].tolist()
        raise UserError(f"row {row}, group {group}: indices do not ascend: the file is damaged, build the engine again")
    return places


def _places_nof8(mask: torch.Tensor, keep: int) -> torch.Tensor:
    """The indices of each group's set bits: [N, K/8, n]. Raises UserError where a byte has not n bits."""
    bits = mask[..., None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    wrong = bits.sum(2) != keep
    if bool(wrong.any()):
        row, group = wrong.nonzero()[0].tolist()
        raise UserError(
            f"row {row}, group {group}: the mask keeps {int(bits[row, group].sum())} of 8, not {keep}: the file is "
            "damaged, build the engine again"
        )
    return bits.nonzero()[:, 2].view(*mask.shape, keep)


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor as an array. numpy lacks bfloat16 and float8: they come as void types of the same width."""
    tensor = tensor.detach().cpu().contiguous()
    width = tensor.element_size()
    array: np.ndarray[Any, Any]
    if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn):
        array = tensor.view(_INTEGERS[width]).numpy().view(f"V{width}")
    else:
        array = tensor.numpy()
    return array


def from_numpy(array: np.ndarray[Any, Any], dtype: torch.dtype) -> torch.Tensor:
    """The tensor of `dtype` that `to_numpy` took."""
    return torch.from_numpy(array.view(f"i{array.itemsize}")).view(dtype)
