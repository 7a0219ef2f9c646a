"""Settings of the launch command that are the tutorial's, in its order: part of the table."""

from __future__ import annotations

from deploy.checks.registry import CHECKS
from deploy.settings.row import (
    AUTO,
    SERVE,
    SHARED,
    Flag,
    Setting,
    served,
)
from deploy.settings.sglang_names import ATTENTION_BACKENDS
from deploy.settings.tutorial import CHUNK, EXPERTS, REQUESTS, TOKENS
from deploy.settings.value_types import (
    BOOLEAN,
    HOST,
    PORT,
    Choice,
    FilePath,
    Integer,
    Names,
    Number,
    Text,
)
from kt_kernel.host.cpus import CPU_LIMIT
from kt_kernel.packed import KT_METHODS

#: What SGLang and its kernels hold in 32 bits.
MOST = 2**31 - 1

# Rows are denser than the formatter would have them, so that the table can be read as one.
# fmt: off
LAUNCH: tuple[Setting, ...] = (
    Setting(
        "KT_HOST", HOST, "127.0.0.1",
        "Address that the server listens on; `smoke` and `health` talk to it. `status` listens on "
        "it, too. One that other hosts reach, as 0.0.0.0, needs `KT_API_KEY`.",
        SERVE, ("serve", "check", "smoke", "health", "status"), served("--host"),
        tutorial="0.0.0.0",
    ),
    Setting(
        "KT_PORT", PORT, "30000",
        "Port that the server listens on; `smoke`, `health` and `status` talk to it.",
        SERVE, ("serve", "check", "smoke", "health", "status"), served("--port"), tutorial="30000",
    ),
    Setting(
        "KT_MODEL_PATH", FilePath(), "/models/deepseek-v3.2",
        "Directory of the checkpoint: `download` fills it, `convert` and `serve` read it.",
        SHARED, ("download", "convert", "serve", "check", "bundle", "unbundle"),
        (Flag("serve", "--model", ("--model-path",)), Flag("convert", "--input-path", (), 1)),
        tutorial="/path/to/deepseek-v3.2",
    ),
    Setting(
        "KT_WEIGHT_PATH", FilePath(), "/weights/deepseek-v3.2-INT4",
        "Directory of the experts' packed weights: `convert` fills it, `serve` reads it.",
        SHARED, ("convert", "serve", "check", "bundle", "unbundle"),
        (Flag("serve", "--kt-weight-path"), Flag("convert", "--output", (), 3)),
        tutorial="/path/to/deepseek-v3.2-INT4",
    ),
    Setting(
        "KT_CPUINFER", Integer(1, CPU_LIMIT), AUTO,
        "CPU threads for the experts and for the conversion. `auto` is the number of physical "
        "cores this process may use; `serve` leaves a CPU to SGLang's scheduler of each GPU and "
        "one to the thread that starts CUDA graphs' calls. There more threads than CPUs are an "
        "error, because every layer waits for its slowest thread.",
        SHARED, ("convert", "serve", "check"),
        (Flag("serve", "--kt-cpuinfer"), Flag("convert", "--cpuinfer-threads", (), 5)),
        tutorial="60", auto=True,
    ),
    Setting(
        "KT_THREADPOOL_COUNT", Integer(1, 1024), AUTO,
        "Thread pools, one per NUMA node. `auto` is the number of NUMA nodes whose cores this "
        "process may use.",
        SHARED, ("convert", "serve", "check"),
        (Flag("serve", "--kt-threadpool-count"), Flag("convert", "--threadpool-count", (), 6)),
        tutorial="2", auto=True,
    ),
    Setting(
        "KT_NUM_GPU_EXPERTS", Integer(0, MOST), AUTO,
        "Routed experts of each layer that stay on the GPU. `auto` is what fits besides the KV "
        "cache (docs/gpu-memory.md), the tutorial's 1 without a GPU.",
        SERVE, ("serve", "check"), served("--kt-num-gpu-experts"), str(EXPERTS), auto=True,
    ),
    Setting(
        "KT_ATTENTION_BACKEND", Choice(ATTENTION_BACKENDS), AUTO,
        "Attention kernels. `auto` goes with `KT_DENSE_ATTENTION`: `triton` for dense attention, "
        "`dsa` for sparse. `none` leaves the choice to SGLang.",
        SERVE, ("serve", "check"), served("--attention-backend"), tutorial="triton",
        auto=True, none=True,
    ),
    Setting(
        "KT_TRUST_REMOTE_CODE", BOOLEAN, "0",
        "Run Python code that the checkpoint brings, with all rights of the server; `download` "
        "leaves such files out otherwise. V3.2 needs none.",
        SERVE, ("download", "serve", "check"), served("--trust-remote-code"), tutorial="1",
    ),
    Setting(
        "KT_MEM_FRACTION_STATIC", Number(above=0, maximum=1), "0.98",
        "Share of the GPU's memory for weights and KV cache. `none` leaves it to SGLang.",
        SERVE, ("serve", "check"), served("--mem-fraction-static"), tutorial="0.98", none=True,
    ),
    Setting(
        "KT_CHUNKED_PREFILL_SIZE", Integer(1, MOST), AUTO,
        f"Tokens of a prompt that are computed at a time. `auto` is the tutorial's {CHUNK}, or 2048"
        f" on a card that cannot also hold its {TOKENS} tokens.",
        SERVE, ("serve", "check"), served("--chunked-prefill-size"), str(CHUNK), auto=True,
    ),
    Setting(
        "KT_MAX_RUNNING_REQUESTS", Integer(1, MOST), AUTO,
        f"Requests that are computed at the same time. `auto` is the tutorial's {REQUESTS}, or 8 on"
        f" a card that cannot also hold its {TOKENS} tokens. `none` leaves it to SGLang.",
        SERVE, ("serve", "check"), served("--max-running-requests"), str(REQUESTS),
        auto=True, none=True,
    ),
    Setting(
        "KT_MAX_TOTAL_TOKENS", Integer(256, MOST), AUTO,
        "Tokens that the KV cache holds for all requests together. `auto` is what fits, up to one "
        f"context of full length (docs/gpu-memory.md), the tutorial's {TOKENS} without a GPU. "
        "`none` leaves it to SGLang.",
        SERVE, ("serve", "check"), served("--max-total-tokens"), str(TOKENS), auto=True, none=True,
    ),
    Setting(
        "KT_SERVED_MODEL_NAME", Text("a name without spaces", r"\S+"), "DeepSeek-V3.2",
        "Name of the model in the API.",
        SERVE, ("serve", "smoke"), served("--served-model-name"), tutorial="DeepSeek-V3.2",
    ),
    Setting(
        "KT_ENABLE_MIXED_CHUNK", BOOLEAN, "1",
        "Compute prefill and decode in the same batch.",
        SERVE, ("serve",), served("--enable-mixed-chunk"), tutorial="1",
    ),
    Setting(
        "KT_TENSOR_PARALLEL_SIZE", Integer(1, 1024), "1", "GPUs that share the model.",
        SERVE, ("serve", "check"), served("--tensor-parallel-size", "--tp-size"), tutorial="1",
    ),
    Setting(
        "KT_ENABLE_P2P_CHECK", BOOLEAN, "1",
        "Check that GPUs can reach each other's memory instead of assuming it.",
        SERVE, ("serve",), served("--enable-p2p-check"), tutorial="1",
    ),
    Setting(
        "KT_DISABLE_SHARED_EXPERTS_FUSION", BOOLEAN, "1",
        "Keep the shared expert apart from the routed ones, as CPU experts need it.",
        SERVE, ("serve",), served("--disable-shared-experts-fusion"), tutorial="1",
    ),
    Setting(
        "KT_METHOD", Choice(tuple(KT_METHODS)), "AMXINT4",
        "Kernel method; must fit the weights, which `KT_QUANT_METHOD` decides. The names are "
        "SGLang's: they run on every instruction set of the kernel, not on AMX only.",
        SERVE, ("serve", "check"), served("--kt-method"), tutorial="AMXINT4",
    ),
    Setting(
        "KT_IGNORE_CHECKS", Names(tuple(check.name for check in CHECKS)), "",
        "Checks whose FAIL becomes a warning, so that `serve` starts all the same.",
        SHARED, ("serve", "check"),
    ),
    Setting(
        "KT_RUN_DIR", FilePath(), AUTO,
        "Directory of the state files that `health` and `status` read, one for each stage; each "
        "deployment on a host needs its own. `auto` is `kt-kernel` in `XDG_RUNTIME_DIR`, or "
        "`/tmp/kt-kernel-UID`. `{host}` stands for this host's name, or the container's: servers "
        "that share a directory have `servers/{host}` below it each.",
        SHARED, ("download", "convert", "serve", "check", "health", "status"), auto=True,
    ),
)
# fmt: on
