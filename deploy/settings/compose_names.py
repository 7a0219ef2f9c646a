"""Names of compose's own variables, which stand in `.env` beside the settings; no stage reads them.

docs/operations.md tells what they mean.
"""

from __future__ import annotations

_NAMES = """
APT_CONF_FILE APT_MIRROR BASE_IMAGE CACHE CA_BUNDLE_FILE COMPOSE_PROJECT_NAME DEMO_IMAGE GPU_IDS
GRAFANA_IMAGE GRAFANA_PORT HEALTH_INTERVAL IMAGE IMAGE_TARGET IMAGE_VERSION MEMLOCK MODELS
MONITORING_RESTART PIP_CONF_FILE PROMETHEUS_IMAGE PROMETHEUS_PORT PROMETHEUS_RETENTION PULL_POLICY
REPLICAS RESTART REVISION ROUTER_BALANCE ROUTER_HEALTH_INTERVAL ROUTER_IMAGE ROUTER_LOG_LEVEL
ROUTER_POLICY RUN_AS SCRAPE_INTERVAL SETTINGS_FILE SHM_SIZE START_PERIOD STOP_GRACE_PERIOD WEIGHTS
WORKER_URLS
"""
COMPOSE = tuple(_NAMES.split())
#: Those that nearly every host needs, for `.env.example`: name, default, meaning.
FIRST = (
    (
        "MODELS",
        "models",
        "Where the model's 689 GB go: a directory of the host, or a named volume.",
    ),
    ("WEIGHTS", "weights", "Where the packed weights' 338 GB go, likewise."),
    (
        "RUN_AS",
        "10001:10001",
        "User and group in the containers; directories of the host must belong to them (id -u, "
        "id -g).",
    ),
    ("GPU_IDS", "0", "GPU of the containers, by number or UUID (nvidia-smi -L)."),
)
#: What replaced those of earlier versions.
RENAMED = {"GPU_COUNT": "GPU_IDS"}
