"""Runs the OpenAI-compatible router until Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from builder.deploy.proxy import Proxy
from builder.deploy.upstream import SILENCE_SECONDS, Upstream, checked_url
from calibration.routing.controller import Settings
from calibration.routing.router import Router
from calibration.routing.service import RouterService
from plugins.common.errors import UserError


@dataclass(frozen=True)
class Options:
    """dense, built: URLs of OpenAI-compatible servers. capacity: requests that each takes at a time."""

    dense: str
    built: str
    capacity: int = 64
    settings: Settings = Settings()  # noqa: RUF009
    state_file: Path | None = None


def make_proxy(router: Router, tokenizer_dir: Path, options: Options) -> tuple[Proxy, RouterService]:
    """The proxy, and the service to close after it. Raises UserError for a wrong URL, router, tokenizer or state."""
    try:
        import httpx
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed", "pip install 'twofour[route]'") from None
    from calibration.data.tokenizer import load_tokenizer

    dense, cheap = router.variants[:2]
    urls = {dense: checked_url("--dense", options.dense), cheap: checked_url("--built", options.built)}
    if len(set(urls.values())) == 1:
        raise UserError(f"--dense and --built are both '{options.dense}'", "name two servers")
    tokenizer = load_tokenizer(tokenizer_dir)
    timeout = httpx.Timeout(SILENCE_SECONDS, connect=5.0)
    client = httpx.AsyncClient(timeout=timeout, limits=httpx.Limits(max_connections=None))
    upstreams = {name: Upstream(url, options.capacity, client) for name, url in urls.items()}
    service = RouterService(
        router,
        idle=lambda: not any(upstream.in_flight for upstream in upstreams.values()),
        settings=options.settings,
        state_file=options.state_file,
    )
    return Proxy(service, upstreams, tokenizer, httpx.Client(timeout=timeout), router.seen), service


def serve(
    router: Router, tokenizer_dir: Path, options: Options, host: str, port: int, say: Callable[[str], None]
) -> None:
    """Serves until Ctrl-C."""
    proxy, service = make_proxy(router, tokenizer_dir, options)
    import uvicorn

    say(f"routing between {options.dense} and {options.built} on http://{host}:{port}; Ctrl-C stops it")
    try:
        uvicorn.run(proxy.app(), host=host, port=port, log_level="warning")
    finally:
        service.close()
