"""A plugin of pytest that writes down which test began, and how it ended, as it happens: a process
that hangs or dies leaves no other report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Recorder(config.getoption("record")))


class _Recorder:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)

    def _write(self, event: str, test: str) -> None:
        self._file.write(json.dumps([event, test]) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write("began", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._write("failed", report.nodeid)
        elif report.when == "call" and report.passed:
            self._write("passed", report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write("failed", report.nodeid)
