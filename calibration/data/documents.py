"""Documents of a data file or of a Hugging Face dataset. An error names the file and the row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from calibration.data.conversations import Document, document_of
from calibration.data.rows import COMPRESSED, JSON_SUFFIXES, TABLE_SUFFIXES, Row, read_rows
from plugins.common.errors import UserError

FILE_SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, *COMPRESSED, ".parquet", ".txt", ".md", ".safetensors", ".npy")
DATASET_ROWS = 4096  # of a hub dataset, which may hold billions


def read_documents(data: str) -> list[Document]:
    """All documents, at least one, of a file (see rows.py) or of a dataset id. Raises UserError."""
    path = find_file(data)
    rows = _dataset(data) if path is None else read_rows(path)
    documents = [document_of(row) for row in rows]
    if not any(document.content for document in documents):
        raise UserError(f"'{data}' holds no text: it must hold at least one document")
    return documents


def find_file(data: str) -> Path | None:
    """The file that `data` names; None where it can only be a dataset id. Raises UserError for a file that lacks."""
    path = Path(data)
    try:
        if path.is_dir():
            raise UserError(f"'{data}' is a directory: give a .jsonl or .txt file in it")
        if path.is_file():
            return path
    except OSError as error:
        raise UserError(f"'{data[:80]}' cannot be looked up ({error.strerror}): check the path") from None
    if path.suffix.lower() in FILE_SUFFIXES or data.startswith((".", "/", "~")):
        raise UserError(f"no file at '{data}': check the path")
    return None


def _dataset(name: str) -> Iterator[Row]:
    """`id`, `id:config` or `id:config:split` of the Hugging Face hub, streamed."""
    identity, config, split = [*name.split(":"), "", ""][:3]
    try:
        from datasets import load_dataset

        rows = load_dataset(identity, config or None, split=split or "train", streaming=True)
        taken = list(rows.take(DATASET_ROWS))
    except ImportError:
        raise UserError(
            f"'{name}' is not a file, and a dataset id needs the package 'datasets': pip install datasets"
        ) from None
    except Exception as error:  # datasets raises many kinds where the network is closed or the id is wrong
        raise UserError(
            f"no file '{name}' here, and the dataset cannot be fetched ({type(error).__name__}): "
            "check the name, or download it as .jsonl"
        ) from None
    return (Row(f"dataset '{name}' row {number}", dict(row)) for number, row in enumerate(taken, start=1))
