"""The check of a request's body before SGLang reads it: HTTP 400 for what would be served wrong."""

import json
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from typing import Any, NoReturn

from kt_kernel.sglang_plugin.edge.check import TOO_DEEP, problem_of_body
from kt_kernel.sglang_plugin.edge.kinds import Limits, Problem, Said

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_BODY = 64 << 20
"""Bytes of a request: fifty prompts of 160000 token ids."""


class CheckedRequests:
    """ASGI middleware: answers what is wrong with a request, or hands it on without nulls."""

    def __init__(
        self, app: Application, limits: Callable[[], Limits], closed: Collection[str] = ()
    ) -> None:
        """``limits`` is asked at each request; a route in ``closed`` is not served."""
        self._app = app
        self._limits = limits
        self._closed = closed

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and str(scope["path"]).rstrip("/") in self._closed:
            expected = "one that this server was started for"
            await refuse(scope, send, 400, Problem("the route", Said(scope["path"]), expected))
            return
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        body = await body_or_refusal(scope, receive, send)
        if body is None:
            return
        problem = problem_of_bytes(body, self._limits())
        if problem is not None:
            await refuse(scope, send, 400, problem)
            return
        body = without_nulls(body)
        rest = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return rest.pop() if rest else await receive()

        await self._app(scope, replay, send)


def problem_of_bytes(body: bytes, limits: Limits) -> Problem | None:
    """What is wrong with a body, or None if it may be served or is no JSON at all.

    What is no JSON is for the route to refuse, in its own words.
    """
    try:
        document = json.loads(body, parse_constant=_no_number)
    except RecursionError:
        return TOO_DEEP
    except _NoNumberError as error:
        return Problem("the body", Said(error), "numbers as in JSON")
    except ValueError as error:
        # Python's limit of digits, where another parser might not have it.
        huge = "digits" in str(error)
        return Problem("the body", Said(error), "shorter numbers") if huge else None
    return problem_of_body(document, limits)


def without_nulls(body: bytes) -> bytes:
    """``body`` without the fields at its top that are null.

    OpenAI's and Anthropic's clients write null for a default; SGLang refuses it in some fields.
    """
    if b"null" not in body:
        return body
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):  # the route refuses it
        return body
    if not isinstance(document, dict) or None not in document.values():
        return body
    return json.dumps(
        {name: value for name, value in document.items() if value is not None}
    ).encode()


class _NoNumberError(Exception):
    pass


def _no_number(name: str) -> NoReturn:
    raise _NoNumberError(name)


def _has_body(scope: Message) -> bool:
    headers = dict(scope["headers"])
    if b"content-length" not in headers and b"transfer-encoding" not in headers:
        return scope["method"] not in ("GET", "HEAD", "OPTIONS", "DELETE")
    # Files of audio; no route that takes them reads JSON.
    return not headers.get(b"content-type", b"").lower().startswith(b"multipart/")


async def body_or_refusal(scope: Message, receive: Receive, send: Send) -> bytes | None:
    """The whole body; None if the client has gone, or was told that it is too long."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            found = Said(f"more than {MAX_BODY} bytes")
            expected = f"at most {MAX_BODY}: send fewer prompts at once"
            await refuse(scope, send, 413, Problem("the body", found, expected))
            return None
        if not message.get("more_body", False):
            return bytes(body)


KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
"""What OpenAI and Anthropic call an error of a status; any other is an invalid request."""


async def refuse(
    scope: Message,
    send: Send,
    status: int,
    problem: Problem,
    more_headers: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    """Answer in the shape in which the route's clients expect an error."""
    kind, text = KINDS.get(status, "invalid_request_error"), str(problem)
    error = {"message": text, "type": kind, "param": problem.path, "code": status}
    path = str(scope["path"])
    if path.startswith("/v1/messages"):
        content: dict[str, object] = {"type": "error", "error": {"type": kind, "message": text}}
    elif path.startswith(("/v1/responses", "/generate")):
        content = {"error": error}
    else:
        content = {"object": "error", **error}
    body = json.dumps(content).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        # After a body that was not read to its end, the connection has no next request.
        *([(b"connection", b"close")] if status == 413 else []),
        *more_headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
