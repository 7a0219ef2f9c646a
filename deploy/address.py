"""Where the server is, for its clients on this machine."""

from __future__ import annotations

from deploy.config import Config


def base_url(config: Config) -> str:
    """Address of the server as a client on this machine reaches it."""
    host = config.text("KT_HOST")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{config.integer('KT_PORT')}"
