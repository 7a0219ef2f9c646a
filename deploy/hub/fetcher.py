"""Files of the Hub to disk, each going on where an earlier attempt or process stopped.

The Hub's own client gives each attempt a file of its own and begins it again. Here a file that is
on its way has a path that follows from its digest (``unfinished.py``), and its bytes are written in
order: what a killed process leaves is the beginning of the file, to be continued by a request for
the rest.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import httpx
from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from deploy.hub.http_client import looks_like_a_page, not_the_hub, through_proxy
from deploy.hub.marker import RepoFile, file_size
from deploy.hub.retries import HubUnreachable, Stopped, with_retries
from deploy.hub.unfinished import FOLDER, partial_path

#: Files that never begin as a web page does.
NEVER_PAGES = (".safetensors", ".json", ".py")


class Fetcher:
    """Fetches files of one commit of a repository.

    Args:
        repo_id, commit: what to fetch from.
        directory: where to put the files.
        token: for the Hub; None takes the one that the Hub's client knows, if any.
        retries: how often to try a file again without getting further.
        workers: files at the same time.
        explained: makes a context that turns the client's exceptions into user errors.
    """

    def __init__(
        self,
        repo_id: str,
        commit: str,
        directory: Path,
        token: str | None,
        retries: int,
        workers: int,
        explained: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._repo_id, self._commit, self._directory = repo_id, commit, directory
        self._headers = build_hf_headers(token=token)
        # The size on the wire is the size of the file.
        self._headers["Accept-Encoding"] = "identity"
        self._retries, self._workers, self._explained = retries, workers, explained
        self._stop = threading.Event()

    def fetch(self, files: Mapping[str, RepoFile], finished: Callable[[str, bool], None]) -> None:
        """Fetch the files that are not there in their size.

        Args:
            files: by name, without folders.
            finished: is told each file that is complete, and whether it came from the Hub in one
                piece; called by several threads.

        Raises:
            UserError: of the first file that could not be fetched.
        """
        wanted = [n for n, file in files.items() if file_size(self._directory / n) != file.size]
        if not wanted:
            return
        with self._explained():
            (self._directory / FOLDER).mkdir(parents=True, exist_ok=True)
            for name in wanted:
                (self._directory / name).unlink(missing_ok=True)  # it has another size
        self._stop.clear()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="download")
        try:
            tasks = [pool.submit(self._fetch_file, n, files[n], finished) for n in wanted]
            ended, _ = wait(tasks, return_when=FIRST_EXCEPTION)
        except KeyboardInterrupt:
            self._stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        self._stop.set()
        pool.shutdown(cancel_futures=True)
        for error in (task.exception() for task in ended):
            if error is not None and not isinstance(error, Stopped):
                raise error

    def _fetch_file(self, name: str, file: RepoFile, finished: Callable[[str, bool], None]) -> None:
        path = partial_path(self._directory, name, file)
        fresh, attempts = not file_size(path), 0

        def attempt() -> None:
            nonlocal attempts
            attempts += 1
            with self._explained(), path.open("ab", buffering=0) as partial:
                self._append(partial, name, file)

        with_retries(attempt, self._retries, lambda: file_size(path) or 0, self._stop)
        with self._explained():
            path.replace(self._directory / name)
        finished(name, fresh and attempts == 1)

    def _append(self, partial: BinaryIO, name: str, file: RepoFile) -> None:
        """Complete a partial file; raises what the client raises, and HubUnreachable."""
        offset = partial.tell()
        if offset > file.size:
            partial.truncate(0)
            offset = 0
        if offset == file.size:
            return
        url = hf_hub_url(self._repo_id, name, revision=self._commit)
        headers = self._headers | ({"Range": f"bytes={offset}-"} if offset else {})
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            if response.status_code == 416:
                partial.truncate(0)
                raise self._wrong(name, f"has no bytes from {offset} of {file.size} on")
            if response.is_error:
                response.read()
            hf_raise_for_status(response)
            encoded = response.headers.get("content-encoding", "identity") != "identity"
            if offset and (encoded or not _continues(response, offset, file.size)):
                partial.truncate(0)
                if response.status_code == 206:
                    raise self._wrong(name, f"sends other bytes than those from {offset} on")
                offset = 0
            for chunk in response.iter_bytes():
                if self._stop.is_set():
                    raise Stopped
                if offset == 0 and name.endswith(NEVER_PAGES) and looks_like_a_page(chunk):
                    raise not_the_hub(constants.ENDPOINT, "a web page", str(response.url))
                if offset + len(chunk) > file.size:
                    partial.truncate(0)
                    raise self._wrong(name, f"sends more than {file.size} bytes")
                rest = memoryview(chunk)
                while rest:  # a disk that is nearly full takes a part
                    rest = rest[partial.write(rest) :]
                offset += len(chunk)
            if offset < file.size:
                raise self._wrong(name, f"sends {offset} bytes of {file.size}")

    def _wrong(self, name: str, what: str) -> HubUnreachable:
        where = constants.ENDPOINT
        return HubUnreachable(
            f"{where}{through_proxy(where)} {what} for {name} of {self._repo_id}",
            "check the network, or the mirror in HF_ENDPOINT",
        )


def _continues(response: httpx.Response, offset: int, size: int) -> bool:
    """Whether the answer to a request for the rest of a file is that rest."""
    match = re.fullmatch(
        r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("content-range", "").strip()
    )
    return (
        response.status_code == 206
        and match is not None
        and int(match[1]) == offset
        and match[3] in (str(size), "*")
    )
