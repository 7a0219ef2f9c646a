"""Prompts put to a running SGLang server, and its answers with the scores of their tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.errors import NOT_AS_EXPECTED, BenchmarkError
from examples.tiny.tasks import ANSWER_START, chat
from kt_kernel.errors import UserError
from kt_kernel.files.foreign import Fields, parse_json, read_file

TOP = 64
"""Log-probabilities kept of each position; the rest of the vocabulary counts as one event."""
MAX_ANSWER_TOKENS = 64
TIMEOUT = 600.0
LARGEST_RESULTS = 1 << 30
"""Bytes of a results file: a line has 40 kB."""
LARGEST_SCORE = 700.0
"""Log-probabilities beyond are none: e to that power is no number."""
AT_ONCE = 8
"""Requests in flight: a batch takes little longer than one."""


@dataclass(frozen=True)
class Prompt:
    """A question and the answer that counts as right."""

    id: str
    task: str
    question: str
    answer: str


@dataclass(frozen=True)
class Result:
    """One line of a results file.

    tokens: the scored tokens, from the answer's first to the end-of-sentence token.
    log_probability: of each of them, given all before. top: for each, the most likely tokens' ids
    and log-probabilities.
    """

    prompt: Prompt
    text: str
    tokens: list[int]
    log_probability: list[float]
    top: list[dict[str, float]]

    @property
    def right(self) -> bool:
        return self.text.strip() == self.prompt.answer


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a file of JSON lines.

    Raises:
        BenchmarkError: it cannot be read, a line is no prompt, or an id occurs twice.
    """
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(_lines(path), 1):
        try:
            prompt = _prompt(_fields(line))
        except (ValueError, UserError) as error:
            raise BenchmarkError(
                f"{path}, line {number}: expected a JSON object with id, task, question and "
                f"answer ({error})"
            ) from None
        if prompt.id in prompts:
            raise BenchmarkError(f"{path}, line {number}: id {prompt.id!r} occurs twice")
        prompts[prompt.id] = prompt
    return list(prompts.values())


def read_results(path: Path, repair: bool = False) -> list[Result]:
    """Finished lines of a results file; none if there is no file.

    Args:
        path: the file.
        repair: drop a last line that a kill cut off from the file, too.

    Raises:
        BenchmarkError: it cannot be read, or a line is no result.
    """
    if not path.exists():
        return []
    lines = _lines(path)
    is_cut = bool(lines) and not lines[-1].endswith(b"\n")
    whole = lines[:-1] if is_cut else lines
    results = []
    for number, line in enumerate(whole, 1):
        try:
            results.append(_result(_fields(line)))
        except (ValueError, UserError):
            raise BenchmarkError(
                f"{path}, line {number} is not a result of `ask`: choose another file"
            ) from None
    if repair and is_cut:
        if not results and not lines[-1].startswith(b'{"prompt"'):
            raise BenchmarkError(f"{path} holds no result of `ask`: choose another file")
        os.truncate(path, sum(map(len, whole)))
    return results


def _lines(path: Path) -> list[bytes]:
    try:
        return read_file(path, LARGEST_RESULTS).splitlines(keepends=True)
    except UserError as error:
        raise BenchmarkError(str(error)) from None


def _fields(line: bytes) -> Fields:
    return Fields({"line": parse_json(line)}, "it").inner("line")


def _prompt(fields: Fields) -> Prompt:
    if fields.values.keys() != {"id", "task", "question", "answer"}:
        raise ValueError("other fields")
    return Prompt(**{name: fields.text(name) for name in fields.values})


def _result(fields: Fields) -> Result:
    tokens = fields.integers("tokens")
    scores, top = fields.array("log_probability"), fields.array("top")
    rows = [Fields({"row": row}, "top").inner("row").values for row in top]
    if not 0 < len(tokens) == len(scores) == len(rows) or not all(
        type(value) in (int, float) and -LARGEST_SCORE < value < LARGEST_SCORE
        for values in (scores, *(row.values() for row in rows))
        for value in values
    ):
        raise ValueError("scores")
    return Result(_prompt(fields.inner("prompt")), fields.text("text"), tokens, scores, rows)


def ask(url: str, model: str, prompts: Sequence[Prompt], output: Path) -> list[Result]:
    """Ask the server what ``output`` does not answer yet; returns the results of all prompts.

    Raises:
        BenchmarkError: the server is not there or refuses, or ``output`` is of other prompts.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    done = {result.prompt.id: result for result in read_results(output, repair=True)}
    for prompt in prompts:
        if prompt.id in done and done[prompt.id].prompt != prompt:
            raise BenchmarkError(
                f"{output} has another prompt under the id {prompt.id!r}: choose another file"
            )
    # trust_env off: a proxy for the internet has no business between two local programs.
    with (
        httpx.Client(base_url=url.rstrip("/"), timeout=TIMEOUT, trust_env=False) as client,
        output.open("a", encoding="utf-8") as file,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        asked = [pool.submit(ask_one, client, model, p) for p in prompts if p.id not in done]
        try:
            for future in as_completed(asked):
                result = future.result()
                done[result.prompt.id] = result
                file.write(json.dumps(asdict(result)) + "\n")
                file.flush()
        except httpx.HTTPStatusError as error:
            raise BenchmarkError(
                f"{url} refuses ({error.response.status_code}): {error.response.text[:300]}"
            ) from None
        except httpx.HTTPError as error:
            raise BenchmarkError(
                f"{url} does not answer: {str(error) or type(error).__name__}"
            ) from None
        except NOT_AS_EXPECTED as error:
            raise BenchmarkError(
                f"{url} does not answer as SGLang ({type(error).__name__}: {error})"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
    return [done[prompt.id] for prompt in prompts]


def ask_one(client: httpx.Client, model: str, prompt: Prompt) -> Result:
    """The answer and the scores of one prompt."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt.question}],
        "temperature": 0,
        "max_tokens": MAX_ANSWER_TOKENS,
    }
    answer = post(client, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
    scored = post(
        client,
        "/generate",
        {
            "text": chat(prompt.question, prompt.answer),
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": TOP,
            "return_text_in_logprobs": True,
        },
    )["meta_info"]
    tokens, top = scored["input_token_logprobs"], scored["input_top_logprobs"]
    # What the question's author wrote is not the model's to predict.
    start = max(i for i, (_, _, text) in enumerate(tokens) if text == ANSWER_START) + 1
    return Result(
        prompt=prompt,
        text=answer or "",
        tokens=[token for _, token, _ in tokens[start:]],
        log_probability=[value for value, _, _ in tokens[start:]],
        top=[{str(token): value for value, token, _ in row} for row in top[start:]],
    )


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post(path, json=body)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer
