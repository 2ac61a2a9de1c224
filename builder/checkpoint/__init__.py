"""Checkpoints on disk, in both formats: read lazily and verified from the files alone, without torch."""

from builder.artifacts.filesystem import checkpoint_digest as digest
from builder.checkpoint.description import Description, describe
from builder.checkpoint.reading import Checkpoint, LayerFacts, read
from builder.checkpoint.violations import Code, VerificationError, Violation
from builder.checkpoint.zeros import normalize_zeros
from plugins.common.safetensors_file import Tensor

__all__ = [
    "Checkpoint",
    "Code",
    "Description",
    "LayerFacts",
    "Tensor",
    "VerificationError",
    "Violation",
    "describe",
    "digest",
    "normalize_zeros",
    "read",
]
