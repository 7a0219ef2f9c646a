"""Made-up /proc, /sys and /dev trees of hosts and containers."""

from __future__ import annotations

from pathlib import Path

GIB = 2**30


def write(root: Path, files: dict[str, str]) -> Path:
    """Write files below ``root``; returns it."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def host(root: Path, gib: int = 512, nodes: int = 2, **meminfo: int) -> Path:
    """A host with so much memory, spread evenly over NUMA nodes; further fields in GiB."""
    fields = {"MemTotal": gib, "MemFree": gib, "MemAvailable": gib, **meminfo}
    lines = "".join(f"{name}:  {value << 20} kB\n" for name, value in fields.items())
    files = {
        "proc/meminfo": lines + "HugePages_Total:       0\n",
        "proc/self/cgroup": "0::/\n",
        "proc/self/status": f"Name:\tpython\nMems_allowed_list:\t0-{nodes - 1}\n",
        "proc/sys/vm/overcommit_memory": "0\n",
        "sys/devices/system/cpu/online": "0-127\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        "dev/shm/.keep": "",
    }
    for node in range(nodes):
        each = (gib << 20) // nodes
        text = f"Node {node} MemTotal:       {each} kB\nNode {node} MemFree:        {each} kB\n"
        files[f"sys/devices/system/node/node{node}/meminfo"] = text
    return write(root, files)
