"""End the process with one clear line instead of serving a model that is wrong."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import NoReturn

from kt_kernel.errors import UserError

#: Versions of SGLang that this package is tested with, the last is the one that is installed.
TESTED_VERSIONS = ("0.5.16", "0.5.23")
TESTED_SGLANG = f"this package is tested with SGLang {' and '.join(TESTED_VERSIONS)}"


def sglang_version() -> str:
    """Version of the installed SGLang, or "(not installed)"."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def refuse_to_serve(message: str) -> NoReturn:
    """Print ``error: message`` on stderr and raise ``SystemExit(2)``.

    ``SystemExit`` because SGLang's plugin loader catches ``Exception``. A child
    that ends this way before it is ready makes SGLang's main process stop the rest.
    """
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def may_be_the_version(error: BaseException) -> bool:
    """Whether another version of SGLang may be why: it has another name or another signature.

    A directory that cannot be read, a full disk or a library that is not there is the machine's.
    """
    kinds = ImportError | AttributeError | TypeError | NameError | LookupError | AssertionError
    machine = ("shared object file", "getpwuid", "No space left")
    return isinstance(error, kinds) and not any(cause in str(error) for cause in machine)


@contextmanager
def refusing_to_serve(what: str) -> Iterator[None]:
    """Turn any exception of the block into :func:`refuse_to_serve`.

    ``what`` says what failed; it is used for exceptions that are not a
    :class:`UserError`, whose own text need not tell a reader anything.
    """
    try:
        yield
    except UserError as error:
        refuse_to_serve(str(error))
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        if may_be_the_version(error):
            refuse_to_serve(f"{what} in SGLang {sglang_version()}: {text}; {TESTED_SGLANG}")
        refuse_to_serve(f"{what}: {text}")
