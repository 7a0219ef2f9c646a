"""End a server whose address was taken while it loaded."""

from __future__ import annotations

from typing import Any

from kt_kernel.host.addresses import address_problem
from kt_kernel.sglang_plugin.refusal import refuse_to_serve


def refuse_taken_address(server_args: Any, *_: Any, **__: Any) -> None:
    """Before ``_setup_and_run_http_server``: the model is loaded, and nothing listens yet."""
    problem = address_problem(server_args.host, server_args.port)
    if problem is not None:
        found, todo = problem
        refuse_to_serve(
            f"KT_PORT: expected port {server_args.port} on {server_args.host} to be free still "
            f"after loading, found {found}: {todo}"
        )
