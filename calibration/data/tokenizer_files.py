"""The files that make a tokenizer, carried along: nothing added, embeddings untouched.

transformers 5 writes two things into tokenizer_config.json that transformers 4, which TensorRT-LLM 1.0 to 1.2 pins,
cannot read. Both read the older form, so that is what is written.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from plugins.common.json_files import read_json, write_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copies those that `source` has, in the form that transformers 4 and 5 both read."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    path = out / "tokenizer_config.json"
    if path.is_file():
        write_json(path, for_transformers_4(read_json(path)), 2)


def for_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json with the older name of the class, and the older key of further special tokens."""
    config = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
