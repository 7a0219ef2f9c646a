"""Lists what an image ships and under which licences: ``python licences.py > /app/licences.txt``.

One line for each Python package of this interpreter and each Debian package: name, version, the
licence it states, and where its texts lie. It repeats what the packages say of themselves; what
they carry inside (a library in a wheel) is in their texts only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import Distribution
from pathlib import Path

NOT_STATED = "NOT STATED"
_TEXT = re.compile(r"(licen[cs]e|copying|notice|copyright)", re.IGNORECASE)
_CODE = {".py", ".pyc", ".pyi", ".so", ".h"}
#: A `License` field that is longer, or of several lines, holds the text and not its name.
_LONGEST_NAME = 120
#: Packages that name more texts than this outside their metadata get a count of the others.
_MOST_TEXTS = 4


def stated_licence(distribution: Distribution) -> str:
    """What the metadata says: the SPDX expression, else the name, else the classifiers."""
    metadata = distribution.metadata

    def field(name: str) -> str:
        text = (metadata.get_all(name) or [""])[0].strip()
        return "" if text == "UNKNOWN" else text

    if expression := field("License-Expression"):
        return expression
    name = field("License")
    if name and "\n" not in name and len(name) <= _LONGEST_NAME:
        return name
    classifiers = [text.split(" :: ") for text in metadata.get_all("Classifier") or []]
    classes = [parts[-1] for parts in classifiers if parts[0] == "License" and len(parts) > 1]
    if classes := [each for each in classes if each != "OSI Approved"]:
        return ", ".join(classes)
    return name.splitlines()[0].strip() + " ..." if name else NOT_STATED


def licence_texts(distribution: Distribution) -> list[str]:
    """Paths of its licence texts below site-packages; those in its metadata as one folder."""
    folders: set[str] = set()
    others: list[str] = []
    for path in distribution.files or []:
        is_text = _TEXT.match(path.name) and path.suffix not in _CODE
        in_metadata = path.parts[0].endswith((".dist-info", ".egg-info"))
        in_folder = in_metadata and path.parts[1:2] in [("licenses",), ("license_files",)]
        if not (is_text or in_folder) or not Path(str(path.locate())).is_file():
            continue
        if in_folder:
            folders.add("/".join(path.parts[:2]))
        else:
            others.append(str(path))
    more = len(others) - _MOST_TEXTS
    shown = sorted(others, key=lambda name: (".dist-info" not in name, name))[:_MOST_TEXTS]
    return [*sorted(folders), *shown, *([f"and {more} more"] if more > 0 else [])]


def python_lines(site_packages: Path) -> Iterator[tuple[str, bool]]:
    """A line for each Python package, and whether anything is known of its licence."""
    found = importlib.metadata.distributions(path=[str(site_packages)])
    for distribution in sorted(found, key=lambda each: each.name.lower()):
        stated, texts = stated_licence(distribution), licence_texts(distribution)
        known = stated != NOT_STATED or bool(texts)
        says = "as its text says" if known and stated == NOT_STATED else stated
        yield "; ".join([f"{distribution.name} {distribution.version}: {says}", *texts]), known


def debian_packages(root: Path) -> Iterator[tuple[str, str, str]]:
    """Name, version and architecture of each installed Debian package, by name.

    Raises:
        subprocess.CalledProcessError: dpkg-query failed.
    """
    query = ["dpkg-query", f"--admindir={root}/var/lib/dpkg", "-W", "-f"]
    query.append("${db:Status-Status} ${Package} ${Version} ${Architecture}\n")
    output = subprocess.run(query, check=True, stdout=subprocess.PIPE, text=True).stdout
    for line in sorted(output.splitlines()):
        status, name, version, architecture = line.split(" ")
        if status == "installed":
            yield name, version, architecture


def debian_lines(root: Path) -> Iterator[tuple[str, bool]]:
    """A line for each Debian package, and whether its copyright file is there.

    Raises:
        subprocess.CalledProcessError: dpkg-query failed.
    """
    for name, version, _ in debian_packages(root):
        text = Path("usr/share/doc", name, "copyright")
        known = (root / text).is_file()
        yield f"{name} {version}: " + (f"/{text}" if known else NOT_STATED), known


def parse_arguments(description: str) -> argparse.Namespace:
    """Where the packages are: ``site_packages`` and ``root``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--site-packages", type=Path, default=Path(sysconfig.get_path("purelib")), metavar="PATH"
    )
    parser.add_argument(
        "--root", type=Path, default=Path("/"), metavar="PATH", help="of Debian's packages"
    )
    return parser.parse_args()


def main() -> int:
    """Print the list; says on standard error how long it is and what is not known."""
    args = parse_arguments("List packages and their licences.")
    sections = {
        f"Python packages, paths below {args.site_packages}": list(
            python_lines(args.site_packages)
        ),
        "Debian packages, with their copyright files": list(debian_lines(args.root)),
    }
    print("What this image ships, and the licences that the packages state of themselves.")
    for heading, lines in sections.items():
        print(f"\n{heading}:\n")
        print("\n".join(line for line, _ in lines))
    unknown = [
        line.split(" ")[0] for lines in sections.values() for line, known in lines if not known
    ]
    counts = " and ".join(f"{len(lines)} {name.split(',')[0]}" for name, lines in sections.items())
    print(f"licences of {counts}; {NOT_STATED}: {' '.join(unknown) or 'none'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
