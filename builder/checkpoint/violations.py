"""Violations of a checkpoint: a code for each kind of damage, and its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from plugins.common.errors import GateError


class Code(StrEnum):
    """The kinds of damage, in the order in which they are looked for."""

    PICKLE = "pickle"  # weights in a file that runs code when it is loaded
    MISSING_FILE = "missing-file"  # a shard or a rank's file is not there
    FILE = "file"  # not a whole safetensors file
    CONFIG = "config"  # unreadable, unsupported, or two configs that disagree
    INDEX = "index"  # the index and the shards disagree
    UNFOLDED_MASK = "unfolded-mask"  # ModelOpt's masks were not folded into the weights before the export
    QUANTIZER_STATE = "quantizer-state"  # a quantizer's own tensors were left in
    UNEXPECTED_TENSOR = "unexpected-tensor"  # the config has no such tensor
    MISSING_TENSOR = "missing-tensor"  # the config calls for it
    DTYPE = "dtype"
    SHAPE = "shape"
    SCALE = "scale"  # not finite or not positive
    NOT_FINITE = "not-finite"  # NaN or infinity in a weight
    SPARSITY = "sparsity"  # a group with more nonzeros than the pattern that the layer is declared to hold
    NEGATIVE_ZERO = "negative-zero"  # in a layer declared sparse: sparse kernels count it as a value
    TENSOR_PARALLEL = "tensor-parallel"  # a rank's share of K would cut a group
    DIGEST = "digest"  # the sha256 is not the one on record
    LOCK = "version-lock"  # an engine that was built for other versions, or for another GPU, than this machine's


@dataclass(frozen=True)
class Violation:
    """One piece of damage. `row` counts from 0, `group` is the group of inputs within the row."""

    code: Code
    problem: str
    file: str | None = None
    tensor: str | None = None
    row: int | None = None
    group: int | None = None

    @property
    def message(self) -> str:
        """One line: where, then what."""
        where = [f"{self.file}:"] if self.file else []
        where += [repr(self.tensor)] if self.tensor is not None else []
        where += [f"row {self.row}"] if self.row is not None else []
        where += [f"group {self.group}"] if self.group is not None else []
        place = " ".join(where[:2]) + "".join(f", {part}" for part in where[2:])
        return f"{place}{'' if place.endswith(':') or not place else ':'} {self.problem}".strip()

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "code": self.code.value, "message": self.message}


Report = Callable[[Violation], None]


class Unsupported(Violation):
    """Not damage: a feature that this release does not support, such as the format of a newer ModelOpt."""


class VerificationError(GateError):
    """A checkpoint differs from what it declares."""

    def __init__(self, violation: Violation, more: int = 0) -> None:
        self.violation = violation
        also = f" (and {more} more: twofour verify lists them)" if more else ""
        super().__init__(f"[{violation.code.value}] {violation.message}{also}")
