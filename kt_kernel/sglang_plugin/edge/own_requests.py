"""How SGLang's HTTP server asks itself, now that its routes want a key."""

from __future__ import annotations

from typing import Any

import requests

from kt_kernel.sglang_plugin.edge.access import OWN_HEADER, own_key


class OwnRequests:
    """What SGLang's HTTP server uses of ``requests`` to ask itself, which is the administrator."""

    exceptions = requests.exceptions

    @staticmethod
    def get(url: str, **options: Any) -> Any:
        """``requests.get`` with the server's own key."""
        return requests.get(url, **_with_own_key(options))

    @staticmethod
    def post(url: str, **options: Any) -> Any:
        """``requests.post`` with the server's own key."""
        return requests.post(url, **_with_own_key(options))


def _with_own_key(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "headers": {**(options.get("headers") or {}), OWN_HEADER: own_key()}}
