"""The edge before SGLang's router: who may ask what, and then the request to the router itself.

The router knows one key for all its routes, lets the pages of all origins ask, and tells anyone its
servers' metrics. So it listens for this process only, and this one hands it what the table allows.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote

import aiohttp
from yarl import URL

from kt_kernel.sglang_plugin.edge.access import Guarded, Keys, with_cors
from kt_kernel.sglang_plugin.edge.http import (
    Application,
    Message,
    Receive,
    Send,
    body_or_refusal,
    refuse,
)
from kt_kernel.sglang_plugin.edge.kinds import Problem, Said
from kt_kernel.sglang_plugin.edge.routes import Role, Table

ROUTES = Table(
    # Some load balancers ask by HEAD.
    anyone="""
        GET /health, HEAD /health, GET /liveness, HEAD /liveness
        GET /readiness, HEAD /readiness""",
    user="""
        POST /generate, POST /v1/completions, POST /v1/chat/completions, POST /v1/rerank
        POST /v1/embeddings, POST /v1/classify, POST /v1/responses, GET /v1/responses/{}
        POST /v1/responses/{}/cancel, GET /v1/models, GET /get_model_info, GET /engine_metrics
        GET /health_generate""",
    admin="GET /workers, POST /workers, GET /workers/{}, PUT /workers/{}, DELETE /workers/{}",
)
"""What the router answers. The rest is closed: conversations that fill its memory, modules of code,
tokenizers from anywhere, and what changes the servers, which know their own administrator."""

CONNECT_SECONDS = 10.0
#: Of one connection, or what this process says in the router's place.
_NOT_HANDED_ON = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding "
    b"upgrade host authorization origin date server".split()
)
#: In a header's value uvicorn takes them, and aiohttp sends none.
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


def front(router: str, keys: Keys, control_key: str, origins: frozenset[str]) -> Application:
    """The application that clients ask.

    Args:
        router: address of SGLang's router.
        keys: what clients send.
        control_key: the router's own, for its list of servers.
        origins: whose web pages may ask.
    """
    client_key = keys.user.decode() if keys.user else ""
    handed = {Role.ANYONE: "", Role.USER: client_key, Role.ADMIN: control_key}
    return with_cors(Guarded(HandOn(router, handed), keys, origins, ROUTES), origins)


class HandOn:
    """ASGI application: asks the router, and hands its answer on as it comes."""

    def __init__(self, router: str, keys: Mapping[Role, str]) -> None:
        """``keys``: what the router wants to see for the routes of each role."""
        self._router = router
        self._keys = keys
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        body = await body_or_refusal(scope, receive, send)
        if body is None:
            return
        asking = asyncio.create_task(self._ask(scope, body, send))
        gone = asyncio.ensure_future(receive())  # what comes after the body is the client's end
        try:
            await asyncio.wait({asking, gone}, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                asking.result()
        finally:  # the router hears of the end, and the server stops computing
            for task in (asking, gone):
                task.cancel()
            await asyncio.gather(asking, gone, return_exceptions=True)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        # Answers take hours and are as many as clients want; the router has limits of its own.
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            connector=connector, timeout=limits, auto_decompress=False
        ) as self._session:
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def _ask(self, scope: Message, body: bytes, send: Send) -> None:
        assert self._session is not None
        method, path = str(scope["method"]), str(scope["path"])
        headers = [(n, v) for n, v in _handed_on(scope["headers"]) if n != b"content-length"]
        if bad := next((name for name, value in headers if _CONTROL.search(value)), None):
            where, found = f"the header {bad.decode('latin-1')[:80]}", Said("control characters")
            await refuse(scope, send, 400, Problem(where, found, "none"))
            return
        if key := self._keys[ROUTES.methods_of(path)[method]]:
            headers.append((b"authorization", f"Bearer {key}".encode()))
        # The path that was looked up in the table, whichever way it was written.
        query = scope["query_string"].decode("latin-1")
        url = URL(self._router + quote(path) + ("?" + query if query else ""), encoded=True)
        told = False
        try:
            async with self._session.request(
                method,
                url,
                data=body or None,
                headers=[(n.decode("latin-1"), _text(v)) for n, v in headers],
                skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
                allow_redirects=False,
            ) as answer:
                told = True
                await send(
                    {
                        "type": "http.response.start",
                        "status": answer.status,
                        "headers": _handed_on(answer.raw_headers),
                    }
                )
                async for chunk in answer.content.iter_any():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except aiohttp.ClientError as error:
            # What broke off in the middle breaks off for the client, too: uvicorn sees to it.
            if not told:
                found = Said(type(error).__name__)
                problem = Problem("the router", found, "one that listens: ask again in a minute")
                await refuse(scope, send, 503, problem)


def _text(value: bytes) -> str:
    """What aiohttp, which writes UTF-8, sends as these bytes; other bytes are taken for Latin-1."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _handed_on(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    named = ((name.lower(), value) for name, value in headers)
    return [
        (name, value)
        for name, value in named
        if name not in _NOT_HANDED_ON and not name.startswith(b"access-control-")
    ]
