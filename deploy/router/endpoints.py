"""Tell the router which servers there are, while they come and go: a directory of files, each with
one server's address, as the jobs of ``cluster/slurm`` write them."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NoReturn

#: Seconds between two looks at the directory, and until the router is asked again.
PAUSE, AGAIN = 5.0, 1.0
#: Of a file; an address is shorter.
MAX_BYTES = 4096


def addresses(directory: Path) -> tuple[set[str], set[str]]:
    """What the files say now, and what is wrong with those that have no address.

    A file that goes meanwhile is gone, and one that is empty has no address yet.

    Raises:
        OSError: the directory cannot be read.
    """
    found, problems = set(), set()
    for path in directory.iterdir():
        # Of an editor, or of a file that is being written.
        if path.name.startswith(".") or path.name.endswith(".tmp"):
            continue
        try:
            if not path.is_file():  # a pipe would be waited for
                continue
            with path.open("rb") as file:
                content = file.read(MAX_BYTES).strip()
        except OSError:
            continue
        if content.startswith(b"http") and content.isascii():
            found.add(content.decode())
        elif content:
            problems.add(f"{path}: expected http://HOST:PORT, found {ascii(content[:40])[1:]}")
    return found, problems


class ServerList:
    """The router's list of servers.

    Args:
        url: the router's.
        key: that opens its list.
        server_key: the servers', or "".
    """

    def __init__(self, url: str, key: str, server_key: str) -> None:
        self._url, self._key, self._server_key = url, key, server_key
        self._ids: dict[str, str] = {}
        # No proxy for the internet comes between.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def _ask(self, method: str, path: str, body: dict[str, str] | None = None) -> Any:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        with self._opener.open(request, timeout=30) as answer:
            return json.loads(answer.read() or b"null")

    def follow(self, wanted: set[str]) -> set[str]:
        """Add servers that have come, and remove those that have gone.

        Returns:
            What the router did not do: it does not answer, or refuses. It is asked for the rest.
        """
        problems = set()
        gone, come = self._ids.keys() - wanted, wanted - self._ids.keys()
        for url in (*sorted(gone), *sorted(come)):
            try:
                self._change(url, url in wanted)
            except urllib.error.HTTPError as error:
                error.close()
                problems.add(f"the router refuses {url!r}: {error}; asking on")
            except OSError as error:
                problems.add(f"the router: {error}; asking on")
            except Exception as error:  # no answer may end the following
                problems.add(f"the router's answer to {url!r}: {error!r}; asking on")
        return problems

    def _change(self, url: str, comes: bool) -> None:
        if comes:
            key = {"api_key": self._server_key} if self._server_key else {}
            self._ids[url] = self._ask("POST", "/workers", {"url": url, **key})["worker_id"]
        else:
            self._ask("DELETE", f"/workers/{self._ids[url]}")
            del self._ids[url]
        print(f"{'added' if comes else 'left out'} {url}", flush=True)


def follow(directory: Path, servers: ServerList) -> NoReturn:
    """Follow for ever."""
    said: set[str] = set()
    while True:
        said, pause = look(directory, servers, said)
        time.sleep(pause)


def look(directory: Path, servers: ServerList, said: set[str]) -> tuple[set[str], float]:
    """Follow once.

    Args:
        said: the problems at the last look, which are not told again.

    Returns:
        The problems now, and the seconds until the next look.
    """
    try:
        wanted, problems = addresses(directory)
        undone = servers.follow(wanted)
    except OSError as error:
        problems, undone = {f"{directory}: {error.strerror}"}, set()
    for problem in sorted((problems | undone) - said):
        with contextlib.suppress(OSError):  # nobody listens any more
            print(f"warning: {problem}", file=sys.stderr, flush=True)
    return problems | undone, AGAIN if undone else PAUSE
