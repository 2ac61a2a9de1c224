"""The checkpoint stage: quantize, export through ModelOpt, and prove the files before anything else reads them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from builder import checkpoint
from builder.checkpoint import checkpoint_config as configs
from builder.checkpoint import layout
from builder.planning.hub import find_config
from builder.planning.model_config import architecture
from builder.verify import verify
from calibration.config import Quantization
from calibration.quantization import export
from calibration.quantization.quantize import load_model, quantize
from plugins.common.progress import Progress
from plugins.sparsity.declaration import Declaration


def write_checkpoints(
    source: Path,
    config: Quantization,
    layers: Sequence[str],
    tokens: Any,
    out: Path,
    trtllm: tuple[int, int] | None,
    progress: Progress,
) -> None:
    """Writes out/hf and, for `trtllm` (tensor parallel, pipeline parallel), out/trtllm.

    `layers` are the modules to quantize; `tokens` [samples, length] may be None where nothing is.
    Raises GateError where a written file is not what it should be.
    """
    declared, names = Declaration.read(source), _tensors(source)
    if not config.wanted and trtllm is None:
        export.copy_checkpoint(source, out / "hf", declared, names)
    else:
        model = load_model(source)
        if config.wanted:
            model = quantize(model, config, layers, tokens, progress)
        if trtllm is not None:
            export.export_trtllm(model, source, out / "trtllm", declared, *trtllm)
        if config.wanted:
            export.export_hf(model, source, out / "hf", declared, per_token=config.activations == "per_token")
        else:
            export.copy_checkpoint(source, out / "hf", declared, names)
    for written in sorted(out.iterdir()):
        checkpoint.normalize_zeros(written)  # rounding to FP8 leaves -0.0 where a kept weight was tiny
        verify(written, progress=progress).require()


def _tensors(source: Path) -> Collection[str]:
    """The names of the tensors that the model's config calls for or allows."""
    config, where = find_config(str(source))
    return layout.hf_tensors(architecture(config, where), configs.Quantization()).keys()
