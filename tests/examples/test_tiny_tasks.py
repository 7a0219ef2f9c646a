"""The tiny model's questions have right answers, and those of the evaluation are not trained on."""

from __future__ import annotations

import re

import pytest
from tokenizers import Tokenizer

from deploy.settings.variables import BY_NAME
from examples.tiny.tasks import TASKS, Example, Mixture, evaluation_examples
from examples.tiny.train import HELD_OUT_PER_TASK, HELD_OUT_SEED, batches, trained_tokenizer


def answer_of(example: Example) -> str:
    """The right answer, worked out from the question alone."""
    words = example.question.split()
    match example.task.split(",")[0]:
        case "sum":
            return str(int(words[2]) + int(words[4].rstrip("?")))
        case "difference":
            return str(int(words[2]) - int(words[4].rstrip("?")))
        case "sort":
            return " ".join(sorted(words[1:]))
        case "copy":
            return " ".join(words[1:])
        case "copy from":
            return " ".join(words[words.index(words[2].rstrip(":"), 3) :])
        case "reverse":
            return " ".join(words[:0:-1])
        case "recall":
            said, _, asked = example.question.partition(" What do")
            names = re.findall(r"[A-Z]\w+", asked)
            found = [re.findall(rf"{name} \w+", said)[0] for name in names]
            return "Today " + re.sub(", (?=[^,]*$)", " and ", ", ".join(found)) + "."
        case "facts":
            return BY_NAME[words[-1].rstrip("?")].default
    return example.answer  # greetings: whatever the table says


def test_answers_are_right() -> None:
    mixture = Mixture(11)
    examples = [*(mixture.draw() for _ in range(2000)), *evaluation_examples(12, 50)]
    assert {e.task for e in examples} == set(TASKS)
    for example in examples:
        assert example.answer == answer_of(example)


def test_held_out_questions_are_not_trained_on() -> None:
    mixture = Mixture(13)
    trained = {mixture.draw().question for _ in range(20_000)}
    asked = evaluation_examples(HELD_OUT_SEED, HELD_OUT_PER_TASK)
    seen = [e.question for e in asked if e.task not in ("facts", "greeting")]
    assert len(seen) > 500
    assert not trained & set(seen)


def test_what_is_answered_right_gets_rarer() -> None:
    mixture = Mixture(14)
    for _ in range(500):
        mixture.learn("copy", True)
    tasks = [mixture.draw().task for _ in range(4000)]
    at_first = TASKS["copy"][1] / TASKS["recall"][1]
    assert 0 < tasks.count("copy") < 0.4 * at_first * tasks.count("recall")


def test_first_tasks_are_the_only_ones_until_they_are_right() -> None:
    mixture = Mixture(15, {"recall": 0.5, "copy from": 0.5})
    for _ in range(200):
        mixture.learn("recall", True)
    assert {mixture.draw().task for _ in range(200)} == {"recall", "copy from"}
    for _ in range(200):
        mixture.learn("copy from", True)
    assert {mixture.draw().task for _ in range(2000)} == set(TASKS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return trained_tokenizer()


def test_each_digit_is_one_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("907").tokens == ["9", "0", "7"]


def test_only_answers_are_targets(tokenizer: Tokenizer) -> None:
    examples = [Example("sort", "Sort: 3 1 2", "1 2 3"), Example("greeting", "hi", "Hi!")]
    for inputs, targets, tasks in batches(tokenizer, examples, 2):
        (row,) = targets
        answer = tokenizer.decode(row[row >= 0].tolist(), skip_special_tokens=False)
        (example,) = [e for e in examples if answer == e.answer + "<｜end▁of▁sentence｜>"]
        assert tasks == [example.task]
        # The first target follows the prompt's last token.
        first = int((row >= 0).nonzero()[0])
        assert inputs[0, : first + 1].tolist() == tokenizer.encode(example.prompt).ids
