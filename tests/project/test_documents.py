"""What the documents name is there: files, headings, `make` targets, modules, glossary terms."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *sorted(path.name for path in REPOSITORY.glob("*.md")),
    *sorted(str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("docs/*.md")),
    "examples/tiny/README.md",
]
GLOSSARY = REPOSITORY / "docs" / "glossary.md"
#: Names that stand for any file of a kind.
INVENTED = {"csrc/isa/NAME.h", "csrc/targets/NAME.cpp"}
#: Modules of others that are started by hand.
OTHERS_MODULES = {"pytest", "sglang.launch_server"}
#: Pages about measurements and how it is made.
MEASURED = {"docs/architecture.md", "docs/performance.md"}
#: Columns of the glossary's tables.
Row = dict[str, str]


def text_of(name: str) -> str:
    return (REPOSITORY / name).read_text("utf-8")


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    return re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def code_spans(text: str) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


@cache
def headings(path: Path) -> set[str]:
    """The anchors that a Git host makes of the headings."""
    lines = re.findall(r"^#+ (.*)$", prose(path.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@cache
def tracked() -> frozenset[str]:
    """Committed files, and their folders."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
        text=True,
    )
    files = [Path(line) for line in listed.stdout.splitlines()]
    return frozenset(str(path) for file in files for path in (file, *file.parents))


@cache
def make_targets() -> set[str]:
    rules = re.findall(r"^([a-z][a-z -]*):(?!=)", text_of("Makefile"), re.MULTILINE)
    return {target for rule in rules for target in rule.split()}


def paths_in(words: list[str]) -> set[str]:
    """The words that say where something is in this repository."""
    roots = {name.split("/")[0] for name in tracked()}
    found = {word.strip("\"'").rstrip("/,;:)") for word in words}
    return {
        word
        for word in found
        if re.fullmatch(r"[\w.][\w.-]*\.(py|h|cpp|toml|ya?ml|sh)", word)  # somewhere
        or ("/" in word and word.split("/")[0] in roots and "//" not in word)
    }


def exists(path: str) -> bool:
    """Whether it is a committed file or folder, the name of one, or a pattern of some."""
    if "*" in path:
        return any(
            str(found.relative_to(REPOSITORY)) in tracked() for found in REPOSITORY.glob(path)
        )
    return path in tracked() or any(name.endswith(f"/{path}") for name in tracked())


def targets_in(text: str) -> set[str]:
    """What `make` is asked for in the code of a document."""
    # Perhaps behind a variable; up to a variable, an option, a comment or another command.
    commands = [
        match
        for line in [*code_spans(text), *"\n".join(code_blocks(text)).splitlines()]
        for match in re.findall(r"(?:^|[&;] ?|[\d\"'] )make((?: [a-z][a-z-]*)+)(?![\w./=])", line)
    ]
    return {word for command in commands for word in command.split()}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    text = prose(text_of(name))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (REPOSITORY / name).parent / file if file else REPOSITORY / name
        path = path.resolve()
        assert str(path.relative_to(REPOSITORY)) in tracked(), target
        if anchor:
            assert anchor in headings(path), target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_exist(name: str) -> None:
    text = text_of(name)
    words = [word for span in code_spans(text) for word in span.split()]
    words += "\n".join(code_blocks(text)).split()
    missing = {path for path in paths_in(words) - INVENTED if not exists(path)}
    assert missing == set()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_exist(name: str) -> None:
    assert targets_in(text_of(name)) - make_targets() == set()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_modules_exist(name: str) -> None:
    text = "\n".join([*code_spans(text_of(name)), text_of(name)])
    for module in set(re.findall(r"python -m ([\w.]+\w)", text)) - OTHERS_MODULES:
        path = module.replace(".", "/")
        assert {f"{path}.py", f"{path}/__main__.py"} & tracked(), module


@pytest.mark.parametrize("name", DOCUMENTS)
def test_it_is_said_which_python_a_command_means(name: str) -> None:
    """Debian has no `python`, and its `python3` none of the packages."""
    text = text_of(name)
    # Those of the measurements are for whoever has read the guide for contributors.
    commands = re.findall(
        r"^ *python (?:-m|entrypoint)", "\n".join(code_blocks(text)), re.MULTILINE
    )
    if commands and name not in MEASURED:
        assert ".venv/bin" in text or "that of `.venv`" in text


def test_what_is_looked_for_is_found() -> None:
    """The patterns above see what people write."""
    text = (
        "`make up WITH=cpu`, `KT_X=1 make gpu-test`\n```bash\nmake demo    # it\n"
        'make up-cpu && make chat WITH=cpu\nK="a b" make quality\ncp env/x.env my.env\n```\n'
        "`csrc/nothing.h`, `python -m deploy.settings.docs`"
    )
    assert targets_in(text) == {"up", "gpu-test", "demo", "up-cpu", "chat", "quality"}
    words = [word for part in [*code_spans(text), *code_blocks(text)] for word in part.split()]
    assert paths_in(words) == {"env/x.env", "csrc/nothing.h"}
    assert not exists("csrc/nothing.h")
    assert not exists("nothing.h")
    assert exists("pool.h")
    assert exists("deploy/checks/*.py")
    assert {"venv", "convert", "up-cpu"} <= make_targets()
    assert "flags-we-add-and-why" in headings(REPOSITORY / "docs/configuration.md")


def test_folders_of_the_extension_are_in_the_order_that_the_guide_says() -> None:
    (row,) = re.findall(
        r"^\| \[csrc/\]\(csrc\) \|(.*)\|$", text_of("CONTRIBUTING.md"), re.MULTILINE
    )
    order = re.findall(r"`(\w+)`", row)
    folders = {path.name for path in (REPOSITORY / "csrc").iterdir() if path.is_dir()}
    assert sorted(order) == sorted(folders)
    for place, folder in enumerate(order):
        for path in (REPOSITORY / "csrc" / folder).rglob("*"):
            if path.suffix in (".h", ".cpp"):
                included = set(re.findall(r'#include "(\w+)/', path.read_text("utf-8")))
                assert included <= set(order[: place + 1]), path


# ---- the glossary --------------------------------------------------------------------------------


def glossary_rows() -> list[Row]:
    rows: list[Row] = []
    columns: list[str] = []
    for line in GLOSSARY.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            columns = []
        elif not columns:
            columns = cells
        elif set(line) - set("|- "):
            rows.append(dict(zip(columns, cells, strict=True)))
    return rows


def test_each_term_stands_once() -> None:
    rows = glossary_rows()
    assert len(rows) > 50
    terms = [
        term.strip().lower()
        for row in rows
        for term in re.split(r",|:", row.get("Term") or row["Name"])
    ]
    assert sorted(terms) == sorted(set(terms))
    assert all(row["What it is"] for row in rows)


def test_terms_are_in_the_code_where_the_glossary_says() -> None:
    checked = 0
    for row in glossary_rows():
        spans = re.findall(r"`([^`]+)`", row["In the code"])
        paths = [span for span in spans if "/" in span]
        assert all(path in tracked() for path in paths), row
        sources = [(REPOSITORY / path).read_text("utf-8") for path in paths]
        for name in set(spans) - set(paths):
            assert any(re.search(rf"\b{re.escape(name)}\b", source) for source in sources), row
            checked += 1
        assert paths or not spans, row
    assert checked > 40
