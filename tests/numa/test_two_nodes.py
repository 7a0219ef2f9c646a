"""A machine with two NUMA nodes, emulated: each slice's memory lies on its node, and the result is
that of one node.

Needs ``qemu-system-x86_64`` and a Linux kernel: the file that ``KT_GUEST_KERNEL`` names, or the
one that ``get_kernel.sh`` fetches.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kt_kernel import packed
from kt_kernel.files.safetensors_header import read_header
from kt_kernel.host.cpus import Cpu, allowed_cpus, choose_cpus
from tests import native_program
from tests.kt_kernel.layer_files import write_random_layer

ROOT = Path(__file__).parents[2]
QEMU = shutil.which("qemu-system-x86_64")
KERNEL = os.environ.get("KT_GUEST_KERNEL") or max(
    map(str, ROOT.glob(".cache/guest/boot/vmlinuz-*")), default=None
)

pytestmark = [
    pytest.mark.numa,
    pytest.mark.skipif(QEMU is None, reason="needs qemu-system-x86_64 (qemu-system-x86)"),
    pytest.mark.skipif(KERNEL is None, reason="needs a Linux kernel (make numa-test)"),
]

# Eleven units of 64: slices of five and six, large enough for huge pages.
LAYOUT = packed.PackedLayout(16, 512, 704, "int8")
TOP_K = 4
TIMEOUT = 300
GUEST_CPUS = [Cpu(cpu, node=cpu // 2, core_rank=0) for cpu in range(4)]

# loglevel 0: on a busy host the kernel complains of stalls, amid the program's lines.
# numa_balancing: the kernel hides pages now and then to see who uses them; such a page seems to
# have no memory.
KERNEL_OPTIONS = "console=ttyS0 panic=-1 loglevel=0 numa_balancing=disable"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """guest.cpp with the whole of csrc but the bindings, in one static program."""
    main = Path(__file__).with_name("guest.cpp")
    return native_program.build(main, tmp_path_factory.mktemp("guest"), ["-O2"], ["-static"])


def archive(files: dict[str, Path]) -> bytes:
    """A cpio archive ("newc") of regular files, as the kernel unpacks for its first program."""
    data = b""
    for name, path in [*files.items(), ("TRAILER!!!", None)]:
        content = path.read_bytes() if path else b""
        fields = [0, 0o100755, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0]
        data += b"070701" + b"".join(b"%08x" % field for field in fields)
        data += name.encode() + b"\0"
        data += b"\0" * (-len(data) % 4) + content
        data += b"\0" * (-len(data) % 4)
    return data


def arguments(file: Path, cpus: list[Cpu]) -> list[str]:
    """The program's, for two slices with the first four of these CPUs."""
    tensors = read_header(file).tensors
    names = [
        f"{projection}.{part}"
        for projection in packed.PROJECTIONS
        for part in ("codes", "table_index", "scales")
    ]
    sizes = (LAYOUT.num_experts, TOP_K, LAYOUT.hidden_size, LAYOUT.intermediate_size)
    offsets = [tensors[name].begin if name in tensors else 0 for name in ["tables", *names]]
    groups = [",".join(map(str, group)) for group in choose_cpus(cpus, 4, 2)]
    return [*map(str, sizes), LAYOUT.method, *map(str, offsets), *groups]


def start_guest(program: Path, layer: Path, folder: Path) -> str:
    """What the program prints on a machine of two nodes with two CPUs each."""
    assert QEMU is not None
    assert KERNEL is not None
    image = folder / "initramfs"
    image.write_bytes(archive({"init": program, "layer": layer}))
    command = [
        *(QEMU, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "4", "-m", "1G"),
        *("-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"),
        *("-kernel", KERNEL, "-initrd", str(image)),
        *("-append", " ".join([KERNEL_OPTIONS, "-- /layer", *arguments(layer, GUEST_CPUS)])),
    ]
    for node in range(2):
        command += ["-object", f"memory-backend-ram,id=m{node},size=512M"]
        command += ["-numa", f"node,nodeid={node},cpus={2 * node}-{2 * node + 1},memdev=m{node}"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL
    )
    assert "done" in result.stdout, result.stdout + result.stderr
    return result.stdout


def found(pattern: str, text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, match)) for match in re.findall(pattern, text)]


@pytest.mark.timeout(2 * TIMEOUT)
def test_slices_lie_on_their_nodes(program: Path, tmp_path: Path) -> None:
    write_random_layer(tmp_path, LAYOUT)
    layer = tmp_path / packed.layer_file_name(0)
    guest = start_guest(program, layer, tmp_path)
    print(guest)
    here = subprocess.run(
        [str(program), str(layer), *arguments(layer, allowed_cpus())],
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    assert found(r"group (\d): (\d) workers", guest) == [(0, 2), (1, 2)]
    # Every page on the slice's node, none on the other and none without memory.
    slice_bytes = [
        LAYOUT.num_experts * 3 * 512 * width for width in (5 * 64, 6 * 64)
    ]  # and the scales, less than a page of each expert
    placed = found(r"slice (\d): node (-?\d+): (\d+) pages", guest)
    assert [(index, node) for index, node, _ in placed] == [(0, 0), (1, 1)]
    for (_, _, pages), weights in zip(placed, slice_bytes, strict=True):
        assert weights / 4096 < pages < 1.02 * weights / 4096

    outputs = re.findall(r"output of \d+: [0-9a-f]{16}", guest)
    assert len(set(outputs)) == 3
    assert outputs == re.findall(r"output of \d+: [0-9a-f]{16}", here)
