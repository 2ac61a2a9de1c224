"""The two configs of a pytorch engine, in the form that every release from 1.0 on reads.

config.json names what transformers 4 and 5 look for. Both it and hf_quant_config.json name the fused layers that
quantization leaves alone: 1.0 looks for `qkv_proj` among the excluded names, later releases for its parts too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builder.checkpoint import Checkpoint
from calibration.quantization.trtllm_config import for_transformers_4
from plugins.common.errors import UserError
from plugins.common.fused_layers import FUSED
from plugins.common.json_files import read_json, write_json

EIGHT_BIT = ("fp8", "int8")


def write(out: Path, checkpoint: Checkpoint) -> None:
    """Writes config.json, and hf_quant_config.json where the checkpoint has one.

    Raises UserError where TensorRT-LLM could not fuse the layers that it fuses.
    """
    config: dict[str, Any] = for_transformers_4(checkpoint.config)
    fused = excluded_fused_layers(checkpoint)
    if fused:
        section = config["quantization_config"]
        config["quantization_config"] = {**section, "ignore": [*(section.get("ignore") or []), *fused]}
    write_json(out / "config.json", config)
    path = checkpoint.directory / "hf_quant_config.json"
    if path.is_file():
        declared = read_json(path)
        declared["quantization"]["exclude_modules"] = [*(declared["quantization"].get("exclude_modules") or []), *fused]
        write_json(out / path.name, declared)


def excluded_fused_layers(checkpoint: Checkpoint) -> list[str]:
    """TensorRT-LLM's names of the fused layers whose parts are all left in 16 bit, in an 8-bit checkpoint.

    Raises UserError where only some parts are: a fused layer has one number format.
    """
    if checkpoint.format not in EIGHT_BIT:
        return []
    formats = {layer.name: layer.format for layer in checkpoint.shapes()}
    fused = []
    for last, parts in FUSED.items():
        for block in sorted({name.rpartition(".")[0] for name in formats if name.endswith(f".{parts[0]}")}):
            kinds = {part: formats.get(f"{block}.{part}") for part in parts}
            if len(set(kinds.values())) > 1:
                listing = ", ".join(f"{part} {kind}" for part, kind in kinds.items())
                raise UserError(
                    f"'{block}' has {listing}, and TensorRT-LLM fuses them into one {last}",
                    "exclude all of them from quantization, or none",
                )
            if not set(kinds.values()) & set(EIGHT_BIT):
                fused.append(f"{block}.{last}")
    return fused
