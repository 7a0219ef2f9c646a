"""PyTorch's store of a server listens where only this host reaches it."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own: the group of processes is the process's.
PROGRAM = """
import sys
from pathlib import Path
import torch.distributed as dist
from kt_kernel.host.addresses import free_port
from kt_kernel.sglang_plugin.rendezvous import listen_on_one_address

for _ in range(2):
    address, port = sys.argv[1], free_port()
    method = f"tcp://{address}:{port}"
    if sys.argv[2] == "hooked":
        listen_on_one_address(1, 0, method)
    dist.init_process_group("gloo", init_method=method, world_size=1, rank=0)
    dist.barrier()
    LISTENS = "0A"
    for file in ("tcp", "tcp6"):
        for line in Path("/proc/self/net", file).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if local.endswith(f":{port:04X}") and state == LISTENS:
                print(local.partition(":")[0])
    dist.destroy_process_group()
"""


def listeners(address: str, how: str = "hooked") -> list[str]:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, address, how],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize(
    ("told", "listens"),
    [
        ("127.0.0.1", "0100007F"),
        ("127.0.0.2", "0200007F"),
        # A server on all addresses tells its own.
        ("0.0.0.0", "0100007F"),
    ],
)
def test_the_store_listens_on_one_address(told: str, listens: str) -> None:
    """Whoever reached it could read and set the server's keys, and fill its memory."""
    assert listeners(told) == [listens] * 2


def test_without_the_hook_it_listens_on_all() -> None:
    """Else the test above shows nothing."""
    found = listeners("127.0.0.1", "plain")
    assert len(found) == 2
    assert set("".join(found)) == {"0"}
