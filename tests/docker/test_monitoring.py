"""The dashboard's queries against a real server's metrics, scraped by a real Prometheus."""

from __future__ import annotations

import json
import re
import time

import httpx
import pytest

from tests.docker.engine import REPOSITORY
from tests.docker.images import BASE_IMAGE
from tests.docker.project import Project

DASHBOARD = REPOSITORY / "compose/grafana/dashboards/serving.json"
IMAGE = "tests/prometheus:local"
PORT = 19090
QUERIES = [
    target["expr"]
    for panel in json.loads(DASHBOARD.read_text())["panels"]
    for target in panel["targets"]
]


@pytest.fixture(scope="module")
def prometheus(stack: Project, measured: list[str]) -> str:
    """URL of a Prometheus that has scraped the server a few times, with requests in between."""
    stack.engine.docker(
        *("build", "-q", "-t", IMAGE, "--build-arg", f"BASE_IMAGE={BASE_IMAGE}"),
        *("-f", "tests/docker/prometheus.Dockerfile", "tests/docker"),
    )
    monitored = stack.with_files(
        "compose/monitoring.yml",
        PROMETHEUS_IMAGE=IMAGE,
        PROMETHEUS_PORT=str(PORT),
        SCRAPE_INTERVAL="2s",
    )
    monitored.up("--no-deps", "prometheus")
    url = f"http://127.0.0.1:{PORT}"
    deadline = time.monotonic() + 60
    scraped = 0.0
    while scraped < 4:
        assert time.monotonic() < deadline, monitored.tail("prometheus")
        with stack.api() as api:
            api.post(
                "/v1/chat/completions",
                json={
                    "model": "DeepSeek-V3.2",
                    "max_tokens": 4,
                    "messages": [{"role": "user", "content": "hi"}],
                },
            ).raise_for_status()
        time.sleep(1)
        found = ask(url, 'count_over_time(up{job="sglang"}[5m])')
        scraped = float(found[0]["value"][1]) if found else 0
    return url


def ask(url: str, query: str) -> list[dict[str, list[str]]]:
    """Result of an instant query; an empty list while Prometheus is starting."""
    try:
        answer = httpx.get(f"{url}/api/v1/query", params={"query": query}, trust_env=False)
    except httpx.TransportError:
        return []
    if answer.status_code == 503:
        return []
    assert answer.status_code == 200, f"{query}: {answer.text}"
    result: list[dict[str, list[str]]] = answer.json()["data"]["result"]
    return result


def test_prometheus_scrapes_the_server(prometheus: str) -> None:
    assert ask(prometheus, 'up{job="sglang"}')[0]["value"][1] == "1"
    assert float(ask(prometheus, "sglang:generation_tokens_total")[0]["value"][1]) > 0


def test_every_metric_of_the_dashboard_is_exported(stack: Project) -> None:
    with stack.api() as api:
        exported = set(re.findall(r"^((?:sglang:|kt_)\w+)", api.get("/metrics").text, re.M))
    named = {name for query in QUERIES for name in re.findall(r"(?:sglang:|kt_)\w+", query)}
    assert len(named) > 10
    assert named <= exported


@pytest.mark.parametrize("query", QUERIES)
def test_a_panel_has_data(prometheus: str, query: str) -> None:
    assert ask(prometheus, query), "No data"
