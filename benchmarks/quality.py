"""What quantising the experts changes in the answers and in the next-token distributions.

    python -m benchmarks.quality tiny                     # the table of docs/accuracy.md
    python -m benchmarks.quality ask --base-url URL --output a.jsonl [--prompts FILE]
    python -m benchmarks.quality compare a.jsonl b.jsonl

``ask`` puts each prompt to a running SGLang server twice: as a chat through the OpenAI API, at
temperature 0, for the answer, and as text with the expected answer through ``/generate`` (whose
OpenAI counterpart gives no log-probabilities of a prompt) for the distribution of each token.
A line is appended for each finished prompt, and prompts that have one are not asked again.

``--prompts`` is a file of JSON lines with ``id``, ``task``, ``question`` and ``answer``; the
default is the tiny model's held-out set.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.errors import NOT_AS_EXPECTED, BenchmarkError
from examples.tiny.tasks import ANSWER_START, chat
from kt_kernel.errors import UserError
from kt_kernel.files import Fields, parse_json, read_file

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


def divergence(original: dict[str, float], other: dict[str, float]) -> float:
    """KL(original || other) in nats of one position.

    Tokens that are not in both lists are one event, so that the value is a lower bound, and exact
    where the lists hold nearly all of the probability.
    """
    shared = original.keys() & other.keys()
    total = sum(math.exp(original[t]) * (original[t] - other[t]) for t in shared)
    rest = [max(1 - sum(math.exp(d[t]) for t in shared), 1e-9) for d in (original, other)]
    return max(total + rest[0] * math.log(rest[0] / rest[1]), 0.0)


def summary(original: Sequence[Result], other: Sequence[Result]) -> dict[str, Any]:
    """Accuracy of each task, perplexity and divergence of ``other`` against ``original``.

    Raises:
        BenchmarkError: they are not of the same prompts, or the tokenizers differ.
    """
    by_id = {result.prompt.id: result for result in original}
    if by_id.keys() != {r.prompt.id for r in other} or any(
        by_id[r.prompt.id].tokens != r.tokens for r in other
    ):
        raise BenchmarkError("the two files are not of the same prompts and tokens")
    tasks: dict[str, list[bool]] = {}
    for result in other:
        tasks.setdefault(result.prompt.task, []).append(result.right)
    kl = [
        divergence(a, b)
        for result in other
        for a, b in zip(by_id[result.prompt.id].top, result.top, strict=True)
    ]
    log_probability = [value for result in other for value in result.log_probability]
    same = [by_id[r.prompt.id].text == r.text for r in other]
    return {
        "accuracy": sum(map(sum, tasks.values())) / len(other),
        "tasks": {task: sum(right) / len(right) for task, right in tasks.items()},
        "same answers": sum(same) / len(same),
        "perplexity": math.exp(-sum(log_probability) / len(log_probability)),
        "KL": sum(kl) / len(kl),
        "KL median": sorted(kl)[len(kl) // 2],
        "positions": len(kl),
        "questions": len(other),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Summaries by name, as a Markdown table."""
    tasks = list(next(iter(rows.values()))["tasks"])
    lines = [
        f"| | {' | '.join(tasks)} | all | same answer | perplexity | KL, nats |",
        "|---" * (len(tasks) + 5) + "|",
    ]
    for name, row in rows.items():
        cells = [f"{row['tasks'][task]:.1%}" for task in tasks]
        cells += [f"{row['accuracy']:.1%}", f"{row['same answers']:.1%}"]
        cells += [f"{row['perplexity']:.4f}", f"{row['KL']:.2e}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """0 when done, 2 for bad input or a missing server."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("ask", help="ask a running server")
    one.add_argument("--base-url", required=True)
    one.add_argument("--model", default="DeepSeek-V3.2", help="its name in the API")
    one.add_argument("--prompts", type=Path, help="JSON lines; default: the tiny model's")
    one.add_argument("--output", type=Path, required=True, help="results, appended to")
    two = commands.add_parser("compare", help="compare the results of two servers")
    two.add_argument("original", type=Path)
    two.add_argument("other", type=Path)
    tiny = commands.add_parser("tiny", help="measure the tiny model's formats")
    tiny.add_argument("--work", type=Path, default=Path(".cache/quality"))
    tiny.add_argument("--only", help="one variant, to measure in pieces")
    args = parser.parse_args(argv)
    # Imported here: it imports this module.
    from benchmarks import quality_tiny

    try:
        if args.command == "ask":
            prompts = read_prompts(args.prompts) if args.prompts else quality_tiny.prompts()
            results = ask(args.base_url, args.model, prompts, args.output)
            print(table({args.output.name: summary(results, results)}))
        elif args.command == "compare":
            original, other = read_results(args.original), read_results(args.other)
            if not original or not other:
                raise BenchmarkError("nothing to compare: one of the files has no results")
            rows = {args.original.name: original, args.other.name: other}
            print(table({name: summary(original, rows[name]) for name in rows}))
        else:
            quality_tiny.run(args.work, args.only)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
