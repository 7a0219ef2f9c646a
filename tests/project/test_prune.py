"""docker/prune.py: unused files go, licences stay, and what packages say of themselves holds."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "docker/prune.py"


def install(site: Path, package: str, *names: str) -> None:
    """Put a package's files and its metadata there, as an installer does."""
    info = site / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {package}\nVersion: 1.0\n")
    for name in names:
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(name)
    rows = [*(f'"{name}",sha256=x,1' for name in names), f"{info.name}/METADATA,,"]
    (info / "RECORD").write_text("\n".join([*rows, f"{info.name}/RECORD,,"]) + "\n")


def prune(site: Path) -> str:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(site)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_records_stay_true(tmp_path: Path) -> None:
    """An audit, an uninstaller and the list of licences go by them; packages may also be gone."""
    kept = ("scipy/a.py", "scipy/tests/LICENSE.txt", "scipy/protests/a, b.py", "scipy/tests.py")
    gone = ("scipy/tests/test_a.py", "scipy/x/tests/data/é, b.csv", "scipy/tests/__init__.py")
    install(tmp_path, "scipy", *kept, *gone)
    install(tmp_path, "nvidia", "nvidia/cu13/lib/libcusolverMg.so.12", "nvidia/cu13/lib/libx.so")
    install(tmp_path, "other", "other/tests/test_a.py")
    assert prune(tmp_path) == "removed 4 files\n"
    for distribution in importlib.metadata.distributions(path=[str(tmp_path)]):
        assert [f for f in distribution.files or [] if not Path(str(f.locate())).is_file()] == []
    assert all((tmp_path / name).is_file() for name in (*kept, "other/tests/test_a.py"))
    assert not any((tmp_path / name).exists() for name in (*gone, "scipy/x"))
    record = (tmp_path / "scipy-1.0.dist-info/RECORD").read_text()
    assert '"scipy/protests/a, b.py",sha256=x,1' in record
    assert prune(tmp_path) == "removed 0 files\n"


def test_nothing_is_followed_out_of_the_folder(tmp_path: Path) -> None:
    site, outside = tmp_path / "site", tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").touch()
    install(site, "pandas", "pandas/a.py")
    (site / "pandas/tests").symlink_to(outside)
    assert prune(site) == "removed 1 files\n"
    assert (outside / "mine").exists()
