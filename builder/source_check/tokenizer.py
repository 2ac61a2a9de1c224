"""Whether the tokenizer is the model's: the tokens of its tokenizer.json, text that comes back, ids that exist."""

from __future__ import annotations

from pathlib import Path

from calibration.data.tokenizer import read_tokenizer

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def check_tokenizer(model: Path, vocabulary: int) -> list[str]:
    """Notes on the tokenizer of `model`. Raises UserError for one that does not load."""
    if not any((model / name).is_file() for name in FILES):
        return []  # calibration on token files needs none
    tokenizer, notes = read_tokenizer(model)
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= vocabulary}
    if beyond:
        token = min(beyond, key=lambda name: beyond[name])
        notes.append(
            f"the tokenizer has {len(beyond)} tokens that the model lacks, from {beyond[token]} '{token}' on: "
            "text that contains one is rejected"
        )
    return notes
