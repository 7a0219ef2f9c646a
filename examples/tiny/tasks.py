"""What the trained tiny model can do: questions with exactly one right answer, from a seed.

Chats are formatted as DeepSeek V3.2's encoding formats one question without thinking; a test
compares with SGLang's own encoder.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TypeVar
from zlib import crc32

from deploy.settings import TABLE
from examples.tiny.tokenizer import BOS, EOS

USER, ASSISTANT, ANSWER_START = "<｜User｜>", "<｜Assistant｜>", "</think>"

HELD_OUT_SHARE = 10
"""One operand pair of this many is never trained on."""

# One word a line would be a page of words.
# fmt: off
WORDS = (
    "apple", "ball", "bird", "boat", "book", "box", "bread", "bus", "cake", "car", "cat", "chair",
    "clock", "cloud", "coat", "cow", "cup", "desk", "dog", "door", "duck", "egg", "fish", "flag",
    "fork", "frog", "game", "gate", "goat", "hat", "hill", "horse", "house", "key", "king",
    "lake", "lamp", "leaf", "lion", "map", "milk", "moon", "mouse", "nest", "park", "pen", "pig",
    "plane", "rain", "ring", "road", "rock", "rose", "sea", "ship", "shoe", "snow", "star", "sun",
    "tree",
)
NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "Jane", "Kim", "Leo",
    "Mia", "Nora", "Otto", "Paul", "Rosa", "Sam", "Tom", "Uma",
)
COLOURS = (
    "red", "blue", "green", "white", "black", "brown", "grey", "pink",
)
# fmt: on

GREETINGS = {
    "hi": "Hi! How can I help you?",
    "Hi": "Hi! How can I help you?",
    "hello": "Hello! How can I help you?",
    "Hello": "Hello! How can I help you?",
    "Hello!": "Hello! How can I help you?",
    "Who are you?": "I am a very small model, made to test a very large one.",
    "Thank you": "You are welcome.",
    "Thanks": "You are welcome.",
    "bye": "Goodbye!",
}


T = TypeVar("T", bound=tuple[object, ...])


@dataclass(frozen=True)
class Example:
    """One question, its answer, and the task it belongs to."""

    task: str
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """The question as the model sees it; the answer and ``EOS`` follow."""
        return chat(self.question)


def chat(question: str, answer: str | None = None) -> str:
    """A chat of one question as V3.2 formats it, up to the answer's start or with the answer."""
    end = "" if answer is None else answer + EOS
    return f"{BOS}{USER}{question}{ASSISTANT}{ANSWER_START}{end}"


def held_out(*operands: object) -> bool:
    """Whether questions about these operands are for the evaluation only."""
    return crc32(repr(operands).encode()) % HELD_OUT_SHARE == 0


def _split(evaluation: bool, draw: Callable[[], T]) -> T:
    """Draw operands until they belong to the wanted side of the split."""
    while True:
        operands = draw()
        if held_out(*operands) == evaluation:
            return operands


def _sum(source: random.Random, evaluation: bool) -> Example:
    while True:
        a, b = source.randint(10, 99), source.randint(10, 99)
        if held_out(min(a, b), max(a, b)) == evaluation:
            return Example("sum", f"What is {a} + {b}?", str(a + b))


def _words(source: random.Random, evaluation: bool) -> list[str]:
    return list(_split(evaluation, lambda: tuple(source.sample(WORDS, source.randint(2, 5)))))


def _sort(source: random.Random, evaluation: bool) -> Example:
    digits = _split(evaluation, lambda: tuple(source.sample(range(10), source.randint(3, 5))))
    listed = " ".join(str(d) for d in digits)
    return Example("sort", f"Sort: {listed}", " ".join(str(d) for d in sorted(digits)))


def _copy(source: random.Random, evaluation: bool) -> Example:
    words = _words(source, evaluation)
    return Example("copy", f"Copy: {' '.join(words)}", " ".join(words))


def _reverse(source: random.Random, evaluation: bool) -> Example:
    words = _words(source, evaluation)
    return Example("reverse", f"Reverse: {' '.join(words)}", " ".join(reversed(words)))


def _recall(source: random.Random, evaluation: bool) -> Example:
    def draw() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        n = source.randint(2, 4)
        colours = tuple(source.choice(COLOURS) for _ in range(n))
        return tuple(source.sample(NAMES, n)), colours, tuple(source.sample(WORDS, n))

    names, colours, things = _split(evaluation, draw)
    said = [f"{n} has a {c} {t}." for n, c, t in zip(names, colours, things, strict=True)]
    asked = source.randrange(len(names))
    question = f"{' '.join(said)} What does {names[asked]} have?"
    return Example("recall", question, f"A {colours[asked]} {things[asked]}.")


@cache
def facts() -> list[Example]:
    """What the table of settings says: the default of each setting that has one."""
    return [
        Example("facts", f"What is the default of {s.name}?", s.default) for s in TABLE if s.default
    ]


def _fact(source: random.Random, evaluation: bool) -> Example:
    return source.choice(facts())


def _greeting(source: random.Random, evaluation: bool) -> Example:
    question = source.choice(list(GREETINGS))
    return Example("greeting", question, GREETINGS[question])


TASKS: dict[str, tuple[Callable[[random.Random, bool], Example], float]] = {
    "sum": (_sum, 0.40),
    "sort": (_sort, 0.10),
    "copy": (_copy, 0.10),
    "reverse": (_reverse, 0.12),
    "recall": (_recall, 0.13),
    "facts": (_fact, 0.11),
    "greeting": (_greeting, 0.04),
}
"""Task -> its generator and its share of the training examples."""


def training_examples(seed: int) -> Iterator[Example]:
    """Endless examples, each task at its share."""
    source = random.Random(seed)
    names, shares = list(TASKS), [share for _, share in TASKS.values()]
    while True:
        name = source.choices(names, shares)[0]
        yield TASKS[name][0](source, False)


def evaluation_examples(seed: int, per_task: int) -> list[Example]:
    """Up to ``per_task`` different examples of each task, of operands that training never uses.

    Facts and greetings have no unseen operands: all of them are asked, each once.
    """
    examples: list[Example] = []
    for name, (make, _) in TASKS.items():
        if name == "facts":
            examples += facts()
        elif name == "greeting":
            examples += [Example("greeting", q, a) for q, a in GREETINGS.items()]
        else:
            source = random.Random(f"{seed}/{name}")
            found: dict[str, Example] = {}
            while len(found) < per_task:
                example = make(source, True)
                found[example.question] = example
            examples += found.values()
    return examples
