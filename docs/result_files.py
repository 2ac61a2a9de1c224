"""The result files that the generated pages show: the newest of each kind for each subject."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


class File(NamedTuple):
    """A result file's content, and its path from the root of the repository."""

    content: dict[str, Any]
    path: str


def newest(kind: str, subject: Callable[[dict[str, Any]], str]) -> dict[str, File]:
    """The newest `KIND-*.json` for each `subject`; names end with their date."""
    files: dict[str, File] = {}
    for path in sorted(RESULTS.glob(f"{kind}-*.json"), key=lambda path: re.findall(r"\d{4}-\d\d-\d\d.*", path.name)):
        content = json.loads(path.read_text(encoding="utf8"))
        files[subject(content)] = File(content, path.relative_to(ROOT).as_posix())
    return files


def device_name(content: dict[str, Any]) -> str:
    """The GPU of a file of the GPU suite."""
    return str(content["steps"]["machine"]["result"]["device"]["name"])
