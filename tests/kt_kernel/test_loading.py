"""Reading layer files: what it costs in memory, and what it says about its progress."""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import os
import re
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kt_kernel import KTMoEWrapper, packed
from kt_kernel.errors import UserError
from kt_kernel.files.safetensors_header import read_header
from kt_kernel.layer_weights import ONE_FILE_VARIABLE
from kt_kernel.load_progress import LoadProgress
from tests.kt_kernel.layer_files import LAYOUTS, write_layer, write_random_layer


def test_progress_lines() -> None:
    progress = LoadProgress(58)
    line = progress.line(3, 5_900_000_000, 100.0, 102.1)
    assert line == "layer 3: 1 of 58, 5.9 GB in 2.1 s, 2.8 GB/s, ETA 120 s"
    # A second between the layers is part of the time to come.
    line = progress.line(4, 5_900_000_000, 103.1, 104.2)
    assert line == "layer 4: 2 of 58, 5.9 GB in 1.1 s, 5.4 GB/s, ETA 118 s"
    # A layer that is loaded again (a new expert map) is no progress.
    assert "layer 4: 2 of 58, " in progress.line(4, 1, 104.2, 104.3)
    for layer in range(5, 61):
        line = progress.line(layer, 5_800_000_000, 110.0, 112.0)
    assert line == "layer 60: 58 of 58, 5.8 GB in 2.0 s, 2.9 GB/s"
    assert LoadProgress(0).line(7, 10**9, 1.0, 2.0) == "layer 7: 1, 1.0 GB in 1.0 s, 1.0 GB/s"


def wrapper_of(
    folder: Path, layout: packed.PackedLayout, layer_idx: int = 0, **more: Any
) -> KTMoEWrapper:
    return KTMoEWrapper(
        layer_idx=layer_idx,
        num_experts=layout.num_experts,
        num_experts_per_tok=2,
        hidden_size=layout.hidden_size,
        moe_intermediate_size=layout.intermediate_size,
        cpuinfer_threads=2,
        weight_path=str(folder),
        method=f"AMX{layout.method.upper()}",
        **more,
    )


@pytest.mark.parametrize(
    ("manifest", "total"),
    [
        (json.dumps({"model": {"moe_layers": [3, 4, 5]}}), "1 of 3"),
        (None, "1,"),
        ("{", "1,"),
        ("[]", "1,"),
    ],
)
def test_progress_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, manifest: str | None, total: str
) -> None:
    write_layer(tmp_path, LAYOUTS["int4"], 3)
    if manifest is not None:
        (tmp_path / packed.MANIFEST_NAME).write_text(manifest)
    with caplog.at_level(logging.INFO, "kt_kernel"):
        wrapper_of(tmp_path, LAYOUTS["int4"], 3).load_weights(torch.arange(4))
    assert f"kt_kernel: layer 3: {total}" in caplog.text


def test_a_layer_takes_another_layers_file_only_where_the_variable_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else a layer's file under another's name would be served, and answers be wrong unseen."""
    file = write_layer(tmp_path, LAYOUTS["int4"], 3)
    (tmp_path / packed.layer_file_name(4)).hardlink_to(file)

    def load(layer: int) -> None:
        wrapper_of(tmp_path, LAYOUTS["int4"], layer).load_weights(torch.arange(4))

    with pytest.raises(UserError, match="has layer_idx 3, expected 4"):
        load(4)
    monkeypatch.setenv(ONE_FILE_VARIABLE, "3")
    with caplog.at_level(logging.INFO, "kt_kernel"):
        load(4)
    assert "4 experts on the CPU, weights of layer 3" in caplog.text
    monkeypatch.setenv(ONE_FILE_VARIABLE, "5")
    with pytest.raises(UserError, match="has layer_idx 3, expected 5"):
        load(3)
    monkeypatch.setenv(ONE_FILE_VARIABLE, "yes")
    with pytest.raises(UserError, match="'yes': expected the number of a decoder layer"):
        load(3)


def test_layers_share_no_file_that_was_converted_from_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layer(tmp_path, LAYOUTS["int4"], 3, {"source_fingerprint": "f" * 64})
    monkeypatch.setenv(ONE_FILE_VARIABLE, "3")
    with pytest.raises(UserError, match="was converted from a checkpoint, and _KT_ONE_LAYER_FILE"):
        wrapper_of(tmp_path, LAYOUTS["int4"], 3).load_weights(torch.arange(4))


def resident_bytes() -> int:
    """Anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    anonymous = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert anonymous is not None
    return int(anonymous[1]) * 1024


def cached_pages(path: Path) -> int:
    """Pages of a file in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        pages = (len(view) + 4095) // 4096
        resident = (ctypes.c_ubyte * pages)()
        address = ctypes.c_void_p(view.ctypes.data)
        assert libc.mincore(address, ctypes.c_size_t(len(view)), resident) == 0
        del view
        return sum(byte & 1 for byte in resident)


@pytest.fixture
def on_disk() -> Iterator[Path]:
    """A folder that is not in memory, as /tmp may be."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize("slices", [1, 2])
def test_weights_are_in_memory_once(on_disk: Path, slices: int) -> None:
    """What loading adds is the weights, in the process; the page cache keeps nothing of the file.
    Experts on the GPU take no memory."""
    layout = packed.PackedLayout(16, 1024, 1024, "int8")
    write_random_layer(on_disk, layout)
    path = on_disk / packed.layer_file_name(0)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)  # pages that are not on disk yet cannot be dropped
    os.close(descriptor)
    wrapper = wrapper_of(on_disk, layout, threadpool_count=slices, num_gpu_experts=8)
    assert cached_pages(path) > 0
    before = resident_bytes()
    wrapper.load_weights(torch.arange(16))
    added = resident_bytes() - before
    weights = path.stat().st_size // 2
    assert 0.98 * weights < added < 1.05 * weights + (8 << 20)  # huge pages at the edges
    assert cached_pages(path) == 0


def test_the_thread_that_loads_touches_no_weights(tmp_path: Path) -> None:
    """A page lies on the node of the thread that is first to write to it: a worker of its slice."""
    layout = packed.PackedLayout(4, 512, 512, "int8")  # 3 MB: too little for huge pages
    write_random_layer(tmp_path, layout)
    wrapper = wrapper_of(tmp_path, layout)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    wrapper.load_weights(torch.arange(4))
    touched = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
    assert touched < (tmp_path / packed.layer_file_name(0)).stat().st_size / 4096 / 4


def test_a_truncated_file_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that shrinks after its header was checked."""
    path = write_layer(tmp_path, LAYOUTS["int8"], 3)
    header = read_header(path)
    os.truncate(path, 100_000)
    monkeypatch.setattr("kt_kernel.layer_weights.read_header", lambda _: header)
    with pytest.raises(UserError, match=r"layer 3: .*layer-003\.safetensors ends before byte"):
        wrapper_of(tmp_path, LAYOUTS["int8"], 3).load_weights(torch.arange(4))


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    """Linux allows any bytes; the extension, which opens the file itself, takes them, too."""
    folder = tmp_path / os.fsdecode(b"w\xff")
    folder.mkdir()
    path = write_layer(folder, LAYOUTS["int8"], 3)
    wrapper = wrapper_of(folder, LAYOUTS["int8"], 3)
    wrapper.load_weights(torch.arange(4))
    assert wrapper.cpu_slots() == [0, 1, 2, 3]
    # What it says of the file is no text either: one Python raises that, another says nothing.
    with pytest.raises((UnicodeDecodeError, RuntimeError)):
        wrapper._weights.layer.load_file(os.fsencode(path), [[2**40] * 3] * 3, None, [0, 1, 2, 3])


@pytest.mark.parametrize("begin", [-64, 1 << 40, 2**63 - 64])
def test_a_place_outside_the_file_is_refused_before_anything_is_read(
    tmp_path: Path, begin: int
) -> None:
    """And what was loaded before stays: the extension takes no offset on trust."""
    layout = LAYOUTS["int8"]
    path = write_layer(tmp_path, layout, 3)
    wrapper = wrapper_of(tmp_path, layout, 3)
    wrapper.load_weights(torch.arange(4))
    tensors = read_header(path).tensors
    offsets = [[tensors[f"{p}.codes"].begin, 0, begin] for p in packed.PROJECTIONS]
    with pytest.raises(RuntimeError, match=r"layer-003\.safetensors ends before byte"):
        wrapper._weights.layer.load_file(str(path), offsets, None, [0, 1, 2, 3])
    x, ids, weights = torch.ones(1, 256), torch.tensor([[0, 1]]), torch.ones(1, 2)
    wrapper.submit_forward(x, ids, weights)
    assert wrapper.sync_forward(x, 0).abs().sum() > 0


@pytest.mark.parametrize(("bits", "value"), [(0x7F80, "inf"), (0xFFC1, "nan")])
def test_a_scale_that_is_no_number_is_told(tmp_path: Path, bits: int, value: str) -> None:
    """One makes every answer of its expert none, and sampling fail far from here."""
    layout = LAYOUTS["int4"]
    write_layer(tmp_path, layout, 3)
    path = tmp_path / packed.layer_file_name(3)
    entry = read_header(path).tensors["up.scales"]
    with path.open("r+b") as file:
        file.seek(entry.begin + 2 * (2 * entry.shape[1] + 5))
        file.write(bits.to_bytes(2, "little"))
    with pytest.raises(UserError) as raised:
        wrapper_of(tmp_path, layout, 3).load_weights(torch.arange(4))
    said = f"layer 3: {path}: expected finite scales, found {value} for row 5 of expert 2's up (1 "
    assert str(raised.value).startswith(said)
