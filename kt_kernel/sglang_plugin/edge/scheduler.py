"""In the scheduler: a request that raises ends, and not the server."""

import logging
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

logger = logging.getLogger(__name__)


def process_each_request(process: Callable[..., None], scheduler: Any, recv_reqs: Any) -> None:
    """Around ``Scheduler.process_input_requests``.

    SGLang's scheduler ends at any exception, and the server with it. Nothing of a request is
    in a batch yet when it is taken in, so it can be answered with 400 and forgotten. An exception
    of anything but a client's prompt still ends the server: its sender would wait forever.
    """
    for request in recv_reqs:
        try:
            process(scheduler, [request])
        except Exception as error:
            failed = list(tokenized_requests(request))
            if not failed:
                raise
            logger.exception("a request failed before it was queued")
            for one in failed:
                refuse(scheduler, one, error)
    # What SGLang does once in each round, also without a request.
    process(scheduler, [])


def tokenized_requests(request: Any) -> Iterable[Any]:
    """The prompts in a message to the scheduler: itself, or its batch."""
    from sglang.srt.managers.io_struct import (
        BatchTokenizedEmbeddingReqInput,
        BatchTokenizedGenerateReqInput,
        TokenizedEmbeddingReqInput,
        TokenizedGenerateReqInput,
    )

    if isinstance(request, BatchTokenizedGenerateReqInput | BatchTokenizedEmbeddingReqInput):
        return list(request.batch)
    one = isinstance(request, TokenizedGenerateReqInput | TokenizedEmbeddingReqInput)
    return [request] if one else []


def refuse(scheduler: Any, request: Any, error: Exception) -> None:
    """Answer ``request`` with 400; take it out of the queue if it got there."""
    from sglang.srt.managers.io_struct import AbortReq

    scheduler.waiting_queue = [req for req in scheduler.waiting_queue if req.rid != request.rid]
    reason = {
        "type": "abort",
        "status_code": HTTPStatus.BAD_REQUEST,
        "message": f"the request cannot be served: {type(error).__name__}: {error}",
    }
    answer = AbortReq(rid=request.rid, finished_reason=reason)
    scheduler.ipc_channels.send_to_tokenizer.send_output(answer, request)
