"""What every command line does about its standard streams and its current directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

START = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"


def run(
    main: str, shell: str = 'exec "$@"', **variables: str
) -> subprocess.CompletedProcess[bytes]:
    """Run a program whose ``main`` is this function body, started by these words of a shell."""
    code = f"{START}from kt_kernel.program import run_program\ndef main():\n {main}\n return 0\n"
    words = [sys.executable, "-c", code + "run_program(main)"]
    return subprocess.run(
        ["sh", "-c", shell, "sh", *words],
        env={**os.environ, **variables},
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_any_path_is_printed_to_any_output() -> None:
    result = run(r"print('\xfc \udcff')", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"\\xfc \\udcff\n", b"")


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    result = run("[print('x' * 99) for _ in range(9999)]", '("$@"; echo $? >&2) | head -1')
    assert (result.stdout, result.stderr) == (b"x" * 99 + b"\n", b"141\n")


def test_an_output_that_cannot_be_written() -> None:
    result = run("print('x')", 'exec "$@" >/dev/full')
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr == b"error: cannot write the output: No space left on device\n"


def test_a_closed_stream_is_no_other_file(tmp_path: Path) -> None:
    """A file opened later would be number 1 and hold what the program prints."""
    file = tmp_path / "file"
    result = run(
        f"f = open({str(file)!r}, 'w'); print('x', flush=True); import os; os.write(1, b'y')",
        'exec "$@" >&-',
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert file.read_bytes() == b""


def test_a_current_directory_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    result = run("print('x')", f'cd {tmp_path}/gone && rmdir ../gone && exec "$@"')
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr.startswith(b"error: the current directory cannot be used (No such file")


def test_statuses_are_handed_on() -> None:
    assert run("return 7").returncode == 7
    assert run("raise SystemExit(3)").returncode == 3


def run_named(tmp_path: Path, module: str) -> subprocess.CompletedProcess[bytes]:
    """Run the ``main`` of a module with this text, by its name."""
    (tmp_path / "named.py").write_text(module)
    code = f"{START}sys.path.insert(0, {str(tmp_path)!r})\n"
    code += "from kt_kernel.program import run_program; run_program('named:main')"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=60, check=False
    )


def test_an_interrupt_while_it_is_imported_shows_no_traceback(tmp_path: Path) -> None:
    """And later ones are the program's again."""
    result = run_named(tmp_path, "import os; os.kill(os.getpid(), 2)")
    assert (result.returncode, result.stdout, result.stderr) == (-2, b"", b"")
    result = run_named(
        tmp_path,
        "import os\n"
        "def main():\n try: os.kill(os.getpid(), 2)\n except KeyboardInterrupt: return 7",
    )
    assert (result.returncode, result.stderr) == (7, b"")
