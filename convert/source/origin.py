"""Where a checkpoint came from, as the download recorded it beside the files."""

from __future__ import annotations

from pathlib import Path

from kt_kernel.errors import UserError
from kt_kernel.files.foreign import FileMissing, read_fields

#: Says which repository and revision a directory holds, and whether all of it.
MARKER_NAME = ".kt-download.json"


def read_origin(folder: Path) -> dict[str, str]:
    """Repository and revision that the download stage recorded; empty if it did not.

    Raises:
        UserError: the download stage says that it is not finished.
    """
    path = folder / MARKER_NAME
    try:
        recorded = read_fields(path, advice="run the download again")
    except FileMissing:
        return {}
    if not recorded.flag("complete", True):
        raise UserError(
            f"the download of {folder} is not finished, {path} says: run it again first"
        )
    origin = {key: recorded.text(key, "") for key in ("repo_id", "revision")}
    return {key: value for key, value in origin.items() if value}
