"""Holds a source model to its config before anything is calibrated: weights, settings, generation config, tokenizer.

`plan --check`, `build` and the dense baseline's engine call this; `plan` alone reads config.json (settings.py).
"""

from __future__ import annotations

from pathlib import Path

from builder.planning.model_config import architecture
from builder.source_check.generation import check_generation
from builder.source_check.settings import check_settings
from builder.source_check.weights import check_weights

__all__ = ["check_generation", "check_settings", "check_source", "check_weights"]


def check_source(model: Path) -> list[str]:
    """Checks the files of a model directory and returns what a person should know of them.

    Raises UserError, one line, for what a later stage could not build, or would build from what is not there.
    """
    from builder.planning.hub import find_config
    from builder.source_check.tokenizer import check_tokenizer
    from builder.source_check.transformers_view import check_skeleton

    config, source = find_config(str(model))
    shapes = architecture(config, source)
    notes = check_weights(model, shapes, config)
    check_skeleton(config, shapes, source)
    notes += check_generation(model, config, shapes.vocab_size)
    return notes + check_tokenizer(model, shapes.vocab_size)
