"""Makes the text that recovery trains on: the documentation that the model learned from, less all that judges it.

    python recovery_text.py unpacked OUT.jsonl      # `unpacked` as for corpus.py, of the packages it redistributes

A document is left out whole if it is one that `evaluation.jsonl` comes from, or if it holds any paragraph of that text.
"""

import json
import sys
from pathlib import Path

from corpus import REDISTRIBUTED, documents

LONG = 80  # characters: shorter paragraphs, such as headings, are in many documents


def paragraphs(text: str) -> set[str]:
    """The long ones."""
    return {paragraph.strip() for paragraph in text.split("\n\n") if len(paragraph.strip()) > LONG}


def main() -> None:
    """Writes one JSON object a line: `text`, `source`."""
    unpacked, out = map(Path, sys.argv[1:3])
    lines = (Path(__file__).parent / "evaluation.jsonl").read_text(encoding="utf8").splitlines()
    judged = [json.loads(line) for line in lines]
    sources, seen = {row["source"] for row in judged}, set().union(*(paragraphs(row["text"]) for row in judged))
    kept = [
        {"text": text, "source": f"{source}/{name}"}
        for source, name, text in documents(unpacked)
        if source in REDISTRIBUTED and f"{source}/{name}" not in sources and not paragraphs(text) & seen
    ]
    with out.open("w", encoding="utf8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    print(f"{len(kept)} documents, {sum(len(row['text']) for row in kept):,} characters")


if __name__ == "__main__":
    main()
