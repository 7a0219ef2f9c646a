"""Every route of every tested SGLang, and who may ask it."""

from __future__ import annotations

import re

import pytest

from kt_kernel.sglang_plugin.edge.routes import ROUTES, Role, methods_of
from tests.contract.published_wheels import PLUGIN_WHEELS, PublishedWheel
from tests.sglang_plugin.wheel_source import routes_of

#: What SGLang serves and this project does not, and why.
CLOSED = {
    "code that a client brings": """
        POST /update_weights_from_tensor, POST /load_lora_adapter_from_tensors
        POST /update_weights_from_ipc""",
    "other machines that a client names": """
        POST /init_weights_update_group, POST /destroy_weights_update_group
        POST /update_weights_from_distributed, POST /begin_weight_update, POST /end_weight_update
        POST /init_weights_send_group_for_remote_instance
        POST /send_weights_to_remote_instance, GET /get_remote_instance_transfer_engine_info
        GET /remote_instance_transfer_engine_info
        POST /scale_elastic_ep, GET /is_scaling_elastic_ep, POST /pd_role_switch""",
    "nothing that this server has": """
        POST /load_lora_adapter, POST /unload_lora_adapter, POST /add_external_corpus
        POST /remove_external_corpus, GET /list_external_corpora
        POST /v1/audio/transcriptions, WEBSOCKET /v1/realtime, POST /v1/decisions
        POST /v1/systemone, POST /dumper/{}""",
    "500 for an unknown name in a body, and another spelling of /generate": "POST /vertex_generate",
    "a GET that changes the server": """
        GET /flush_cache, GET /start_profile, GET /stop_profile, GET /set_trace_level
        GET /freeze_gc, GET /start_expert_distribution_record
        GET /stop_expert_distribution_record, GET /dump_expert_distribution_record
        GET /get_weights_by_name, GET /release_memory_occupation
        GET /resume_memory_occupation, GET /weights_checker, GET /slow_down, GET /open_session
        GET /close_session, GET /configure_logging, GET /clear_hicache_storage_backend
        POST /clear_hicache_storage_backend""",
}


def names(text: str) -> set[str]:
    return {name.strip() for name in re.split(r"[,\n]", text) if name.strip()}


def ours(route: str) -> str:
    """A route of SGLang as our table spells it."""
    return re.sub(r"\{\w+:path\}", "{...}", re.sub(r"\{\w+\}", "{}", route))


ALL_CLOSED = set().union(*map(names, CLOSED.values()))
SERVED = {f"{method} {path}" for path, roles in ROUTES.items() for method in roles}


@pytest.mark.parametrize("wheel", PLUGIN_WHEELS, ids=str)
def test_each_route_is_decided(wheel: PublishedWheel) -> None:
    """A route that a new SGLang adds is closed, and fails here until someone has looked at it."""
    found = {ours(route) for route in routes_of(wheel.fetch())}
    assert len(found) > 80
    assert found - SERVED - ALL_CLOSED == set()


def test_what_is_decided_exists() -> None:
    """Where SGLang renames a route, its line here goes."""
    found = {ours(route) for wheel in PLUGIN_WHEELS for route in routes_of(wheel.fetch())}
    # Those are mounted by another module, or answered here.
    ours_alone = {"GET /metrics", "HEAD /health", "HEAD /ready", "HEAD /ping"}
    assert found ^ SERVED ^ ALL_CLOSED == ours_alone
    assert not SERVED & ALL_CLOSED


@pytest.mark.parametrize(
    ("path", "roles"),
    [
        ("/generate", {"POST": Role.USER, "PUT": Role.USER}),
        ("/v1/models/a/b", {"GET": Role.USER}),
        ("/v1/responses/x/cancel", {"POST": Role.USER}),
        ("/v1/responses/x", {"GET": Role.USER}),
        ("/flush_cache", {"POST": Role.ADMIN}),
        ("/server_info", {"GET": Role.ADMIN}),
        ("/health", {"GET": Role.ANYONE, "HEAD": Role.ANYONE}),
    ],
)
def test_roles(path: str, roles: dict[str, Role]) -> None:
    assert methods_of(path) == roles


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/of/tomorrow",
        "/generate/",
        "/generatex",
        "//generate",
        "/healthx",
        "/health/../flush_cache",
        "/metrics/x",
        "/v1/responses/",
        "/v1/responses/x/y",
        "/v1/models/",
        "/docs",
        "/openapi.json",
    ],
)
def test_what_only_looks_like_a_route_is_closed(path: str) -> None:
    assert not methods_of(path)
