"""The controller's state in a file: a restart keeps the threshold that service has reached."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from calibration.routing.controller import Controller
from plugins.common.errors import UserError
from plugins.common.json_files import read_json, write_json


def save(controller: Controller, path: Path) -> None:
    """Writes the state as JSON, in one step and durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"build_id": controller.policy.build_id, **controller.state()}
    write_json(path, state, durable=True)


def resume(controller: Controller, path: Path) -> None:
    """Resumes from the file, if there is one. Raises UserError for a damaged one and for another build's."""
    if not path.exists():
        return
    remedy = "remove it, or name another state file"
    try:
        state = read_json(path)
    except (ValueError, OSError) as error:
        raise UserError(f"'{path}' is not a state of a router ({' '.join(str(error).split())})", remedy) from None
    if not isinstance(state, dict) or not all(_is_amount(state.get(key)) for key in controller.state()):
        raise UserError(f"'{path}' is not a state of a router", remedy)
    if state.get("build_id") != controller.policy.build_id:
        raise UserError(
            f"'{path}' is the state of build '{state.get('build_id')}', and the router is of build "
            f"'{controller.policy.build_id}'",
            remedy,
        )
    controller.resume(state)


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
