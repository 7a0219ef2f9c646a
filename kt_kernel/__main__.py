"""``python -m kt_kernel``: what would run on this machine."""

from __future__ import annotations

from kt_kernel.program import run_program

if __name__ == "__main__":  # before the imports below, which need the extension
    run_program("kt_kernel.__main__:main")

import importlib.metadata
import platform
import sys
from collections import defaultdict

from kt_kernel import DISTRIBUTION, _ext
from kt_kernel.engine import target_name
from kt_kernel.errors import UserError
from kt_kernel.host.cpus import Cpu, allowed_cpus, count_cores


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _nodes() -> str:
    nodes: dict[int, list[Cpu]] = defaultdict(list)
    for cpu in allowed_cpus():
        nodes[cpu.node].append(cpu)
    parts = []
    for node, cpus in sorted(nodes.items()):
        parts.append(f"node {node}: {count_cores(cpus)} cores, {len(cpus)} CPUs")
    return "; ".join(parts)


def main() -> int:
    """Print target, CPU features, NUMA nodes and versions; 2 when ``KT_TARGET`` is wrong."""
    try:
        target = target_name()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = {
        "target": target,
        "targets supported": " ".join(name for name, supported in _ext.targets() if supported),
        "CPU": _ext.cpu_brand(),
        "features": " ".join(name for name, present in _ext.cpu_features() if present),
        "NUMA (usable)": _nodes(),
        "kt_kernel": _version(DISTRIBUTION),
        "sglang": _version("sglang"),
        "torch": _version("torch"),
        "Python": platform.python_version(),
    }
    for name, value in rows.items():
        print(f"{name + ':':<20}{value}")
    return 0
