"""`twofour route`: opens a build's router and runs the proxy with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from builder import recipe
from builder.deploy.routed_repository import state_file
from calibration.config import Routing
from plugins.common.errors import UserError


def route(
    dense: str,
    built: str,
    router: Path,
    host: str,
    port: int,
    tokenizer: Path | None,
    capacity: int,
    shadow: float | None,
    rest: float,
    state: Path | None,
    say: Callable[[str], None],
) -> None:
    """Serves until Ctrl-C. Raises UserError for a wrong router, tokenizer, URL or state."""
    from builder.deploy.route import Options, serve
    from calibration.routing.controller import Settings
    from calibration.routing.router import Router

    opened = Router.load(router)
    if opened.prefill is not None:
        raise UserError(
            f"the router in '{router}' reads the build's prefill, which servers of OpenAI's API do not return",
            "build with --set routing.features=prompt, or serve with 'twofour deploy'",
        )
    encoding = tokenizer or router.resolve().parent / "checkpoint"
    if not encoding.is_dir():
        raise UserError(f"'{encoding}' holds no tokenizer", "give the model's directory with --tokenizer")
    settings = Settings(shadow=shadow_share(router) if shadow is None else shadow, rest=rest)
    options = Options(dense, built, capacity, settings, state or state_file(opened.build_id))
    serve(opened, encoding, options, host, port, say)


def shadow_share(router: Path) -> float:
    """The share in the build's recipe; the default where the router is not part of a build."""
    path = router.resolve().parent / "recipe.yaml"
    config = recipe.load(str(path)).routing if path.is_file() else None
    return (config or Routing()).shadow
