"""Keep the store through which a server's processes find each other from other hosts."""

from __future__ import annotations

import functools
import importlib
import socket
from contextlib import suppress
from typing import Any

from kt_kernel.host.addresses import LOOPBACK_OF


def listen_on_one_address(*_: Any, **__: Any) -> None:
    """Before ``init_distributed_environment``, which has torch start a store of keys and values.

    It has no authentication, and torch's listens on all addresses, whatever address it is told. It
    takes a socket that listens already.
    """
    # torch.distributed has a function of this name.
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
    if not hasattr(rendezvous.TCPStore, "func"):
        rendezvous.TCPStore = functools.partial(_store, rendezvous.TCPStore)


def _store(create: Any, host_name: str, port: int, **options: Any) -> Any:
    """What ``create`` makes; a server listens on ``host_name`` only, or on loopback if that is
    any address."""
    address = LOOPBACK_OF.get(host_name, host_name)
    listening = None
    if options.get("is_master") and port:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        # Of an address that is none of this host's, as behind a translation, torch knows more.
        with suppress(OSError):
            listening = socket.create_server((address, port), family=family)
    if listening is None:
        return create(host_name=host_name, port=port, **options)
    return create(
        host_name=address,
        port=port,
        **options,
        master_listen_fd=listening.detach(),  # the store closes it
    )
