"""The stage ``status``: answers ``GET /health`` in every stage, also before the server listens.

It runs beside the stages, in a container of its own, and reads their state files.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from deploy.config import Config
from deploy.health import examine, find_state, health_url, http_status, may_listen, report_of
from deploy.report import say
from deploy.setting import AUTO
from deploy.state import DONE, READY, State, read_state, run_directory
from kt_kernel.errors import UserError


def run(config: Config) -> NoReturn:
    """Serve until the process is told to end.

    Raises:
        UserError: the port cannot be listened on.
    """
    directory = run_directory(config["KT_RUN_DIR"])
    server = config.text("KT_STATUS_SERVER")
    url = health_url(config) if server == AUTO else server
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    host, port = config.text("KT_HOST"), config.integer("KT_STATUS_PORT")
    with listen(host, port, directory, url, server != AUTO) as status:
        say(f"status: GET /health on port {status.server_port}; the states are in {directory}")
        status.serve_forever()
    raise AssertionError("unreachable")


def listen(
    host: str, port: int, directory: Path, url: str, elsewhere: bool = False
) -> ThreadingHTTPServer:
    """A server of the states in ``directory``; ``url`` is where SGLang's says how it is.

    Raises:
        UserError: the port cannot be listened on.
    """

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads = True

    class Handler(_Handler):
        def report(self) -> dict[str, object]:
            return report_of(overall_state(directory, url, elsewhere), directory)

    try:
        return Server((host, port), Handler)
    except OSError as error:
        raise UserError(
            f"cannot listen on KT_HOST {host}, KT_STATUS_PORT {port}: {error.strerror}: choose "
            f"another port"
        ) from None


def overall_state(directory: Path, url: str, elsewhere: bool = False) -> State | None:
    """What the deployment is doing: serving, if the server says so; else what its stages say.

    An `up` runs the earlier stages again while the server serves; serving is what counts then.

    Args:
        url: where the server says how it is.
        elsewhere: whether that is another server than the one whose state is in ``directory``.
    """
    latest = find_state(directory, None)
    serve = read_state(directory, "serve")
    if serve is not None and may_listen(serve) and serve.is_alive(directory):
        found = examine(serve, directory, url)
        if found.phase == READY:
            return found
    # Replicas, and servers on other hosts, leave no state here; one that served here before may
    # have left its own.
    is_idle = latest is None or latest.phase == DONE or (elsewhere and latest.stage == "serve")
    if (serve is None or elsewhere) and is_idle and http_status(url)[0] == 200:
        return State("serve", READY)
    return None if latest is None else examine(latest, directory, url)


class _Handler(BaseHTTPRequestHandler):
    timeout = 30.0  # seconds for a client to send its request

    def report(self) -> dict[str, object]:
        raise NotImplementedError

    def do_GET(self) -> None:
        if urlsplit(self.path).path != "/health":
            self._answer(404, {"error": f"expected GET /health, found {self.path}"})
            return
        report = self.report()
        serving = report.get("stage") == "serve" and report["healthy"]
        self._answer(200 if serving else 503, report)

    def _answer(self, status: int, body: dict[str, object]) -> None:
        content = json.dumps(body).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Probes are not worth a line."""
