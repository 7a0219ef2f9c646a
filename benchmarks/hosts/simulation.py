"""Users who ask hosts behind a router, in simulated time.

A host does as SGLang does there: a prompt is computed while the answers under way wait, in the
order of arrival and while there is room among the running requests; a decode step gives each of
these a token. A user reads the answer for some time, then asks again. Nothing of a prompt is in a
cache: that is the worst case, and the first question of each conversation.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.hosts.speeds import Speeds
from deploy.router.options import router_options

#: The deployment's option of the router, and the router's own default.
BALANCE_ABSOLUTE: int = router_options({})["balance_abs_threshold"]
BALANCE_RELATIVE = 1.5


@dataclass(frozen=True)
class Load:
    """What users do.

    Attributes:
        users: how many.
        prompt, answer: tokens.
        pause: seconds between an answer and the next question, on average.
    """

    users: int
    prompt: int
    answer: int
    pause: float = 60.0


@dataclass
class Request:
    """One question. ``first`` and ``end`` are when its tokens came."""

    user: int
    asked: float
    left: int
    first: float = 0.0
    end: float = 0.0


@dataclass
class Host:
    """One server; its work goes on in actions: a prompt, or some equal decode steps."""

    speeds: Speeds
    most: int
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    action: int = 0
    prompt: Request | None = None
    began: float = 0.0
    steps: int = 0
    step: float = 0.0

    @property
    def load(self) -> int:
        """Requests that it has."""
        return len(self.waiting) + len(self.running) + (self.prompt is not None)

    def begin(self, now: float, prompt_tokens: int) -> float | None:
        """Begin the next action; when it ends, None if there is nothing to do."""
        self.action += 1
        self.began, self.prompt, self.steps = now, None, 0
        if self.waiting and len(self.running) < self.most:
            self.prompt = self.waiting.popleft()
            return now + self.speeds.prompt(prompt_tokens)
        if self.running:
            self.step = self.speeds.step(len(self.running))
            self.steps = min(request.left for request in self.running)
            return now + self.steps * self.step
        return None

    def interrupt(self, now: float) -> float | None:
        """A request has come: end the decode after the step under way; when that is."""
        if self.steps == 0 or len(self.running) >= self.most:
            return None
        done = max(1, math.ceil((now - self.began) / self.step))
        if done >= self.steps:
            return None
        self.steps = done
        self.action += 1
        return self.began + done * self.step

    def finish(self, now: float) -> list[Request]:
        """End the action; the requests that are answered."""
        if self.prompt is not None:
            self.prompt.first = now
            self.prompt.left -= 1
            self.running.append(self.prompt)
        for request in self.running if self.prompt is None else ():
            request.left -= self.steps
        ended = [request for request in self.running if request.left <= 0]
        self.running = [request for request in self.running if request.left > 0]
        for request in ended:
            request.end = now
        return ended


def choose(loads: Sequence[int], before: int | None) -> int:
    """The host for a request, as the router's policy ``cache_aware`` chooses.

    The one that has the beginning of the conversation, unless it has too many requests more than
    the idlest.
    """
    idlest = min(range(len(loads)), key=loads.__getitem__)
    most = max(loads)
    unequal = most - loads[idlest] > BALANCE_ABSOLUTE and most > BALANCE_RELATIVE * loads[idlest]
    return idlest if before is None or unequal else before


def simulate(
    load: Load,
    hosts: Sequence[Speeds],
    most: int,
    seconds: float = 5400.0,
    choose: Callable[[Sequence[int], int | None], int] = choose,
) -> list[Request]:
    """The requests that were answered, without those of the first tenth of the time.

    Args:
        hosts: the speeds of each.
        most: requests that a host computes together.
        seconds: simulated; at least 20 requests of a user fit in.
        choose: the router.
    """
    rng = random.Random(0)
    there = [Host(speeds, most) for speeds in hosts]
    home: list[int | None] = [None] * load.users
    events: list[tuple[float, int, int, int, int]] = []  # time, order, host or -1, user, action
    order = 0

    def later(time: float | None, host: int, user: int, action: int = 0) -> None:
        nonlocal order
        if time is not None:
            order += 1
            heapq.heappush(events, (time, order, host, user, action))

    for user in range(load.users):
        later(rng.uniform(0, load.pause), -1, user)
    answered: list[Request] = []
    while events and events[0][0] < seconds:
        now, _, index, user, action = heapq.heappop(events)
        if index < 0:
            index = home[user] = choose([host.load for host in there], home[user])
            host = there[index]
            idle = host.load == 0
            host.waiting.append(Request(user, now, load.answer))
            end = host.begin(now, load.prompt) if idle else host.interrupt(now)
            later(end, index, -1, host.action)
        elif action == (host := there[index]).action:
            for request in host.finish(now):
                answered.append(request)
                later(now + rng.expovariate(1 / load.pause), -1, request.user)
            later(host.begin(now, load.prompt), index, -1, host.action)
    return [request for request in answered if request.asked > seconds / 10]
