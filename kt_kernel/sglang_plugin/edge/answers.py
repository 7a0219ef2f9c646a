"""In the scheduler: what a grammar or a stop pattern may do while an answer is made.

Neither is known to be harmless before it runs: a grammar may lead to a place where no token fits,
and a regular expression may search without end. Each ends its own request with 400.
"""

import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

SEARCH_SECONDS = 0.5
"""For one search of a stop pattern. All other requests wait for it."""

DEAD_END = "the grammar or JSON schema allows no further token: it has no answer, or no end"


def open_dead_end(fill: Callable[..., None], grammar: Any, vocab_mask: Any, idx: int) -> None:
    """Around ``XGrammarGrammar.fill_vocab_mask``, which writes the tokens that fit to a row.

    Without one, all probabilities are NaN, sampling raises, and the server ends. So tokens are let
    through, and :func:`accept_or_dead_end` refuses whichever is taken.
    """
    fill(grammar, vocab_mask, idx)
    if not vocab_mask[idx].any():
        grammar.kt_dead_end = True
        vocab_mask[idx].fill_(-1)
        # At the end of a text the answer would be complete. A number of the row is 32 tokens.
        for token in grammar.matcher.stop_token_ids:
            vocab_mask[idx, token // 32] = 0


def accept_or_dead_end(accept: Callable[..., None], grammar: Any, token: int) -> None:
    """Around ``XGrammarGrammar.accept_token``: raises ValueError, by which its request ends."""
    if getattr(grammar, "kt_dead_end", False):
        raise ValueError(DEAD_END)
    accept(grammar, token)


def blame_client(create: Callable[..., None], abort: Any, *args: Any, **kwargs: Any) -> None:
    """Around ``FINISH_ABORT.__init__``: a dead end is the client's error, and not the server's."""
    create(abort, *args, **kwargs)
    if DEAD_END in (abort.message or ""):
        abort.message = DEAD_END
        abort.status_code = HTTPStatus.BAD_REQUEST
        abort.err_type = "BadRequestError"


class TimedRe:
    """What SGLang's ``schedule_batch`` uses of Python's ``re``, which knows no limit of time."""

    error = re.error

    @staticmethod
    def search(pattern: str, text: str) -> Any:
        """The first match or None; raises ``re.error`` where the search takes too long."""
        import regex  # type: ignore[import-untyped]  # of the same syntax

        try:
            return regex.search(pattern, text, timeout=SEARCH_SECONDS)
        except TimeoutError as error:
            raise re.error(f"takes more than {SEARCH_SECONDS} s to search an answer") from error
        except regex.error as error:
            raise re.error(str(error)) from error


def finish_or_refuse(check: Callable[..., Any], req: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``Req._check_str_based_finish``, which not everywhere expects a search to raise."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    try:
        return check(req, *args, **kwargs)
    except re.error as error:
        message = f"stop_regex: {error}; use fewer repetitions inside one another"
        req.finished_reason = FINISH_ABORT(message, HTTPStatus.BAD_REQUEST, "BadRequestError")
        return True
