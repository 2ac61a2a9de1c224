"""Loads the model's tokenizer and checks it against its tokenizer.json.

transformers 5 builds some tokenizers from their class, not from their file: under a SentencePiece class such as
LlamaTokenizerFast a byte-level tokenizer.json loses every space (https://github.com/huggingface/transformers/issues/45488).
TensorRT-LLM and others follow the file, and so does this module.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plugins.common.errors import UserError

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = (
    "The first  line, and 12 more.",
    " def f(x):\n\treturn x == 10  # it's\n\n",
    "Grüße, 東京 🙂 naïve",
)
PLAIN = PROBES[0]  # of characters that every tokenizer keeps


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, which gives the tokens of its tokenizer.json.

    Warns as `read_tokenizer` notes. Raises UserError where the directory contains no tokenizer that loads.
    """
    tokenizer, notes = read_tokenizer(model)
    for note in notes:
        log.warning(note)
    return tokenizer


def read_tokenizer(model: Path) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer, and notes: where transformers would read the file as something else, where decoding loses text."""
    from transformers import PreTrainedTokenizerFast

    notes = []
    tokenizer, difference = _as_transformers_reads_it(model)
    if difference:
        tokenizer = _load(PreTrainedTokenizerFast, model)
        if find_difference(tokenizer, model):
            raise UserError(
                f"'{model}': transformers does not give the tokens of its tokenizer.json: fetch its tokenizer again"
            )
        notes.append(
            f"'{model}': transformers reads tokenizer.json as {difference}: the tokens of tokenizer.json are used; "
            "set tokenizer_class in tokenizer_config.json to PreTrainedTokenizerFast"
        )
    if (text := tokenizer.decode(_ids(tokenizer, PLAIN))).strip() != PLAIN:
        notes.append(f"'{model}': its tokenizer turns '{PLAIN}' into '{text}': check it")
    return tokenizer, notes


def _as_transformers_reads_it(model: Path) -> tuple[Any, str]:
    """The tokenizer of the class that tokenizer_config.json names, and how it differs from tokenizer.json.

    A class that this transformers does not know differs altogether.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = _load(AutoTokenizer, model)
    except UserError:
        if not (model / "tokenizer.json").is_file():
            raise
        return None, "a class that it cannot load"
    name = type(tokenizer).__name__
    try:
        difference = find_difference(tokenizer, model)
    except Exception as error:  # of a tokenizer that loads and cannot encode
        return None, f"{name}, which fails on text ({' '.join(str(error).split())[:80]})"
    return tokenizer, f"{name}, {difference}" if difference else ""


def find_difference(tokenizer: PreTrainedTokenizerBase, model: Path) -> str:
    """How the tokens differ from those of the model's tokenizer.json; empty where they do not, or there is no file."""
    path = model / "tokenizer.json"
    if not path.is_file():
        return ""
    own = _own(path)
    for text in PROBES:
        expected, ids = own.encode(text, add_special_tokens=False).ids, _ids(tokenizer, text)
        if ids != expected and (decoded := tokenizer.decode(ids)) != text:
            return f"which turns {text!r} into {decoded!r}"
        if ids != expected:
            return f"which splits {text!r} otherwise"
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != own.decode(ids):
            return f"which decodes {ids[:8]} to {tokenizer.decode(ids)!r}, not {own.decode(ids)!r}"
    return ""


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _load(kind: Any, model: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(str(model), trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a missing or broken tokenizer
        raise UserError(_unusable(model, error)) from None
    return tokenizer


def _own(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    except Exception as error:
        raise UserError(_unusable(path.parent, error)) from None
    return tokenizer


def _unusable(model: Path, error: Exception) -> str:
    if not (model / "tokenizer.json").is_file():
        return f"'{model}' contains no tokenizer that loads ({type(error).__name__}): add tokenizer.json"
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return f"'{model}' contains no tokenizer that loads ({reason}): fetch its tokenizer files again"
