"""What follows from the settings table is what the table says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.settings import docs
from deploy.settings.compose_names import FIRST
from deploy.settings.config import load
from deploy.settings.env_file import read_env_file
from deploy.settings.table import TABLE
from deploy.settings.variables import BY_NAME, SECRETS, is_known
from deploy.stages.registry import STAGES
from tests.deploy.helpers import REPOSITORY, clean_environment, run


def test_generated_files_are_fresh() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "deploy.settings.docs", "--check"],
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_check_finds_a_stale_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "env").mkdir()
    (tmp_path / "compose").mkdir()
    (tmp_path / "compose/container.env").write_text("KT_HOST=0.0.0.0\n")
    compose = (REPOSITORY / "docker-compose.yml").read_text()
    stale = compose.replace("    KT_CPUINFER:\n", "").replace("    KT_TARGET:\n", "    KT_GONE:\n")
    (tmp_path / "docker-compose.yml").write_text(stale)
    assert docs.main(["--check"]) == 1
    assert docs.main([]) == 0
    assert (tmp_path / "docker-compose.yml").read_text() == compose
    assert docs.main(["--check"]) == 0
    (tmp_path / ".env.example").write_text("old")
    capsys.readouterr()
    assert docs.main(["--check"]) == 1
    assert capsys.readouterr().err.startswith("error: .env.example is not what")


def test_configuration_page_has_everything() -> None:
    page = docs.configuration_page()
    for setting in TABLE:
        assert f"`{setting.name}`" in page
        for flag in setting.flags:
            assert f"`{flag.name}`" in page
        if setting.adds:
            assert f"| `{setting.adds}` | {setting.reason} | `{setting.turn_off}` |" in page
    for name in SECRETS:
        assert f"`{name}`" in page


def test_env_example_holds_the_defaults(tmp_path: Path) -> None:
    assert read_env_file(REPOSITORY / ".env.example") == []
    text = re.sub(r"^#(\w+=)", r"\1", docs.env_example(), flags=re.MULTILINE)
    (tmp_path / "all.env").write_text(text)
    lines = read_env_file(tmp_path / "all.env")
    composes = [name for name, _, _ in FIRST]
    assert [line.name for line in lines[: len(composes)]] == composes
    assert {line.name for line in lines} == set(BY_NAME) | set(SECRETS) | set(composes)
    given = {line.name: line.value for line in lines if is_known(line.name)}
    assert load(given).values == load({}).values


def test_env_example_has_the_defaults_of_compose() -> None:
    compose = (REPOSITORY / "docker-compose.yml").read_text()
    for name, default, _ in FIRST:
        assert f"${{{name}:-{default}}}" in compose


def test_help_lists_the_settings_of_a_stage() -> None:
    for stage in STAGES:
        text = run(stage, "--help").stdout
        for setting in TABLE:
            # Other stages' settings may be mentioned in a sentence, never as a row of their own.
            has_row = re.search(rf"^  {setting.name}\b", text, re.MULTILINE) is not None
            assert has_row == (stage in setting.stages), (stage, setting.name)
    everything = run("--help").stdout
    assert all(f"  {setting.name}" in everything for setting in TABLE)


def test_variables_that_the_code_reads_are_in_the_table() -> None:
    """A variable of the kernel that the table did not know would be refused."""
    read = re.compile(r"""(?:getenv\(|environ(?:\.get\(|\[)|environ\.pop\()\s*["'](KT_\w+)["']""")
    found = set()
    for folder in ("kt_kernel", "convert", "csrc", "deploy", "examples"):
        for path in (REPOSITORY / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp"):
                found |= set(read.findall(path.read_text("utf-8")))
    assert found, "the pattern finds nothing"
    assert {name for name in found if not is_known(name)} == set()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sreve"], "error: unknown stage sreve: did you mean serve?"),
        (["--env-file", "x", "dowload"], "error: unknown stage dowload: did you mean download?"),
        (
            ["zzz"],
            "error: unknown stage zzz: expected check, download, convert, serve, smoke, "
            "health, status, bundle, unbundle",
        ),
        (
            [],
            "error: expected a stage: check, download, convert, serve, smoke, health, "
            "status, bundle, unbundle (see entrypoint.py --help)",
        ),
        (
            ["--env-file", "serve", "--print"],
            "error: --env-file: expected a file, found the stage serve: write --env-file FILE "
            "serve",
        ),
        (["serve", "--prnt"], "error: unrecognized arguments: --prnt (see entrypoint.py --help)"),
        (["serve", "--json"], "error: --json goes with --print (see entrypoint.py --help)"),
    ],
)
def test_mistakes_on_the_command_line(words: list[str], message: str) -> None:
    result = run(*words)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == message + "\n"


def test_nothing_heavy_is_loaded_to_print_a_command() -> None:
    """Without torch and SGLang, --print answers at once on any machine."""
    code = (
        "import sys; from deploy.command_line import main; status = main(['serve', '--print']); "
        "heavy = {'torch', 'sglang', 'numpy', 'huggingface_hub', 'httpx'} & set(sys.modules); "
        "sys.exit(status or len(heavy))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=clean_environment(KT_DEVICE="cpu"),
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
