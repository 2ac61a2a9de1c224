"""The token ids that begin, end and pad a text: in generation_config.json, or else in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plugins.common.errors import UserError
from plugins.common.json_files import read_json_object

FILE = "generation_config.json"
KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_generation(model: Path, config: Mapping[str, Any], vocabulary: int) -> list[str]:
    """Notes on token ids. Raises UserError for a file that is not a JSON object and for an id that is not a number."""
    path = model / FILE
    settings = read_json_object(path, "fetch it again, or remove it") if path.is_file() else {}
    notes = []
    for source, table in ((path, settings), (model / "config.json", config)):
        for key in KEYS:
            for token in _ids(table.get(key), key, source):
                if key == "eos_token_id" and not 0 <= token < vocabulary:
                    notes.append(f"'{source.name}' ends texts at token {token}, outside the vocabulary of {vocabulary}")
    return notes


def _ids(value: Any, key: str, source: Path) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise UserError(f"'{source}': {key} is {str(value)[:40]!r}, not a token id or a list of them: fix it")
    return ids
