"""Check of compose's own variables, which the stages neither read nor refuse."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from deploy.checks.result import Finding, Status
from deploy.checks.situation import Situation, check
from deploy.settings.compose_names import COMPOSE, RENAMED

#: How much a name is like one of compose's to be taken for a misspelt one: containers have
#: variables of many programs. One letter of six is another.
_LIKE = 0.83
#: By how many letters its length differs then: IMAGE_TAG is not IMAGE_TARGET.
_LETTERS = 2


@check("compose-variables", serve=False)
def check_compose_variables(situation: Situation) -> Iterator[Finding]:
    """In a container of docker-compose.yml: no old or misspelt name of a variable of compose, which
    would be ignored. All of `.env` is in the environment there."""
    if not situation.values["KT_PUBLISHED_HOST"]:
        return
    found = False
    for name, value in sorted(situation.environment.items()):
        if not value or name in COMPOSE:
            continue
        if new := RENAMED.get(name):
            found = True
            yield Finding(
                Status.FAIL,
                f"{new}, which replaced {name}",
                f"{name}, which is ignored",
                f"set {new} in its place (docs/operations.md has its values)",
            )
        elif near := _nearest(name):
            found = True
            yield Finding(
                Status.WARN,
                "variables of docker-compose.yml by their names",
                f"{name}, which is ignored",
                f"did you mean {near}?",
            )
    if not found:
        yield Finding(Status.PASS, "no old or misspelt name of a variable of compose", "none")


def _nearest(name: str) -> str | None:
    """The variable of compose that was meant, if this may be a misspelt one."""
    as_long = [known for known in COMPOSE if abs(len(known) - len(name)) <= _LETTERS]
    return next(iter(difflib.get_close_matches(name, as_long, n=1, cutoff=_LIKE)), None)
