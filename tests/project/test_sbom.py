"""docker/sbom.py: what an image and an environment ship, for those who look up advisories."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

SCRIPT = Path(__file__).resolve().parents[2] / "docker/sbom.py"
STATUS = """\
Package: told
Status: install ok installed
Architecture: amd64
Maintainer: nobody
Version: 1:2-3+b1
Description: x

Package: removed
Status: deinstall ok config-files
Architecture: all
Maintainer: nobody
Version: 5
Config-Version: 5
Description: x
"""


def listed(*arguments: str | Path) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_every_package_once(tmp_path: Path) -> None:
    """Of this environment and of Debian's, by the names that databases of advisories have."""
    (tmp_path / "var/lib/dpkg/info").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/updates").mkdir()
    (tmp_path / "var/lib/dpkg/status").write_text(STATUS)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text('NAME="Ubuntu"\nID=ubuntu\n')
    found = listed("--root", tmp_path)
    assert (found["bomFormat"], found["specVersion"], found["version"]) == ("CycloneDX", "1.6", 1)
    urls = [component["purl"] for component in found["components"]]
    assert len({*urls}) == len(urls) > 100
    assert f"pkg:pypi/sglang@{importlib.metadata.version('sglang')}" in urls
    assert f"pkg:pypi/huggingface-hub@{importlib.metadata.version('huggingface_hub')}" in urls
    assert [url for url in urls if url.startswith("pkg:deb/")] == [
        "pkg:deb/ubuntu/told@1%3A2-3%2Bb1?arch=amd64"
    ]
    ours = next(c for c in found["components"] if c["name"] == "kt-kernel-stock-sglang")
    assert ours["licenses"] == [{"license": {"name": "Apache-2.0"}}]
    assert listed("--root", tmp_path) == found  # no time, no chance: two can be compared
    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(found))
    assert wrong is None, str(wrong)
