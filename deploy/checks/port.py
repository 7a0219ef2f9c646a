"""Check of the server's address."""

from __future__ import annotations

from collections.abc import Iterator

from deploy.checks.result import Finding, Status
from deploy.checks.situation import Situation, check
from kt_kernel.host.addresses import address_problem


@check("port")
def check_port(situation: Situation) -> Iterator[Finding]:
    """The server's address is free."""
    host, port = situation.values["KT_HOST"], situation.values["KT_PORT"]
    expected = f"port {port} on {host} to be free"
    problem = address_problem(host, port)
    if problem is None:
        yield Finding(Status.PASS, expected, "it free")
    else:
        found, todo = problem
        yield Finding(Status.FAIL, expected, found, todo)
