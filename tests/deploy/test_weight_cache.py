"""The local copy of the packed weights: one for a host, whole, of the weights that there are."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.checks.weight_cache import check_weight_cache
from deploy.copies import copying, weight_cache
from deploy.copies.copying import Progress
from deploy.copies.sums import UNFINISHED_NAME, read_sums
from deploy.copies.weight_cache import folder_of, local_copy
from deploy.stages.health import examine
from deploy.state import StageState, read_state
from kt_kernel.errors import UserError
from kt_kernel.packed import MANIFEST_NAME
from tests.deploy.checks.situations import situation
from tests.deploy.helpers import Prepared, content
from tests.locks import refuse_locks

pytestmark = pytest.mark.timeout(120)  # of locks that nobody gives up


def in_child(work: Callable[[], object], before: Callable[[Progress], None]) -> int:
    """Do some work in a child that does something more after each chunk; its id."""
    pid = os.fork()
    if pid:
        return pid
    add = Progress.add

    def added(self: Progress, count: int) -> None:
        add(self, count)
        before(self)

    setattr(Progress, "add", added)  # noqa: B010  (mypy minds the assignment)
    try:
        work()
    finally:
        os._exit(0)


def test_a_copy_is_made_once(prepared: Prepared, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = local_copy(prepared.int4, cache, None)
    copied = {name for name in content(folder) if name != "SHA256SUMS"}
    assert {name: content(folder)[name] for name in copied} == content(prepared.int4)
    before = {path: path.stat().st_ino for path in folder.iterdir()}
    assert local_copy(prepared.int4, cache, None) == folder
    assert {path: path.stat().st_ino for path in folder.iterdir()} == before


def test_a_conversion_again_is_noticed_and_makes_room(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets that no server uses stay until their room is needed; one in use stays then, too."""
    cache, source = tmp_path / "cache", tmp_path / "weights"
    shutil.copytree(prepared.int4, source)
    old = local_copy(source, cache, None)
    held = weight_cache.is_held(old)
    assert held  # by this process, as by a server
    shutil.rmtree(source)
    shutil.copytree(prepared.int8, source)
    new = local_copy(source, cache, None)
    assert new != old
    assert old.is_dir()
    assert content(new).keys() - {"SHA256SUMS"} == content(prepared.int8).keys()

    # Another host's disk, on which nobody holds the old set, and which has room for one.
    other = tmp_path / "other"
    pid = in_child(lambda: local_copy(prepared.int4, other, None), lambda _: None)
    assert os.waitpid(pid, 0)[1] == 0
    idle = folder_of(other, prepared.int4)
    assert idle.is_dir()
    disk = weight_cache._bytes_in(new)

    def usage(_: object) -> SimpleNamespace:
        used = sum(weight_cache._bytes_in(p) for p in other.iterdir() if p.is_dir())
        return SimpleNamespace(free=disk - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    local_copy(source, other, None)
    assert not idle.exists()
    expected = f"not enough free space for KT_WEIGHT_CACHE {other}: expected .*, found "
    with pytest.raises(UserError, match=expected):  # the set there now is held
        local_copy(prepared.int4, other, None)


@pytest.mark.parametrize("share", [0.0, 0.7])
def test_killed_while_it_copies(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(copying, "THREADS", 1)  # so that the first two of three files are finished
    total = weight_cache._bytes_in(prepared.int4)
    cache = tmp_path / "cache"

    def die(progress: Progress) -> None:
        if progress.done >= share * total:
            os.kill(os.getpid(), signal.SIGKILL)

    pid = in_child(lambda: local_copy(prepared.int4, cache, None), die)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    folder = folder_of(cache, prepared.int4)
    assert not (folder / MANIFEST_NAME).exists()
    finished = read_sums(folder / UNFINISHED_NAME)
    assert len(finished) == (2 if share else 0)
    kept = {folder / name: (folder / name).stat().st_ino for name in finished}
    local_copy(prepared.int4, cache, None)
    assert {path: path.stat().st_ino for path in kept} == kept
    assert set(content(folder)) == {*content(prepared.int4), "SHA256SUMS"}


def test_servers_of_a_host_share_one_copy(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits for the first and says how far that is; it copies nothing."""
    monkeypatch.setattr(weight_cache, "POLL_SECONDS", 0.02)
    cache, go = tmp_path / "cache", tmp_path / "go"

    def wait(_: Progress) -> None:
        while not go.exists():
            time.sleep(0.01)

    first = in_child(lambda: local_copy(prepared.int4, cache, None), wait)
    folder = folder_of(cache, prepared.int4)
    while not list(folder.glob(".*")):
        time.sleep(0.01)
    monkeypatch.setattr(weight_cache, "_copy", lambda *_: pytest.fail("it copies, too"))
    state = StageState(tmp_path / "run", "serve")
    found: list[Path] = []
    second = threading.Thread(
        target=lambda: found.append(local_copy(prepared.int4, cache, state)), daemon=True
    )
    second.start()
    deadline = time.monotonic() + 30
    said = None
    while said is None or not said.line().startswith("copying weights "):
        assert time.monotonic() < deadline, said
        time.sleep(0.01)
        said = read_state(tmp_path / "run", "serve")
    assert examine(said, tmp_path / "run", "http://127.0.0.1:9/health") == said  # no server yet
    go.touch()
    second.join(30)
    assert found == [folder]
    os.waitpid(first, 0)


def test_damage_is_one_line(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_cache, "POLL_SECONDS", 0.01)
    source = tmp_path / "weights"
    shutil.copytree(prepared.int4, source)
    layer = sorted(source.glob("layer-*"))[0]
    whole = layer.read_bytes()
    layer.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{layer} is damaged: expected the SHA-256"):
        local_copy(source, tmp_path / "cache", None)
    layer.write_bytes(whole)
    folder = local_copy(source, tmp_path / "cache", None)
    (folder / layer.name).unlink()
    with pytest.raises(UserError, match="is damaged, and a server uses it: expected all files"):
        local_copy(source, tmp_path / "cache", None)  # this process has it, too
    layer.unlink()
    with pytest.raises(UserError, match="expected finished weights, found layer-"):
        local_copy(source, tmp_path / "cache", None)


def test_a_set_of_another_user(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is shared if it is whole, and never in the way; a user's own rights do not bind root."""
    cache = tmp_path / "cache"
    pid = in_child(lambda: local_copy(prepared.int4, cache, None), lambda _: None)
    assert os.waitpid(pid, 0)[1] == 0
    theirs = folder_of(cache, prepared.int4)
    lock, open_any = theirs.with_name(f"{theirs.name}.lock"), os.open

    def open_mine(path: Path, flags: int, *rest: int) -> int:
        if path == lock and flags & (os.O_RDWR | os.O_CREAT):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return open_any(path, flags, *rest)

    def utime(_: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "open", open_mine)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
        with pytest.raises(UserError, match="not enough free space for KT_WEIGHT_CACHE"):
            local_copy(prepared.int8, cache, None)
        full.setattr(os, "access", lambda *_: False)
        assert weight_cache.room(cache, prepared.int8, 0)[1] == 10  # theirs stays
    monkeypatch.setattr(os, "utime", utime)
    monkeypatch.setattr(weight_cache, "_copy", lambda *_: pytest.fail("it copies"))
    assert local_copy(prepared.int4, cache, None) == theirs
    assert weight_cache.is_held(theirs)
    assert local_copy(prepared.int4, cache, None) == theirs  # shared with one that holds it


def test_no_locks_no_copy(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second server would take the first one's half-written copy for a killed one's."""
    cache = tmp_path / "cache"
    pid = in_child(lambda: local_copy(prepared.int8, cache, None), lambda _: None)
    assert os.waitpid(pid, 0)[1] == 0
    refuse_locks(monkeypatch)
    with pytest.raises(UserError, match=f"^cannot lock a file in KT_WEIGHT_CACHE {cache} "):
        local_copy(prepared.int4, cache, None)
    assert weight_cache.is_held(folder_of(cache, prepared.int8))  # perhaps: it stays


def test_the_check(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"KT_WEIGHT_PATH": str(prepared.int4), "KT_MODEL_PATH": str(prepared.model)}
    assert list(check_weight_cache(situation(tmp_path, **settings))) == []
    settings["KT_WEIGHT_CACHE"] = str(tmp_path / "cache")
    looked = situation(tmp_path, **settings)
    space, disk = check_weight_cache(looked)
    assert (space.status, disk.status) == ("PASS", "WARN")
    assert disk.found == "the file system that has KT_WEIGHT_PATH"
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
        space, _ = check_weight_cache(looked)
        assert space.status == "FAIL"
        assert space.found.startswith("10 bytes free")
    monkeypatch.setattr(os, "access", lambda *_: False)
    (refused,) = check_weight_cache(looked)
    assert (refused.status, refused.todo) == ("FAIL", "choose a directory that it can write to")
    local_copy(prepared.int4, tmp_path / "cache", None)
    (copied,) = check_weight_cache(looked)
    assert (copied.status, copied.found) == ("PASS", "all of them")
