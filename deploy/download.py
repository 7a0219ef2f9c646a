"""The stage ``download``: a model repository, by commit, complete and verified, or an error.

It can be killed at any moment and run again: finished files are kept, and the directory counts as
a model only once its marker says that every file is there (see ``marker.py``).
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from deploy.config import Config, export
from deploy.marker import Marker, RepoFile, file_size, read_marker
from deploy.progress import ProgressLines, bytes_present, gigabytes, unfinished_files
from deploy.report import say
from deploy.state import DONE, StageState
from deploy.verify import Verifier
from kt_kernel.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOCK_NAME = ".kt-download.lock"
LONGEST_WAIT = 60.0  # seconds between attempts


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

    from deploy import hub_client

    directory = config.path("KT_MODEL_PATH")
    repo_id, requested = config.text("KT_MODEL_ID"), config.text("KT_MODEL_REVISION")
    marker = read_marker(directory)
    if marker is not None and marker.repo_id != repo_id:
        raise UserError(
            f"{directory} holds {marker.repo_id}, KT_MODEL_ID is {repo_id}: set KT_MODEL_PATH to "
            f"another directory"
        )
    api = HfApi(token=config["HF_TOKEN"])
    try:
        commit = hub_client.resolve_revision(api, repo_id, requested)
    except hub_client.HubUnreachable as error:
        if not _is_finished(marker, directory) or marker.requested_revision != requested:
            raise
        say(f"warning: {error.reason}: keeping {directory}, which holds {_describe(marker)}")
        state.set(DONE)
        return 0
    if _is_finished(marker, directory) and marker.revision == commit:
        say(f"{directory} already holds {_describe(marker)}")
        state.set(DONE)
        return 0
    _tell_why(marker, directory, requested, commit)
    with _only_one(directory):
        _Download(config, api, directory, requested, commit, state).run(marker)
    state.set(DONE)
    return 0


def _is_finished(marker: Marker | None, directory: Path) -> TypeGuard[Marker]:
    return marker is not None and marker.complete and not marker.missing(directory)


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
    else:
        missing = marker.missing(directory)
        say(f"{directory}: {', '.join(missing[:3])} missing or of another size: downloading again")


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Keep a second download out of the directory; the lock ends with the process."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"cannot write to KT_MODEL_PATH {directory}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another download to {directory} is running: wait for it") from None
        yield
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
        from deploy import hub_client

        self._hub = hub_client
        self._config, self._api, self._directory = config, api, directory
        self._repo_id = config.text("KT_MODEL_ID")
        self._requested, self._commit = requested, commit
        self._state = state
        self._interval = float(config["KT_PROGRESS_INTERVAL"])
        self._bars = sys.stderr.isatty()
        if not self._bars:
            from huggingface_hub.utils import disable_progress_bars

            disable_progress_bars()

    def run(self, earlier: Marker | None) -> None:
        started = time.monotonic()
        for path in unfinished_files(self._directory):
            path.unlink()  # the client never continues them
        listed = self._hub.list_files(self._api, self._repo_id, self._commit)
        small = self._hub.choose_small_files(listed)
        marker = Marker(self._repo_id, self._requested, self._commit, {})
        if earlier is not None:
            marker.stale = sorted({*earlier.files, *earlier.stale})
            if earlier.revision == self._commit:
                marker.verified = earlier.verified
        marker.save(self._directory)  # from here on this is no finished model
        shards = None
        if self._hub.INDEX_NAME in listed:
            self._fetch({self._hub.INDEX_NAME: listed[self._hub.INDEX_NAME]})
            shards = self._read_shards()
        chosen = sorted({*small, *self._hub.choose_weights(listed, shards)})
        marker.files = {name: listed[name] for name in chosen}
        marker.stale = [name for name in marker.stale if name not in marker.files]
        marker.save(self._directory)
        self._check_space(marker)
        self._download(marker)
        self._verify(marker)
        for name in marker.stale:
            (self._directory / name).unlink(missing_ok=True)
        marker.complete = True
        marker.save(self._directory)
        seconds = time.monotonic() - started
        say(f"{self._directory} holds {_describe(marker)} ({seconds:.0f} s)")

    def _read_shards(self) -> set[str]:
        path = self._directory / self._hub.INDEX_NAME
        try:
            shards = set(json.loads(path.read_bytes())["weight_map"].values())
            if not shards or not all(isinstance(s, str) and Path(s).name == s for s in shards):
                raise ValueError(shards)
        except (OSError, KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"{path} is not an index of safetensors shards: delete it and download again, or "
                f"choose another KT_MODEL_REVISION"
            ) from None
        return shards

    def _check_space(self, marker: Marker) -> None:
        needed = sum(marker.files[name].size for name in marker.missing(self._directory))
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise UserError(
                f"not enough free space for KT_MODEL_PATH {self._directory}: expected "
                f"{gigabytes(needed)}, found {gigabytes(free)}; free some or choose another disk"
            )

    def _download(self, marker: Marker) -> None:
        """Fetch what is missing; start again after a lost connection."""
        total, attempts_left = marker.total_bytes, self._config.integer("KT_DOWNLOAD_RETRIES")
        wait = 2.0
        missing = len(marker.missing(self._directory))
        say(
            f"downloading {self._repo_id} at commit {self._commit} to {self._directory}: "
            f"{len(marker.files)} files, {gigabytes(total)}, {missing} to fetch"
        )
        while True:
            try:
                with self._progress("downloading", total, marker):
                    self._fetch(marker.files)
                return
            except self._hub.HubUnreachable as error:
                left = len(marker.missing(self._directory))
                if left < missing:
                    missing, wait = left, 2.0
                    attempts_left = self._config.integer("KT_DOWNLOAD_RETRIES")
                if attempts_left == 0:
                    raise
                attempts_left -= 1
                say(f"warning: {error.reason}: trying again in {wait:.0f} s")
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)

    @contextmanager
    def _progress(self, what: str, total: int, marker: Marker) -> Iterator[None]:
        directory, files = self._directory, marker.files

        def done() -> int:
            return bytes_present(directory, files)

        lines = nullcontext() if self._bars else ProgressLines(what, total, done, self._interval)
        with self._state.watch(what, total, done), lines:
            yield

    def _fetch(self, files: Mapping[str, RepoFile]) -> None:
        from huggingface_hub import snapshot_download

        for name, file in files.items():
            # The client takes a file of an earlier run for finished without looking at its size.
            if file_size(self._directory / name) not in (None, file.size):
                (self._directory / name).unlink()
        with self._hub.explained(self._repo_id, self._requested, self._directory):
            snapshot_download(
                self._repo_id,
                revision=self._commit,
                local_dir=self._directory,
                allow_patterns=[glob.escape(name) for name in files],
                max_workers=self._config.integer("KT_DOWNLOAD_WORKERS"),
                token=self._config["HF_TOKEN"],
            )

    def _verify(self, marker: Marker) -> None:
        """Check every file; fetch a damaged one once more."""
        with_content = self._config["KT_VERIFY_DOWNLOAD"] == "sha256"
        verifier = Verifier(self._directory, marker, with_content)
        names = sorted(marker.files)
        total = marker.total_bytes
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
        self._fetch({name: marker.files[name] for name in bad})
        bad = verifier.bad_files(bad)
        if bad:
            raise UserError(
                f"{self._directory / bad[0]} is not what the Hub lists, twice in a row"
                + (f" (and {len(bad) - 1} more files)" if len(bad) > 1 else "")
                + ": check the disk, the network or the mirror in HF_ENDPOINT"
            )
