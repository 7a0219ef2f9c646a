"""Every route that the server serves, and who may ask it: one table.

What is not here is closed, to everyone: a new version of SGLang opens nothing by itself.
``tests/sglang_plugin/edge/test_routes.py`` lists the routes of each tested version and the decision
for each. No GET in the table changes the server: a web page can have any visitor send one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from enum import IntEnum

NEAR = 0.75
"""How alike two paths are, from 0 to 1, of which one is told for the other: a guess."""


class Role(IntEnum):
    """Who may ask; each may also do what those before may."""

    ANYONE = 0  # computes nothing and tells no more than that the server is there
    USER = 1
    ADMIN = 2


# Some load balancers ask by HEAD.
_ANYONE = """
GET /, HEAD /, GET /health, HEAD /health, GET /ready, HEAD /ready, GET /ping, HEAD /ping
"""

_USER = """
POST /generate, PUT /generate, POST /encode, PUT /encode, POST /classify, PUT /classify
POST /v1/completions, POST /v1/chat/completions, POST /v1/responses, GET /v1/responses/{}
POST /v1/responses/{}/cancel, POST /v1/messages, POST /v1/messages/count_tokens
POST /v1/embeddings, POST /v1/classify, POST /v1/score, POST /v1/rerank, PUT /v1/rerank
POST /v1/tokenize, POST /tokenize, POST /v1/detokenize, POST /detokenize
GET /v1/models, GET /v1/models/{...}, GET /model_info, GET /get_model_info
POST /api/chat, POST /api/generate, GET /api/tags, POST /api/show
POST /invocations, POST /separate_reasoning, POST /parse_function_call
GET /health_generate, GET /metrics
"""

_ADMIN = """
GET /server_info, GET /get_server_info, GET /v1/loads, GET /get_load
GET /weight_version, GET /get_weight_version, POST /update_weight_version
POST /open_session, POST /close_session, POST /abort_request
POST /pause_generation, POST /continue_generation, POST /flush_cache, POST /freeze_gc
POST /start_profile, POST /stop_profile, POST /set_trace_level, POST /configure_logging
POST /start_expert_distribution_record, POST /stop_expert_distribution_record
POST /dump_expert_distribution_record
POST /release_memory_occupation, POST /resume_memory_occupation, POST /slow_down
POST /set_internal_state, PUT /set_internal_state, POST /update_weights_from_disk
POST /get_weights_by_name, POST /weights_checker
GET /hicache/storage-backend, PUT /hicache/storage-backend, DELETE /hicache/storage-backend
POST /hicache/storage-backend/clear, GET /get_hicache_l3_cache_layout
"""


class Table:
    """Who may ask which path by which method: the routes of a server, the rest is closed.

    Args:
        anyone, user, admin: for each role ``METHOD /path, ...``. ``{}`` is one part of a path,
            ``{...}`` the rest.
    """

    def __init__(self, anyone: str, user: str, admin: str) -> None:
        self.routes: dict[str, dict[str, Role]] = {}
        for role, text in ((Role.ANYONE, anyone), (Role.USER, user), (Role.ADMIN, admin)):
            for entry in text.replace("\n", ",").split(","):
                if entry.strip():
                    method, path = entry.split()
                    self.routes.setdefault(path, {})[method] = role
        self._patterns = [(_pattern(path), path) for path in self.routes if "{" in path]

    def methods_of(self, path: str) -> Mapping[str, Role]:
        """Who may ask a path by which method; empty for a path that is closed."""
        if "{" not in path and path in self.routes:
            return self.routes[path]
        found = (self.routes[route] for pattern, route in self._patterns if pattern.fullmatch(path))
        return next(found, {})

    def nearest(self, path: str, role: Role) -> str | None:
        """The route that whoever asked for ``path`` may have meant, of those that it may ask."""
        path = path.rstrip("/")[:200]
        known = [
            route
            for route, roles in self.routes.items()
            if "{" not in route and min(roles.values()) <= role
        ]
        # Without or with a part of the address too many; then a slip of the hand.
        ends = [route for route in known if path and (route.endswith(path) or path.endswith(route))]
        return max(ends, key=len, default=None) or next(
            iter(get_close_matches(path, known, 1, NEAR)), None
        )


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.escape(path).replace(r"\{\.\.\.\}", ".+").replace(r"\{\}", "[^/]+"))


SERVER = Table(_ANYONE, _USER, _ADMIN)
"""Of SGLang's server."""
ROUTES = SERVER.routes
methods_of = SERVER.methods_of
