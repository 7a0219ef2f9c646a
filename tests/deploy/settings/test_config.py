"""From the environment and env files to values."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploy.errors import UserErrors
from deploy.settings.config import export, load
from deploy.settings.env_file import read_env_file
from deploy.settings.variables import HANDED_ON
from deploy.stages.registry import STAGES
from tests.deploy.helpers import REPOSITORY, run, without_home

NOT_SHOWN = "expected NAME=value, found another line (not shown, it may be part of a secret)"


def problems(environ: dict[str, str], *files: Path, stage: str | None = None) -> list[str]:
    """Messages of a load that must fail."""
    with pytest.raises(UserErrors) as caught:
        load(environ, files, stage)
    return caught.value.messages


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults() -> None:
    config = load({})
    assert config["KT_MODEL_ID"] == "deepseek-ai/DeepSeek-V3.2"
    assert config.path("KT_MODEL_PATH") == Path("/models/deepseek-v3.2")
    assert config.path("KT_WEIGHT_PATH") == Path("/weights/deepseek-v3.2-INT4")
    assert config.integer("KT_PORT") == 30000
    assert config["HF_TOKEN"] is None


def test_precedence(tmp_path: Path) -> None:
    first = write(tmp_path / "a", "KT_PORT=1\nKT_CPUINFER=1\nKT_METHOD=AMXINT8\n")
    second = write(tmp_path / "b", "KT_PORT=2\nKT_CPUINFER=2\n")
    config = load({"KT_PORT": "3"}, [first, second])
    assert (config["KT_PORT"], config["KT_CPUINFER"], config["KT_METHOD"]) == (3, 2, "AMXINT8")
    assert config.environment["KT_PORT"] == "3"
    assert config.from_files == {"KT_CPUINFER", "KT_METHOD"}


def test_an_empty_variable_is_not_set(tmp_path: Path) -> None:
    file = write(tmp_path / "a", "KT_PORT=2\nKT_METHOD=\nCUDA_VISIBLE_DEVICES=\n")
    config = load({"KT_PORT": "", "HF_ENDPOINT": "", "CUDA_DEVICE_ORDER": ""}, [file])
    assert (config["KT_PORT"], config["KT_METHOD"]) == (2, "AMXINT4")
    assert "HF_ENDPOINT" not in config.environment
    assert config.environment["CUDA_VISIBLE_DEVICES"] == ""  # means no GPU, unlike not set
    assert config.environment["CUDA_DEVICE_ORDER"] == ""


def test_unknown_names_suggest_the_nearest(tmp_path: Path) -> None:
    file = write(tmp_path / "settings.env", "# comment\nKT_CHUNKED_PREFIL_SIZE=1\nPORT=30000\n")
    found = problems({"KT_CPU_INFER": "4", "KT_ZZZZZZ": "1", "OTHER": "x"}, file)
    assert found == [
        f"{file}:2: unknown setting KT_CHUNKED_PREFIL_SIZE: did you mean KT_CHUNKED_PREFILL_SIZE?",
        f"{file}:3: unknown setting PORT: did you mean KT_PORT?",
        "unknown setting KT_CPU_INFER: did you mean KT_CPUINFER?",
        "unknown setting KT_ZZZZZZ: docs/configuration.md lists them all",
    ]


def test_bad_values_say_what_was_expected(tmp_path: Path) -> None:
    file = write(tmp_path / "a", "KT_PORT=http\n")
    assert problems({"KT_METHOD": "int4", "KT_TRUST_REMOTE_CODE": "maybe"}, file) == [
        f"{file}:1: KT_PORT: expected an integer from 1 to 65535, found 'http'",
        "KT_TRUST_REMOTE_CODE: expected 1/0, true/false, yes/no or on/off, found 'maybe'",
        "KT_METHOD: expected one of AMXINT4, AMXINT8, found 'int4'",
    ]


def test_a_secret_from_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "token", "hf_abc\n")
    assert load({"HF_TOKEN_FILE": str(file)}, stage="download")["HF_TOKEN"] == "hf_abc"
    assert load({"KT_API_KEY_FILE": str(file)}, stage="serve")["KT_API_KEY"] == "hf_abc"
    # A stage that does not use it needs no access to it.
    assert load({"HF_TOKEN_FILE": "/nowhere"}, stage="serve")["HF_TOKEN"] is None


def test_secrets_that_do_not_work(tmp_path: Path) -> None:
    file = write(tmp_path / "token", "hf_abc")
    empty = write(tmp_path / "empty", "\n")
    several = write(tmp_path / "several", "one two\n")
    assert problems({"HF_TOKEN_FILE": str(file), "HF_TOKEN": "hf_x"}, stage="download") == [
        "both HF_TOKEN and HF_TOKEN_FILE are set: keep one of them"
    ]
    assert problems({"HF_TOKEN_FILE": str(tmp_path / "no")}, stage="download") == [
        f"HF_TOKEN_FILE: cannot read {tmp_path}/no: No such file or directory"
    ]
    assert problems({"KT_API_KEY_FILE": str(tmp_path)}, stage="smoke") == [
        f"KT_API_KEY_FILE: cannot read {tmp_path}: Is a directory"
    ]
    assert problems({"HF_TOKEN_FILE": str(empty)}, stage="download") == [
        f"HF_TOKEN_FILE: {empty} is empty"
    ]
    assert problems({"HF_TOKEN_FILE": str(several)}, stage="download") == [
        "HF_TOKEN: expected ASCII characters without spaces, found its value (not shown)"
    ]


def test_only_secrets_have_files() -> None:
    assert problems({"KT_PORT_FILE": "/x"}) == [
        "unknown setting KT_PORT_FILE: did you mean KT_PORT?"
    ]


def test_env_file_syntax(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a",
        "\n# comment\nKT_A=plain # comment\nexport KT_B = spaced value \n"
        "KT_C='single # \"quoted\"' # comment\n"
        'KT_D="double \\"quoted\\" \\$x\\n"\nKT_E=\nKT_F=a#b\n'
        "KT_G='{\"index_topk\": null}'\n",
    )
    values = {line.name: line.value for line in read_env_file(file)}
    assert values == {
        "KT_A": "plain",
        "KT_B": "spaced value",
        "KT_C": 'single # "quoted"',
        "KT_D": 'double "quoted" $x\n',
        "KT_E": "",
        "KT_F": "a#b",
        "KT_G": '{"index_topk": null}',
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("KT_PORT", NOT_SHOWN),
        ("1A=2", NOT_SHOWN),
        ("KT_PORT='1", "KT_PORT has an opening ' but no closing one at the end"),
        ('KT_PORT="1', 'KT_PORT has an opening " but no closing one at the end'),
        ("KT_HOST=a\nKT_HOST=b", "KT_HOST is set again, first at FILE:1"),
    ],
)
def test_bad_lines(tmp_path: Path, line: str, message: str) -> None:
    file = write(tmp_path / "a", line + "\n")
    number = line.count("\n") + 1
    assert problems({}, file) == [f"{file}:{number}: {message.replace('FILE', str(file))}"]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert problems({}, tmp_path / "no", tmp_path / "binary") == [
        f"--env-file {tmp_path}/no: No such file or directory",
        f"--env-file {tmp_path}/binary is not a text file in UTF-8",
    ]


def test_auto_of_the_kernel_is_not_handed_on(tmp_path: Path) -> None:
    """The kernel knows target names only."""
    file = write(tmp_path / "a", "KT_TARGET=scalar\n")
    assert "KT_TARGET" not in load({"KT_TARGET": "auto"}, [file]).environment
    assert load({}, [file]).environment["KT_TARGET"] == "scalar"


def test_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a", "HF_ENDPOINT=http://mirror\nSGLANG_X=1\n")
    monkeypatch.setenv("HF_HOME", "")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    environ = {k: v for k, v in os.environ.items() if not k.startswith("KT_")}
    export(load(environ, [file]))
    assert os.environ["HF_ENDPOINT"] == "http://mirror"
    assert os.environ["SGLANG_X"] == "1"
    assert "HF_HOME" not in os.environ


@pytest.mark.parametrize("from_file", [False, True], ids=["environment", "env file"])
def test_a_stage_gets_its_own_variables(tmp_path: Path, from_file: bool) -> None:
    """A proxy for the download would stand between the server and itself."""
    given = {
        "HTTP_PROXY": ("download", "bundle"),
        "https_proxy": ("download", "bundle"),
        "All_Proxy": ("download", "bundle"),
        "NO_PROXY": ("download", "bundle"),
        "SSL_CERT_FILE": ("download", "bundle"),
        "HF_TOKEN": ("download",),
        "HUGGING_FACE_HUB_TOKEN": ("download",),
        "HF_ENDPOINT": ("download",),
        "HF_HUB_OFFLINE": ("download", "serve"),
        "HF_HUB_DISABLE_TELEMETRY": ("download", "serve"),
        "KT_API_KEY": ("serve", "check", "smoke"),
        "KT_ADMIN_KEY": ("serve", "check"),
        "KT_PORT": ("serve", "check", "smoke", "health", "status"),
        "SGLANG_X": ("serve", "check"),
        "SGLANG_X_PROXY": ("download", "bundle", "serve", "check"),
        "OMP_NUM_THREADS": ("convert", "serve"),
    }
    values = {"HF_ENDPOINT": "http://hub"}
    texts = {name: values.get(name, "1") for name in given}
    file = write(tmp_path / "a", "".join(f"{name}={text}\n" for name, text in texts.items()))
    for stage in STAGES:
        environ = {"PATH": "/bin", **({} if from_file else texts)}
        config = load(environ, [file] if from_file else [], stage)
        expected = {name for name, stages in given.items() if stage in stages}
        assert set(config.environment) == {"PATH", *expected}, stage


def test_what_is_handed_on_names_stages() -> None:
    for pattern, _, stages in HANDED_ON:
        assert stages, pattern
        assert set(stages) <= set(STAGES)


def test_export_takes_other_stages_variables_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    environ = {k: v for k, v in os.environ.items() if not k.startswith("KT_")}
    export(load(environ, stage="serve"))
    assert "PATH" in os.environ
    assert not {"HTTPS_PROXY", "HF_TOKEN"} & set(os.environ)


def test_no_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems({"KT_MODEL_PATH": "~nosuchuser/m"}) == [
        "KT_MODEL_PATH: expected a path, found '~nosuchuser/m': there is no user nosuchuser, write "
        "the path of the home directory"
    ]
    without_home(monkeypatch)
    assert problems({"KT_MODEL_PATH": "~/m"}) == [
        "KT_MODEL_PATH: expected a path, found '~/m': this user has none and HOME is not set, "
        "write the path of the home directory"
    ]


def test_json_without_end() -> None:
    (line,) = problems({"KT_MODEL_OVERRIDE_ARGS": '{"a":' * 100_000})
    assert line.startswith("KT_MODEL_OVERRIDE_ARGS: expected a JSON object, found ")
    assert len(line) < 300


@pytest.mark.parametrize("words", ["check", "download", "convert", "serve", "bundle /tmp/b"])
def test_the_examples_paths_are_no_paths(words: str, tmp_path: Path) -> None:
    """As root, 689 GB were begun below /path/to."""
    example = REPOSITORY / "env/tutorial.env"
    result = run("--env-file", example, *words.split(), KT_RUN_DIR=str(tmp_path))
    assert (result.returncode, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    names = ["KT_MODEL_PATH"] if words == "download" else ["KT_MODEL_PATH", "KT_WEIGHT_PATH"]
    assert [line.split(":")[1].strip() for line in lines] == names
    assert lines[0].endswith("put your own directory in the place of /path/to")
