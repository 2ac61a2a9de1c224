"""Loads a causal language model whose every weight comes from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibration.model.silence import suppress_output
from calibration.model.weight_files import model_dtype
from plugins.common.errors import UserError


def load_causal_lm(directory: Path, dtype: torch.dtype | None = None, **options: Any) -> nn.Module:
    """The model for evaluation, in `dtype` or its own (see `model_dtype`). `options` are `from_pretrained`'s.

    Raises UserError for files that do not load, and for a weight that they lack: transformers would draw it at random.
    """
    from transformers import AutoModelForCausalLM

    dtype = dtype or getattr(torch, model_dtype(directory))
    options |= _generation_config(directory)
    try:
        with suppress_output():
            model, info = AutoModelForCausalLM.from_pretrained(
                str(directory), dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
    except Exception as error:  # transformers, safetensors and accelerate raise many kinds
        reason = " ".join(f"{error}".split())[:200] or type(error).__name__
        raise UserError(f"'{directory}' cannot be loaded ({reason}): check its files") from None
    if lost := sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]):
        raise UserError(f"'{directory}' lacks the tensor '{lost[0]}': its weights do not match its config.json")
    loaded: nn.Module = model.eval()
    return loaded


def _generation_config(directory: Path) -> dict[str, Any]:
    """An empty generation config in place of one that transformers refuses: nothing is generated with it."""
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_pretrained(str(directory))
    except ValueError:
        return {"generation_config": GenerationConfig()}
    except OSError:  # there is none
        pass
    return {}
