"""Questions to the Hub, and its client's exceptions in one line each.

Import this module only after the environment is complete: the client reads HF_* when imported.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub import HfApi, constants
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import RepoFile as ListedFile

from deploy.hub.http_client import looks_like_a_page, not_the_hub, through_proxy
from deploy.hub.marker import RepoFile
from deploy.hub.retries import HubUnreachable, Stopped, retry_after
from kt_kernel.errors import UserError
from kt_kernel.files.foreign import Fields, read_fields
from kt_kernel.files.names import is_plain
from kt_kernel.files.safetensors_header import LARGEST_HEADER

COMMIT = re.compile(r"[0-9a-f]{40}")
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
#: Besides the shards: configuration, tokenizer, custom code, template, licence and model card.
#: Only at the top of the repository; folders hold demo code, pictures or other formats, and names
#: that begin with a dot are this program's.
NEEDED = (
    "*.json",
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "*.py",
    "*.md",
    "*.txt",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
)
#: What only a server with ``--trust-remote-code`` reads; by a name such as ``tokenizer_x.py``, too.
CODE = ".py"
METADATA_TIMEOUT = 30.0


def resolve_revision(api: HfApi, repo_id: str, revision: str) -> str:
    """The commit that a branch, tag or commit stands for; a full commit hash needs no network.

    Raises:
        UserError: no such repository or revision, or no access.
        HubUnreachable: no answer.
    """
    if COMMIT.fullmatch(revision):
        return revision
    with explained(repo_id, revision):
        info = api.repo_info(repo_id, revision=revision, timeout=METADATA_TIMEOUT)
        # The client takes whatever the answer has.
        if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
            raise TypeError
    return info.sha


def list_files(api: HfApi, repo_id: str, commit: str) -> dict[str, RepoFile]:
    """All files of a commit, by path.

    Raises:
        UserError: as :func:`resolve_revision`.
    """
    with explained(repo_id, commit):
        listed = list(api.list_repo_tree(repo_id, recursive=True, revision=commit))
        return dict(_listed_file(entry) for entry in listed if isinstance(entry, ListedFile))


def _listed_file(entry: ListedFile) -> tuple[str, RepoFile]:
    """Path and file of an entry of a listing; TypeError if it is not as the Hub makes it."""
    found = Fields({"path": entry.path, "git_id": entry.blob_id, "size": entry.size}, "")
    if entry.lfs:
        found.values |= {"size": entry.lfs.size, "sha256": entry.lfs.sha256}
    try:
        texts = found.text("path"), found.text("sha256", ""), found.text("git_id")
        size = found.integer("size")
    except UserError:
        raise TypeError from None
    "".join(texts).encode()  # half a character names no file
    return texts[0], RepoFile(size, *texts[1:])


def choose_small_files(files: dict[str, RepoFile], with_code: bool) -> list[str]:
    """Files to download besides the weights; Python code only ``with_code``.

    Raises:
        UserError: the repository holds no safetensors checkpoint.
    """
    if INDEX_NAME not in files and SINGLE_NAME not in files:
        raise UserError(
            f"the repository has neither {INDEX_NAME} nor {SINGLE_NAME}: expected a checkpoint in "
            f"safetensors format, set KT_MODEL_ID to one"
        )
    return [
        name
        for name in sorted(files)
        if is_plain(name)
        and (with_code or not name.endswith(CODE))
        and any(fnmatch.fnmatchcase(name, pattern) for pattern in NEEDED)
    ]


def read_shards(directory: Path) -> set[str]:
    """The files with the weights, as the index in a directory names them.

    Raises:
        UserError: it is no index, or names something else.
    """
    path = directory / INDEX_NAME
    try:
        shards = set(read_fields(path, LARGEST_HEADER).texts("weight_map").values())
        # Nothing but weights: a pickle or Python code under this heading would come along, too.
        if not shards or not all(is_plain(s) and s.endswith(".safetensors") for s in shards):
            raise UserError("no names of shards")
    except UserError:
        raise UserError(
            f"{path} is not an index of safetensors shards: delete it and download again, or "
            f"choose another KT_MODEL_REVISION"
        ) from None
    return shards


def choose_weights(files: dict[str, RepoFile], shards: set[str] | None) -> list[str]:
    """The files with the weights: the shards that the index names, or the only file.

    Raises:
        UserError: a shard that the index names is not in the repository.
    """
    if shards is None:
        return [SINGLE_NAME]
    absent = sorted(shards - set(files))
    if absent:
        raise UserError(
            f"{INDEX_NAME} names {absent[0]}"
            + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
            + ", which the repository does not have: choose another KT_MODEL_REVISION"
        )
    return sorted(shards)


@contextmanager
def explained(repo_id: str, revision: str, directory: Path | None = None) -> Iterator[None]:
    """Turn what the Hub's client raises into one line that says what to do."""
    try:
        yield
    except (UserError, Stopped):
        raise
    except Exception as error:
        raise _explain(error, repo_id, revision, directory) from error


def _explain(error: Exception, repo_id: str, revision: str, directory: Path | None) -> Exception:
    where = constants.ENDPOINT
    token_hint = "set HF_TOKEN or HF_TOKEN_FILE to a token that has access"
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return _no_space(directory)
        if isinstance(cause, hub_errors.GatedRepoError):
            return UserError(
                f"{repo_id} at {where} is gated: ask for access on its page and {token_hint}"
            )
        if isinstance(cause, hub_errors.RevisionNotFoundError):
            return UserError(
                f"{repo_id} at {where} has no revision {revision}: "
                f"set KT_MODEL_REVISION to a branch, tag or commit of it"
            )
        if isinstance(cause, hub_errors.RepositoryNotFoundError):
            return UserError(
                f"{where} has no repository {repo_id}, or it is private: "
                f"check KT_MODEL_ID, or {token_hint}"
            )
        if isinstance(cause, hub_errors.OfflineModeIsEnabled):
            return HubUnreachable(
                "HF_HUB_OFFLINE is set",
                f"unset it to download {repo_id} at {revision}",
                may_pass=False,
            )
        if isinstance(cause, hub_errors.HfHubHTTPError):
            return _explain_status(cause.response, repo_id, revision)
        if isinstance(cause, httpx.RequestError):
            return _explain_connection(cause, repo_id)
        if isinstance(cause, json.JSONDecodeError):
            if looks_like_a_page(cause.doc.encode("utf-8", "replace")):
                return not_the_hub(where, "a web page")
            return HubUnreachable(
                f"{where}{through_proxy(where)} sends no JSON, or a part of it, for {repo_id}",
                "check HF_ENDPOINT and the proxy",
            )
    if "No space left on device" in str(error):  # from a library, as text only
        return _no_space(directory)
    if isinstance(error, OSError) and error.strerror:
        return UserError(f"cannot write {error.filename or directory}: {error.strerror}")
    if isinstance(error, TypeError | KeyError | AttributeError | UnicodeError | RecursionError):
        return UserError(
            f"{where}{through_proxy(where)} sends JSON that is not the Hub's for {repo_id} "
            f"({type(error).__name__}): set HF_ENDPOINT to the Hub or to a mirror of it"
        )
    first_line = (str(error).strip().splitlines() or [""])[0]
    return UserError(f"downloading {repo_id} failed: {type(error).__name__}: {first_line}")


def _explain_status(response: httpx.Response, repo_id: str, revision: str) -> Exception:
    where, status = constants.ENDPOINT, response.status_code
    if status in (401, 403):
        return UserError(
            f"{where} refuses the token for {repo_id} (HTTP {status}): set HF_TOKEN or "
            f"HF_TOKEN_FILE to a token that has access"
        )
    if status >= 500 or status in (408, 429):
        return HubUnreachable(
            f"{where}{through_proxy(where)} answers HTTP {status} for {repo_id}",
            "try again later",
            wait=retry_after(response.headers),
        )
    return UserError(f"{where} answers HTTP {status} for {repo_id} at {revision}")


def _explain_connection(error: httpx.RequestError, repo_id: str) -> Exception:
    where, kind = constants.ENDPOINT, type(error).__name__
    if isinstance(error, httpx.TooManyRedirects):
        return not_the_hub(where, "redirects that never end")
    # A proxy that wants a password and a certificate that nobody knows stay as they are.
    lasting = isinstance(error, httpx.UnsupportedProtocol) or any(
        isinstance(cause, ssl.SSLCertVerificationError) for cause in _causes(error)
    )
    if isinstance(error, httpx.ProxyError) and re.match(r"4\d\d\b", str(error)):
        lasting, kind = True, f"the proxy answers HTTP {str(error).splitlines()[0]}"
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        lasting, kind = True, "its certificate is signed by nobody known: set SSL_CERT_FILE"
    return HubUnreachable(
        f"cannot reach {where}{through_proxy(where)} for {repo_id} ({kind})",
        "check the network, or set HF_ENDPOINT to a mirror; what is downloaded is kept",
        may_pass=not lasting,
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and those it was raised from, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _no_space(directory: Path | None) -> UserError:
    return UserError(
        f"no space left while downloading to {directory}: free some and run it again, "
        f"what is downloaded is kept"
    )
