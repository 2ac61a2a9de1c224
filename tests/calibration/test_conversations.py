"""Rows of every common layout: what they are read as, and the one line that a row without text gets."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from calibration.data.conversations import Document, document_of, plain_text
from calibration.data.documents import read_documents
from calibration.data.encoding import encode_documents
from calibration.data.rows import Row, read_rows
from calibration.data.tokenizer import load_tokenizer
from plugins.common.errors import UserError

USER, ASSISTANT = {"role": "user", "content": "Ask."}, {"role": "assistant", "content": "Answer."}
CALL = [{"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": 3}'}}]


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ("a text", "a text"),
        ({"text": "a", "messages": [USER]}, "a"),
        ({"text": None, "messages": [USER]}, [USER]),
        ({"article": "a", "id": 3}, "a"),
        ({"prompt": "a"}, "a"),
        ({"messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
        ({"conversations": [{"from": "human", "value": "Ask."}, {"from": "gpt", "value": "Answer."}]},
         [USER, ASSISTANT]),
        ({"conversation": [USER, ASSISTANT]}, [USER, ASSISTANT]),
        ({"system": "Be brief.", "conversations": [{"from": "human", "value": "Ask."}]},
         [{"role": "system", "content": "Be brief."}, USER]),
        ({"prompt": "The sky is", "completion": " blue."}, "The sky is blue."),
        ({"prompt": [USER], "completion": [ASSISTANT]}, [USER, ASSISTANT]),
        ({"prompt": "Ask.", "chosen": "Answer.", "rejected": "No."}, [USER, ASSISTANT]),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": []}, [USER, ASSISTANT]),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER]}, [USER, ASSISTANT]),
        ({"instruction": "Ask.", "input": "", "output": "Answer."}, [USER, ASSISTANT]),
        ({"instruction": "Ask.", "input": "It.", "output": "Answer."},
         [{"role": "user", "content": "Ask.\nIt."}, ASSISTANT]),
        ({"instruction": "Ask.", "output": "Answer.", "history": [["Ask.", "Answer."]]}, [USER, ASSISTANT] * 2),
        ({"question": "Ask.", "answer": "Answer."}, [USER, ASSISTANT]),
        ({"query": "Ask.", "response": "Answer."}, [USER, ASSISTANT]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "sk."}]}]},
         [USER]),
    ],
)  # fmt: skip
def test_a_row_is_read_in_every_common_layout(row: Any, content: Any) -> None:
    assert document_of(Row("'x' line 1", row)).content == content


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ({"text": None}, "'text' is null, not text"),
        ({"text": 3}, "'text' is a number, not text"),
        ({"body": "a"}, "has neither 'text' nor 'messages' (its keys: body)"),
        ([], "is not an object"),
        ({"messages": []}, "'messages' holds no message"),
        ({"messages": ["Ask."]}, "'messages' 1 is a str: write an object"),
        ({"messages": [USER, {"role": "assistant"}]}, "'messages' 2 has no 'content'"),
        ({"messages": [{"content": "Ask."}]}, "'messages' 1 has no 'role'"),
        ({"messages": [{"role": "user", "content": 3}]}, "'messages' 1: its content is a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "a part of type 'image_url'"),
        ({"prompt": "a", "completion": None}, "'completion' is null"),
        ({"question": ["a"], "answer": "b"}, "'question' is a list"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "'history' is not a list of pairs"),
        ({"text": "half \ud83d of a character"}, "holds \\ud83d, one half of a character"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "holds \\udc00"),
    ],
)  # fmt: skip
def test_a_row_without_text_is_named_with_what_it_holds(row: Any, fragment: str) -> None:
    with pytest.raises(UserError) as error:
        document_of(Row("'x' line 7", row))
    assert str(error.value).startswith("'x' line 7")
    assert fragment in str(error.value)


@pytest.fixture(params=[False, True])
def tokenizer(request: pytest.FixtureRequest, docs_llama: Path) -> Any:
    """The example's tokenizer, without and with a template that joins contents as strings, as SmolLM2's does."""
    tokenizer = load_tokenizer(docs_llama)
    if request.param:
        tokenizer.chat_template = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
    return tokenizer


@pytest.mark.parametrize(
    "messages",
    [
        [USER, {"role": "assistant", "content": None, "tool_calls": CALL}, {"role": "tool", "content": "3"}, ASSISTANT],
        [{"role": "user", "content": [{"type": "text", "text": "Ask."}]}, ASSISTANT],
        [USER, {"role": "assistant", "tool_calls": CALL}, ASSISTANT],
    ],
)
def test_messages_without_plain_content_are_encoded(messages: list[Any], tokenizer: Any) -> None:
    (ids,) = encode_documents([document_of(Row("'x' line 1", {"messages": messages}))], tokenizer, None)
    text = tokenizer.decode(ids)
    assert "Ask." in text
    assert "Answer." in text
    assert "{'" not in text


def test_tool_calls_are_part_of_the_text_without_a_template() -> None:
    document = document_of(Row("'x'", {"messages": [USER, {"role": "assistant", "tool_calls": CALL}]}))
    assert isinstance(document.content, list)
    assert '"name": "look"' in plain_text(document.content)


@pytest.mark.parametrize(
    ("template", "fragment"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[5]['content'] }}", "UndefinedError"),
        ("{% for m in messages %}{{ m['content'] }", "TemplateSyntaxError"),
        ("{{ messages[0]['content'] + 3 }}", "TypeError"),
        ("A constant.", "drops the message 'Ask.'"),
    ],
)
def test_a_template_that_does_not_render_the_conversation_is_one_line(
    template: str, fragment: str, docs_llama: Path
) -> None:
    tokenizer: Any = load_tokenizer(docs_llama)
    tokenizer.chat_template = template
    with pytest.raises(UserError) as error:
        encode_documents([Document([USER, ASSISTANT], "'x' line 4")], tokenizer, None)
    assert str(error.value).startswith("'x' line 4: the chat template ")
    assert fragment in str(error.value)
    assert "\n" not in str(error.value)


def test_a_template_that_is_asked_for_and_missing_is_refused(docs_llama: Path) -> None:
    with pytest.raises(UserError, match="calibration.chat_template is true, and the tokenizer has no chat template"):
        encode_documents([Document("a")], load_tokenizer(docs_llama), True)


# files


def contents(path: Path, data: bytes) -> list[Any]:
    path.write_bytes(data)
    return [document.content for document in read_documents(str(path))]


@pytest.mark.parametrize("name", ["one.json", "one.jsonl"])
def test_a_single_conversation_is_one_document(name: str, tmp_path: Path) -> None:
    assert contents(tmp_path / name, json.dumps({"messages": [USER, ASSISTANT]}).encode()) == [[USER, ASSISTANT]]


@pytest.mark.parametrize("suffix", [".txt", ".md", ""])
def test_prose_that_begins_like_json_stays_prose(suffix: str, tmp_path: Path) -> None:
    for text in ("[1] Knuth, The Art.\n\nMore.", "{braces} in prose", "[link](there) and\nmore", '"quoted": a line'):
        assert contents(tmp_path / f"a{suffix}", text.encode()) == [text]


def test_damaged_json_under_a_text_name_is_not_prose(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 2 is not JSON"):
        contents(tmp_path / "rows.txt", b'{"text": "a"}\n{"text": "b\n')


@pytest.mark.parametrize(
    ("name", "data", "fragment"),
    [
        ("a.jsonl", b'{"text": "a", "text": "b"}\n{"text": "c"}', "line 1 is not JSON (the key 'text' appears twice)"),
        ("a.json", b'[{"text": "a"}, {"text": ]', "line 1 is not JSON"),
        ("a.json", b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "several lists of rows (train, test)"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "is not JSON"),
        ("a.txt", "utf16".encode("utf-16-le"), "line 1 holds a NUL character"),
        ("a.csv", b'id,text\n1,"a"\n2,b,c\n', "line 3 does not have the 2 fields"),
        ("a.csv", b'id,text\n1,"a\n', "is not a table of values"),
        ("a.csv", b"text,text\na,b\n", "has a duplicate column"),
        ("a.parquet", b"PAR1 and no more", "is not a complete Parquet file"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd", "is compressed with zstd"),
        ("a.jsonl", b"PK\x03\x04", "is a zip archive"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named_with_the_line(
    name: str, data: bytes, fragment: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        contents(tmp_path / name, data)
    assert str(error.value).startswith(f"'{tmp_path / name}' ")
    assert fragment in str(error.value)
    assert "\n" not in str(error.value)


def test_gzip_that_is_damaged_anywhere_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress("\n".join(json.dumps({"text": f"text {n} " * 9}) for n in range(60)).encode())
    block, checksum = bytearray(whole), bytearray(whole)
    block[10], checksum[-6] = 0xFF, checksum[-6] ^ 0xFF
    for data in (whole[: len(whole) // 2], bytes(block), bytes(checksum), b'{"text": "a"}\n', whole + b"more"):
        with pytest.raises(UserError, match="is not a complete gzip file"):
            contents(tmp_path / "a.jsonl.gz", data)


def test_a_row_keeps_its_place_for_later_errors(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert [row.where for row in read_rows(tmp_path / "a.jsonl")] == [
        f"'{tmp_path / 'a.jsonl'}' line {n}" for n in (1, 3)
    ]
