"""This project's licence, and docker/licences.py: the list of what an image ships."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "docker" / "licences.py"
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
#: Of the standard text of the Apache License 2.0, as the Apache Software Foundation publishes it.
APACHE_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
STATUS = """\
Package: told
Status: install ok installed
Architecture: all
Maintainer: nobody
Version: 1:2-3
Description: x

Package: untold
Status: install ok installed
Architecture: all
Maintainer: nobody
Version: 4
Description: x

Package: removed
Status: deinstall ok config-files
Architecture: all
Maintainer: nobody
Version: 5
Config-Version: 5
Description: x
"""


def listed(*arguments: str | Path) -> tuple[list[str], str]:
    """The lines that the script prints, and what it says beside."""
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines(), result.stderr


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A system of three Debian packages, one of them without its copyright file, one removed."""
    root = tmp_path / "root"
    for folder in ("info", "updates"):
        (root / "var/lib/dpkg" / folder).mkdir(parents=True)
    (root / "var/lib/dpkg/status").write_text(STATUS)
    (root / "usr/share/doc/told").mkdir(parents=True)
    (root / "usr/share/doc/told/copyright").touch()
    return root


def package(folder: Path, name: str, *metadata: str, texts: tuple[str, ...] = ()) -> None:
    """Put an installed package's metadata into ``folder``."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    head = ["Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0", *metadata]
    (info / "METADATA").write_text("\n".join(head) + "\n")
    for text in texts:
        (folder / text).parent.mkdir(parents=True, exist_ok=True)
        (folder / text).touch()
    # A file that a later step deleted stays in the record.
    record = [*texts, f"{info.name}/licenses/DELETED", f"{info.name}/METADATA"]
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in record))


def test_the_licence_is_the_standard_text() -> None:
    digest = hashlib.sha256((REPOSITORY / "LICENSE").read_bytes()).hexdigest()
    assert digest == APACHE_SHA256


def test_what_packages_say(tmp_path: Path, root: Path) -> None:
    site = tmp_path / "site"
    package(site, "a-spdx", "License-Expression: MIT", "License: ignored")
    package(site, "b-field", "License: BSD", "Classifier: License :: OSI Approved :: MIT License")
    package(site, "c-classifier", "Classifier: License :: OSI Approved :: MIT License")
    package(site, "d-text", "License: Some Licence", "        second line of its text")
    package(site, "e-both", "License: Some Licence\n        more", "Classifier: License :: Other")
    package(site, "f-nothing", "License: UNKNOWN", "Classifier: License :: OSI Approved")
    texts = tuple(f"g_files-1.0.dist-info/licenses/{name}" for name in ("LICENSE", "x/NOTICE"))
    package(site, "g_files", texts=(*texts, "g/LICENSE.txt", "g/license.py"))
    lines, said = listed("--site-packages", site, "--root", root)
    at = next(i for i, line in enumerate(lines) if line.startswith("Python packages"))
    assert lines[at + 2 : at + 9] == [
        "a-spdx 1.0: MIT",
        "b-field 1.0: BSD",
        "c-classifier 1.0: MIT License",
        "d-text 1.0: Some Licence ...",
        "e-both 1.0: Other",
        "f-nothing 1.0: NOT STATED",
        "g_files 1.0: as its text says; g_files-1.0.dist-info/licenses; g/LICENSE.txt",
    ]
    at = next(i for i, line in enumerate(lines) if line.startswith("Debian packages"))
    assert lines[at + 2 :] == ["told 1:2-3: /usr/share/doc/told/copyright", "untold 4: NOT STATED"]
    counts = "licences of 7 Python packages and 2 Debian packages"
    assert said == f"{counts}; NOT STATED: f-nothing untold\n"


def test_no_package_of_this_environment_is_missed(root: Path) -> None:
    lines, _ = listed("--root", root)
    shown = {re.sub(r"[-_.]+", "_", line.split(" ")[0]).lower() for line in lines}
    folders = [path.name.split("-")[0] for path in SITE_PACKAGES.glob("*.dist-info")]
    assert len(folders) > 100
    assert {re.sub(r"[-_.]+", "_", name).lower() for name in folders} - shown == set()
    (ours,) = [line for line in lines if line.startswith("kt-kernel-stock-sglang ")]
    assert ": Apache-2.0; kt_kernel_stock_sglang-" in ours
