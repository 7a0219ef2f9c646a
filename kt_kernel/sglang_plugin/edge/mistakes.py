"""A request that SGLang cannot make its own request of is its sender's mistake: 400.

SGLang says 500 to some, or nothing and a traceback, and a router leaves out a server that does so
three times. What fails later is the server's fault, and stays 500. The log has the traceback.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from kt_kernel.sglang_plugin.edge.http import Application, Message, Receive, Send, refuse
from kt_kernel.sglang_plugin.edge.invalid import problem_of_errors
from kt_kernel.sglang_plugin.edge.kinds import Problem, Said
from kt_kernel.sglang_plugin.edge.routes import Role, methods_of

logger = logging.getLogger(__name__)

_SHAPES = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    RecursionError,
    NotImplementedError,
)


_WITHOUT_ITS_CALL = (
    "messages: found a tool's result without its call, expected an assistant's message with "
    "tool_calls before it, one for each result"
)
_MEANINGS = {
    "Invalid messages at": _WITHOUT_ITS_CALL,
    "No tool calls but found tool output": _WITHOUT_ITS_CALL,
    "Invalid message for role `developer`": (
        "messages: found a developer's message without content, expected text"
    ),
    "schema_ is required": (
        "response_format.json_schema.schema: found none, expected a JSON schema as an object"
    ),
}
"""How an error begins that speaks of what SGLang has made of a request, and what it means to who
sent it. V3.2's encoder quotes messages that SGLang has put among the client's."""


class _Conversion:
    """Of one request; ``done`` when the first part of it goes to the scheduler."""

    done = False


_current: ContextVar[_Conversion | None] = ContextVar("kt_conversion", default=None)


def handed_on() -> None:
    """The request of this task has been converted: nothing after it is its sender's mistake."""
    if (conversion := _current.get()) is not None:
        conversion.done = True


class Unreadable(Problem):
    """``value`` is what a request raised when it was read."""

    def __str__(self) -> str:
        return unreadable(self.value)


def unreadable(error: object) -> str:
    """One line about a request that raised ``error`` when it was read."""
    text = str(error)
    for beginning, meaning in _MEANINGS.items():
        if text.startswith(beginning):
            return meaning
    return (
        f"the request cannot be served: {type(error).__name__}: {' '.join(text.split())[:300]}; "
        "compare it with the fields of SGLang's API"
    )


def in_one_line(message: str, error: BaseException | None) -> str:
    """What SGLang says of a request in ``message``, without what only its authors can read.

    ``error`` is the exception that it tells, if there is one.
    """
    from pydantic import ValidationError

    # /v1/responses adds the exception's cause, if only None.
    if isinstance(error, ValidationError) and message.startswith(str(error)):
        return str(problem_of_errors([dict(one) for one in error.errors()]))
    if error is not None and message == f"{error} None":
        message = str(error)
    for beginning, meaning in _MEANINGS.items():
        if message.startswith(beginning):
            return meaning
    # jsonschema adds the part of the metaschema, and the whole schema.
    return message.strip().partition("\n")[0][:1000]


def mistake_in(error: BaseException | None) -> Problem | None:
    """What was wrong with the request whose conversion raised ``error``; None for other faults."""
    conversion = _current.get()
    if conversion is None or conversion.done or not _is_of_a_request(error):
        return None
    return Unreadable("the request", error, "")


def _is_of_a_request(error: BaseException | None) -> bool:
    """Whether it is what reading a value of the wrong shape raises: no lack of memory or files."""
    import jinja2

    # The encoder of V3.2's chats has an exception of its own, and another for an unknown role.
    return isinstance(error, (*_SHAPES, jinja2.TemplateError)) or (
        type(error).__name__ == "DS32EncodingError"
    )


class Mistakes:
    """ASGI middleware around SGLang's application: what it raises of a request is told as 400."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path, method = str(scope.get("path")), scope.get("method")
        if scope["type"] != "http" or methods_of(path).get(str(method)) is not Role.USER:
            await self._app(scope, receive, send)
            return
        begun = False

        async def send_and_see(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        token = _current.set(_Conversion())
        try:
            await self._app(scope, receive, send_and_see)
        except Exception as error:
            problem = mistake_in(error)
            if begun or problem is None:
                raise
            if "'bytes' object" in str(error):  # a route that takes whatever FastAPI has read
                problem = problem_of_content_type(scope) or problem
            logger.warning("%s: answered 400", path, exc_info=error)
            await refuse(scope, send, 400, problem)
        finally:
            _current.reset(token)


def tell_mistake(answer: Callable[..., Any], serving: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the functions by which SGLang's handlers answer an exception, which it has logged, or
    say what is wrong with a request."""
    status = kwargs.get("status_code", 400)
    problem = mistake_in(sys.exception()) if status == 500 else None
    message = str(args[0] if args else kwargs.get("message", ""))
    if problem is not None:
        message = str(problem)
        kwargs["status_code"] = 400
        name = "error_type" if "error_type" in kwargs else "err_type"
        kwargs[name] = "invalid_request_error"
        kwargs.pop("exception_name", None)
    elif status < 500:
        message = in_one_line(message, sys.exception())
    if args:
        args = (message, *args[1:])
    else:
        kwargs["message"] = message
    return answer(serving, *args, **kwargs)


def problem_of_content_type(scope: Message) -> Problem | None:
    """What is wrong with the header by which a body says that it is JSON; None if it does so."""
    headers = [value for name, value in scope["headers"] if name.lower() == b"content-type"]
    found = headers[0].decode("latin-1").partition(";")[0].strip() if headers else "none"
    subtype = found.lower().rpartition("/")[2]
    if subtype == "json" or subtype.endswith("+json"):
        return None
    expected = "application/json (curl: -H 'Content-Type: application/json')"
    return Problem("content-type", Said(found[:80]), expected)


def problem_of_request(scope: Message, errors: Sequence[Mapping[str, Any]]) -> Problem:
    """What is wrong with a request of which FastAPI found these errors."""
    first = errors[0]
    part, *place = first["loc"]
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", "no JSON")
        found = Said(f"no JSON at character {place[-1] + 1} ({why})")
        return Problem("the body", found, "JSON in UTF-8")
    # FastAPI reads no other body; what it hands on instead is of no kind.
    whole = part == "header" or (first["type"] != "missing" and isinstance(first["input"], bytes))
    if whole and (problem := problem_of_content_type(scope)) is not None:
        return problem
    return problem_of_errors([{**error, "loc": tuple(error["loc"][1:])} for error in errors])


async def tell_invalid(request: Any, error: Any) -> Any:
    """In the place of SGLang's handler of ``RequestValidationError``, which tells the server's
    paths, in many lines."""
    from starlette.responses import Response

    problem = problem_of_request(request.scope, error.errors())

    class Refused(Response):
        async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
            await refuse(scope, send, 400, problem)

    return Refused()
