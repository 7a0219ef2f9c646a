"""Lists what is installed as a CycloneDX document: ``python sbom.py > sbom.json``.

The Python packages of this interpreter and, where dpkg is there, the Debian packages, each with its
version, package URL and the licence that it states; the same packages as ``licences.py`` lists. So
it says what an audit can look up, not what a wheel carries inside.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from licences import NOT_STATED, debian_packages, parse_arguments, stated_licence

FORMAT, FORMAT_VERSION = "CycloneDX", "1.6"


def python_components(site_packages: Path) -> Iterator[dict[str, Any]]:
    """The installed Python packages, by name."""
    found = importlib.metadata.distributions(path=[str(site_packages)])
    for distribution in sorted(found, key=lambda each: each.name.lower()):
        # As the package index writes names.
        name = re.sub(r"[-_.]+", "-", distribution.name).lower()
        component = _component("pypi", name, distribution.version)
        licence = stated_licence(distribution)
        if licence != NOT_STATED:
            component["licenses"] = [{"license": {"name": licence}}]
        yield component


def debian_components(root: Path) -> Iterator[dict[str, Any]]:
    """The installed Debian packages, by name; none where there is no dpkg.

    Raises:
        subprocess.CalledProcessError: dpkg-query failed.
    """
    if shutil.which("dpkg-query") is None:
        return
    vendor = _vendor(root)
    for name, version, architecture in debian_packages(root):
        yield _component(f"deb/{vendor}", name, version, f"?arch={architecture}")


def _vendor(root: Path) -> str:
    """``debian`` or ``ubuntu``, whose packages have different advisories."""
    release = root / "etc/os-release"
    text = release.read_text("utf-8") if release.is_file() else ""
    found = re.search(r'^ID="?(\w+)', text, re.MULTILINE)
    return found[1] if found else "debian"


def _component(kind: str, name: str, version: str, qualifiers: str = "") -> dict[str, Any]:
    purl = f"pkg:{kind}/{quote(name, safe='')}@{quote(version, safe='')}{qualifiers}"
    return {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
    }


def document(components: list[dict[str, Any]]) -> dict[str, Any]:
    """The document; two of the same packages are equal to the byte."""
    content = json.dumps(components, sort_keys=True)
    return {
        "bomFormat": FORMAT,
        "specVersion": FORMAT_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, content)}",
        "version": 1,
        "components": components,
    }


def main() -> int:
    """Print the document."""
    args = parse_arguments("List installed packages as CycloneDX JSON.")
    components = [*python_components(args.site_packages), *debian_components(args.root)]
    print(json.dumps(document(components), indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
