"""An OpenAI-compatible server behind the router: whether it is up, how full it is, and requests to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from plugins.common.errors import UserError

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 600.0  # the longest time between two parts of an answer
PROBE_SECONDS = 1.0  # between two probes
FULL = (429, 503)  # statuses of a server that takes no more requests


class DownError(Exception):
    """The server cannot be reached, or left before the answer began."""


@dataclass
class Upstream:
    """One server. capacity: requests at a time, beyond which it is full. model: its own name for the model."""

    url: str
    capacity: int
    client: httpx.AsyncClient = field(repr=False)
    up: bool = True
    model: str | None = None
    in_flight: int = 0

    @property
    def full(self) -> bool:
        return self.in_flight >= self.capacity

    @property
    def load(self) -> float:
        """The busy share, from 0 to 1."""
        return min(self.in_flight / self.capacity, 1.0)

    def own(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The request under this server's name for the model."""
        return {**body, "model": self.model} if self.model is not None else dict(body)

    @asynccontextmanager
    async def open(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> AsyncIterator[httpx.Response]:
        """The response to a POST, whole unless the body requests a stream. Leaving early cancels the request.

        Raises DownError where no answer began, or where one that is not streamed broke off.
        """
        import anyio
        import httpx

        request = self.client.build_request("POST", self.url + path, json=self.own(body), headers=dict(headers))
        self.in_flight += 1
        response = None
        try:
            try:
                response = await self.client.send(request, stream=True)
                if not body.get("stream") or response.status_code != 200:
                    await response.aread()
            except httpx.HTTPError as error:
                self.up = False
                raise DownError(f"{self.url}: {error or type(error).__name__}") from None
            yield response
        finally:
            self.in_flight -= 1
            if response is not None:
                with anyio.CancelScope(shield=True):
                    await response.aclose()

    async def probe(self) -> None:
        """Asks the server for its health and, once, for its model's name."""
        import httpx

        try:
            health = await self.client.get(f"{self.url}/health", timeout=CONNECT_SECONDS)
            self.up = health.status_code < 500
            if self.up and self.model is None:
                models = await self.client.get(f"{self.url}/v1/models", timeout=CONNECT_SECONDS)
                self.model = str(models.json()["data"][0]["id"])
        except httpx.HTTPError:
            self.up = False
        except (ValueError, LookupError, TypeError):
            pass  # no list of models: requests keep the client's name

    async def watch(self) -> None:
        """Probes until cancelled."""
        while True:
            await self.probe()
            await asyncio.sleep(PROBE_SECONDS)


def checked_url(option: str, url: str) -> str:
    """The URL without a trailing slash or /v1. Raises UserError for one that is not http(s)."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{option} '{url}' is not a URL", "write it as http://host:port")
    return url.rstrip("/").removesuffix("/v1")
