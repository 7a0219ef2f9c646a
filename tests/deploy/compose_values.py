"""What ``docker compose`` 2.26 makes of env files, as it said when asked; more texts to ask about.

``tests/docker/test_env_file.py`` asks again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

#: The environment in which the files are read.
ENVIRONMENT = {"SET": "s e$t", "EMPTY": ""}
#: Files and the variables that they set.
VALUES: list[tuple[str, dict[str, str]]] = [
    ("\ufeffA=1\n", {"A": "1"}),
    ("A=$SET", {"A": "s e$t"}),
    ("A=$$SET", {"A": "$SET"}),
    ("A=${SET}", {"A": "s e$t"}),
    ("A=pa$word1-x", {"A": "pa-x"}),
    ("A=pa${word}x", {"A": "pax"}),
    ("A=${UNSET:-d f}", {"A": "d f"}),
    ("A=${EMPTY:-d}", {"A": "d"}),
    ("A=${EMPTY-d}", {"A": ""}),
    ("A=${SET:+r}", {"A": "r"}),
    ("A=${UNSET+r}", {"A": ""}),
    ("A=${EMPTY+r}", {"A": "r"}),
    ("A=${EMPTY:+r}", {"A": ""}),
    ("A=$", {"A": "$"}),
    ("A=a$ b", {"A": "a$ b"}),
    ("A=$1$!$-", {"A": "$1$!$-"}),
    ("A=$$$SET", {"A": "$s e$t"}),
    ("A=$$$$", {"A": "$$"}),
    ("A=\\$SET\\n", {"A": "\\s e$t\\n"}),
    ("A=${B:-${SET}}x", {"A": "s e$tx"}),
    ("A=${B:-{$SET}}", {"A": "{s e$t}"}),
    ("A=${SET:-}}", {"A": "s e$t}"}),
    ("B=1\nA=$B", {"A": "1", "B": "1"}),
    ("SET=2\nA=$SET", {"A": "s e$t", "SET": "2"}),
    ("A=$A", {"A": ""}),
    ("A=${SET:?m}", {"A": "s e$t"}),
    ("A='$SET $$ \\' \\n'", {"A": "$SET $$ ' \\n"}),
    ('A="$SET \\$SET $$SET"', {"A": "s e$t $SET $SET"}),
    ('A="\\a\\b\\f\\n\\r\\t\\v\\c\\q\\x41\\\\"', {"A": "\x07\x08\x0c\n\r\t\x0b\\c\\q\\x41\\"}),
    ('A="\\" \\\' \\0101\\101"', {"A": "\" \\' A\\101"}),
    ('A="\\0\\00\\018\\0777\\0377"', {"A": "\\\\0\\18\\777ÿ"}),
    ('A="${UNSET:-\\"d\\"}"', {"A": '"d"'}),
    ("A=a#b", {"A": "a#b"}),
    ("A=a #b # c", {"A": "a"}),
    ("A=a\t#b", {"A": "a\t#b"}),
    ("A= #b", {"A": "#b"}),
    ("A=#b", {"A": "#b"}),
    ("A=", {"A": ""}),
    ("A=  \nB=1", {"A": "", "B": "1"}),
    ("A = b ", {"A": "b"}),
    ("export A=b", {"A": "b"}),
    ("export\tA = b", {"A": "b"}),
    ("exportA=1", {"exportA": "1"}),
    ("A: b", {"A": "b"}),
    ("A:b:c=d", {"A": "b:c=d"}),
    ("A==1", {"A": "=1"}),
    ("A=1\r\nB=2\r\n", {"A": "1", "B": "2"}),
    ('A="x\ny" # c\nB=1', {"A": "x\ny", "B": "1"}),
    ("A='x\ny'\nB=1", {"A": "x\ny", "B": "1"}),
    ('A="x\r\ny"\r\n', {"A": "x\r\ny"}),
    ('A=x"y"', {"A": 'x"y"'}),
    ("A=\"\"\nB=''", {"A": "", "B": ""}),
    ('A="x"#c', {"A": "x"}),
    ("# c\n\n  A=1\n \t# d\n", {"A": "1"}),
    ("A=ü€ \xa0\nB=2", {"A": "ü€", "B": "2"}),
    ("A\xa0=\xa0x", {"A": "x"}),
    ("A=\u2028x\n\u2028B=2", {"A": "\u2028x", "B": "2"}),
    ("A=1\x85B=2", {"A": "1\x85B=2"}),
    ('A={"a": null}', {"A": '{"a": null}'}),
    ("A=a\\\nB=1", {"A": "a\\", "B": "1"}),
    ("A=`x` $(y)", {"A": "`x` $(y)"}),
    ("A=x\\ #y", {"A": "x\\"}),
]

_IN_LINES = (
    *(
        "A",
        "B",
        "=",
        "=",
        ":",
        " ",
        "\t",
        "\n",
        "'",
        '"',
        "#",
        " #",
        "$",
        "$$",
        "{",
        "}",
        "export ",
    ),
    *("$SET", "${SET}", "${UNSET:-d}", "\\", "\\n", "\\$", "\\0101", "\\'", '\\"', "x", "y z", "1"),
    *("\r\n", "ü", "\u00a0", "\u2028", "\v", "\nC=", '="', "='"),
)
_IN_VALUES = (
    *("$", "{", "}", "${", "${", "SET", "UNSET", "EMPTY", ":", "-", "+", "?", "x", " "),
    *("\\", '"', "\\0", "101", "\\n"),
)


def texts(count: int, seed: int) -> Iterator[str]:
    """Files out of pieces that mean something, in any order."""
    draw = random.Random(seed)
    for i in range(count):
        if i % 2:
            yield "A=" + "".join(draw.choices(_IN_LINES, k=draw.randint(1, 10))) + "\n"
        else:
            quote = draw.choice(("", '"', "'"))
            inside = "".join(draw.choices(_IN_VALUES, k=draw.randint(1, 9)))
            yield f"A={quote}{inside}{quote}\nB=1\n"
