"""The other build that a router compares a build with: the first of `routing.variants`."""

from __future__ import annotations

from pathlib import Path

from builder.artifacts.manifest import is_build, source_digest
from builder.engines.registry import engine_facts
from calibration.config import Routing
from plugins.common.errors import UserError


def reference_engine(routing: Routing, model_digest: str | None) -> Path | None:
    """The engine of the build that `variants` names; None if that is the dense model.

    `model_digest`: of the dense model that this build is made from. Raises UserError for a directory without a build,
    a build of another model or tokenizer, and an engine that is not the torch backend's.
    """
    named = routing.variants[0]
    if named == "dense":
        return None
    build = Path(named)
    if not is_build(build) or not (build / "engine" / "engine.json").is_file():
        raise UserError(
            f"routing.variants names '{named}', which holds no build with an engine",
            "name 'dense' or the --out of twofour build",
        )
    if source_digest(build, "model") != model_digest:
        raise UserError(
            f"routing.variants names '{named}', a build of another model or tokenizer", "build both from the same model"
        )
    backend = engine_facts(build / "engine").get("backend")
    if backend != "torch":
        raise UserError(
            f"routing.variants names '{named}', a {backend} engine, and a router is trained with torch engines",
            "build it with engine.backend=torch",
        )
    return build / "engine"
