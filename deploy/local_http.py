"""Ask a server of this machine, or of the container beside this one, by HTTP."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from typing import Any

from kt_kernel.errors import UserError, one_line
from kt_kernel.files.foreign import parse_json
from kt_kernel.host.addresses import LOOPBACK_OF

HTTP_TIMEOUT = 10.0  # seconds; the answer costs nothing, but the cores may be busy
MOST_BYTES = 4096  # of an answer


def url_of(host: str, port: int) -> str:
    """Address of a server that listens on ``host``."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def local_url(host: str, port: int) -> str:
    """The same, as a client on this machine reaches it."""
    return url_of(LOOPBACK_OF.get(host, host), port)


def http_status(url: str) -> tuple[int | None, str]:
    """HTTP status of a GET and what the server says of itself, empty if it says nothing; or None
    and what kept the request from being answered."""
    try:
        status, told = http_answer(url)
    except UserError as error:
        return None, str(error)
    state = told.get("state")
    return status, one_line(state) if isinstance(state, str) else ""


def http_answer(url: str) -> tuple[int, dict[str, Any]]:
    """HTTP status of a GET and the fields of the answer, none if it is not 200 or has none.

    Raises:
        UserError: what kept the request from being answered.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a local program
    try:
        with opener.open(url, timeout=HTTP_TIMEOUT) as response:
            return response.status, _fields(response.read(MOST_BYTES))
    except urllib.error.HTTPError as error:
        return error.code, {}
    except urllib.error.URLError as error:
        raise UserError(str(error.reason)) from None
    except (OSError, ValueError, http.client.InvalidURL) as error:
        raise UserError(str(error)) from None
    except http.client.HTTPException:  # another program has the port
        raise UserError("what answers there does not speak HTTP") from None


def _fields(body: bytes) -> dict[str, Any]:
    """What a server tells of itself, as the plugin and the router do; empty if it tells nothing."""
    try:
        told = parse_json(body.decode())
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}
