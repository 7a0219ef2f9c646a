"""Who may ask what: keys, roles, and pages of other origins, before a request's body is read."""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kt_kernel.sglang_plugin.edge.http import Application, Message, Receive, Send, refuse
from kt_kernel.sglang_plugin.edge.kinds import Problem, Said
from kt_kernel.sglang_plugin.edge.routes import SERVER, Role, Table

USER_KEY = "KT_API_KEY"
ADMIN_KEY = "KT_ADMIN_KEY"
ORIGINS = "KT_CORS_ORIGINS"
OWN_KEY = "KT_SERVER_OWN_KEY"
"""Environment variable of the key by which SGLang's processes ask their own server."""
OWN_HEADER = "x-kt-server-own-key"
CORS: dict[str, Any] = {
    "allow_methods": ("GET", "POST"),
    "allow_headers": ("authorization", "content-type"),
}
"""What pages of the origins that may ask at all may send."""


@dataclass(frozen=True, repr=False)
class Keys:
    """The keys of a server; one that is not there is None. Never printed."""

    user: bytes | None = None
    admin: bytes | None = None
    own: bytes | None = None

    def role_of(self, headers: list[tuple[bytes, bytes]]) -> Role:
        """The role that a request's headers prove. Bytes are compared: a key need not be ASCII."""
        given = {name: [v for n, v in headers if n == name] for name, _ in headers}
        own = given.get(OWN_HEADER.encode(), [])
        if len(own) == 1 and _same(own[0], self.own):
            return Role.ADMIN
        # SGLang's router sends the same key twice: its client's, and the server's that it knows.
        words = {*given.get(b"authorization", [])}
        scheme, _, key = words.pop().partition(b" ") if len(words) == 1 else (b"", b"", b"")
        if scheme.lower() != b"bearer":
            key = b""
        if _same(key, self.admin):
            return Role.ADMIN
        return Role.USER if self.user is None or _same(key, self.user) else Role.ANYONE


def _same(given: bytes, key: bytes | None) -> bool:
    return key is not None and hmac.compare_digest(given, key)


def own_key() -> str:
    """The key by which this server's processes ask it; the first that asks makes it up.

    The others inherit it, or are started with what the first has in its environment.
    """
    return os.environ.setdefault(OWN_KEY, secrets.token_hex(32))


def keys_of(server_args: Any, environ: Mapping[str, str]) -> Keys:
    """The keys in the environment, where ``serve`` puts them, or those of SGLang's own flags."""

    def key(name: str, argument: str) -> bytes | None:
        text = environ.get(name) or getattr(server_args, argument, None)
        return text.encode() if text else None

    return Keys(key(USER_KEY, "api_key"), key(ADMIN_KEY, "admin_api_key"), own_key().encode())


def origins_of(environ: Mapping[str, str]) -> frozenset[str]:
    """Origins whose pages may ask the server."""
    return frozenset(filter(None, environ.get(ORIGINS, "").split(",")))


@dataclass(frozen=True)
class Refusal:
    """Status and words of an answer to whoever may not ask."""

    status: int
    problem: Problem
    headers: tuple[tuple[bytes, bytes], ...] = ()


def decide(
    scope: Message, path: str, keys: Keys, origins: frozenset[str], table: Table = SERVER
) -> Refusal | None:
    """Why a request is not answered; None if it is."""
    roles, method = table.methods_of(path), str(scope["method"])
    needed = roles.get(method)
    if needed is Role.ANYONE:
        return None
    headers = [(name.lower(), value) for name, value in scope["headers"]]
    role = keys.role_of(headers)
    if role is Role.ANYONE:
        problem = Problem("the header Authorization", Said("no valid key"), f"Bearer {USER_KEY}")
        return Refusal(401, problem, ((b"www-authenticate", b"Bearer"),))
    # Without a key, the browser of whoever reaches the server can ask it for any page.
    origin = next((value.decode("latin-1") for name, value in headers if name == b"origin"), None)
    if origin is not None and keys.user is None and role < Role.ADMIN and origin not in origins:
        expected = f"one of {ORIGINS}, or no page at all"
        return Refusal(403, Problem("the page's origin", Said(origin[:200]), expected))
    if not roles:
        nearest = table.nearest(path, role)
        expected = "one that this server serves" + (
            f"; the nearest is {nearest}" if nearest else ""
        )
        return Refusal(404, Problem("the route", Said(path[:200]), expected))
    if needed is None:
        allowed = ", ".join(sorted(roles))
        problem = Problem("the method", Said(f"{method[:20]} {path[:200]}"), allowed)
        return Refusal(405, problem, ((b"allow", allowed.encode()),))
    if role < needed:
        found = Said("an ordinary one" if keys.admin else f"a server without {ADMIN_KEY}")
        return Refusal(403, Problem("the key", found, f"{ADMIN_KEY}'s, which {path} needs"))
    return None


class Guarded:
    """ASGI middleware: hands on what its sender may ask, and answers the rest itself."""

    def __init__(
        self, app: Application, keys: Keys, origins: frozenset[str], table: Table = SERVER
    ) -> None:
        self._app = app
        self._keys = keys
        self._origins = origins
        self._table = table

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":  # no route of a WebSocket is served
            await send({"type": "websocket.close", "code": 1008})
        elif refusal := decide(scope, route_of(scope), self._keys, self._origins, self._table):
            await refuse(scope, send, refusal.status, refusal.problem, refusal.headers)
        else:
            await self._app(scope, receive, send)


def route_of(scope: Message) -> str:
    """The path below the application's root, as its routes are matched."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root + "/") else path


def with_cors(app: Application, origins: frozenset[str]) -> Application:
    """The application, with answers for the browsers of these origins' pages."""
    if not origins:
        return app
    from starlette.middleware.cors import CORSMiddleware

    return CORSMiddleware(app, sorted(origins), **CORS)
