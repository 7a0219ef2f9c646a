"""What SGLang's router is started with. Its flags stand here, once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kt_kernel.errors import UserError

POLICIES = ("cache_aware", "round_robin", "random", "power_of_two")
LOG_LEVELS = ("error", "warn", "info", "debug")
GRACE_SECONDS = 110
"""For the requests under way after SIGTERM: less than Compose and Slurm wait."""


def router_options(environ: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of ``RouterArgs`` that do not depend on keys and ports.

    Raises:
        UserError: a variable is not what it can be.
    """
    return {
        # A conversation stays where its prefix is cached: to compute 4096 tokens again takes the
        # CPUs up to 40 s. The router's own threshold, 64 requests more than on the idlest server,
        # is more than a server takes at all (KT_MAX_RUNNING_REQUESTS): one would do all the work.
        "policy": _one_of(environ, "ROUTER_POLICY", POLICIES),
        "balance_abs_threshold": _number(environ, "ROUTER_BALANCE", 4),
        "health_check_interval_secs": _number(environ, "ROUTER_HEALTH_INTERVAL", 10),
        "health_check_timeout_secs": 10,
        # A request goes to one server. The router would send what ended one to the next, up to
        # five times.
        "disable_retries": True,
        # After so many failures in a row a server is left out at once, and tried again after 10 s.
        # With one, two requests that a server answers with 500 would leave out two servers that
        # are well.
        "cb_failure_threshold": 3,
        "cb_timeout_duration_secs": 10,
        # A server that has not answered by the end of the start-up time would never be asked
        # again, and one that downloads and converts first takes hours.
        "worker_startup_timeout_secs": 365 * 24 * 3600,
        # Of a whole answer: thousands of tokens may take hours.
        "request_timeout_secs": 24 * 3600,
        "shutdown_grace_period_secs": GRACE_SECONDS,
        "log_level": _one_of(environ, "ROUTER_LOG_LEVEL", LOG_LEVELS, "warn"),
    }


def server_urls(environ: Mapping[str, str]) -> list[str]:
    """Addresses of ``WORKER_URLS``, or of the ``REPLICAS`` servers of the compose project
    ``PROJECT``, which listen on ``KT_PORT``.

    Raises:
        UserError: one is no address.
    """
    urls = environ.get("WORKER_URLS", "").split()
    for url in urls:
        if not url.startswith(("http://", "https://")) or url.endswith("/"):
            raise UserError(f"WORKER_URLS: expected addresses like http://host:30000, found {url}")
    if not urls and environ.get("PROJECT"):
        # By the containers' names: an address may change when a container starts again.
        count, port = _number(environ, "REPLICAS", 2), _number(environ, "KT_PORT", 30000)
        urls = [f"http://{environ['PROJECT']}-serve-{i}:{port}" for i in range(1, count + 1)]
    return urls


def _one_of(
    environ: Mapping[str, str], name: str, words: tuple[str, ...], default: str | None = None
) -> str:
    value = environ.get(name) or default or words[0]
    if value not in words:
        raise UserError(f"{name}: expected {', '.join(words[:-1])} or {words[-1]}, found {value}")
    return value


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and int(text[:9]) > 0 and len(text) < 9):
        raise UserError(f"{name}: expected a number from 1, found {text}")
    return int(text)
