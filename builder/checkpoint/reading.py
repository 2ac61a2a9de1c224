"""Opens a checkpoint: its configs, the headers of its files, facts about its linear layers. Weights stay on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from builder.checkpoint import config as configs
from builder.checkpoint import layout
from builder.checkpoint.declaration import read_declaration
from builder.checkpoint.safetensors_file import Tensor
from builder.checkpoint.tensor_files import hf_tensors, read_table, trtllm_tensors
from builder.checkpoint.violations import Code, Report, Unsupported, VerificationError, Violation
from builder.planning.compatibility import features_of
from builder.planning.model_config import Architecture
from builder.planning.sharding import is_row_parallel
from plugins.common.errors import UserError
from plugins.common.formats import OF_DTYPE, OF_SAFETENSORS
from plugins.sparsity.declaration import Declaration
from plugins.sparsity.segments import Segments

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class LayerFacts:
    """One linear layer over all ranks. `bytes` counts weight, bias and scales as stored; `packed_bytes` counts a 2:4
    weight as half its values with 2-bit indices."""

    name: str
    out_features: int
    in_features: int
    format: str
    sparse: bool  # declared 2:4, as a whole or in part
    bytes: int
    packed_bytes: int
    weights: tuple[Tensor, ...] = field(repr=False)
    segments: Segments | None = None  # of a layer that is 2:4 in part

    @property
    def fraction(self) -> float:
        """The share of the weight that is declared 2:4."""
        return self.segments.fraction if self.segments else float(self.sparse)

    @cached_property
    def zeros(self) -> float:
        """The share of the weight's values that are 0 or -0. Reads the weight."""
        total = sum(math.prod(tensor.shape) for tensor in self.weights)
        nonzero = sum(int(np.count_nonzero(rows)) for tensor in self.weights for _, rows in tensor.chunks())
        return 1 - nonzero / total


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. In a TensorRT-LLM one, `tensors` and `expected` name rank r's as `rank{r}/NAME`."""

    directory: Path
    kind: Literal["hf", "trtllm"]
    config: Mapping[str, Any]
    architecture: Architecture
    quantization: configs.Quantization
    mapping: configs.Mapping
    tensors: Mapping[str, Tensor]
    expected: Mapping[str, layout.Expected]
    declaration: Declaration

    @property
    def sparse_layers(self) -> tuple[str, ...]:
        """Those declared 2:4 as a whole or in part."""
        return self.declaration.pruned

    @property
    def whole_sparse_layers(self) -> tuple[str, ...]:
        """Those declared 2:4 as a whole."""
        return self.declaration.layers

    def segments(self, key: str) -> Segments | None:
        """Of the tensor `key` where it is a weight declared 2:4, as a whole or in part."""
        tensor, expected = self.tensors[key], self.expected.get(key)
        if expected is None or expected.role != "weight" or expected.layer not in self.sparse_layers:
            return None
        whole = Segments.split("rows", tensor.shape[0], tensor.shape[0])
        return self.declaration.hybrid.get(expected.layer, whole)

    @property
    def format(self) -> str:
        """Of the quantized layers, or of all where none is: "int8", "fp8", "bf16", "fp16" or "fp32"."""
        if self.quantization.format != "none":
            return self.quantization.format
        return OF_DTYPE[self.architecture.dtype]

    @property
    def features(self) -> tuple[str, ...]:
        """What not every backend has (builder/planning/compatibility.py)."""
        return features_of(self.quantization.per_token, self.quantization.format_of("lm_head") != "none")

    @property
    def kv_cache(self) -> str:
        """ "none", "int8" or "fp8"."""
        return self.quantization.kv_cache

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

    def _facts(self, layer: str, names: list[str]) -> LayerFacts | None:
        weights = tuple(self.tensors[name] for name in names if name.endswith(".weight"))
        if not weights or any(len(weight.shape) != 2 for weight in weights):
            return None
        total = sum(self.tensors[name].nbytes for name in names)
        segments, sparse = self.declaration.hybrid.get(layer), layer in self.sparse_layers
        share = segments.fraction if segments else float(sparse)
        saved = sum(round(share * (weight.nbytes - _packed_bytes(weight))) for weight in weights)
        rows, columns = weights[0].shape
        cut_rows, cut_columns = len(weights), 1
        if is_row_parallel(layer):
            cut_rows, cut_columns = cut_columns, cut_rows
        return LayerFacts(
            name=layer,
            out_features=rows * cut_rows,
            in_features=columns * cut_columns,
            format=OF_SAFETENSORS.get(weights[0].dtype, weights[0].dtype.lower()),
            sparse=sparse,
            bytes=total,
            packed_bytes=total - saved,
            weights=weights,
            segments=segments,
        )


def _packed_bytes(weight: Tensor) -> int:
    rows, columns = weight.shape
    return weight.nbytes // 2 + rows * -(-columns // 8)


def read(directory: Path) -> Checkpoint:
    """Opens the checkpoint at `directory`, of either kind.

    Raises UserError where there is none, or one that this release does not know, VerificationError where its files do
    not make sense; the weights' values are not looked at (see verify).
    """

    def refuse(violation: Violation) -> None:
        if isinstance(violation, Unsupported):
            raise UserError(f"'{directory / (violation.file or '')}': {violation.problem}")
        raise VerificationError(violation)

    checkpoint = open_checkpoint(directory, refuse)
    assert checkpoint is not None
    return checkpoint


def open_checkpoint(directory: Path, report: Report) -> Checkpoint | None:
    """Opens a checkpoint and reports errors of its files. None where the errors leave no checkpoint."""
    config = _read_config(directory, report)
    if config is None:
        return None
    for path in sorted(directory.iterdir()):
        if path.suffix.lower() in PICKLES:
            report(
                Violation(Code.PICKLE, "pickled data can run code when it is loaded: keep safetensors only", path.name)
            )
    kind: Literal["hf", "trtllm"] = "trtllm" if "architecture" in config else "hf"
    mapping = configs.Mapping()
    try:
        if kind == "hf":
            exported = read_table(directory / "hf_quant_config.json", report)
            arch, quantization = configs.read_hf(config, exported)
        else:
            arch, quantization, mapping = configs.read_trtllm(config)
    except configs.ConfigError as error:
        kind_of = Unsupported if isinstance(error, configs.UnsupportedError) else Violation
        report(kind_of(Code.CONFIG, str(error), "config.json"))
        return None
    if kind == "hf":
        expected = layout.hf_tensors(arch, quantization)
        tensors = hf_tensors(directory, report)
    else:
        expected = {
            f"rank{rank}/{name}": tensor
            for rank in range(mapping.ranks)
            for name, tensor in layout.trtllm_tensors(arch, quantization, mapping, rank, config).items()
        }
        tensors = trtllm_tensors(directory, mapping.ranks, report)
    weights = [tensor for tensor in expected.values() if tensor.role == "weight"]
    shapes = {str(x.layer): x.shapes[0] for x in weights}
    declared = read_declaration(directory, shapes, arch.head_widths, report)
    return Checkpoint(directory, kind, config, arch, quantization, mapping, tensors, expected, declared)


def _read_config(directory: Path, report: Report) -> dict[str, Any] | None:
    if not directory.is_dir():
        raise UserError(f"no checkpoint at '{directory}': give the directory that contains its config.json")
    if (directory / "engine.json").exists() or any(directory.glob("*.engine")):
        raise UserError(f"'{directory}' is an engine: give the checkpoint that it was built from")
    if not (directory / "config.json").exists():
        raise UserError(f"'{directory}' contains no config.json: give a checkpoint, or a build's checkpoint directory")
    return read_table(directory / "config.json", report)
