"""Rows of a data file, recognized by content: compression, JSON in every arrangement, CSV, Parquet, plain text.

A row is a JSON value, or the text of one document. A file that is none of these raises a UserError that names the line.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugins.common.errors import UserError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson", ".jsonlines")
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
COMPRESSED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz"}
DECOMPRESS = {"gzip": gzip.decompress, "bzip2": bz2.decompress, "xz": lzma.decompress}
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}
REFUSED = {
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: decompress it first (zstd -d)",
    b"PK\x03\x04": "is a zip archive: unpack it and give the file in it",
    b"%PDF": "is a PDF: extract its text first",
}
LIKE_JSON = re.compile(r"""\s*[\[{]\s*\{?\s*["'][^"'\n]*["']\s*:""")


@dataclass(frozen=True)
class Row:
    """One row and its place, such as "'texts.jsonl' line 3"."""

    where: str
    value: Any


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of `path`, in order. Raises UserError for a file that is damaged or of no known form."""
    data = _decompressed(path)
    suffix = _suffix(path)
    if suffix == ".parquet" or data.startswith(b"PAR1"):
        return _parquet_rows(data, path)
    text = _decoded(data, path)
    if suffix in TABLE_SUFFIXES:
        return _table_rows(text, path, TABLE_SUFFIXES[suffix])
    if suffix in JSON_SUFFIXES or _is_json(text):
        return _json_rows(text, path)
    return _text_rows(text, path)


def _suffix(path: Path) -> str:
    """The name's suffix in lower case, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kept = [suffix for suffix in suffixes if suffix not in COMPRESSED]
    return kept[-1] if kept else ""


def _decompressed(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}): check the file") from None
    for magic, reason in REFUSED.items():
        if data.startswith(magic):
            raise UserError(f"'{path}' {reason}")
    kind = next((kind for magic, kind in MAGIC.items() if data.startswith(magic)), COMPRESSED.get(path.suffix.lower()))
    if kind is None or not data:
        return data
    try:
        return DECOMPRESS[kind](data)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise UserError(f"'{path}' is not a complete {kind} file ({error}): create it again") from None


def _decoded(data: bytes, path: Path) -> str:
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"'{path}' line {line} is not UTF-8 (byte {data[error.start]:#04x}): convert the file"
        ) from None


def _text_rows(text: str, path: Path) -> Iterator[Row]:
    """Documents of plain text: a form feed ends one."""
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"'{path}' line {line} holds a NUL character: convert the file to UTF-8 text")
    lines = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
    for number, part in enumerate("\n".join(lines).split("\f"), start=1):
        if part.strip():
            yield Row(f"'{path}' document {number}", part)


# -- JSON


def _is_json(text: str) -> bool:
    """Whether a file of any name holds JSON rows. A damaged one counts: it must not pass for prose."""
    if not text.lstrip().startswith(("{", "[")):
        return False
    for candidate in (text.lstrip().split("\n", 1)[0], text):
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(row, dict) for row in value)):
            return True
    return LIKE_JSON.match(text) is not None


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    """Rows of JSON Lines, of one array, of one object that holds the rows, or of values one after another."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if len(lines) > 1 and (_is_value(lines[0][1]) or _suffix(path) == ".jsonl"):
        for number, line in lines:
            yield Row(f"'{path}' line {number}", _parse(line, f"'{path}' line {number}", "one object a line"))
        return
    values = list(_values(text, path))
    if len(values) != 1:
        yield from values
    elif isinstance(values[0].value, list):
        yield from (Row(f"'{path}' entry {n}", value) for n, value in enumerate(values[0].value, start=1))
    else:
        yield from _nested_rows(values[0], path)


def _is_value(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _values(text: str, path: Path) -> Iterator[Row]:
    """Each JSON value of the text, which may stretch over lines."""
    decoder, position = json.JSONDecoder(object_pairs_hook=_unique), 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        where = f"'{path}' line {text.count(chr(10), 0, position) + 1}"
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise UserError(f"'{path}' line {error.lineno} is not JSON ({error.msg}): fix that line") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({_short(error)}): fix that value") from None
        yield Row(where, value)


def _parse(text: str, where: str, advice: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}): {advice}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({_short(error)}): {advice}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ. JSON's own reader keeps the last of two values and loses the other."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' appears twice")
    return row


def _nested_rows(row: Row, path: Path) -> Iterator[Row]:
    """One object: its only list of objects are the rows; lists or tables of equal length are columns; else one row."""
    value = row.value
    if not isinstance(value, dict) or any(_is_conversation(cells) for cells in value.values()):
        yield row
        return
    lists = {key: rows for key, rows in value.items() if _are_objects(rows)}
    if len(lists) > 1:
        raise UserError(f"'{path}' holds several lists of rows ({', '.join(lists)}): keep one of them")
    if lists:
        ((key, rows),) = lists.items()
        for number, each in enumerate(rows, start=1):
            inner = each["row"] if each.keys() >= {"row", "row_idx"} else each  # the form of the hub's dataset viewer
            yield Row(f"'{path}' {key} {number}", inner)
    elif columns := _columns(value):
        for number, cells in enumerate(zip(*columns.values(), strict=True), start=1):
            yield Row(f"'{path}' row {number}", dict(zip(columns, cells, strict=True)))
    else:
        yield row


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _is_conversation(value: Any) -> bool:
    return _are_objects(value) and all(row.keys() & {"role", "from"} for row in value)


def _columns(table: dict[str, Any]) -> dict[str, list[Any]]:
    """The columns of a table written column by column, as pandas and datasets do; empty where it is none."""
    columns = {key: list(cells.values()) if isinstance(cells, dict) else cells for key, cells in table.items()}
    if not all(isinstance(cells, list) and len(cells) > 0 for cells in columns.values()):
        return {}
    return columns if len({len(cells) for cells in columns.values()}) == 1 else {}


# -- tables


def _table_rows(text: str, path: Path, delimiter: str) -> Iterator[Row]:
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise UserError(f"'{path}' has a duplicate column in its first line: rename one")
        for row in reader:
            where = f"'{path}' line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where} does not have the {len(names)} fields of the first line: quote its commas")
            yield Row(where, dict(row))
    except csv.Error as error:
        raise UserError(f"'{path}' is not a table of values ({error}): fix its quotes, or write .jsonl") from None
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(data: bytes, path: Path) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"'{path}' is a Parquet file, which needs pyarrow: pip install 'pyarrow<22'") from None
    try:
        rows = parquet.read_table(io.BytesIO(data)).to_pylist()
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        raise UserError(f"'{path}' is not a complete Parquet file ({_short(error)}): fetch it again") from None
    return (Row(f"'{path}' row {number}", row) for number, row in enumerate(rows, start=1))


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
