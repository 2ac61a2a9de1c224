"""Calibration windows: deterministic, hashed, from every kind of file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.config import CalibrationData
from calibration.data.documents import read_documents
from calibration.data.tokenizer import load_tokenizer
from calibration.data.windows import Windows, calibration_windows, windows
from plugins.common.errors import UserError

TEXTS = ["The first text. " * 30, "A second one, longer. " * 50, "short", "The last of them. " * 20]


@pytest.fixture(scope="module")
def model(docs_llama: Path) -> Path:
    return docs_llama


def write_jsonl(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_the_same_seed_gives_the_same_tokens(model: Path, tmp_path: Path) -> None:
    with (model / "calibration.jsonl").open(encoding="utf8") as texts:
        (tmp_path / "texts.jsonl").write_text("".join(next(texts) for _ in range(20)), encoding="utf8")
    config = CalibrationData(data=str(tmp_path / "texts.jsonl"), samples=16, sequence_length=64, seed=3)
    first, second = calibration_windows(config, model), calibration_windows(config, model)
    assert first.tokens.shape == (16, 64)
    assert first.tokens.dtype == np.int64
    assert first.sha256 == second.sha256
    assert (first.tokens == second.tokens).all()
    other = calibration_windows(config.model_copy(update={"seed": 4}), model)
    assert other.sha256 != first.sha256


def test_the_hash_is_of_shape_and_tokens() -> None:
    documents = np.zeros(2, dtype=np.int64)
    tokens = np.arange(12, dtype=np.int64)
    shapes = [Windows(tokens.reshape(2, 6), documents), Windows(tokens.reshape(3, 4), documents)]
    assert shapes[0].sha256 != shapes[1].sha256
    changed = tokens.copy()
    changed[5] = 0
    assert Windows(changed.reshape(2, 6), documents).sha256 != shapes[0].sha256


def test_first_comes_one_window_of_each_document_and_the_rest_is_joined(model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "texts.jsonl")
    tokenizer = load_tokenizer(model)
    ids = [list(tokenizer(text)["input_ids"]) for text in TEXTS]
    actual = windows(str(data), model, 32)
    whole = [len(document) // 32 for document in ids]
    round_robin = [(at, number) for number, count in enumerate(whole) for at in range(count)]
    for row, (at, number) in zip(actual.tokens, sorted(round_robin), strict=False):
        assert row.tolist() == ids[number][at * 32 : (at + 1) * 32]
    rest = [token for document, count in zip(ids, whole, strict=True) for token in document[count * 32 :]]
    joined = actual.tokens[sum(whole) :]
    assert joined.flatten().tolist() == rest[: len(rest) // 32 * 32]
    assert len(set(actual.documents.tolist())) == sum(1 for count in whole if count) + len(joined)


def test_the_order_of_the_data_is_kept_without_a_seed(model: Path, tmp_path: Path) -> None:
    actual = windows(str(write_jsonl(tmp_path / "texts.jsonl")), model, 32, samples=2)
    assert actual.documents.tolist() == [0, 1]


def test_every_kind_of_text_file_holds_the_same_text(model: Path, tmp_path: Path) -> None:
    text = TEXTS[1]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text, "title": "x"}) + "\n\n")
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.md").write_text(text)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": text}) + "\n")
    actual = {windows(str(path), model, 32).sha256 for path in tmp_path.iterdir()}
    assert len(actual) == 1


def test_a_form_feed_parts_the_documents_of_a_plain_text(tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("one\n\nstill one\fand two\f \n")
    documents = read_documents(str(tmp_path / "two.txt"))
    assert [document.content for document in documents] == ["one\n\nstill one", "and two"]


@pytest.mark.parametrize("name", ["tokens.npy", "tokens.safetensors"])
def test_token_files_are_taken_as_they_are(model: Path, tmp_path: Path, name: str) -> None:
    from safetensors.numpy import save_file

    tokens = np.random.default_rng(0).integers(0, 4096, (5, 40), dtype=np.int32)
    path = tmp_path / name
    np.save(path, tokens) if name.endswith(".npy") else save_file({"input_ids": tokens}, path)
    actual = windows(str(path), model, 32, samples=4)
    assert actual.tokens.dtype == np.int64
    assert (actual.tokens == tokens[:4, :32]).all()


@pytest.mark.parametrize(
    ("tokens", "fragment"),
    [
        (np.zeros((2, 16), np.int64), "of shape [2, 16]: integers [samples, 32 or more] are needed"),
        (np.zeros((2, 32), np.float32), "holds float32"),
        (np.zeros(64, np.int64), "of shape [64]"),
        (np.full((2, 32), -1), "holds token -1"),
        (np.full((2, 32), 4096), "holds token 4096, beyond the vocabulary of 4096"),
        (np.array([[None] * 32]), "cannot be read as tokens"),
    ],
)
def test_token_files_that_cannot_be_used(model: Path, tmp_path: Path, tokens: Any, fragment: str) -> None:
    np.save(tmp_path / "tokens.npy", tokens)
    with pytest.raises(UserError) as error:
        windows(str(tmp_path / "tokens.npy"), model, 32)
    assert fragment in str(error.value)


def test_a_safetensors_file_without_input_ids(model: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"tokens": np.zeros((2, 32), np.int64)}, tmp_path / "tokens.safetensors")
    with pytest.raises(UserError, match="has no tensor 'input_ids'"):
        windows(str(tmp_path / "tokens.safetensors"), model, 32)


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
TALK = [{"role": "user", "content": "Ask. " * 40}, {"role": "assistant", "content": "Answer. " * 40}]


@pytest.fixture
def chat_model(model: Path, tmp_path: Path) -> Path:
    """The example's tokenizer with a chat template."""
    out = tmp_path / "chat"
    out.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((model / name).read_bytes())
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out


def test_the_chat_template_is_applied_to_messages(model: Path, chat_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n")
    tokenizer = load_tokenizer(chat_model)

    def first(model: Path, chat_template: bool | None = None) -> str:
        actual = windows(str(path), model, 32, samples=1, chat_template=chat_template)
        return str(tokenizer.decode(actual.tokens[0], skip_special_tokens=True))

    assert first(chat_model).startswith("<user>Ask.")
    assert first(chat_model, chat_template=False).startswith("Ask.")
    assert first(model).startswith("Ask.")  # a tokenizer without a template


def test_plain_text_is_put_into_the_chat_template_only_when_asked(chat_model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "texts.jsonl", [TEXTS[0]])
    tokenizer = load_tokenizer(chat_model)
    asked = windows(str(path), chat_model, 32, chat_template=True)
    assert tokenizer.decode(asked.tokens[0]).startswith("<user>The first text.")
    assert "<user>" not in tokenizer.decode(windows(str(path), chat_model, 32).tokens[0])


def test_a_dataset_is_streamed_and_its_text_column_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return datasets.IterableDataset.from_generator(lambda: ({"id": i, "article": f"text {i}"} for i in range(3)))

    monkeypatch.setattr(datasets, "load_dataset", load)
    documents = read_documents("acme/news:3.0.0:validation")
    assert [document.content for document in documents] == ["text 0", "text 1", "text 2"]
    assert asked == [(("acme/news", "3.0.0"), {"split": "validation", "streaming": True})]
