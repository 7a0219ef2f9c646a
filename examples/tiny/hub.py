"""A local server that speaks the part of the Hub's HTTP API which downloads a model.

``python -m examples.tiny.hub --root DIR`` serves each folder ``DIR/<organisation>/<name>`` as a
model repository with one branch, ``main``. Point ``HF_ENDPOINT`` at it and use the ordinary
client: ``huggingface_hub.snapshot_download("<organisation>/<name>", revision=...)``.

A repository's revision is computed from the content of its files, so a changed file is a new
revision and the old one is gone. For tests, the server can ask for a token, throttle, and cut
connections in the middle of a file.
"""

from __future__ import annotations

import argparse
import json
import re
import select
import signal
import sys
import threading
import time
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from examples.tiny.repositories import BRANCH, HubError, Repositories
from kt_kernel.errors import UserError
from kt_kernel.program import run_program

CHUNK_BYTES = 64 << 10


@dataclass
class HubOptions:
    """What the server refuses and breaks; the defaults are a public and healthy Hub.

    token: the only token that may read files; None lets everybody.
    forbidden_token: a valid token of an account without access (403 instead of 401).
    rate: bytes per second of each response's body; None does not throttle.
    drop_after: cut each file's connection after so many body bytes; None does not cut.
    drop_times: how many connections to cut in all; None cuts every one.
    """

    token: str | None = None
    forbidden_token: str | None = None
    rate: float | None = None
    drop_after: int | None = None
    drop_times: int | None = None


class Hub(ThreadingHTTPServer):
    """The server; use as a context manager to run it in a background thread.

    ``log`` gets one line per request: method, path, status, body bytes sent.
    Raises UserError if ``root`` is not a folder or the address cannot be bound.
    """

    daemon_threads = True

    def __init__(
        self,
        root: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        options: HubOptions | None = None,
        log: IO[str] | None = None,
    ) -> None:
        if not root.is_dir():
            raise UserError(f"--root {root} is not a folder; expected <root>/<organisation>/<name>")
        self.repositories = Repositories(root)
        self.options = options or HubOptions()
        self._connections = 0
        self._log = log
        self._counting = threading.Lock()
        self._thread: threading.Thread | None = None
        try:
            super().__init__((host, port), HubHandler)
        except OSError as error:
            raise UserError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another --port"
            ) from error

    @property
    def endpoint(self) -> str:
        """The URL to put in HF_ENDPOINT."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"

    def may_drop(self) -> bool:
        """Return whether to cut the connection now, and count the cut."""
        with self._counting:
            if self.options.drop_times is None:
                return True
            self.options.drop_times -= 1
            return self.options.drop_times >= 0

    def is_idle(self) -> bool:
        """Whether no client is connected, or waiting to be (tests wait for that)."""
        waiting, _, _ = select.select([self.socket], [], [], 0)
        with self._counting:
            return self._connections == 0 and not waiting

    def process_request(self, request: Any, client_address: Any) -> None:
        """Count the connection from here on; its thread may begin late."""
        with self._counting:
            self._connections += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one connection to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._counting:
                self._connections -= 1

    def record(self, line: str) -> None:
        """Write one line to the log, if there is one."""
        if self._log is not None:
            with self._counting:
                print(line, file=self._log, flush=True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that went away (tests kill them); report anything else."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def __enter__(self) -> Hub:
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        if self._thread is not None:
            self._thread.join()
        self.server_close()


class HubHandler(BaseHTTPRequestHandler):
    """One connection of a client."""

    server: Hub
    protocol_version = "HTTP/1.1"
    _INFO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?")
    _TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)")
    _FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")

    def do_GET(self) -> None:
        """Answer a GET (also a HEAD, which differs only in sending no body)."""
        self._sent = 0
        self._status = HTTPStatus.OK
        try:
            self._route(urlsplit(self.path).path)
        except HubError as error:
            self._send_error(error)
        finally:
            self.server.record(f"{self.command} {self.path} {self._status:d} {self._sent}")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Do nothing: ``Hub.record`` logs instead."""

    def _route(self, path: str) -> None:
        if match := self._INFO.fullmatch(path):
            self._send_info(*(unquote(group or BRANCH) for group in match.groups()))
        elif match := self._TREE.fullmatch(path):
            self._send_tree(*(unquote(group) for group in match.groups()))
        elif match := self._FILE.fullmatch(path):
            self._send_file(*(unquote(group) for group in match.groups()))
        else:
            raise HubError(HTTPStatus.NOT_FOUND, "NotFound", f"No such page: {path}")

    def _send_info(self, repo_id: str, revision: str) -> None:
        snapshot = self.server.repositories.snapshot(repo_id, revision)
        info = {
            "_id": snapshot.revision[:24],
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.split("/")[0],
            "sha": snapshot.revision,
            "private": False,
            "gated": "manual" if self.server.options.token else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": name} for name in snapshot.files],
        }
        self._send_json(HTTPStatus.OK, info)

    def _send_tree(self, repo_id: str, revision: str) -> None:
        snapshot = self.server.repositories.snapshot(repo_id, revision)
        entries: list[dict[str, object]] = []
        for name, file in snapshot.files.items():
            entry = {"type": "file", "oid": file.git_id, "size": file.size, "path": name}
            if file.is_large:
                entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
            entries.append(entry)
        self._send_json(HTTPStatus.OK, entries)

    def _send_file(self, repo_id: str, revision: str, name: str) -> None:
        snapshot = self.server.repositories.snapshot(repo_id, revision)
        self._check_token()
        file = snapshot.files.get(name)
        if file is None:
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found")
        begin, end = self._range(file.size)
        partial = (begin, end) != (0, file.size)
        self._status = HTTPStatus.PARTIAL_CONTENT if partial else HTTPStatus.OK
        self.send_response(self._status)
        self.send_header("ETag", f'"{file.etag}"')
        self.send_header("X-Repo-Commit", snapshot.revision)
        if file.is_large:
            self.send_header("X-Linked-Etag", f'"{file.etag}"')
            self.send_header("X-Linked-Size", str(file.size))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(end - begin))
        if partial:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{file.size}")
        self.end_headers()
        if self.command == "GET":
            self._send_body(file.path, begin, end)

    def _send_body(self, path: Path, begin: int, end: int) -> None:
        options = self.server.options
        limit = end - begin
        cut = options.drop_after is not None and options.drop_after < limit
        if cut and self.server.may_drop():
            limit = options.drop_after or 0
            self.close_connection = True
        started = time.monotonic()
        with path.open("rb") as stream:
            stream.seek(begin)
            while self._sent < limit:
                chunk = stream.read(min(CHUNK_BYTES, limit - self._sent))
                if not chunk:  # The file shrank while being served.
                    self.close_connection = True
                    return
                self.wfile.write(chunk)
                self._sent += len(chunk)
                if options.rate:
                    ahead = self._sent / options.rate - (time.monotonic() - started)
                    time.sleep(max(0.0, ahead))

    def _range(self, size: int) -> tuple[int, int]:
        """Return the half-open byte range asked for; the whole file if none is."""
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if match is None or match.groups() == ("", ""):
            return 0, size
        first, last = match.groups()
        if first:
            begin, end = int(first), min(int(last) + 1 if last else size, size)
        else:
            begin, end = max(0, size - int(last)), size
        if begin >= end:
            status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
            raise HubError(status, "RangeNotSatisfiable", f"the file has {size} bytes")
        return begin, end

    def _check_token(self) -> None:
        options = self.server.options
        if options.token is None:
            return
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given == options.token:
            return
        if not given:
            message = "Access to this model is restricted. You must be authenticated to access it."
            raise HubError(HTTPStatus.UNAUTHORIZED, "GatedRepo", message)
        if given == options.forbidden_token:
            message = "Access to this model is restricted and you are not in the authorized list."
            raise HubError(HTTPStatus.FORBIDDEN, "GatedRepo", message)
        message = "Invalid credentials in Authorization header"
        raise HubError(HTTPStatus.UNAUTHORIZED, "", message)

    def _send_error(self, error: HubError) -> None:
        headers = {"X-Error-Message": error.message}
        if error.code:
            headers["X-Error-Code"] = error.code
        self._send_json(error.status, {"error": error.message}, headers)

    def _send_json(
        self, status: HTTPStatus, value: object, headers: dict[str, str] | None = None
    ) -> None:
        body = json.dumps(value).encode()
        self._status = status
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self._sent = len(body)


def _positive(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.tiny.hub",
        description="Serve model folders to huggingface_hub from this machine.",
    )
    add = parser.add_argument
    add("--root", type=Path, required=True, help="serves <root>/<organisation>/<name>")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=0, help="0 takes a free one (default: 0)")
    add("--ready-file", type=Path, help="written when listening: the URL for HF_ENDPOINT")
    add("--log", type=Path, help="append one line per request: method, path, status, bytes")
    add("--token", help="only this token may read files")
    add("--forbidden-token", help="a valid token without access to the files")
    add("--rate", type=_positive, help="body bytes per second of each response")
    add("--drop-after", type=int, help="cut each file's connection after so many bytes")
    add("--drop-times", type=int, help="with --drop-after: how many to cut (default: all)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; return the exit code (0, or 2 for a user's mistake)."""
    args = _parser().parse_args(argv)
    options = HubOptions(
        args.token, args.forbidden_token, args.rate, args.drop_after, args.drop_times
    )
    stop = threading.Event()
    try:
        log = args.log.open("a", encoding="utf-8") if args.log else None
        with Hub(args.root, args.host, args.port, options, log) as hub:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stop.set())
            print(f"serving {args.root} at {hub.endpoint}", flush=True)
            if args.ready_file:
                # Renamed into place, so that a waiting reader never sees half a URL.
                partial = args.ready_file.with_name(args.ready_file.name + ".partial")
                partial.write_text(hub.endpoint + "\n", "utf-8")
                partial.replace(args.ready_file)
            stop.wait()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    finally:
        if args.ready_file:
            args.ready_file.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    run_program(main)
