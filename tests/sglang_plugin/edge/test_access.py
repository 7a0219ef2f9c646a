"""Who may ask what, of an application that would answer everything."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from kt_kernel.sglang_plugin.edge import access
from kt_kernel.sglang_plugin.edge.access import Guarded, Keys, keys_of, origins_of
from kt_kernel.sglang_plugin.edge.http import Message
from kt_kernel.sglang_plugin.edge.own_requests import OwnRequests

BOTH = Keys(b"user-key", b"admin-key", b"own")
USER_ONLY = Keys(b"user-key", None, b"own")
NONE = Keys(None, None, b"own")
ADMIN_ONLY = Keys(None, b"admin-key", b"own")


def ask(
    keys: Keys,
    route: str,
    *headers: tuple[str, str],
    origins: frozenset[str] = frozenset(),
    root: str = "",
) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON and headers of the answer; 200 where the application was asked."""
    method, path = route.split(" ", 1)
    sent: list[Message] = []

    async def application(scope: Message, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def receive() -> Message:
        raise AssertionError("reads the body of a request that it may refuse")

    async def send(message: Message) -> None:
        sent.append(message)

    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"type": "http", "method": method, "path": path, "headers": raw, "root_path": root}
    asyncio.run(Guarded(application, keys, origins)(scope, receive, send))
    body = b"".join(message["body"] for message in sent[1:])
    told = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], json.loads(body), told


def bearer(key: str) -> tuple[str, str]:
    return "Authorization", f"Bearer {key}"


GENERATE, FLUSH, INFO = "POST /generate", "POST /flush_cache", "GET /server_info"


@pytest.mark.parametrize(
    ("keys", "route", "key", "status"),
    [
        (BOTH, GENERATE, None, 401),
        (BOTH, GENERATE, "user-key", 200),
        (BOTH, GENERATE, "admin-key", 200),
        (BOTH, FLUSH, "user-key", 403),
        (BOTH, FLUSH, "admin-key", 200),
        (BOTH, INFO, "user-key", 403),
        (BOTH, "GET /metrics", None, 401),
        (BOTH, "GET /metrics", "user-key", 200),
        (BOTH, "GET /health_generate", None, 401),
        (BOTH, "GET /health", None, 200),
        (BOTH, "GET /health", "wrong", 200),
        (BOTH, "GET /flush_cache", "admin-key", 405),
        (BOTH, "OPTIONS /generate", None, 401),
        (BOTH, "OPTIONS /generate", "user-key", 405),
        # Who has no key does not learn which routes there are.
        (BOTH, "POST /of/tomorrow", None, 401),
        (BOTH, "POST /of/tomorrow", "user-key", 404),
        (BOTH, "POST /of/tomorrow", "admin-key", 404),
        (USER_ONLY, FLUSH, "user-key", 403),
        (USER_ONLY, FLUSH, "", 401),
        (NONE, GENERATE, None, 200),
        (NONE, FLUSH, None, 403),
        (NONE, GENERATE, "any", 200),
        (ADMIN_ONLY, GENERATE, None, 200),
        (ADMIN_ONLY, FLUSH, None, 403),
        (ADMIN_ONLY, FLUSH, "admin-key", 200),
    ],
)
def test_roles(keys: Keys, route: str, key: str | None, status: int) -> None:
    assert ask(keys, route, *([bearer(key)] if key is not None else []))[0] == status


@pytest.mark.parametrize(
    "value",
    [
        "",
        "user-key",
        "Bearer",
        "Bearer ",
        "Bearer  user-key",
        "Bearer user-key ",
        "Bearer user-keyx",
        "Bearer user-ke",
        "Basic user-key",
        "Bearer \xfcser-key\xff",
        "\xe9",
        "Bearer " + "x" * 100_000,
    ],
)
def test_a_wrong_header_is_401_and_never_500(value: str) -> None:
    status, told, headers = ask(BOTH, GENERATE, ("Authorization", value))
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert told["error"]["type"] == "authentication_error"
    assert value[:5] == "Beare" or value not in told["error"]["message"] or not value


def test_two_headers_are_none() -> None:
    """Programs between may look at the other one."""
    assert ask(BOTH, GENERATE, bearer("wrong"), bearer("user-key"))[0] == 401
    assert ask(BOTH, GENERATE, bearer("user-key"), bearer("wrong"))[0] == 401


def test_two_equal_headers_are_one() -> None:
    """So SGLang's router asks a server whose key it knows: its client's header, and its own."""
    assert ask(BOTH, GENERATE, bearer("user-key"), bearer("user-key"))[0] == 200
    assert ask(BOTH, GENERATE, bearer("wrong"), bearer("wrong"))[0] == 401


def test_the_schemes_name_has_any_case() -> None:
    assert ask(BOTH, GENERATE, ("Authorization", "bEaReR user-key"))[0] == 200


def test_the_server_asks_itself() -> None:
    assert ask(BOTH, "POST /freeze_gc", (access.OWN_HEADER, "own"))[0] == 200
    assert ask(BOTH, "POST /freeze_gc", (access.OWN_HEADER, "other"))[0] == 401
    assert ask(Keys(b"user-key"), "POST /freeze_gc", (access.OWN_HEADER, ""))[0] == 401


def test_its_requests_have_the_key_in_a_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(access.OWN_KEY, "k")
    seen: list[dict[str, Any]] = []
    for method in ("get", "post"):
        monkeypatch.setattr(f"requests.{method}", lambda url, **options: seen.append(options))
    OwnRequests.get("u", headers={"Authorization": "a"}, timeout=5)
    OwnRequests.post("u", json={})
    assert seen[0] == {"headers": {"Authorization": "a", access.OWN_HEADER: "k"}, "timeout": 5}
    assert seen[1] == {"json": {}, "headers": {access.OWN_HEADER: "k"}}


EVIL = ("Origin", "http://evil.example")


def test_pages_of_other_origins_may_not_ask_where_there_is_no_key() -> None:
    assert ask(NONE, GENERATE, EVIL)[0] == 403
    assert ask(NONE, "GET /v1/models", EVIL)[0] == 403
    assert ask(NONE, "GET /health", EVIL)[0] == 200
    named = frozenset(["http://evil.example"])
    assert ask(NONE, GENERATE, EVIL, origins=named)[0] == 200
    # Whoever has the key is asked for nothing else.
    assert ask(BOTH, GENERATE, EVIL, bearer("user-key"))[0] == 200


def test_the_answer_says_what_to_set() -> None:
    assert ask(USER_ONLY, FLUSH, bearer("user-key"))[1]["message"] == (
        "the key: found a server without KT_ADMIN_KEY, expected KT_ADMIN_KEY's, which "
        "/flush_cache needs"
    )
    status, told, headers = ask(BOTH, "GET /flush_cache", bearer("admin-key"))
    assert (status, headers["allow"]) == (405, "POST")
    assert told["message"] == "the method: found GET /flush_cache, expected POST"


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/models", "/v1/models"),
        ("/v1/completion", "/v1/completions"),
        ("/of/tomorrow", None),
        # One that its sender may not ask.
        ("/flush_cach", None),
    ],
)
def test_an_unknown_route_is_told_the_nearest(path: str, nearest: str | None) -> None:
    """A base URL without /v1 is the first mistake of an OpenAI client's user."""
    status, told, _ = ask(BOTH, f"PUT {path}", bearer("user-key"))
    expected = "one that this server serves" + (f"; the nearest is {nearest}" if nearest else "")
    text = f"the route: found {path}, expected {expected}"
    assert (status, told["message"]) == (404, text)


def test_the_root_of_an_application_behind_a_proxy_is_left_out() -> None:
    """SGLang matches its routes so (``--fastapi-root-path``)."""
    assert ask(BOTH, "POST /ai/flush_cache", bearer("user-key"), root="/ai")[0] == 403
    assert ask(BOTH, "POST /flush_cache", bearer("user-key"), root="/ai")[0] == 403
    assert ask(BOTH, "POST /ai/generate", bearer("user-key"), root="/ai")[0] == 200


def test_web_sockets_are_closed_and_the_lifespan_is_not() -> None:
    calls: list[str] = []
    sent: list[Message] = []

    async def application(scope: Message, receive: Any, send: Any) -> None:
        calls.append(scope["type"])

    async def nothing() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    guarded = Guarded(application, NONE, frozenset())
    asyncio.run(guarded({"type": "websocket", "path": "/v1/realtime"}, nothing, send))
    asyncio.run(guarded({"type": "lifespan"}, nothing, send))
    assert (calls, sent) == (["lifespan"], [{"type": "websocket.close", "code": 1008}])


def test_where_the_keys_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(access.OWN_KEY, "own")
    flags = SimpleNamespace(api_key="a", admin_api_key=None)
    assert keys_of(flags, {}) == Keys(b"a", None, b"own")
    assert keys_of(flags, {"KT_API_KEY": "b", "KT_ADMIN_KEY": "c"}) == Keys(b"b", b"c", b"own")
    assert keys_of(SimpleNamespace(), {"KT_API_KEY": ""}) == Keys(None, None, b"own")
    assert "own" not in repr(keys_of(flags, {}))
    assert origins_of({}) == frozenset()
    assert origins_of({"KT_CORS_ORIGINS": "http://a,https://b:1"}) == {"http://a", "https://b:1"}


def test_each_server_has_an_own_key_and_its_processes_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(access.OWN_KEY, raising=False)
    first = access.own_key()
    assert (len(first), access.own_key()) == (64, first)
    monkeypatch.delenv(access.OWN_KEY)
    assert access.own_key() != first
