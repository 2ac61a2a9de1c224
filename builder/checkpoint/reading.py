"""Opens a checkpoint: its configs, the headers of its files, facts about its linear layers. Weights stay on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from builder.checkpoint.description import Description, describe_to, raise_first
from builder.checkpoint.tensor_files import hf_tensors, trtllm_tensors
from builder.checkpoint.violations import Report
from builder.planning.sharding import is_row_parallel
from plugins.common.formats import OF_SAFETENSORS
from plugins.common.linear_shape import LinearShape
from plugins.common.patterns import keep_and_group
from plugins.common.safetensors_file import Tensor
from plugins.sparsity.segments import Segments


@dataclass(frozen=True)
class LayerFacts:
    """One linear layer over all ranks. `bytes` counts weight, bias and scales as stored; `packed_bytes` counts a
    sparse weight as its kept values with their positions."""

    shape: LinearShape  # as declared: `pattern` is that of the checkpoint's sparse layers
    bytes: int
    packed_bytes: int
    weights: tuple[Tensor, ...] = field(repr=False)
    segments: Segments | None = None  # of a layer that is sparse in part

    @cached_property
    def zeros(self) -> float:
        """The share of the weight's values that are 0 or -0. Reads the weight."""
        total = sum(math.prod(tensor.shape) for tensor in self.weights)
        nonzero = sum(int(np.count_nonzero(rows)) for tensor in self.weights for _, rows in tensor.chunks())
        return 1 - nonzero / total


@dataclass(frozen=True)
class Checkpoint(Description):
    """A checkpoint on disk. In a TensorRT-LLM one, `tensors` names rank r's as `rank{r}/NAME`."""

    tensors: Mapping[str, Tensor]

    def segments(self, key: str) -> Segments | None:
        """Of the tensor `key` where it is a weight declared sparse, as a whole or in part."""
        tensor, expected = self.tensors[key], self.expected.get(key)
        if expected is None or expected.role != "weight" or expected.layer not in self.sparse_layers:
            return None
        whole = Segments.split("rows", tensor.shape[0], tensor.shape[0], pattern=self.declaration.pattern)
        return self.declaration.hybrid.get(expected.layer, whole)

    def layers(self) -> list[LayerFacts]:
        """The linear layers, in the order of the forward pass; a layer whose weight is missing is left out."""
        members: dict[str, list[str]] = {}
        for name, expected in self.expected.items():
            if expected.layer is not None and name in self.tensors:
                members.setdefault(expected.layer, []).append(name)
        if self.kind == "hf" and "lm_head.weight" not in self.tensors:  # tied to the embedding
            members["lm_head"] = [name for name in ("model.embed_tokens.weight",) if name in self.tensors]
        facts = [self._facts(layer, names) for layer, names in members.items()]
        return [fact for fact in facts if fact is not None]

    def shapes(self) -> list[LinearShape]:
        """Of `layers`."""
        return [layer.shape for layer in self.layers()]

    def _facts(self, layer: str, names: list[str]) -> LayerFacts | None:
        weights = tuple(self.tensors[name] for name in names if name.endswith(".weight"))
        if not weights or any(len(weight.shape) != 2 for weight in weights):
            return None
        total = sum(self.tensors[name].nbytes for name in names)
        segments, pattern = self.declaration.hybrid.get(layer), self.declaration.pattern
        fraction = segments.fraction if segments else float(layer in self.sparse_layers)
        saved = sum(round(fraction * (weight.nbytes - _packed_bytes(weight, pattern))) for weight in weights)
        rows, columns = weights[0].shape
        cut_rows, cut_columns = len(weights), 1
        if is_row_parallel(layer):
            cut_rows, cut_columns = cut_columns, cut_rows
        format = OF_SAFETENSORS.get(weights[0].dtype, weights[0].dtype.lower())
        shape = LinearShape(rows * cut_rows, columns * cut_columns, format, fraction, pattern, layer)
        return LayerFacts(shape, total, total - saved, weights, segments)


def _packed_bytes(weight: Tensor, pattern: str) -> int:
    rows, columns = weight.shape
    keep, group = keep_and_group(pattern)
    return weight.nbytes * keep // group + rows * -(-columns // 8)


def read(directory: Path) -> Checkpoint:
    """Opens the checkpoint at `directory`, of either kind.

    Raises UserError where there is none, or one that this release does not know, VerificationError where its files do
    not make sense; the weights' values are not looked at (see verify).
    """
    checkpoint = open_checkpoint(directory, raise_first(directory))
    assert checkpoint is not None
    return checkpoint


def open_checkpoint(directory: Path, report: Report) -> Checkpoint | None:
    """Opens a checkpoint and reports errors of its files. None where the errors leave no checkpoint."""
    description = describe_to(directory, report)
    if description is None:
        return None
    ranks = description.mapping.ranks
    of_hf = description.kind == "hf"
    tensors = hf_tensors(directory, report) if of_hf else trtllm_tensors(directory, ranks, report)
    return Checkpoint(**vars(description), tensors=tensors)
