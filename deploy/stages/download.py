"""The stage ``download``: a model repository, by commit, complete and verified, or an error.

It can be killed at any moment and run again: finished files and the beginnings of others are kept
(see ``hub/fetcher.py``), and the directory counts as a model only once its marker says that every
file is there (see ``hub/marker.py``).
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeGuard

from deploy.console import say
from deploy.hub.digests import Verifier
from deploy.hub.marker import (
    Marker,
    MarkerDamaged,
    RepoFile,
    file_size,
    marker_or_none,
    read_marker,
    stamp,
)
from deploy.hub.others import files_there, refuse_files_of_others
from deploy.hub.retries import HubUnreachable, with_retries
from deploy.hub.unfinished import bytes_present, partial_path, unfinished_files
from deploy.progress_lines import ProgressLines
from deploy.settings.config import Config, export
from deploy.stages.stage import Stage
from deploy.stages.turns import POLL_SECONDS, add_in_turn
from deploy.state import DONE, WAITING, StageState
from kt_kernel.errors import UserError
from kt_kernel.files.locks import try_lock
from kt_kernel.files.units import gigabytes

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOCK_NAME = ".kt-download.lock"
#: Times to ask again for the revision when a finished download can do without the answer.
RETRIES_WHEN_FINISHED = 1


def run(config: Config, state: StageState) -> int:
    """Download ``KT_MODEL_ID`` at ``KT_MODEL_REVISION`` to ``KT_MODEL_PATH``.

    Returns:
        0, if the directory holds that revision in full.

    Raises:
        UserError: what stopped it, in one line.
    """
    state.set("asking the Hub")
    export(config)  # the Hub's client reads HF_* when it is imported
    from huggingface_hub import HfApi

    from deploy.hub import client as hub_client
    from deploy.hub import http_client

    http_client.prepare_client()
    directory = config.path("KT_MODEL_PATH")
    repo_id, requested = config.text("KT_MODEL_ID"), config.text("KT_MODEL_REVISION")
    there = files_there(directory, [LOCK_NAME])  # before the marker, which another may write now
    try:
        marker = read_marker(directory)
        ours = marker is not None
    except MarkerDamaged as error:
        say(f"warning: {error.reason}: making it again, finished files are recognised")
        marker, ours = None, True
    if marker is not None and marker.repo_id != repo_id:
        raise UserError(
            f"{directory} holds {marker.repo_id}, KT_MODEL_ID is {repo_id}: set KT_MODEL_PATH to "
            f"another directory"
        )
    api = HfApi(token=config["HF_TOKEN"])
    retries = config.integer("KT_DOWNLOAD_RETRIES")
    code: bool = config["KT_TRUST_REMOTE_CODE"]
    kept = _is_finished(marker, directory, code) and marker.requested_revision == requested
    try:
        commit = with_retries(
            lambda: hub_client.resolve_revision(api, repo_id, requested),
            min(retries, RETRIES_WHEN_FINISHED) if kept else retries,
        )
    except HubUnreachable as error:
        if marker is None or not kept:
            raise
        say(f"warning: {error.reason}: keeping {directory}, which holds {_describe(marker)}")
        state.set(DONE)
        return 0
    if _is_finished(marker, directory, code) and marker.revision == commit:
        say(f"{directory} already holds {_describe(marker)}")
        state.set(DONE)
        return 0
    _tell_why(marker, directory, requested, commit)
    if there and not ours:
        listed = with_retries(lambda: hub_client.list_files(api, repo_id, commit), retries)
        refuse_files_of_others(
            directory, there, listed, hub_client.choose_small_files(listed, code)
        )
    with _only_one(directory, state) as waited:
        if waited:  # the other one may have done it
            marker = marker_or_none(directory)
            if _is_finished(marker, directory, code) and marker.revision == commit:
                say(f"{directory} holds {_describe(marker)}, by the other download")
                state.set(DONE)
                return 0
        _Download(config, api, directory, requested, commit, state).run(marker)
    state.set(DONE)
    return 0


def _is_finished(marker: Marker | None, directory: Path, code: bool) -> TypeGuard[Marker]:
    """Whether all is there; with ``code``, the repository's Python files, too."""
    return (
        marker is not None
        and marker.complete
        and (marker.with_code or not code)
        and not marker.missing(directory)
    )


def _describe(marker: Marker) -> str:
    return (
        f"{marker.repo_id} at commit {marker.revision}: {len(marker.files)} files, "
        f"{gigabytes(marker.total_bytes)}"
    )


def _tell_why(marker: Marker | None, directory: Path, requested: str, commit: str) -> None:
    """Say why a directory that was finished once is downloaded to again."""
    if marker is None or not marker.complete:
        return
    if marker.revision != commit:
        say(f"{requested} is now commit {commit}, {directory} holds {marker.revision}: updating")
    elif missing := marker.missing(directory):
        say(f"{directory}: {', '.join(missing[:3])} missing or of another size: downloading again")
    else:
        say(f"{directory} holds no Python files, KT_TRUST_REMOTE_CODE is on: fetching them")


@contextmanager
def _only_one(directory: Path, state: StageState) -> Iterator[bool]:
    """Wait until no other process, on this host or another, downloads to the directory.

    The lock ends with the process. Gives whether there was another.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"cannot write to KT_MODEL_PATH {directory}: {error.strerror}") from None
    try:
        waited = False
        while not try_lock(fd, f"KT_MODEL_PATH {directory}"):
            if not waited:
                holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
                reason = f"another download to {directory} ({holder or 'just started'})"
                state.set(WAITING, reason)
                say(f"waiting for {reason}")
            waited = True
            time.sleep(POLL_SECONDS)
        if waited:
            state.begin()
        with suppress(OSError):  # a full disk: only the name of the holder is missing
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        try:
            yield waited
        finally:
            with suppress(OSError):
                os.ftruncate(fd, 0)  # a finished directory does not tell who made it
    finally:
        os.close(fd)


class _Download:
    """One download of one commit into one directory."""

    def __init__(
        self,
        config: Config,
        api: HfApi,
        directory: Path,
        requested: str,
        commit: str,
        state: StageState,
    ) -> None:
        from deploy.hub import client as hub_client
        from deploy.hub import fetcher

        self._hub = hub_client
        self._config, self._api, self._directory = config, api, directory
        self._repo_id = config.text("KT_MODEL_ID")
        self._requested, self._commit = requested, commit
        self._state = state
        self._interval = float(config["KT_PROGRESS_INTERVAL"])
        self._retries = config.integer("KT_DOWNLOAD_RETRIES")
        self._fetcher = fetcher.Fetcher(
            self._repo_id,
            commit,
            directory,
            config["HF_TOKEN"],
            self._retries,
            config.integer("KT_DOWNLOAD_WORKERS"),
            lambda: hub_client.explained(self._repo_id, requested, directory),
        )

    def run(self, earlier: Marker | None) -> None:
        started = time.monotonic()
        listed = with_retries(
            lambda: self._hub.list_files(self._api, self._repo_id, self._commit), self._retries
        )
        code: bool = self._config["KT_TRUST_REMOTE_CODE"]
        small = self._hub.choose_small_files(listed, code)
        marker = Marker(self._repo_id, self._requested, self._commit, {}, with_code=code)
        if earlier is not None:
            marker.take_over(earlier, listed, self._directory)
        marker.save(self._directory)  # from here on this is no finished model
        if earlier is not None:
            self._remove_changed(earlier, listed)
        shards = None
        if self._hub.INDEX_NAME in listed:
            marker.files[self._hub.INDEX_NAME] = listed[self._hub.INDEX_NAME]
            self._fetch(marker, {self._hub.INDEX_NAME: listed[self._hub.INDEX_NAME]})
            self._verify(marker, [self._hub.INDEX_NAME])
            shards = self._hub.read_shards(self._directory)
        chosen = sorted({*small, *self._hub.choose_weights(listed, shards)})
        marker.files = {name: listed[name] for name in chosen}
        marker.stale = [name for name in marker.stale if name not in marker.files]
        marker.save(self._directory)
        self._remove_unfinished(marker)
        self._check_space(marker)
        self._download(marker)
        self._verify(marker, chosen)
        for name in marker.stale:
            (self._directory / name).unlink(missing_ok=True)
        self._remove_unfinished(None)
        marker.complete = True
        marker.save(self._directory)
        seconds = time.monotonic() - started
        say(f"{self._directory} holds {_describe(marker)} ({seconds:.0f} s)")

    def _remove_changed(self, earlier: Marker, listed: Mapping[str, RepoFile]) -> None:
        """Remove files of an earlier revision that have other content in this one."""
        for name, file in earlier.files.items():
            if name in listed and listed[name] != file:
                (self._directory / name).unlink(missing_ok=True)

    def _remove_unfinished(self, marker: Marker | None) -> None:
        """Remove unfinished files, but those of the marker."""
        files = {} if marker is None else marker.files
        kept = {partial_path(self._directory, name, file) for name, file in files.items()}
        for path in unfinished_files(self._directory):
            if path not in kept:
                path.unlink(missing_ok=True)

    def _check_space(self, marker: Marker) -> None:
        missing = {name: marker.files[name] for name in marker.missing(self._directory)}
        needed = sum(
            file.size - (file_size(partial_path(self._directory, name, file)) or 0)
            for name, file in missing.items()
        )
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise UserError(
                f"not enough free space for KT_MODEL_PATH {self._directory}: expected "
                f"{gigabytes(needed)}, found {gigabytes(free)}; free some or choose another disk"
            )

    def _download(self, marker: Marker) -> None:
        """Fetch what is missing."""
        total, missing = marker.total_bytes, marker.missing(self._directory)
        present = bytes_present(self._directory, marker.files)
        say(
            f"downloading {self._repo_id} at commit {self._commit} to {self._directory}: "
            f"{len(marker.files)} files, {gigabytes(total)}, {len(missing)} to fetch"
            + (f", {gigabytes(present)} are there" if missing and present else "")
        )
        with self._progress("downloading", total, marker):
            self._fetch(marker, marker.files)

    @contextmanager
    def _progress(self, what: str, total: int, marker: Marker) -> Iterator[None]:
        directory, files = self._directory, marker.files

        def done() -> int:
            return bytes_present(directory, files)

        lines = ProgressLines(what, total, done, self._interval)
        with self._state.watch(what, total, done), lines:
            yield

    def _fetch(self, marker: Marker, files: Mapping[str, RepoFile]) -> None:
        received = Lock()

        def finished(name: str, fresh: bool) -> None:
            with received:
                if fresh:
                    marker.received[name] = stamp(self._directory / name)
                marker.save(self._directory)

        self._fetcher.fetch(files, finished)

    def _verify(self, marker: Marker, names: Sequence[str]) -> None:
        """Check files; fetch a damaged one once more."""
        with_content = self._config["KT_VERIFY_DOWNLOAD"] == "sha256"
        verifier = Verifier(self._directory, marker, with_content)
        total = sum(marker.files[name].size for name in names)
        with (
            self._state.watch("verifying", total, lambda: verifier.bytes_done),
            ProgressLines("verifying", total, lambda: verifier.bytes_done, self._interval),
        ):
            bad = verifier.bad_files(names)
        if not bad:
            return
        say(f"warning: {', '.join(bad[:3])} damaged or incomplete: downloading again")
        for name in bad:
            (self._directory / name).unlink(missing_ok=True)
        self._fetch(marker, {name: marker.files[name] for name in bad})
        bad = verifier.bad_files(bad)
        if bad:
            raise UserError(
                f"{self._directory / bad[0]} is not what the Hub lists, twice in a row"
                + (f" (and {len(bad) - 1} more files)" if len(bad) > 1 else "")
                + ": check the disk, the network or the mirror in HF_ENDPOINT"
            )


STAGE = Stage(
    "download",
    "download the model from the Hub, by commit, and verify it",
    lambda config, _, state: run(config, state),
    add_in_turn,
    keeps_state=lambda _: True,
)
