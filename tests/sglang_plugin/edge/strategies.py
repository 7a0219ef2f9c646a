"""Values that a kind takes, values that it does not take, and requests with either."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from kt_kernel.sglang_plugin.edge.fields import FIELDS, SAMPLING
from kt_kernel.sglang_plugin.edge.kinds import (
    ByToken,
    Either,
    Embeddings,
    Fields,
    Flag,
    IdsOrLists,
    Integer,
    Internal,
    JsonText,
    Kind,
    Limits,
    Number,
    Object,
    OneOrList,
    Pattern,
    Prompt,
    RequestId,
    Text,
    TokenIds,
    resolve,
)

Values = st.SearchStrategy[Any]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 1 << 31, 1 << 63, -(1 << 63) - 1, 1 << 70, 10**400]),
    st.floats(allow_nan=False),
    st.text(max_size=6),
)
json_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def right(kind: Kind, limits: Limits) -> Values:
    """Values that ``kind`` takes. Of long ranges only the ends: each may be a token to compute."""
    match kind:
        case Integer(low, high, aside):
            first, last = int(resolve(low, limits)), int(resolve(high, limits))
            ends = {first, min(first + 1, last), last} | ({aside} if aside is not None else set())
            return st.sampled_from(sorted(ends))
        case Number(low, high, above):
            return st.floats(low, high, exclude_min=above) | st.just(high)
        case Flag():
            return st.booleans()
        case Text() | RequestId() | Pattern():
            return st.sampled_from(["a", "b+", "zz"])
        case JsonText():
            return st.sampled_from(["{}", '{"type": "integer"}', ""])
        case TokenIds(_, least):
            return st.lists(st.integers(0, limits.vocabulary - 1), min_size=least, max_size=4)
        case IdsOrLists(ids, least):
            plain = right(ids, limits)
            return plain | st.lists(right(TokenIds(least=least), limits), max_size=3)
        case OneOrList(inner):
            return right(inner, limits) | st.lists(right(inner, limits), max_size=3)
        case Prompt():
            return st.sampled_from(["a", ["a", "b"], [5, 6], [[5], [6]]])
        case Embeddings():
            return st.just([[0.5] * (limits.hidden or 1)])
        case ByToken(inner):
            tokens = st.integers(0, limits.vocabulary - 1).map(str)
            return st.dictionaries(tokens, right(inner, limits), max_size=4)
        case Fields(fields) | Object(fields):
            return st.fixed_dictionaries(
                {}, optional={name: right(inner, limits) for name, inner in fields.items()}
            )
        case Internal():
            return st.sampled_from([[], False, 0])
        case Either(kinds):
            return st.one_of(*(right(inner, limits) for inner in kinds))
    raise AssertionError(f"no values for {kind}")


def wrong(kind: Kind, limits: Limits) -> Values:
    """Values that ``kind`` does not take: numbers beside its range, other types, mixtures."""
    match kind:
        case Integer(low, high):
            first, last = int(resolve(low, limits)), int(resolve(high, limits))
            beside = st.integers(max_value=first - 1) | st.integers(min_value=last + 1)
            return (beside | st.booleans() | st.just(1.5) | st.just("1")).filter(
                lambda value: value != kind.aside or type(value) is bool
            )
        case Number(low, high):
            return (
                st.floats(high, exclude_min=True)
                | st.floats(max_value=low, exclude_max=True, allow_infinity=False).map(
                    lambda value: value - 1
                )
                | st.booleans()
            )
        case Flag():
            return st.sampled_from([0, 1, "true"])
        case Text():
            short = [""] if kind.least else []
            return st.sampled_from([5, {}, "a" * (kind.characters + 1), *short])
        case RequestId():
            return st.sampled_from([5, {}, "", "a" * 257, "HEALTH_CHECK_1"])
        case Pattern():
            return st.sampled_from(["(", "[", "a{99999999999999999999}", "é" * 200, 5])
        case JsonText():
            return st.sampled_from(["{", "[" * 1000 + "]" * 1000, 5])
        case TokenIds():
            token = st.sampled_from([-1, limits.vocabulary, 1 << 70, 1.5, True, "1", None, [1]])
            return st.lists(token, min_size=1, max_size=3) | st.sampled_from([5, "a"])
        case IdsOrLists():
            return wrong(TokenIds(), limits).filter(lambda value: [1] not in _as_list(value))
        case OneOrList(inner):
            return wrong(inner, limits).filter(lambda value: not isinstance(value, list))
        case Prompt():
            bad: list[Any] = [5, [-1], [[-1]], [[]], [5, "a"], [[5], []], [limits.vocabulary]]
            return st.sampled_from(bad)
        case Embeddings():
            rows: list[Any] = [5, [[]] if limits.hidden else [5], [["a"]], [[1e300]]]
            return st.sampled_from(rows)
        case ByToken():
            return st.sampled_from(
                [[5], {"-1": 0}, {"x": 0}, {str(limits.vocabulary): 0}, {"1": 1e9}]
            )
        case Fields(fields):
            name = st.sampled_from(sorted(fields))
            return name.flatmap(
                lambda name: st.fixed_dictionaries({name: wrong(fields[name], limits)})
            )
        case Object():
            return st.sampled_from([5, "json", [], [{}]])
        case Internal():
            return st.sampled_from([1, "x", [1], True])
        case Either(kinds):
            if any(isinstance(inner, Flag) for inner in kinds):
                return st.sampled_from([-1, limits.vocabulary + 1, "x"])
            return st.sampled_from([[], {}, 1e30])
    raise AssertionError(f"no values for {kind}")


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


#: Bodies that a route answers, each with few tokens.
CHAT = {"model": "x", "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "x", "max_tokens": 2, "prompt": "a"},
    "/v1/messages": CHAT,
    "/v1/responses": {"model": "x", "max_output_tokens": 2, "input": "a"},
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 2}},
    "/encode": {"text": "a"},
    "/v1/embeddings": {"model": "x", "input": "a"},
    "/v1/classify": {"model": "x", "input": "a"},
    "/v1/score": {"model": "x", "query": "a", "items": ["b"], "label_token_ids": [5]},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/tokenize": {"model": "x", "prompt": "a"},
    "/detokenize": {"model": "x", "tokens": [5]},
    "/invocations": CHAT,
}


def requests(limits: Limits) -> Values:
    """A route and a body: right but for a few fields, which may have any value."""

    def value(kind: Kind) -> Values:
        return right(kind, limits) | wrong(kind, limits) | json_values

    def some(kinds: dict[str, Kind]) -> Values:
        names = st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=3, unique=True)
        return names.flatmap(
            lambda chosen: st.fixed_dictionaries({n: value(kinds[n]) for n in chosen})
        )

    def changed(route: str) -> Values:
        base = BODIES[route]
        bodies = some(FIELDS).map(lambda fields: base | fields)
        if "sampling_params" in base:
            inner = some(SAMPLING).map(lambda fields: base["sampling_params"] | fields)
            bodies |= inner.map(lambda sampling: base | {"sampling_params": sampling})
        return bodies | json_values

    return st.sampled_from(sorted(BODIES)).flatmap(
        lambda route: st.tuples(st.just(route), changed(route))
    )
