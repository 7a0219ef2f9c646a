"""Upstream's kt-kernel, through its extension module, with no wrapper's copies in the timing.

Its package is called ``kt_kernel``, as ours is; so the extension is loaded from its file, and
neither package is imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from protocol import (
    HIDDEN,
    INTERMEDIATE,
    PROJECTIONS,
    TOP_K,
    Bf16,
    Call,
    Floats,
    Job,
    Unavailable,
    from_bf16,
    serve,
    to_bf16,
)

_INT4_GROUP, _FP8_BLOCK = 32, 128


class Upstream:
    def __init__(self, job: Job) -> None:
        if "avx2" not in Path("/proc/cpuinfo").read_text():
            raise Unavailable("the wheel needs AVX2")
        extension, self._build = _load_extension(Path(job.baseline))
        classes, fill, self._bits = _METHODS[job.method]
        found = [name for name in classes if hasattr(extension.moe, name)]
        if not found:
            raise Unavailable(
                f"{job.method} is not in the wheel's {self._build} build, the one for this CPU"
            )
        self._class = found[0]
        self._keep: list[Any] = []
        pool = extension.WorkerPoolConfig()
        pool.subpool_count = 1
        pool.subpool_numa_map = [0]
        pool.subpool_thread_count = [job.threads]
        self._cpu = extension.CPUInfer(pool)
        on_gpu = np.zeros(job.experts, np.uint8)
        config = extension.moe.MOEConfig(
            job.experts, TOP_K, HIDDEN, INTERMEDIATE, on_gpu.ctypes.data
        )
        config.layer_idx = 0
        config.pool = self._cpu.backend_
        config.max_len = max(job.max_tokens, 1024)
        self._keep += [on_gpu, *fill(config, job)]
        self._moe = getattr(extension.moe, self._class)(config)
        experts = np.arange(job.experts)
        self._cpu.submit(self._moe.load_weights_task(experts.ctypes.data))
        self._cpu.sync()
        if job.method.startswith("AMX"):
            self._keep = [on_gpu]  # it has quantised into memory of its own

    def describe(self) -> dict[str, Any]:
        return {"runs_on": f"{self._build} build, {self._class}", "bits": self._bits}

    def bind(self, x: Bf16, ids: NDArray[np.int64], weights: Floats) -> Call:
        output = np.empty_like(x)
        tokens = np.array([len(x)], np.int32)
        ids, weights = np.ascontiguousarray(ids), np.ascontiguousarray(weights)
        x = np.ascontiguousarray(x)

        def run() -> None:
            addresses = [a.ctypes.data for a in (ids, weights, x, output)]
            self._cpu.submit(self._moe.forward_task(tokens.ctypes.data, TOP_K, *addresses, False))
            self._cpu.sync()

        return Call(run=run, result=lambda: from_bf16(output))


def _load_extension(folder: Path) -> tuple[Any, str]:
    """The extension module for this CPU and its build's name, as the package itself chooses."""
    detect = folder / "kt_kernel" / "_cpu_detect.py"
    spec = importlib.util.spec_from_file_location("_cpu_detect", detect)
    if spec is None or spec.loader is None or not detect.is_file():
        raise Unavailable(f"{detect} is missing: prepare the baselines again")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        extension, build = module.initialize()
    except ImportError as error:
        raise Unavailable(f"its extension does not load: {error}") from None
    return extension, build


def _tiled(parts: list[NDArray[Any]], experts: int) -> NDArray[Any]:
    """[experts, ...] with a copy of its own for each expert."""
    return np.stack([parts[e % len(parts)] for e in range(experts)])


def _fill_bf16(config: Any, job: Job) -> list[NDArray[Any]]:
    """Quantised by kt-kernel when it loads, as its converter does."""
    held = []
    for projection in PROJECTIONS:
        weights = _tiled(list(job.source(projection)), job.experts)
        setattr(config, f"{projection}_proj", weights.ctypes.data)
        held.append(weights)
    return held


def _fill_quantised(
    config: Any, job: Job, bits: int, group_size: int, quantise: Any
) -> list[NDArray[Any]]:
    config.quant_config.bits = bits
    config.quant_config.group_size = group_size
    config.quant_config.zero_point = False
    held = []
    for projection in PROJECTIONS:
        parts = [quantise(job.source_floats(projection, i)) for i in range(job.num_sources)]
        codes = _tiled([p[0] for p in parts], job.experts)
        scales = _tiled([p[1] for p in parts], job.experts)
        setattr(config, f"{projection}_projs", [[c.ctypes.data for c in codes]])
        setattr(config, f"{projection}_scales", [[s.ctypes.data for s in scales]])
        held += [codes, scales]
    return held


def _fill_int4(config: Any, job: Job) -> list[NDArray[Any]]:
    return _fill_quantised(config, job, 4, _INT4_GROUP, _quantise_int4)


def _quantise_int4(weights: Floats) -> tuple[NDArray[Any], NDArray[Any]]:
    """Round to nearest in groups of 32 along K: two codes + 8 to a byte, bf16 scales."""
    n, k = weights.shape
    groups = weights.reshape(n, k // _INT4_GROUP, _INT4_GROUP)
    scales = (np.abs(groups).max(axis=2) / 7).astype(np.float32)
    bits = to_bf16(scales)
    codes = np.clip(np.rint(groups / from_bf16(bits)[..., None]), -8, 7).astype(np.int8) + 8
    codes = codes.astype(np.uint8).reshape(n, k)
    return codes[:, ::2] | codes[:, 1::2] << 4, bits


def _fill_fp8(config: Any, job: Job) -> list[NDArray[Any]]:
    return _fill_quantised(config, job, 8, _FP8_BLOCK, _quantise_fp8)


def _quantise_fp8(weights: Floats) -> tuple[NDArray[Any], NDArray[Any]]:
    """e4m3 in 128 x 128 blocks with power-of-two scales: how V3.2's checkpoint stores them."""
    import torch

    n, k = weights.shape
    blocks = torch.from_numpy(weights).reshape(n // 128, 128, k // 128, 128)
    scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax((1, 3), keepdim=True) / 448)))
    codes = (blocks / scale).to(torch.float8_e4m3fn).view(torch.uint8).reshape(n, k)
    return codes.contiguous().numpy(), scale.reshape(n // 128, k // 128).contiguous().numpy()


_ROW_SCALES = 32 * (2 / HIDDEN + 1 / INTERMEDIATE) / 3  # bits of fp32 scales, one for each row

# method -> its classes, the first that the build has is used; how to fill in the weights; bits
_METHODS = {
    "AMXINT4": (("AMXInt4_MOE",), _fill_bf16, 4 + _ROW_SCALES),
    "AMXINT8": (("AMXInt8_MOE",), _fill_bf16, 8 + _ROW_SCALES),
    "RAWINT4": (("AMXInt4_KGroup_MOE", "AVX2RawInt4_MOE"), _fill_int4, 4 + 16 / _INT4_GROUP),
    "FP8": (("AMXFP8_MOE", "AVX2FP8_MOE"), _fill_fp8, 8 + 32 / _FP8_BLOCK**2),
}


if __name__ == "__main__":
    serve(Upstream)
