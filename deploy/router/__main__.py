"""Start SGLang's router in a process of its own, and the edge before it in this one.

The settings are those of ``serve``: keys, ``KT_HOST``, ``KT_PORT``, ``KT_CORS_ORIGINS``.
"""

from __future__ import annotations

from kt_kernel.program import end_with_parent, run_program

if __name__ == "__main__":  # before the imports below, which take a while
    run_program("deploy.router.__main__:main")

import argparse
import asyncio
import importlib.util
import multiprocessing
import os
import secrets
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any

import uvicorn

from deploy.checks.exposure import exposure
from deploy.checks.result import Status
from deploy.errors import UserErrors, messages_of
from deploy.router.endpoints import ServerList, follow
from deploy.router.front import front
from deploy.router.options import GRACE_SECONDS, router_options, server_urls
from deploy.settings.config import Config, export, load
from kt_kernel.errors import UserError
from kt_kernel.host.addresses import address_problem, free_port
from kt_kernel.sglang_plugin.edge.access import keys_of, origins_of
from kt_kernel.sglang_plugin.edge.http import MAX_BODY

LOOPBACK = "127.0.0.1"


def main(argv: Sequence[str] | None = None) -> int:
    """Route until told to end; 2 for a mistake in the settings, 1 if the router ends by itself."""
    parser = argparse.ArgumentParser("python -m deploy.router", description=__doc__)
    parser.add_argument("--env-file", action="append", type=Path, default=[], metavar="FILE")
    parser.add_argument(
        "--follow", type=Path, metavar="DIRECTORY", help="of files with the servers' addresses"
    )
    args = parser.parse_args(argv)
    try:
        config = load(os.environ, args.env_file, "serve")
        _check(config)
        export(config)  # the servers are not behind a proxy for the internet
        options = router_options(os.environ)
        urls = [] if args.follow else server_urls(os.environ)
        if not urls and not args.follow:
            raise UserError("expected servers: WORKER_URLS, PROJECT, or --follow; found none")
    except UserError as error:
        for message in messages_of(error):
            print(f"error: {message}", file=sys.stderr)
        return 2
    return _route(config, {**options, "worker_urls": urls}, args.follow)


def _check(config: Config) -> None:
    """Raises UserError for what keeps the router from being started."""
    problems = [
        f"expected {finding.expected}, found {finding.found}: {finding.todo}"
        for finding in exposure(config.values)
        if finding.status is Status.FAIL
    ]
    host, port = config.text("KT_HOST"), config.integer("KT_PORT")
    if problem := address_problem(host, port):
        problems.append(f"port {port} on {host}: found {problem[0]}: {problem[1]}")
    if importlib.util.find_spec("sglang_router") is None:
        problems.append(
            f"{sys.executable} has no sglang-router: install requirements/router.txt there"
        )
    if problems:
        raise UserErrors(problems)


def _route(config: Config, options: dict[str, Any], directory: Path | None) -> int:
    environ = {**os.environ, **{n: config[n] or "" for n in ("KT_API_KEY", "KT_ADMIN_KEY")}}
    keys, control_key, port = keys_of(None, environ), secrets.token_hex(32), free_port()
    router = f"http://{LOOPBACK}:{port}"
    arguments = options | {
        "host": LOOPBACK,
        "port": port,
        "prometheus_host": LOOPBACK,
        "prometheus_port": free_port(),
        "api_key": config["KT_API_KEY"],
        "control_plane_api_keys": [("front", "front", control_key, "admin")],
        "max_payload_size": MAX_BODY,
    }
    # On a command line the keys would be seen by everybody on the host.
    child = multiprocessing.get_context("fork").Process(target=_run_router, args=(arguments,))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    child.start()
    try:
        if directory is not None:
            servers = ServerList(router, control_key, config["KT_API_KEY"] or "")
            Thread(target=follow, args=(directory, servers), daemon=True).start()
        app = front(router, keys, control_key, origins_of(environ))
        asyncio.run(_serve(app, config, child))
        print("error: the router has ended by itself", file=sys.stderr)
        return 1
    finally:
        child.terminate()
        child.join(GRACE_SECONDS)
        child.kill()


async def _serve(app: Any, config: Config, router: BaseProcess) -> None:
    """Serve until a signal, which then arrives here once more, or until the router has ended."""
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=config.text("KT_HOST"),
            port=config.integer("KT_PORT"),
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="on",
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    )
    _at_end_of(router.sentinel, lambda: setattr(server, "should_exit", True))
    await server.serve()


def _at_end_of(sentinel: int, act: Callable[[], None]) -> None:
    """Act once when a process ends: its sentinel stays readable."""
    loop = asyncio.get_running_loop()

    def ended() -> None:
        loop.remove_reader(sentinel)
        act()

    loop.add_reader(sentinel, ended)


def _run_router(arguments: dict[str, Any]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    end_with_parent(parent.pid, signal.SIGTERM)
    from sglang_router.router import Router
    from sglang_router.router_args import RouterArgs

    Router.from_args(RouterArgs(**arguments)).start()
