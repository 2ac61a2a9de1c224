"""Calibration data under random damage: a UserError or documents, never a traceback, never JSON read as prose."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.data.conversations import document_of, plain_text
from calibration.data.documents import read_documents
from calibration.data.rows import Row
from plugins.common.errors import UserError
from tests.support.damage import TEXTS, VALUES, damaged

Texts = list[str]


def lines(texts: Texts) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def table(texts: Texts) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["id", "text"], *([str(n), text] for n, text in enumerate(texts))])
    return out.getvalue().encode()


def parquet(texts: Texts) -> bytes:
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": texts}), out)
    return out.getvalue()


FORMS: dict[str, Callable[[Texts], bytes]] = {
    "lines.jsonl": lines,
    "LINES.JSONL": lines,
    "lines.json": lines,
    "lines.ndjson": lines,
    "unnamed": lines,
    "named.txt": lines,
    "array.json": lambda texts: json.dumps([{"text": text} for text in texts], indent=1).encode(),
    "array.jsonl": lambda texts: json.dumps([{"text": text} for text in texts]).encode(),
    "strings.json": lambda texts: json.dumps(texts).encode(),
    "table.json": lambda texts: json.dumps({"version": 1, "data": [{"text": text} for text in texts]}).encode(),
    "columns.json": lambda texts: json.dumps({"text": texts, "id": list(range(len(texts)))}).encode(),
    "pandas.json": lambda texts: json.dumps({"text": {str(n): text for n, text in enumerate(texts)}}).encode(),
    "viewer.json": lambda texts: json.dumps(
        {"rows": [{"row_idx": n, "row": {"text": text}} for n, text in enumerate(texts)]}
    ).encode(),
    "pretty.json": lambda texts: "\n".join(json.dumps({"text": text}, indent=2) for text in texts).encode(),
    "lines.json.gz": lambda texts: gzip.compress(lines(texts)),
    "no-suffix-of-gzip.jsonl": lambda texts: gzip.compress(lines(texts)),
    "table.csv": table,
    "rows.parquet": parquet,
}


def read(path: Path, content: bytes) -> list[Any] | None:
    """The documents' contents; None where the file is refused, in one line that names it."""
    path.write_bytes(content)
    try:
        return [document.content for document in read_documents(str(path))]
    except UserError as error:
        message = str(error)
    assert str(path) in message
    assert "\n" not in message
    return None


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_back_every_text(name: str, tmp_path: Path) -> None:
    @given(st.lists(TEXTS, min_size=1, max_size=4))
    def check(texts: Texts) -> None:
        if name == "table.csv":
            texts = [text.replace("\0", " ") for text in texts]
        assert read(tmp_path / name, FORMS[name](texts)) == texts

    check()


@pytest.mark.parametrize("name", [name for name in FORMS if name not in ("unnamed", "named.txt")])
def test_a_damaged_file_is_refused_or_read_as_rows(name: str, tmp_path: Path) -> None:
    @given(st.data())
    def check(data: st.DataObject) -> None:
        content = FORMS[name](data.draw(st.lists(TEXTS, min_size=1, max_size=4)))
        for text in read(tmp_path / name, data.draw(damaged(content))) or []:
            assert '"text"' not in text or name.endswith(".csv"), text

    check()


@pytest.mark.parametrize("name", ["lines.json.gz", "array.json", "rows.parquet"])
def test_a_file_cut_short_is_refused(name: str, tmp_path: Path) -> None:
    """JSON Lines alone can be cut between two rows and look whole."""

    @given(st.lists(TEXTS, min_size=1, max_size=4), st.floats(0, 1, exclude_max=True))
    def check(texts: Texts, share: float) -> None:
        content = FORMS[name](texts)
        assert read(tmp_path / name, content[: int(len(content) * share)]) is None

    check()


def test_gzip_gives_all_or_nothing(tmp_path: Path) -> None:
    @given(st.data())
    def check(data: st.DataObject) -> None:
        texts = data.draw(st.lists(TEXTS, min_size=1, max_size=4))
        documents = read(tmp_path / "texts.jsonl.gz", data.draw(damaged(gzip.compress(lines(texts), mtime=0))))
        assert documents is None or documents == texts * (len(documents) // len(texts))  # a member may be there twice

    check()


KEYS = [
    "text",
    "messages",
    "conversations",
    "conversation",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "instruction",
    "input",
    "output",
    "history",
    "question",
    "answer",
    "query",
    "response",
    "system",
    "content",
    "article",
]
MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "tool_calls", "name"]),
        st.sampled_from(["user", "assistant", "human", "gpt", None, [], [{"type": "text", "text": "part"}]]) | VALUES,
        max_size=4,
    ),
    max_size=3,
)


@given(st.dictionaries(st.sampled_from(KEYS), st.text(max_size=8) | VALUES | MESSAGES, max_size=4) | VALUES)
def test_any_row_is_text_or_refused(row: Any) -> None:
    try:
        document = document_of(Row("'x' line 1", row))
    except UserError as error:
        message = str(error)
    else:
        content = document.content
        (content if isinstance(content, str) else plain_text(content)).encode("utf8")
        return
    assert message.startswith("'x' line 1")


@pytest.mark.parametrize("name", ["tokens.npy", "tokens.safetensors"])
def test_damaged_tokens_are_refused_or_whole(name: str, docs_llama: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save

    from calibration.data.windows import windows

    tokens = np.arange(64, dtype=np.int32).reshape(2, 32)
    content = io.BytesIO()
    np.save(content, tokens)
    whole = content.getvalue() if name.endswith(".npy") else save({"input_ids": tokens})

    @given(damaged(whole))
    def check(data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        try:
            seen = windows(str(tmp_path / name), docs_llama, 16)
        except UserError:
            return
        assert 0 <= seen.tokens.min() <= seen.tokens.max() < 4096

    check()
