"""JSON files: read as they are or with an error for each way in which one is damaged, and written at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plugins.common.errors import UserError
from plugins.common.files import replacing


def read_json(path: Path, default: Any = ...) -> Any:
    """The file's JSON value; `default`, where one is given, if there is no file."""
    if default is not ... and not path.is_file():
        return default
    return json.loads(path.read_text(encoding="utf8"))


def write_json(path: Path, value: Any, indent: int = 1, *, durable: bool = False) -> None:
    """Writes a JSON value for people to read, at once; `durable` as in `replacing`."""
    with replacing(path, durable=durable) as partial:
        partial.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf8")


def read_json_object(path: Path, advice: str = "fetch it again") -> dict[str, Any]:
    """The object in `path`. Raises UserError, one line that ends in `advice`, for any other content.

    Raises FileNotFoundError where there is no file, whose meaning differs from reader to reader.
    """
    try:
        value = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}): check the file") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"'{path}' is not JSON ({reason}): {advice}") from None
    if not isinstance(value, dict):
        raise UserError(f"'{path}' is not a JSON object: {advice}")
    return value
