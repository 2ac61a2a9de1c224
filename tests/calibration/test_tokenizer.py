"""The tokenizer that calibration, evaluation and serving share: tokenizer.json's own tokens, and one BOS."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from calibration.data.encoding import encode_text
from calibration.data.tokenizer import load_tokenizer, read_tokenizer
from calibration.data.windows import windows
from plugins.common.errors import UserError

TEXT = "A trigger is  a named object,\n\tattached to 'x'.  naïve 漢字 🙂"


@pytest.fixture
def model(docs_llama: Path, tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(docs_llama / name, tmp_path / name)
    return tmp_path


def set_class(model: Path, **changes: Any) -> None:
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | changes
    settings.pop("backend", None)
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "name",
    ["LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "GPT2TokenizerFast",
     "Qwen2TokenizerFast", "T5TokenizerFast", "GemmaTokenizerFast", "NoSuchTokenizer", None],
)  # fmt: skip
def test_the_tokens_are_those_of_tokenizer_json_whatever_the_class(model: Path, name: str | None) -> None:
    own = Tokenizer.from_file(str(model / "tokenizer.json"))
    set_class(model, tokenizer_class=name)
    tokenizer = load_tokenizer(model)
    assert encode_text(tokenizer, TEXT, add_special_tokens=False) == own.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.decode(own.encode(TEXT, add_special_tokens=False).ids) == TEXT


def test_a_class_that_drops_spaces_is_named(model: Path) -> None:
    set_class(model, tokenizer_class="LlamaTokenizerFast")
    _, (note,) = read_tokenizer(model)
    assert "Thefirstline" in note
    assert "PreTrainedTokenizerFast" in note


def test_a_tokenizer_that_loses_text_is_named(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    _, (note,) = read_tokenizer(model)
    assert "into 'the first  line" in note


def test_a_sound_tokenizer_needs_no_word(model: Path) -> None:
    assert read_tokenizer(model)[1] == []


def test_a_damaged_tokenizer_is_quoted(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match="contains no tokenizer that loads"):
        load_tokenizer(model)


@pytest.mark.parametrize("text", ["A trigger is", "<s>A trigger is", "<s><s>A trigger is"])
def test_a_text_has_one_bos(model: Path, text: str) -> None:
    ids = encode_text(load_tokenizer(model), text)
    assert ids == [0, *encode_text(load_tokenizer(model), "A trigger is", add_special_tokens=False)]


@pytest.mark.parametrize("column", ["messages", "text", "templated"])
def test_every_window_begins_with_one_bos(model: Path, tmp_path: Path, column: str) -> None:
    (model / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    )
    text = "The collections module. " * 20
    rows = {
        "messages": {"messages": [{"role": "user", "content": text}]},
        "text": {"text": text},
        "templated": {"text": f"<s>[user] {text}"},
    }
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(rows[column]) + "\n" for _ in range(3)))
    tokens = windows(str(data), model, 32, samples=3).tokens
    assert (tokens[:, 0] == 0).all()
    assert (tokens[:, 1] != 0).all()
