"""Who gets which variable: the settings of the table, and what is handed on unchecked."""

from __future__ import annotations

import fnmatch
import re

from deploy.settings.row import Flag, Setting
from deploy.settings.table import TABLE

#: Names besides the table's that an env file may set: read by the programs that a stage starts,
#: handed on unchecked to the stages named. A pattern in capitals that ends in _PROXY holds for any
#: case, as in the programs that read it.
HANDED_ON: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("SGLANG_*", "SGLang's own variables", ("serve", "check")),
    ("HF_HUB_*", "variables of the Hub's client", ("download", "serve")),
    (
        "HF_XET_*",
        "taken and not used: files come over HTTP, so that they can be continued",
        ("download",),
    ),
    ("HUGGING_FACE_HUB_TOKEN", "an older name of HF_TOKEN", ("download",)),
    ("HF_TOKEN_PATH", "where the Hub's client looks for its token", ("download",)),
    ("NCCL_*", "NVIDIA's collective library", ("serve", "check")),
    (
        "CUDA_*",
        "the CUDA runtime; CUDA_VISIBLE_DEVICES chooses GPUs",
        ("convert", "serve", "check"),
    ),
    ("TRITON_*", "the Triton compiler", ("serve",)),
    ("PYTORCH_ALLOC_CONF", "another name of PYTORCH_CUDA_ALLOC_CONF", ("serve",)),
    ("OMP_*", "OpenMP threads of torch", ("convert", "serve")),
    (
        "*_PROXY",
        "HTTP_PROXY, HTTPS_PROXY, NO_PROXY, ALL_PROXY, in capitals or not: the way to the Hub. The "
        "server never gets them; it would ask itself through the proxy",
        ("download", "bundle"),
    ),
    ("SSL_CERT_FILE", "certificates of a private network", ("download", "bundle")),
    ("REQUESTS_CA_BUNDLE", "the same, if SSL_CERT_FILE is not set", ("download", "bundle")),
)

BY_NAME: dict[str, Setting] = {setting.name: setting for setting in TABLE}
SECRETS: dict[str, Setting] = {s.file_name: s for s in TABLE if s.secret}


#: Words in the names of other programs' variables whose values are not shown.
_PRIVATE = re.compile(r"(TOKEN|KEY|AUTH|PROXY)$|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def may_show(name: str) -> bool:
    """Whether a variable's value may be shown as it is: it holds no secret."""
    setting = BY_NAME.get(name)
    if setting is not None:
        return not (setting.secret or setting.private)
    return name in SECRETS or not _PRIVATE.search(name)


def shown_name(name: str) -> str:
    """A name in an env file for a message: one that is unlike a variable's may be a secret."""
    return name if name.isupper() or is_known(name) else "a name in small letters (not shown)"


def stages_of(name: str) -> tuple[str, ...] | None:
    """The stages that get a variable; None for one that is not this project's: all get it."""
    setting = BY_NAME.get(name) or SECRETS.get(name)
    if setting is not None:
        return setting.stages
    found = [stages for pattern, _, stages in HANDED_ON if _matches(name, pattern)]
    return tuple(stage for stages in found for stage in stages) if found else None


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name.upper() if pattern.endswith("_PROXY") else name, pattern)


def is_for(name: str, stage: str) -> bool:
    """Whether a stage, and the programs it starts, get a variable."""
    stages = stages_of(name)
    return stages is None or stage in stages


def is_known(name: str) -> bool:
    """Whether a name may stand in an env file."""
    return stages_of(name) is not None


def known_names() -> list[str]:
    """Names of the table and of the files of its secrets, for suggestions."""
    return [*BY_NAME, *SECRETS]


def commanded(stage: str) -> list[tuple[Setting, Flag]]:
    """Settings that become flags in the command of ``stage``, in the command's order."""
    rows = [(s, flag) for s in TABLE for flag in s.flags if flag.stage == stage]
    return sorted(rows, key=lambda row: row[1].position)
