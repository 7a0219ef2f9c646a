"""Names out of files and from the Hub, before anything is read, written or removed there."""

from __future__ import annotations

#: Bytes of a name that every file system takes.
LONGEST_NAME = 255
#: What :func:`is_plain` takes, in words.
PLAIN = f"the name of a file without folders, at most {LONGEST_NAME} bytes, with no dot in front"


def is_plain(name: str) -> bool:
    """Whether a name is that of a visible file right in whatever folder it is looked for.

    So it leads nowhere else, and to nothing that this program keeps for itself in the same folder:
    all such files begin with a dot.
    """
    try:
        length = len(name.encode())
    except UnicodeEncodeError:  # half a character
        return False
    return (
        0 < length <= LONGEST_NAME
        and not name.startswith(".")
        and name.isprintable()  # no NUL, no line break, nothing that a terminal obeys
        and not {"/", "\\"} & {*name}
    )
