"""The server's address in a file, for as long as it takes requests: what a launcher's router reads.

The file comes when the server is ready and goes before the server is told to end, so that new
requests go elsewhere while those under way are finished.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

from deploy.console import say
from deploy.local_http import http_status, local_url, url_of
from kt_kernel.errors import UserError
from kt_kernel.files.durable import named_write_errors, replace_file
from kt_kernel.host.addresses import LOOPBACK_OF

POLL_SECONDS = 2.0


def is_ready(host: str, port: int) -> bool:
    """Whether a server of this machine would answer a request."""
    # Nobody listens yet, or a program that speaks no HTTP: None.
    return http_status(f"{local_url(host, port)}/ready")[0] == HTTPStatus.OK


def url_for_others(host: str, port: int) -> str:
    """Address of the server for other hosts, where ``host`` is what it listens on."""
    if host in LOOPBACK_OF:  # every address
        host = socket.gethostname()
    return url_of(host, port)


class Endpoint:
    """Keeps the file of one server.

    Args:
        path: of the file; one that an earlier server left is removed.
        url: its content.

    Raises:
        UserError: it cannot be written where it is to be.
    """

    def __init__(self, path: Path, url: str) -> None:
        self._path, self._url = path, url
        self._end = threading.Event()
        self._lock = threading.Lock()
        with named_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)

    def follow(self, ready: Callable[[], bool]) -> None:
        """Write the file, in a thread, as soon as the server is ready."""

        def watch() -> None:
            while not self._end.wait(POLL_SECONDS):
                if ready():
                    self._write()
                    return

        threading.Thread(target=watch, name="endpoint", daemon=True).start()

    def _write(self) -> None:
        with self._lock:
            if self._end.is_set():
                return
            try:
                replace_file(self._path, f"{self._url}\n".encode())
            except UserError as error:
                say(f"warning: KT_ENDPOINT_PATH: {error}: nobody is told of this server")

    def remove(self) -> None:
        """Remove the file for good: the server ends."""
        self._end.set()
        # It may be in the middle of the writing, by another thread.
        with self._lock:
            try:
                self._path.unlink(missing_ok=True)
            except OSError as error:
                say(f"warning: cannot remove KT_ENDPOINT_PATH {self._path}: {error.strerror}")
