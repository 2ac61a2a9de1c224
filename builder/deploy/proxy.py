"""An OpenAI-compatible server in front of a dense and a built one: each request goes where the router sends it.

Tokens pass as they come. A client that leaves cancels its request behind. A server that dies before the answer began is
routed around, so that a request is answered once; one that dies within a stream ends it with an error event.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from builder.deploy import openai_requests
from builder.deploy.upstream import FULL, DownError, Upstream
from calibration.routing import metrics
from calibration.routing.controller import Decision, UnavailableError, route_around
from calibration.routing.service import RouterService
from plugins.common.errors import UserError

if TYPE_CHECKING:
    import httpx
    from starlette.applications import Starlette
    from starlette.types import Receive, Scope, Send

VARIANT = "x-twofour-variant"  # header of a response: which variant answered; of a request: which one must
QUALITY = "x-twofour-quality"
_PASSED = ("authorization", "x-request-id", "traceparent")  # headers forwarded to the servers
_ENDPOINTS = (openai_requests.COMPLETIONS, openai_requests.CHAT)


class Proxy:
    """Answers requests with the servers in `upstreams`, by variant. `sync_client` runs the shadow requests.

    seen: see `Router`.
    """

    def __init__(
        self,
        service: RouterService,
        upstreams: Mapping[str, Upstream],
        tokenizer: Any,
        sync_client: httpx.Client,
        seen: Mapping[str, float],
    ) -> None:
        self._service = service
        self._upstreams = upstreams
        self._tokenizer = tokenizer
        self._sync_client = sync_client
        self._seen = seen

    def app(self) -> Starlette:
        """The ASGI application."""
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse, PlainTextResponse
        from starlette.routing import Route

        async def health(_: Any) -> JSONResponse:
            up = {name: upstream.up for name, upstream in self._upstreams.items()}
            return JSONResponse({"up": up}, status_code=200 if any(up.values()) else 503)

        async def page(_: Any) -> PlainTextResponse:
            return PlainTextResponse(metrics.render(self._service.samples()), media_type="text/plain; version=0.0.4")

        async def models(_: Any) -> JSONResponse:
            names = [upstream.model or variant for variant, upstream in self._upstreams.items()]
            return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

        routes = [Route(path, Endpoint(self, path), methods=["POST"]) for path in _ENDPOINTS]
        routes += [Route("/health", health), Route("/metrics", page), Route("/v1/models", models)]
        return Starlette(routes=routes, lifespan=self._lifespan)

    async def answer(self, path: str, raw: bytes, headers: Mapping[str, str], send: Send) -> None:
        """Routes one request and sends its answer. Raises UserError and UnavailableError before anything was sent."""
        from starlette.concurrency import run_in_threadpool

        body = openai_requests.parse(raw)
        quality = body.pop("quality", headers.get(QUALITY, "auto"))
        variant = body.pop("variant", headers.get(VARIANT))
        decision = await run_in_threadpool(self._decide, path, body, quality, variant)
        passed = {name: headers[name] for name in _PASSED if name in headers}
        await self._forward(path, body, passed, decision, send)
        dense, cheap = (self._upstreams[name] for name in list(self._upstreams)[:2])
        again = openai_requests.shadow_request(path, body) if decision.shadow else {}
        self._service.answered(decision, lambda: self._measure(path, again, passed, dense, cheap))

    def _decide(self, path: str, body: Mapping[str, Any], quality: Any, variant: Any) -> Decision:
        tokens = openai_requests.prompt_tokens(path, body, self._tokenizer)
        up, full = self._conditions()
        dense = next(iter(self._upstreams.values()))
        return self._service.decide(tokens, quality=quality, variant=variant, up=up, full=full, load=dense.load)

    def _conditions(self) -> tuple[set[str], set[str]]:
        """The variants that are up, and those that are full."""
        items = self._upstreams.items()
        return {name for name, each in items if each.up}, {name for name, each in items if each.full}

    async def _forward(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str], decision: Decision, send: Send
    ) -> None:
        """Sends the answer of the variant that was decided on, or of the next one where that is down or full."""
        variant, refused = decision.variant, set[str]()
        while True:
            upstream = self._upstreams[variant]
            with contextlib.suppress(DownError):
                async with upstream.open(path, body, headers) as response:
                    alternative = self._next(decision, refused | {variant}) if response.status_code in FULL else variant
                    if alternative in refused | {variant}:
                        await _relay(response, variant, send)
                        return
            refused.add(variant)
            variant = self._next(decision, refused)
            if variant in refused:
                raise UnavailableError("no variant answers: try again later")
            self._service.controller.count(metrics.REROUTED)

    def _next(self, decision: Decision, refused: set[str]) -> str:
        """The variant to try after some refused. One of those where no other is as good and up."""
        up, full = self._conditions()
        return route_around(decision.requested, list(self._upstreams), up, full | refused)

    def _measure(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str], dense: Upstream, cheap: Upstream
    ) -> float:
        """The loss of one request, from both servers' answers to it. Runs on the thread of shadow runs."""
        answers = []
        for upstream in (dense, cheap):
            response = self._sync_client.post(upstream.url + path, json=upstream.own(body), headers=dict(headers))
            response.raise_for_status()
            answers.append(response.json())
        return openai_requests.measured_loss(*answers) / self._seen[openai_requests.COMPARED[path]]

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Any) -> AsyncIterator[None]:
        watches = [asyncio.create_task(upstream.watch()) for upstream in self._upstreams.values()]
        yield
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
        for upstream in self._upstreams.values():
            await upstream.client.aclose()
        self._sync_client.close()


class Endpoint:
    """One path of the API, as an ASGI application: a client that leaves ends the work for it."""

    def __init__(self, proxy: Proxy, path: str) -> None:
        self._proxy = proxy
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        import anyio
        from starlette.requests import Request

        request = Request(scope, receive)
        raw = await request.body()
        async with anyio.create_task_group() as group:

            async def leave() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(leave)
            await self._answer(raw, request.headers, send)
            group.cancel_scope.cancel()

    async def _answer(self, raw: bytes, headers: Mapping[str, str], send: Send) -> None:
        try:
            await self._proxy.answer(self._path, raw, headers, send)
        except UserError as error:
            await _refuse(400, "invalid_request_error", error, send)
        except UnavailableError as error:
            await _refuse(503, "service_unavailable", error, send)


async def _relay(response: httpx.Response, variant: str, send: Send) -> None:
    """Sends a response on, part by part as it comes."""
    import httpx

    kind = response.headers.get("content-type", "application/json")
    headers = [(b"content-type", kind.encode("latin1")), (VARIANT.encode(), variant.encode())]
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    if response.is_stream_consumed:
        await send({"type": "http.response.body", "body": response.content})
        return
    try:
        async for part in response.aiter_bytes():
            await send({"type": "http.response.body", "body": part, "more_body": True})
    except httpx.HTTPError as error:
        reason = _error("server_error", f"variant '{variant}' broke off ({error or type(error).__name__})")
        event = f"\n\ndata: {json.dumps(reason)}\n\n".encode()
        await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _refuse(status: int, kind: str, error: Exception, send: Send) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(_error(kind, str(error))).encode()})


def _error(kind: str, message: str) -> dict[str, Any]:
    """An error in the form of OpenAI's API."""
    return {"error": {"message": message, "type": kind}}
