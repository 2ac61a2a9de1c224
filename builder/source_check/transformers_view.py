"""Whether transformers reads the config as we do: the same tensors, from its own skeleton on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.checkpoint import layout
from builder.checkpoint.checkpoint_config import Quantization
from builder.planning.model_config import Architecture
from plugins.common.errors import UserError


def check_skeleton(config: Mapping[str, Any], shapes: Architecture, source: str) -> None:
    """Raises UserError for a config that transformers refuses, or that gives it other tensors than ours."""
    import torch
    import transformers

    values = {key: value for key, value in config.items() if key != "auto_map"}
    try:
        settings = getattr(transformers, shapes.family.config_class).from_dict(values)
        with torch.device("meta"):
            tensors = getattr(transformers, shapes.name)(settings).state_dict()
    except Exception as error:  # transformers raises what it likes for a value that it does not take
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"'{source}' is a config that transformers rejects ({reason}): fetch the model again") from None
    expected = {name: part for name, part in layout.hf_tensors(shapes, Quantization()).items() if name in tensors}
    for name, tensor in tensors.items():
        if name not in expected or tuple(tensor.shape) not in expected[name].shapes:
            raise UserError(
                f"'{source}': transformers {transformers.__version__} expects '{name}' {list(tensor.shape)}, "
                "unlike twofour: set the sizes that the config omits"
            )
