"""Check of who may reach the server, and with which keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deploy.checks.result import Finding, Status, fail_unless, warn_unless
from deploy.checks.situation import Situation, check
from kt_kernel.host.addresses import LOOPBACK_OF, is_loopback


@check("rendezvous")
def check_rendezvous(situation: Situation) -> Iterator[Finding]:
    """PyTorch's store, by which a server's processes find each other, is for this host only."""
    host = situation.values["KT_HOST"]
    # The plugin has it listen on loopback where KT_HOST is every address.
    where = LOOPBACK_OF.get(host, host)
    yield warn_unless(
        is_loopback(where),
        "PyTorch's store, which has no authentication, on a loopback address",
        f"it on {where}, on a port of SGLang's choice above KT_PORT",
        "set KT_HOST=0.0.0.0, with which it is on 127.0.0.1, or close that address's other ports",
    )


@check("exposure")
def check_exposure(situation: Situation) -> Iterator[Finding]:
    """Other hosts reach the server with a key only."""
    return exposure(situation.values)


def exposure(values: Mapping[str, Any]) -> Iterator[Finding]:
    """What is to be said of a server's address and keys, or a router's."""
    name = "KT_PUBLISHED_HOST" if values["KT_PUBLISHED_HOST"] else "KT_HOST"
    host, key = values[name], values["KT_API_KEY"]
    how = "a key" if key else "no key"
    yield fail_unless(
        bool(key) or is_loopback(host),
        "a key, or an address that only this host reaches",
        f"{how} and {name} {host}",
        "whoever reaches it could use the server: set KT_API_KEY_FILE, or KT_HOST=127.0.0.1",
    )
    if key and key == values["KT_ADMIN_KEY"]:
        yield Finding(
            Status.FAIL,
            "KT_ADMIN_KEY to be another key than KT_API_KEY",
            "the same",
            "every client could change the server: make another one",
        )
