"""Reads documents from JSONL, plain text or a Hugging Face dataset. An error names the file and the line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plugins.common.errors import UserError

Document = str | list[dict[str, str]]  # text, or the messages of a conversation

TEXT_COLUMNS = ("text", "content", "article", "document", "prompt")
FILE_SUFFIXES = (".jsonl", ".gz", ".txt", ".md", ".json", ".safetensors", ".npy")
DATASET_ROWS = 4096  # of a hub dataset, which may hold billions


def read_documents(data: str) -> list[Document]:
    """All documents, at least one, of a file (.jsonl, .jsonl.gz, .txt, .md) or of a dataset id. Raises UserError."""
    path = find_file(data)
    if path is None:
        documents = list(_dataset(data))
    else:
        documents = list(_jsonl(path) if ".jsonl" in path.suffixes else _text(path))
    if not documents:
        raise UserError(f"'{data}' holds no text: it must hold at least one document")
    return documents


def find_file(data: str) -> Path | None:
    """The file that `data` names; None where it can only be a dataset id. Raises UserError for a file that lacks."""
    path = Path(data)
    if path.is_dir():
        raise UserError(f"'{data}' is a directory: name a .jsonl or .txt file in it")
    if path.is_file():
        return path
    if path.suffix in FILE_SUFFIXES or data.startswith((".", "/")):
        raise UserError(f"no file at '{data}': check the path")
    return None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without line ends or byte-order mark."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, raw in enumerate(file, start=1):
                try:
                    yield number, raw.decode("utf-8-sig" if number == 1 else "utf8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"'{path}' line {number} is not UTF-8 (byte {error.object[error.start]:#04x}): convert the file"
                    ) from None
        except (gzip.BadGzipFile, EOFError) as error:
            raise UserError(f"'{path}' is not a whole gzip file ({error}): make it again") from None


def _jsonl(path: Path) -> Iterator[Document]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"'{path}' line {number} is not JSON ({error.msg}): one object a line") from None
        yield _document(row, f"'{path}' line {number}")


def _document(row: Any, where: str) -> Document:
    if not isinstance(row, dict):
        raise UserError(f'{where} is not an object: write {{"text": "..."}}')
    if isinstance(row.get("text"), str):
        return str(row["text"])
    messages = row.get("messages")
    if isinstance(messages, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
        return messages
    keys = ", ".join(map(str, row)) or "none"
    raise UserError(f"{where} has neither 'text' nor 'messages' (its keys: {keys}): rename the text's key to 'text'")


def _text(path: Path) -> Iterator[Document]:
    """Paragraph groups: a line of its own that is empty ends nothing; a form feed ends a document."""
    whole = "\n".join(line for _, line in _lines(path))
    yield from (part for part in whole.split("\f") if part.strip())


def _dataset(name: str) -> Iterator[Document]:
    """`id`, `id:config` or `id:config:split` of the Hugging Face hub, streamed."""
    identity, config, split = [*name.split(":"), "", ""][:3]
    try:
        from datasets import load_dataset

        rows = load_dataset(identity, config or None, split=split or "train", streaming=True)
        taken = list(rows.take(DATASET_ROWS))
    except ImportError:
        raise UserError(
            f"'{name}' is no file, and a dataset id needs the package 'datasets': pip install datasets"
        ) from None
    except Exception as error:  # datasets raises many kinds where the network is closed or the id is wrong
        raise UserError(
            f"no file '{name}' here, and the dataset cannot be fetched ({type(error).__name__}): "
            "check the name, or download it as .jsonl"
        ) from None
    for number, row in enumerate(taken, start=1):
        column = next((key for key in TEXT_COLUMNS if isinstance(row.get(key), str)), None)
        yield _document({"text": row[column]} if column else row, f"dataset '{name}' row {number}")
