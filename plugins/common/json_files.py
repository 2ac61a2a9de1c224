"""Reads a JSON object from a file: one error for each way in which it can be none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plugins.common.errors import UserError


def read_json_object(path: Path, advice: str = "fetch it again") -> dict[str, Any]:
    """The object in `path`. Raises UserError, one line that ends in `advice`, for any other content.

    Raises FileNotFoundError where there is no file, whose meaning differs from reader to reader.
    """
    try:
        value = json.loads(path.read_text(encoding="utf8"))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}): check the file") from None
    except (ValueError, RecursionError) as error:
        words = " ".join(str(error).split())[:160]
        raise UserError(f"'{path}' is not JSON ({words}): {advice}") from None
    if not isinstance(value, dict):
        raise UserError(f"'{path}' is not a JSON object: {advice}")
    return value
