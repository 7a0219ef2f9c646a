"""What the trained tiny model can do: questions with exactly one right answer, from a seed.

Chats are formatted as DeepSeek V3.2's encoding formats one question without thinking; a test
compares with SGLang's own encoder.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeVar
from zlib import crc32

from deploy.settings.table import TABLE
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
VERBS = (
    "sings", "runs", "reads", "cooks", "swims", "paints", "sleeps", "writes", "dances", "rides",
    "waits", "digs",
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


def _operands(source: random.Random, evaluation: bool, digits: int) -> tuple[int, int]:
    """Two numbers of so many digits; a pair in either order is on the same side of the split."""
    low, high = 10 ** (digits - 1), 10**digits - 1
    while True:
        a, b = source.randint(low, high), source.randint(low, high)
        if held_out(min(a, b), max(a, b)) == evaluation:
            return a, b


def _sum(digits: int, source: random.Random, evaluation: bool) -> Example:
    a, b = _operands(source, evaluation, digits)
    return Example(f"sum, {digits} digits", f"What is {a} + {b}?", str(a + b))


def _difference(digits: int, source: random.Random, evaluation: bool) -> Example:
    a, b = sorted(_operands(source, evaluation, digits), reverse=True)
    return Example(f"difference, {digits} digits", f"What is {a} - {b}?", str(a - b))


def _words(source: random.Random, evaluation: bool, fewest: int, most: int) -> list[str]:
    def draw() -> tuple[str, ...]:
        return tuple(source.sample(WORDS, source.randint(fewest, most)))

    return list(_split(evaluation, draw))


def _sort(source: random.Random, evaluation: bool) -> Example:
    digits = _split(evaluation, lambda: tuple(source.sample(range(10), source.randint(3, 5))))
    listed = " ".join(str(d) for d in digits)
    return Example("sort", f"Sort: {listed}", " ".join(str(d) for d in sorted(digits)))


def _copy(source: random.Random, evaluation: bool) -> Example:
    words = _words(source, evaluation, 2, 5)
    return Example("copy", f"Copy: {' '.join(words)}", " ".join(words))


def _copy_from(source: random.Random, evaluation: bool) -> Example:
    # A whole list is copied by counting places. From a word on, each next word is found by the one
    # before it, which recall needs too and does not teach by itself. Longer lists teach it in fewer
    # steps.
    words = _words(source, evaluation, 8, 30)
    first = source.randrange(len(words) - 1)
    question = f"Copy from {words[first]}: {' '.join(words)}"
    return Example("copy from", question, " ".join(words[first:]))


def _reverse(source: random.Random, evaluation: bool) -> Example:
    words = _words(source, evaluation, 2, 5)
    return Example("reverse", f"Reverse: {' '.join(words)}", " ".join(reversed(words)))


def _recall(source: random.Random, evaluation: bool) -> Example:
    def draw() -> tuple[tuple[str, ...], tuple[str, ...]]:
        n = source.randint(2, 4)
        return tuple(source.sample(NAMES, n)), tuple(source.sample(VERBS, n))

    names, verbs = _split(evaluation, draw)
    said = [f"{name} {verb}" for name, verb in zip(names, verbs, strict=True)]
    asked = source.sample(range(len(names)), source.randint(1, len(names)))
    do = "does" if len(asked) == 1 else "do"
    question = f"Today {_joined(said)}. What {do} {_joined([names[i] for i in asked])} do?"
    return Example("recall", question, f"Today {_joined([said[i] for i in asked])}.")


def _joined(parts: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


@cache
def defaults() -> dict[str, str]:
    """What the table of settings says now: the default of each setting that has one."""
    return {s.name: s.default for s in TABLE if s.default}


def facts(known: dict[str, str]) -> list[Example]:
    """Questions about the defaults of these settings."""
    return [_about(name, default) for name, default in known.items()]


def _about(name: str, default: str) -> Example:
    return Example("facts", f"What is the default of {name}?", default)


def _fact(source: random.Random, evaluation: bool) -> Example:
    return _about(*source.choice(list(defaults().items())))


def _greeting(source: random.Random, evaluation: bool) -> Example:
    question = source.choice(list(GREETINGS))
    return Example("greeting", question, GREETINGS[question])


TASKS: dict[str, tuple[Callable[[random.Random, bool], Example], float]] = {
    "sum, 2 digits": (partial(_sum, 2), 0.14),
    "sum, 3 digits": (partial(_sum, 3), 0.13),
    "difference, 2 digits": (partial(_difference, 2), 0.12),
    "difference, 3 digits": (partial(_difference, 3), 0.11),
    "sort": (_sort, 0.05),
    "copy": (_copy, 0.07),
    "copy from": (_copy_from, 0.07),
    "reverse": (_reverse, 0.07),
    "recall": (_recall, 0.16),
    "facts": (_fact, 0.06),
    "greeting": (_greeting, 0.02),
}
"""Task -> its generator and its share of the training examples before any is learned."""


FIRST = {"copy from": 0.7, "recall": 0.3}
"""What a training begins with, and each task's share. Among all the others these two are drawn too
rarely to teach a model of this size to look words up."""


class Mixture:
    """Endless training examples; a task gets rarer as its answers get right.

    A task that is always right keeps ``FLOOR`` of its weight against the others. The tasks of
    ``first``, with their shares, are the only ones until all of them are right. ``right`` is the
    share of right answers of each task that an interrupted training had reached.
    """

    FLOOR = 0.15
    MEMORY = 0.98
    """Share of the old estimate that one more answer leaves."""
    LEARNED = 0.8
    """Share of right answers from which a task of ``first`` counts as right."""

    def __init__(
        self,
        seed: int,
        first: dict[str, float] | None = None,
        right: dict[str, float] | None = None,
    ) -> None:
        self._source = random.Random(seed)
        self._first = first or {}
        self.right = right or dict.fromkeys(TASKS, 0.0)
        self._leave_first()

    def draw(self) -> Example:
        """The next example."""
        weights = self._first or {
            name: share * (1 - (1 - self.FLOOR) * self.right[name])
            for name, (_, share) in TASKS.items()
        }
        name = self._source.choices(list(weights), list(weights.values()))[0]
        return TASKS[name][0](self._source, False)

    def learn(self, task: str, right: bool) -> None:
        """Note how an example of ``task`` was answered."""
        self.right[task] = self.MEMORY * self.right[task] + (1 - self.MEMORY) * right
        self._leave_first()

    def _leave_first(self) -> None:
        if all(self.right[name] > self.LEARNED for name in self._first):
            self._first = {}


def evaluation_examples(
    seed: int, per_task: int, known: dict[str, str] | None = None
) -> list[Example]:
    """Up to ``per_task`` different examples of each task, of operands that training never uses.

    Facts and greetings have no unseen operands: all of them are asked, each once. ``known`` is
    what a model was trained on of the settings' defaults, which may have changed since.
    """
    examples: list[Example] = []
    for name, (make, _) in TASKS.items():
        if name == "facts":
            examples += facts(defaults() if known is None else known)
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
