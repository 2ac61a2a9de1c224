"""Checks by the dense model's perplexity that the calibration text is of the model's kind."""

from __future__ import annotations

from pathlib import Path

from calibration.data.windows import Tokens

WINDOWS = 16  # of each text: enough to detect a wrong tokenizer or language
FAR = 3.0  # times the held-out text's perplexity


def compare_text(model: Path, calibration: Tokens, held_out: Tokens) -> dict[str, float]:
    """The dense model's perplexity on a few windows of each text. Raises GateError where its logits are not finite."""
    from calibration.evaluation.evaluate import hf_logits, perplexity
    from calibration.quantization.quantize import load_model

    logits = hf_logits(load_model(model))
    texts = {"calibration": calibration, "held_out": held_out}
    return {name: perplexity(logits, tokens[:WINDOWS]) for name, tokens in texts.items()}


def warning(perplexity: dict[str, float]) -> str:
    """The warning that `compare_text`'s result calls for; empty where the texts are alike."""
    if perplexity["calibration"] <= FAR * perplexity["held_out"]:
        return ""
    return (
        f"the calibration text looks wrong for this model: perplexity {perplexity['calibration']:.4g}, and "
        f"{perplexity['held_out']:.4g} on the evaluation text; check calibration.data"
    )
