"""A bundle made and installed: whole or not at all, whatever ends it."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.copies import bundle as bundles
from deploy.copies import bundle_parts
from deploy.copies.bundle import PARTS
from deploy.copies.copying import Progress, copy_file, filled_alone
from deploy.copies.sums import SUMS_NAME, UNFINISHED_NAME, read_sums
from deploy.hub.marker import Marker, RepoFile
from deploy.settings.config import load
from deploy.stages import bundle, unbundle
from kt_kernel.errors import UserError
from kt_kernel.packed import MANIFEST_NAME
from tests.deploy.helpers import Prepared, content, fails, run
from tests.locks import refuse_locks


@pytest.fixture
def near(tmp_path: Path, prepared: Prepared) -> dict[str, str]:
    """The settings of a host with a downloaded model and its weights."""
    model = tmp_path / "model"
    shutil.copytree(prepared.model, model)
    files = {
        path.name: RepoFile(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest(), "")
        for path in model.iterdir()
    }
    Marker("lab/tiny", "main", "0" * 40, files, complete=True).save(model)
    weights = tmp_path / "weights"
    shutil.copytree(prepared.int4, weights)
    return {"KT_MODEL_PATH": str(model), "KT_WEIGHT_PATH": str(weights)}


@pytest.fixture
def far(tmp_path: Path) -> dict[str, str]:
    return {"KT_MODEL_PATH": str(tmp_path / "far/model"), "KT_WEIGHT_PATH": f"{tmp_path}/far/int4"}


def make(near: dict[str, str], directory: Path, *parts: str) -> None:
    config = load({"PATH": os.environ["PATH"], **near}, [], "bundle")
    assert bundle.run(config, directory, list(parts), "no/such:image") == 0


def install(far: dict[str, str], directory: Path, *parts: str) -> None:
    config = load({"PATH": os.environ["PATH"], **far}, [], "unbundle")
    assert unbundle.run(config, directory, list(parts) or None) == 0


def sizes_and_times(folder: Path) -> dict[str, tuple[int, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


def test_to_the_other_side(near: dict[str, str], far: dict[str, str], tmp_path: Path) -> None:
    """By the command line, and as `sha256sum -c` sees it."""
    made = run("bundle", tmp_path / "b", "--part", "model", "--part", "weights", **near)
    assert made.returncode == 0, made.stderr
    checked = subprocess.run(
        ["sha256sum", "-c", "--quiet", "--strict", SUMS_NAME], cwd=tmp_path / "b", check=False
    )
    assert checked.returncode == 0
    listed = {str(p.relative_to(tmp_path / "b")) for p in (tmp_path / "b").rglob("*.*")}
    assert {*read_sums(tmp_path / "b" / SUMS_NAME)} == listed
    for _ in range(2):  # the second time all is there
        installed = run("unbundle", tmp_path / "b", **far)
        assert installed.returncode == 0, installed.stderr
    assert installed.stderr.count("already there") == 2
    for name, path in near.items():
        assert content(Path(far[name])) == content(Path(path))


def _killed_after(count: int, work: Callable[[], None]) -> None:
    """Do some work in a child that is killed when it has copied so many bytes."""
    pid = os.fork()
    if pid == 0:
        add = Progress.add

        def dying(self: Progress, added: int) -> None:
            add(self, added)
            if self.done >= count:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(Progress, "add", dying)  # noqa: B010  (mypy minds the assignment)
        work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_killed_on_either_side(
    near: dict[str, str], far: dict[str, str], tmp_path: Path, share: float
) -> None:
    """What was finished is not copied again, and nothing unfinished looks whole."""
    total = sum(path.stat().st_size for path in Path(near["KT_MODEL_PATH"]).iterdir())
    directory, target = tmp_path / "b", Path(far["KT_MODEL_PATH"])
    works: list[tuple[Path, Callable[[], None]]] = [
        (directory / "model", lambda: make(near, directory, "model")),
        (target, lambda: install(far, directory)),
    ]
    for folder, work in works:
        _killed_after(int(share * total), work)
        assert not (folder / ".kt-download.json").exists()
        if folder.parent == directory:
            assert not (directory / SUMS_NAME).exists()
            with pytest.raises(UserError, match="holds no whole bundle, SHA256SUMS is missing"):
                install(far, directory)
            finished = {*read_sums(directory / UNFINISHED_NAME)}
        before = sizes_and_times(folder)
        work()
        after = sizes_and_times(folder)
        if folder.parent == directory:
            for name in finished:
                assert before[Path(name).name] == after[Path(name).name]
        assert content(folder) == content(Path(near["KT_MODEL_PATH"]))


def test_a_damaged_source_or_bundle(
    near: dict[str, str], far: dict[str, str], tmp_path: Path
) -> None:
    layer = sorted(Path(near["KT_WEIGHT_PATH"]).glob("layer-*"))[0]
    whole = layer.read_bytes()
    layer.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    directory = tmp_path / "b"
    with pytest.raises(UserError, match=f"{layer} is damaged: expected the SHA-256 "):
        make(near, directory, "weights")
    assert not [p for p in directory.rglob("*") if p.name == layer.name or "tmp" in p.name]
    layer.write_bytes(whole)
    make(near, directory, "weights")
    copied = directory / "weights" / layer.name
    copied.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{copied} is damaged"):
        install(far, directory)
    assert not Path(far["KT_WEIGHT_PATH"], MANIFEST_NAME).exists()
    copied.unlink()
    with pytest.raises(UserError, match="SHA256SUMS names it: copy the whole bundle"):
        install(far, directory)


def test_weights_that_were_converted_again_replace_the_old(
    near: dict[str, str], prepared: Prepared, tmp_path: Path
) -> None:
    make(near, tmp_path / "b", "weights")
    make({**near, "KT_WEIGHT_PATH": str(prepared.int8)}, tmp_path / "b", "weights")
    assert content(tmp_path / "b/weights") == content(prepared.int8)


def test_parts_come_one_after_the_other(near: dict[str, str], tmp_path: Path) -> None:
    """A part that another run left unfinished is not called whole."""
    directory = tmp_path / "b"
    _killed_after(1, lambda: make(near, directory, "weights"))
    (directory / UNFINISHED_NAME).write_text(f"{'0' * 64}  weights/layer-001.safetensors\n")
    with pytest.raises(UserError, match="an earlier run began: name the part `weights`, too"):
        make(near, directory, "model")
    make(near, directory, "weights")
    assert {name.split("/")[0] for name in read_sums(directory / SUMS_NAME)} == {
        "model", "weights", "INSTALL.txt",
    }  # fmt: skip


def test_a_part_that_cannot_be_had_leaves_a_whole_bundle_whole(
    near: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when the bundle counts as begun before the image and the sources are looked for."""
    make(near, tmp_path / "b", "weights")
    whole = content(tmp_path / "b")
    monkeypatch.setattr(bundle_parts, "ENGINES", ())
    next(Path(near["KT_MODEL_PATH"]).glob("*.safetensors")).unlink()
    for part, found in (("image", "no container engine"), ("model", "a finished download")):
        with pytest.raises(UserError, match=found):
            make(near, tmp_path / "b", part)
        assert content(tmp_path / "b") == whole


def test_directories_of_others_are_left_alone(
    near: dict[str, str], far: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files: expected an empty directory"):
        make(near, tmp_path / "b", "weights")
    (tmp_path / "b" / "letter.txt").unlink()
    make(near, tmp_path / "b", "weights")
    other = Path(far["KT_WEIGHT_PATH"])
    other.mkdir(parents=True)
    (other / MANIFEST_NAME).write_text("{}")
    with pytest.raises(UserError, match=f"KT_WEIGHT_PATH {other} holds other files"):
        install(far, tmp_path / "b")
    with pytest.raises(UserError, match="has no part `image`: it has weights"):
        install(far, tmp_path / "b", "image")
    with bundles.opened(tmp_path / "b"), pytest.raises(UserError, match="another run fills"):
        make(near, tmp_path / "b", "weights")


def test_two_runs_do_not_fill_one_target(
    near: dict[str, str], far: dict[str, str], tmp_path: Path
) -> None:
    """Each would take the other's half-written file for a killed run's."""
    make(near, tmp_path / "b", "weights")
    target = Path(far["KT_WEIGHT_PATH"])
    with filled_alone(target):
        name = next(Path(near["KT_WEIGHT_PATH"]).glob("layer-*")).name
        half = target / f".{name}.tmp-copy"
        half.write_bytes(b"half")
        (target / UNFINISHED_NAME).touch()
        with pytest.raises(UserError, match=f"another run fills {target}: wait for it"):
            install(far, tmp_path / "b")
        # As without locks: what appears there after the leftovers are gone is not touched.
        with pytest.raises(UserError, match="another run writes "):
            copy_file(Path(near["KT_WEIGHT_PATH"], name), target / name, "", Progress())
        assert half.read_bytes() == b"half"
    install(far, tmp_path / "b")
    assert content(target) == content(Path(near["KT_WEIGHT_PATH"]))


def test_no_locks_no_bundle(
    near: dict[str, str], far: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a download: nothing would keep a second run from the half-written files."""
    make(near, tmp_path / "b", "weights")
    refuse_locks(monkeypatch)
    target = far["KT_WEIGHT_PATH"]
    with pytest.raises(UserError, match=f"^cannot lock a file in KT_WEIGHT_PATH {target} "):
        install(far, tmp_path / "b")
    assert list(Path(target).iterdir()) == []
    with pytest.raises(UserError, match=f"^cannot lock a file in {tmp_path / 'b'} "):
        make(near, tmp_path / "b", "weights")


@pytest.mark.parametrize("sums", [SUMS_NAME, UNFINISHED_NAME])
def test_checksums_of_others_are_no_earlier_bundle(
    near: dict[str, str], tmp_path: Path, sums: str
) -> None:
    """Their names lead anywhere, and a bundle removes what is of its parts no more."""
    (tmp_path / "b").mkdir()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "b" / sums).write_text(f"{'0' * 64}  weights/../../victim\n")
    with pytest.raises(UserError, match="holds other files: expected an empty directory"):
        make(near, tmp_path / "b", "weights")
    assert victim.exists()
    assert [path.name for path in (tmp_path / "b").iterdir()] == [sums]


@pytest.mark.parametrize("name", ["model/../../x", "weights/.hidden", "/etc/passwd", "other/x"])
def test_names_that_lead_elsewhere_are_refused(
    far: dict[str, str], tmp_path: Path, name: str
) -> None:
    (tmp_path / SUMS_NAME).write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(UserError, match="which is in no bundle"):
        install(far, tmp_path)


def test_no_room(near: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(
        UserError, match=r"not enough free space in .*: expected .*, found 10 bytes"
    ):
        make(near, tmp_path / "b", "weights")


def test_an_unfinished_model_is_refused(near: dict[str, str], tmp_path: Path) -> None:
    next(Path(near["KT_MODEL_PATH"]).glob("*.safetensors")).unlink()
    line = fails("bundle", tmp_path / "b", "--part", "model", **near)
    assert "expected a finished download, found an unfinished one: run" in line


ENGINE = """#!/bin/sh
echo "$@" >> "$0.log"
case "$1" in
  info) [ ! -e "$0.down" ] ;;
  image) [ "$5" = here:1 ] && echo sha256:0123456789abcdef ;;
  save) printf 'layers of %s' "$2" ;;
  load) grep -q 'layers of here:1' "$3" ;;
esac
"""


def test_the_image_comes_from_the_engine(
    far: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("docker", "podman"):
        (programs / name).write_text(ENGINE)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    config = load({"PATH": os.environ["PATH"]}, [], "bundle")
    with pytest.raises(UserError, match="no container engine here has the image gone:1: build it"):
        bundle.run(config, tmp_path / "b", ["image"], "gone:1")
    for _ in range(2):
        assert bundle.run(config, tmp_path / "b", ["image"], "here:1") == 0
    said = (programs / "docker.log").read_text().splitlines()
    assert said.count("save here:1") == 1  # the second time it is there
    install(far, tmp_path / "b")
    saved = tmp_path / "b/image/here-1-0123456789ab.tar"
    assert (programs / "docker.log").read_text().splitlines()[-1] == f"load --input {saved}"
    (programs / "docker.down").touch()
    install(far, tmp_path / "b")
    said = (programs / "podman.log").read_text().splitlines()
    assert said[-1] == f"load --input {saved}"  # Docker's daemon does not answer


def test_the_repository_can_be_cloned(
    far: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", repository], check=True)
    (repository / "file").write_text("content")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    monkeypatch.setattr(bundle_parts, "ROOT", repository)
    make({}, tmp_path / "b", "source")
    install(far, tmp_path / "b")
    (saved,) = (tmp_path / "b/source").iterdir()
    subprocess.run(["git", "clone", "-q", saved, tmp_path / "clone"], check=True)
    assert (tmp_path / "clone/file").read_text() == "content"
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, stdout=subprocess.PIPE).stdout
    (repository / ".git/shallow").write_bytes(head)
    with pytest.raises(UserError, match="found a shallow one, whose bundle cannot be cloned"):
        make({}, tmp_path / "b", "source")
    shutil.rmtree(repository / ".git")
    with pytest.raises(UserError, match="the part `source` is made with git: expected a repos"):
        make({}, tmp_path / "b", "source")


def test_wheels_are_those_of_the_requirements(
    far: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "index/small-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as file:
        about = "small-1.0.dist-info"
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(bundle_parts, "REQUIREMENTS", ("dev",))  # pip takes 2 s each time
    (requirements / "dev.txt").write_text(f"small==1.0 --hash=sha256:{digest}\n")
    monkeypatch.setattr(bundle_parts, "ROOT", tmp_path)
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent)}
    make(offline, tmp_path / "b", "wheels")
    copied = tmp_path / "b/wheels" / wheel.name
    assert copied.read_bytes() == wheel.read_bytes()
    install(far, tmp_path / "b")
    copied.write_bytes(b"half")  # as a kill leaves it
    make(offline, tmp_path / "b", "wheels")
    assert copied.read_bytes() == wheel.read_bytes()
    (requirements / "dev.txt").write_text(f"small==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(UserError, match=r"pip download .* failed with status 1, see above"):
        make(offline, tmp_path / "b", "wheels")
    assert not (tmp_path / "b" / SUMS_NAME).exists()


def test_the_makefile_knows_the_parts() -> None:
    makefile = (Path(__file__).parents[3] / "Makefile").read_text()
    assert f'PARTS="{" ".join(PARTS)}"' in makefile
