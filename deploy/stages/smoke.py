"""The stage ``smoke``: the tutorial's chat request to a running server, whole and streamed."""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deploy.settings.config import Config
from deploy.stages.health import base_url
from deploy.stages.stage import Stage
from kt_kernel.errors import UserError

if TYPE_CHECKING:
    import httpx

QUESTION = "hi"
#: What code meets that takes a server's JSON for what it should be.
NOT_AS_EXPECTED = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
CONNECT_TIMEOUT = 5.0


@dataclass
class Answer:
    """What came back.

    Attributes:
        text: the answer; reasoning is kept apart.
        usage: as the server reports it, ``prompt_tokens`` and ``completion_tokens`` among others.
        finish_reason: ``stop`` or ``length``.
        seconds: from sending the request to its end.
        first_token: seconds to the first piece of text; None if not streamed.
    """

    text: str = ""
    reasoning: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    finish_reason: str = ""
    seconds: float = 0.0
    first_token: float | None = None

    def report(self, title: str) -> str:
        """Some lines for people."""
        tokens = int(self.usage.get("completion_tokens") or 0)
        times = f"{self.seconds:.2f} s, {tokens / self.seconds:.1f} tokens/s"
        if self.first_token is not None:
            times += f", first token after {self.first_token:.2f} s"
        lines = [f"{title}: {self.text.strip()!r}"]
        if self.reasoning:
            lines.append(f"  reasoning: {self.reasoning.strip()!r}")
        lines.append(
            f"  {self.usage.get('prompt_tokens')} prompt tokens, {tokens} answer tokens "
            f"({self.finish_reason}), {times}"
        )
        return "\n".join(lines)


def request_body(config: Config, stream: bool) -> dict[str, Any]:
    """The tutorial's request; a stream also asks for the usage, which it would leave out."""
    body: dict[str, Any] = {
        "model": config.text("KT_SERVED_MODEL_NAME"),
        "stream": stream,
        "messages": [{"role": "user", "content": QUESTION}],
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    if config["KT_SMOKE_MAX_TOKENS"] is not None:
        body["max_tokens"] = config["KT_SMOKE_MAX_TOKENS"]
    return body


def run(config: Config, url: str | None) -> int:
    """Ask once whole and once streamed, and print the answers.

    Returns:
        0 if both were answered.

    Raises:
        UserError: the server is not there, refuses, or answers with no token.
    """
    import httpx

    url = (url or base_url(config)).rstrip("/")
    headers = {}
    if config["KT_API_KEY"] is not None:
        headers["Authorization"] = f"Bearer {config['KT_API_KEY']}"
    timeout = httpx.Timeout(config["KT_SMOKE_TIMEOUT"], connect=CONNECT_TIMEOUT)
    # trust_env off: a proxy for the internet has no business between two local programs.
    with httpx.Client(headers=headers, timeout=timeout, trust_env=False) as client:
        try:
            for title, ask in (("answer", _ask_whole), ("streamed answer", _ask_stream)):
                answer = ask(client, f"{url}/v1/chat/completions", config)
                print(answer.report(title), flush=True)
                if not answer.usage.get("completion_tokens"):
                    raise UserError(f"{url} answered without a single token")
        except httpx.ConnectError:
            raise UserError(
                f"no server at {url}: start it with `python entrypoint.py serve`, or set KT_HOST "
                f"and KT_PORT or --base-url"
            ) from None
        except httpx.TimeoutException:
            raise UserError(
                f"{url} sent nothing for {timeout.read:g} s: look at the server's log, or raise "
                f"KT_SMOKE_TIMEOUT"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL, *NOT_AS_EXPECTED) as error:
            raise UserError(
                f"{url} does not answer as an OpenAI-compatible server "
                f"({type(error).__name__}: {error})"
            ) from None
    return 0


def _ask_whole(client: httpx.Client, url: str, config: Config) -> Answer:
    started = time.perf_counter()
    response = client.post(url, json=request_body(config, stream=False))
    _refuse_error(response)
    body = response.json()
    choice = body["choices"][0]
    return Answer(
        text=choice["message"].get("content") or "",
        reasoning=choice["message"].get("reasoning_content") or "",
        usage=body["usage"],
        finish_reason=str(choice["finish_reason"]),
        seconds=time.perf_counter() - started,
    )


def _ask_stream(client: httpx.Client, url: str, config: Config) -> Answer:
    answer = Answer()
    started = time.perf_counter()
    with client.stream("POST", url, json=request_body(config, stream=True)) as response:
        if response.is_error:
            response.read()
            _refuse_error(response)
        for line in response.iter_lines():
            data = line.removeprefix("data:").strip()
            if not line.startswith("data:") or data == "[DONE]":
                continue
            event = json.loads(data)
            answer.usage = event.get("usage") or answer.usage
            for choice in event.get("choices") or []:
                delta = choice.get("delta") or {}
                text, reasoning = delta.get("content"), delta.get("reasoning_content")
                if (text or reasoning) and answer.first_token is None:
                    answer.first_token = time.perf_counter() - started
                answer.text += text or ""
                answer.reasoning += reasoning or ""
                answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    answer.seconds = time.perf_counter() - started
    return answer


def _refuse_error(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        message = response.json()["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text.strip().splitlines()[0] if response.text.strip() else "no text"
    hint = ": set KT_API_KEY" if response.status_code in (401, 403) else ""
    raise UserError(f"{response.url} answers HTTP {response.status_code}: {message}{hint}")


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--base-url",
        metavar="URL",
        help="address of the server; the default follows KT_HOST and KT_PORT",
    )


STAGE = Stage(
    "smoke",
    "send the tutorial's chat request to the running server",
    lambda config, args, _: run(config, args.base_url),
    _add_arguments,
)
