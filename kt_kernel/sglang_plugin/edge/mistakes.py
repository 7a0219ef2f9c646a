"""A request that SGLang cannot make its own request of is its sender's mistake: 400.

SGLang says 500 to some, or nothing and a traceback, and a router leaves out a server that does so
three times. What fails later is the server's fault, and stays 500. The log has the traceback.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from kt_kernel.sglang_plugin.edge.http import Application, Message, Receive, Send, refuse
from kt_kernel.sglang_plugin.edge.kinds import Problem
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
    words = " ".join(str(error).split())[:300]
    return (
        f"the request cannot be served: {type(error).__name__}: {words}; compare it with the "
        "fields of SGLang's API"
    )


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
            logger.warning("%s: answered 400", path, exc_info=error)
            await refuse(scope, send, 400, problem)
        finally:
            _current.reset(token)


def tell_mistake(answer: Callable[..., Any], serving: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the functions by which SGLang's handlers answer an exception, which it has logged."""
    problem = mistake_in(sys.exception()) if kwargs.get("status_code") == 500 else None
    if problem is not None:
        kwargs["status_code"] = 400
        if args:  # the message
            args = (str(problem), *args[1:])
        else:
            kwargs["message"] = str(problem)
        name = "error_type" if "error_type" in kwargs else "err_type"
        kwargs[name] = "invalid_request_error"
        kwargs.pop("exception_name", None)
    return answer(serving, *args, **kwargs)


async def tell_invalid(request: Any, error: Any) -> Any:
    """In the place of SGLang's handler of ``RequestValidationError``, which tells the server's
    paths, in many lines."""
    from starlette.responses import Response

    first, *others = error.errors()
    where = ".".join(map(str, first["loc"][1:])) or "the body"
    more = f" (the first of {1 + len(others)})" if others else ""
    problem = Problem(where, first.get("input"), f"what the API has: {first['msg']}{more}")

    class Refused(Response):
        async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
            await refuse(scope, send, 400, problem)

    return Refused()
