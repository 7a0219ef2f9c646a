"""Addresses of this host that servers listen on."""

from __future__ import annotations

import errno
import ipaddress
import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that mean all of this host's, and one by which the host reaches itself for each."""
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""From where the kernel takes the ports of outgoing connections."""


def free_port() -> int:
    """A TCP port that nobody uses, for a server that binds it a minute from now.

    It lies below the range of outgoing connections: those come by the thousand, and each keeps
    its port for a minute after its end.

    Raises:
        OSError: 100 ports were tried.
    """
    above = int(PORT_RANGE.read_text().split()[0])
    for port in random.sample(range(max(1024, above // 2), above), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(errno.EADDRINUSE, f"100 ports below {above} are used")


def is_loopback(host: str) -> bool:
    """Whether only this host reaches a server that listens there."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def address_problem(host: str, port: int) -> tuple[str, str] | None:
    """What keeps a server from listening there and what to do; None if nothing does."""
    try:
        with bound(host, port) as probe:
            probe.listen()
    except socket.gaierror as error:
        todo = "set KT_HOST to 127.0.0.1, or, with a key, to 0.0.0.0 for other hosts"
        return f"that {host} is no address ({error.strerror})", todo
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return "another program listening there", "stop it or set KT_PORT to another port"
        if error.errno == errno.EACCES:
            return "that it needs root", "set KT_PORT to 1024 or more"
        return os.strerror(error.errno or 0), "set KT_HOST to an address of this machine"
    return None


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound as a server binds it: connections that have ended do not count.

    Until it is closed the kernel gives the port to no outgoing connection, and a program that
    listens as servers do can still bind it.

    Raises:
        OSError: it cannot be bound; ``socket.gaierror``: ``host`` is no address.
    """
    family, kind, proto, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, proto) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(address)
        yield held
