"""The model repositories that the local Hub serves: folders, their files' digests, the revision."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

BRANCH = "main"
LARGE_FILE_SUFFIXES = (".safetensors",)
"""Files that the real Hub keeps in LFS: their ETag is a sha256, not a git object id."""


@dataclass(frozen=True)
class HubFile:
    """One served file; ``git_id`` and ``sha256`` are lower-case hexadecimal."""

    path: Path
    size: int
    git_id: str
    sha256: str

    @property
    def is_large(self) -> bool:
        return self.path.name.endswith(LARGE_FILE_SUFFIXES)

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.git_id


@dataclass(frozen=True)
class Snapshot:
    """A repository's files by relative path, and the revision (40 hex digits) they make."""

    revision: str
    files: dict[str, HubFile]


class HubError(Exception):
    """A refusal, as the real Hub words it: HTTP status, X-Error-Code and message."""

    def __init__(self, status: HTTPStatus, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Repositories:
    """Reads the repositories below ``root``; hashes each file once per size and mtime."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._hashed: dict[tuple[Path, int, int], HubFile] = {}
        self._lock = threading.Lock()

    def snapshot(self, repo_id: str, revision: str = BRANCH) -> Snapshot:
        """Return the files of ``repo_id`` at a branch or revision.

        Raises HubError RepoNotFound or RevisionNotFound.
        """
        folder = self.root / repo_id
        if not folder.is_dir() or any(part.startswith(".") for part in repo_id.split("/")):
            raise HubError(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
        with self._lock:
            paths = sorted(p for p in folder.rglob("*") if p.is_file())
            relative = {p.relative_to(folder).as_posix(): p for p in paths}
            files = {
                name: self._hash(path)
                for name, path in relative.items()
                if not any(part.startswith(".") for part in name.split("/"))
            }
        listing = "".join(f"{file.git_id} {name}\n" for name, file in files.items())
        current = hashlib.sha1(f"{repo_id}\n{listing}".encode()).hexdigest()
        if revision not in (BRANCH, current):
            message = f"Invalid rev id: {revision}"
            raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound", message)
        return Snapshot(current, files)

    def _hash(self, path: Path) -> HubFile:
        stat = path.stat()
        key = (path, stat.st_size, stat.st_mtime_ns)
        if key not in self._hashed:
            sha256 = hashlib.sha256()
            git = hashlib.sha1(f"blob {stat.st_size}\0".encode())
            with path.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    sha256.update(chunk)
                    git.update(chunk)
            self._hashed[key] = HubFile(path, stat.st_size, git.hexdigest(), sha256.hexdigest())
        return self._hashed[key]
