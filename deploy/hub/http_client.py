"""The connections to the Hub: time limits, and answers that are not the Hub's.

Import this module only after the environment is complete: the client reads HF_* when imported.
"""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from kt_kernel.errors import UserError

#: Seconds to wait for the next bytes of an answer, where the client sets no limit.
TIMEOUT = 30.0
_PAGE = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml.*?\?>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)",
    re.I | re.S,
)


def prepare_client() -> None:
    """Make the Hub's client refuse web pages and wait for no answer forever.

    Raises:
        UserError: a file of certificates cannot be read.
    """
    # httpx knows the former only; the latter is older and in many set-ups.
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        if path := os.environ.get(name):
            if not os.access(path, os.R_OK):
                raise UserError(f"{name}: expected a file of certificates, cannot read {path}")
            os.environ.setdefault("SSL_CERT_FILE", path)
    set_client_factory(_client)


def _client() -> httpx.Client:
    client = default_client_factory()
    hooks = client.event_hooks
    hooks["request"].append(_limit_time)
    hooks["response"].append(_refuse_page)
    client.event_hooks = hooks
    return client


def _limit_time(request: httpx.Request) -> None:
    given = request.extensions.get("timeout") or {}
    limits = {name: given.get(name) or TIMEOUT for name in ("connect", "read", "write", "pool")}
    request.extensions = {**request.extensions, "timeout": limits}


def _refuse_page(response: httpx.Response) -> None:
    """Refuse what a network or a proxy answers in the Hub's place."""
    kind = response.headers.get("content-type", "").lower()
    if not kind.startswith(("text/html", "application/xhtml")):
        return
    status = response.status_code
    # The Hub's own refusals say so in a header. A page with 5xx may be a front end's and may pass.
    says_why = "x-error-code" in response.headers or "x-error-message" in response.headers
    refusal = 400 <= status < 500 and status not in (408, 429) and not says_why
    if response.is_success or refusal or status == 511:
        what = "a web page" if response.is_success else f"a web page with HTTP {status}"
        raise not_the_hub(constants.ENDPOINT, what, str(response.url))


def not_the_hub(endpoint: str, what: str, url: str = "") -> UserError:
    """The error for an answer that is not the Hub's; ``url`` is where it came from."""
    asked, answered = urlsplit(endpoint), urlsplit(url)
    if url and answered.netloc != asked.netloc:
        what += f", redirected to {answered.scheme}://{answered.hostname}{answered.path},"
    return UserError(
        f"{endpoint}{through_proxy(endpoint)} answers with {what} in place of the Hub's data, as a "
        f"login page does: log in to the network, or check HF_ENDPOINT and HTTP_PROXY, "
        f"HTTPS_PROXY, NO_PROXY"
    )


def looks_like_a_page(content: bytes) -> bool:
    """Whether content begins as HTML does."""
    return _PAGE.match(content) is not None


def through_proxy(url: str) -> str:
    """`` through the proxy ...`` without its password, if the environment names one for a URL."""
    proxies, parts = getproxies(), urlsplit(url)
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or (parts.hostname and proxy_bypass(parts.netloc)):
        return ""
    # A scheme may be left out, and a password may hold what ends it elsewhere.
    scheme = re.match(r"[a-z0-9]+://", proxy, re.IGNORECASE)
    return f" through the proxy {scheme[0] if scheme else ''}{_host(proxy)}"


def _host(address: str) -> str:
    """An address from its host on, without scheme, user and password."""
    return address.rpartition("@" if "@" in address else "://")[2]
