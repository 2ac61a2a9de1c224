"""What a checkpoint's config files declare, of either kind. No weight file is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from builder.checkpoint import checkpoint_config as configs
from builder.checkpoint import layout
from builder.checkpoint.declaration_check import read_declaration
from builder.checkpoint.tensor_files import read_table
from builder.checkpoint.violations import Code, Report, Unsupported, VerificationError, Violation
from builder.planning.compatibility import features_of
from builder.planning.model_config import Architecture
from plugins.common.errors import UserError
from plugins.common.formats import OF_DTYPE
from plugins.sparsity.declaration import Declaration

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Description:
    """A checkpoint without its tensors. In a TensorRT-LLM one, `expected` names rank r's as `rank{r}/NAME`."""

    directory: Path
    kind: Literal["hf", "trtllm"]
    config: Mapping[str, Any]
    architecture: Architecture
    quantization: configs.Quantization
    mapping: configs.Mapping
    expected: Mapping[str, layout.Expected]
    declaration: Declaration

    @property
    def ranks(self) -> int:
        return self.mapping.ranks

    @property
    def sparse_layers(self) -> tuple[str, ...]:
        """Those declared sparse as a whole or in part."""
        return self.declaration.pruned

    @property
    def whole_sparse_layers(self) -> tuple[str, ...]:
        """Those declared sparse as a whole."""
        return self.declaration.layers

    @property
    def format(self) -> str:
        """Of the quantized layers, or of all where none is: "int8", "fp8", "bf16", "fp16" or "fp32"."""
        if self.quantization.format != "none":
            return self.quantization.format
        return OF_DTYPE[self.architecture.dtype]

    @property
    def features(self) -> tuple[str, ...]:
        """What not every backend has (builder/planning/compatibility.py)."""
        pattern = self.declaration.pattern if self.sparse_layers else None
        return features_of(self.quantization.per_token, self.quantization.format_of("lm_head") != "none", pattern)

    @property
    def kv_cache(self) -> str:
        """ "none", "int8" or "fp8"."""
        return self.quantization.kv_cache


def describe(directory: Path) -> Description:
    """Reads the config files of the checkpoint at `directory`. Raises UserError and VerificationError, as `read`."""
    description = describe_to(directory, raise_first(directory))
    assert description is not None
    return description


def raise_first(directory: Path) -> Report:
    """A report that raises: UserError for what this release does not support, VerificationError for damage."""

    def refuse(violation: Violation) -> None:
        if isinstance(violation, Unsupported):
            raise UserError(f"'{directory / (violation.file or '')}': {violation.problem}")
        raise VerificationError(violation)

    return refuse


def describe_to(directory: Path, report: Report) -> Description | None:
    """The same, with errors reported. None where the errors leave no description."""
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
    else:
        expected = {
            f"rank{rank}/{name}": tensor
            for rank in range(mapping.ranks)
            for name, tensor in layout.trtllm_tensors(arch, quantization, mapping, rank, config).items()
        }
    weights = [tensor for tensor in expected.values() if tensor.role == "weight"]
    shapes = {str(x.layer): x.shapes[0] for x in weights}
    declared = read_declaration(directory, shapes, arch.head_widths, report)
    return Description(directory, kind, config, arch, quantization, mapping, expected, declared)


def _read_config(directory: Path, report: Report) -> dict[str, Any] | None:
    if not directory.is_dir():
        raise UserError(f"no checkpoint at '{directory}': give the directory that contains its config.json")
    if (directory / "engine.json").exists() or any(directory.glob("*.engine")):
        raise UserError(f"'{directory}' is an engine: give the checkpoint that it was built from")
    if not (directory / "config.json").exists():
        raise UserError(f"'{directory}' contains no config.json: give a checkpoint, or a build's checkpoint directory")
    return read_table(directory / "config.json", report)
