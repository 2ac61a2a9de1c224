"""python -m benchmarks.pruning.routing_texts DIR: two kinds of text for a router, docs-llama's and Python source code.

Writes three JSON Lines files that share no source document: `calibration.jsonl` holds documentation, for
pruning; `learning.jsonl` trains the router; `serving.jsonl` holds the requests. The last two have as many pieces of
each kind. A row is {"text", "source", "kind"}.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.serving.records import write_jsonl

Row = dict[str, str]

DOCS_LLAMA = Path(__file__).parents[2] / "examples" / "docs-llama"
PIECE = 700  # characters at least: 128 tokens and more
SERVED = 250  # pieces of each kind
LEARNED = 500
"""Pieces of each kind; the documentation that remains is for calibration."""


def read_texts(path: Path) -> list[Row]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def documentation() -> dict[str, str]:
    """Text by source document, of docs-llama's calibration and evaluation files."""
    texts: defaultdict[str, list[str]] = defaultdict(list)
    for name in ("calibration", "evaluation"):
        for row in read_texts(DOCS_LLAMA / f"{name}.jsonl"):
            texts[row["source"]].append(row["text"])
    return {source: "\n\n".join(parts) for source, parts in texts.items()}


def source_code() -> dict[str, str]:
    """Text by file, of the Python standard library without its tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "lib2to3", "pydoc_data", "encodings"}
    files = [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]
    return {str(path.relative_to(root)): path.read_text(encoding="utf8", errors="ignore") for path in files}


def pieces(texts: Mapping[str, str], kind: str, most: int) -> list[Row]:
    """Runs of whole lines of at least PIECE characters, at most `most` of a document."""
    rows = []
    for source, text in texts.items():
        cut, piece = 0, ""
        for line in text.splitlines(keepends=True):
            piece += line
            if len(piece) >= PIECE and cut < most:
                rows.append({"text": piece, "source": source, "kind": kind})
                cut, piece = cut + 1, ""
    return rows


def split(rows: Iterable[Row], sizes: Sequence[int], seed: int = 0) -> list[list[Row]]:
    """Parts of the given sizes and one of the rest; all pieces of a document are in one part, or are dropped."""
    by_source: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_source[row["source"]].append(row)
    documents = list(by_source.values())
    random.Random(seed).shuffle(documents)
    parts: list[list[Row]] = []
    for size in sizes:
        part: list[Row] = []
        while documents and len(part) < size:
            part += documents.pop()
        parts.append(part[:size])
    return [*parts, [row for document in documents for row in document]]


def main() -> None:
    """Writes the files and prints the number of pieces of each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning.routing_texts", description=__doc__)
    parser.add_argument("directory", type=Path)
    out = parser.parse_args().directory
    kinds = (pieces(documentation(), "docs", 16), pieces(source_code(), "code", 3))
    parts = [split(rows, (SERVED, LEARNED)) for rows in kinds]
    (docs_served, docs_learned, rest), (code_served, code_learned, _) = parts
    files = {
        "calibration": rest,
        "learning": docs_learned + code_learned,
        "serving": docs_served + code_served,
    }
    for name, rows in files.items():
        write_jsonl(out / f"{name}.jsonl", random.Random(0).sample(rows, len(rows)))
        print(f"{name}: {len(rows)} pieces of {len({row['source'] for row in rows})} documents")


if __name__ == "__main__":
    main()
