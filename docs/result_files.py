"""The result files that the generated pages show: the newest of each kind for each subject."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

File = dict[str, Any]


def newest(
    results: Path, kind: str, subject: Callable[[dict[str, Any]], str]
) -> dict[str, tuple[dict[str, Any], Path]]:
    """Content and path of the newest `KIND-*.json` for each `subject`; names end with their date."""
    files: dict[str, tuple[File, Path]] = {}
    for path in sorted(results.glob(f"{kind}-*.json"), key=lambda path: re.findall(r"\d{4}-\d\d-\d\d.*", path.name)):
        result = json.loads(path.read_text(encoding="utf8"))
        files[subject(result)] = (result, path)
    return files


def device_name(result: File) -> str:
    """The GPU of a file of the GPU suite."""
    return str(result["steps"]["machine"]["result"]["device"]["name"])
