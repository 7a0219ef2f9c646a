"""The quality harness: its divergence, its results file, and a server that it asks."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.errors import BenchmarkError
from benchmarks.format_error import per_row_int4
from benchmarks.quality import answers
from benchmarks.quality.__main__ import main
from benchmarks.quality.answers import Prompt, Result, ask, read_prompts, read_results
from benchmarks.quality.compare import comparison, divergence, summary
from benchmarks.quality.tiny import RESULTS
from examples.tiny.tasks import ANSWER_START
from tests.mutations import damaged_bytes, damaged_json, fuzz, put

PROMPTS = [Prompt(f"copy/{i}", "copy", f"Copy: {i}", str(i)) for i in range(3)]


def distribution(size: int, seed: int) -> dict[str, float]:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)).log_softmax(0)
    return {str(i): float(v) for i, v in enumerate(values)}


def test_divergence_of_full_lists_is_torchs() -> None:
    a, b = distribution(50, 1), distribution(50, 2)
    expected = torch.nn.functional.kl_div(
        torch.tensor(list(b.values())),
        torch.tensor(list(a.values())),
        log_target=True,
        reduction="sum",
    )
    assert divergence(a, b) == pytest.approx(float(expected), rel=1e-4)


def test_divergence_of_cut_lists_is_a_lower_bound() -> None:
    a, b = distribution(50, 1), distribution(50, 2)
    cut = [dict(sorted(d.items(), key=lambda item: -item[1])[:20]) for d in (a, b)]
    assert 0 < divergence(*cut) < divergence(a, b)
    assert divergence(cut[0], cut[0]) == pytest.approx(0, abs=1e-6)


class Handler(BaseHTTPRequestHandler):
    """Answers a chat with the question's last word, and scores two tokens after the question."""

    asked: list[str]
    refuse = False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/chat/completions":
            question = body["messages"][0]["content"]
            self.asked.append(question)
            answer: object = {"choices": [{"message": {"content": question.split()[-1]}}]}
        else:
            rows = [(None, 7, "?"), (-1.0, 8, ANSWER_START), (-0.5, 9, "9"), (-0.25, 1, "end")]
            top = [None, [(-1.0, 8, "")], [(-0.5, 9, "")], [(-0.25, 1, "")]]
            answer = {"meta_info": {"input_token_logprobs": rows, "input_top_logprobs": top}}
        data = json.dumps(answer).encode()
        self.send_response(503 if self.refuse else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def handler() -> type[Handler]:
    return type("OwnHandler", (Handler,), {"asked": []})


@pytest.fixture
def url(handler: type[Handler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_killed_run_goes_on_after_its_last_whole_line(
    url: str, handler: type[Handler], tmp_path: Path
) -> None:
    output = tmp_path / "results.jsonl"
    whole = ask(url, "m", PROMPTS, output)
    lines = output.read_text().splitlines(keepends=True)
    output.write_text(lines[0] + lines[1][:40])
    (kept,) = [result.prompt.question for result in whole if result.prompt.id in lines[0]]
    handler.asked.clear()
    assert ask(url, "m", PROMPTS, output) == whole
    assert {r.prompt.id: r for r in read_results(output)} == {r.prompt.id: r for r in whole}
    assert sorted(handler.asked) == sorted({p.question for p in PROMPTS} - {kept})


def test_only_the_answer_is_scored(url: str, tmp_path: Path) -> None:
    results = ask(url, "m", PROMPTS, tmp_path / "results.jsonl")
    assert [r.tokens for r in results] == [[9, 1]] * 3
    row = summary(results, results)
    assert row["perplexity"] == pytest.approx(math.exp(0.375))
    assert row["tasks"] == {"copy": 1.0}
    assert row["KL"] == pytest.approx(0, abs=1e-9)


def test_summary_counts_wrong_answers_and_divergence() -> None:
    original = [Result(p, p.answer, [9], [-0.1], [{"9": -0.1}]) for p in PROMPTS]
    wrong = Result(PROMPTS[2], "no", [9], [-2.0], [{"9": -2.0}])
    row = summary(original, [*original[:2], wrong])
    assert row["accuracy"] == pytest.approx(2 / 3)
    assert row["same answers"] == pytest.approx(2 / 3)
    p, q = math.exp(-0.1), math.exp(-2.0)
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert row["KL"] == pytest.approx(expected / 3)
    with pytest.raises(BenchmarkError, match="not of the same prompts"):
        summary(original, original[:2])


def test_bad_input_is_one_clear_error(
    url: str, handler: type[Handler], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts.write_text('{"id": "1", "task": "t", "question": "q"}\n')
    with pytest.raises(BenchmarkError, match=r"prompts\.jsonl, line 1: expected a JSON object"):
        read_prompts(prompts)
    ask(url, "m", PROMPTS, output)
    with pytest.raises(BenchmarkError, match=r"another prompt under the id 'copy/0'"):
        ask(url, "m", [Prompt("copy/0", "copy", "other", "x")], output)
    handler.refuse = True
    assert main(["ask", "--base-url", url, "--output", str(tmp_path / "new.jsonl")]) == 2
    assert main(["ask", "--base-url", "http://127.0.0.1:1", "--output", str(tmp_path / "n")]) == 2
    refused, absent = capsys.readouterr().err.splitlines()
    assert refused.startswith(f"error: {url} refuses (503)")
    assert absent.startswith("error: http://127.0.0.1:1 does not answer")


def test_a_file_of_something_else_is_not_touched(tmp_path: Path) -> None:
    """Neither by reading, nor by `ask` with the wrong --output."""
    path = tmp_path / "notes"
    for content in (b"my notes", b"my notes\nwithout a newline at the end"):
        path.write_bytes(content)
        with pytest.raises(BenchmarkError, match=f"{path}.* not? .*result of `ask`"):
            ask("http://127.0.0.1:1", "m", PROMPTS, path)
        assert path.read_bytes() == content
    whole = json.dumps(asdict(Result(PROMPTS[0], "0", [9], [-0.1], [{"9": -0.1}]))).encode()
    path.write_bytes(whole + b"\n" + whole[:50])
    assert len(read_results(path)) == 1
    assert path.read_bytes() == whole + b"\n" + whole[:50]


@fuzz()
@given(data=st.data())
def test_damaged_lines(data: st.DataObject, tmp_path: Path) -> None:
    result = Result(PROMPTS[0], "0", [9, 1], [-0.1, -0.5], [{"9": -0.1}, {"1": -0.5, "2": -3.0}])
    line = json.dumps(asdict(result)).encode()
    path = put(
        tmp_path / "a", data.draw(st.one_of(damaged_json(line), damaged_bytes(line))) + b"\n"
    )
    with contextlib.suppress(BenchmarkError):
        results = read_results(path)
        comparison({"a": summary(results, results)})
    line = json.dumps(asdict(PROMPTS[0])).encode()
    put(path, data.draw(st.one_of(damaged_json(line), damaged_bytes(line))))
    with contextlib.suppress(BenchmarkError):
        read_prompts(path)


def test_an_answer_of_another_kind_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(answers, "post", lambda *_: {"choices": []})
    with pytest.raises(BenchmarkError, match="does not answer as SGLang"):
        ask("http://127.0.0.1:1", "m", PROMPTS, tmp_path / "results.jsonl")


def test_an_error_without_words_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def ask_one(*_: object) -> Result:
        raise httpx.ReadTimeout("")

    monkeypatch.setattr(answers, "ask_one", ask_one)
    with pytest.raises(BenchmarkError, match=r"does not answer: ReadTimeout$"):
        ask("http://127.0.0.1:1", "m", PROMPTS, tmp_path / "results.jsonl")


def test_per_row_int4_has_15_levels_a_row() -> None:
    weights = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    rounded = per_row_int4(weights)
    assert all(len(row.unique()) <= 15 for row in rounded)
    assert (rounded - weights).abs().max() <= weights.abs().max() / 14 * 1.001


def test_the_document_shows_the_results() -> None:
    rows = json.loads(RESULTS.read_text("utf-8"))
    assert comparison(rows) in RESULTS.with_suffix(".md").read_text("utf-8")
