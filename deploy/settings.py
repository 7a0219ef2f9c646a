"""The one table of settings.

A setting is declared here and nowhere else: its environment variable, type, default, help, the
value in the tutorial, and the flag it becomes in the command of a stage. The command lines,
``--help``, ``docs/configuration.md``, ``.env.example`` and ``env/tutorial.env`` follow from it.

The rows that belong to the launch command stand in the tutorial's order, because the command is
printed in the table's order; the flags that this project adds come last.
"""

from __future__ import annotations

import fnmatch

from deploy.setting import (
    ADDED,
    AUTO,
    CONVERT,
    DOWNLOAD,
    FOREIGN,
    KERNEL,
    NONE,
    SERVE,
    SHARED,
    SMOKE,
    STATUS,
    Flag,
    Setting,
)
from deploy.value_types import (
    PORT,
    REPOSITORY,
    TOKEN,
    URL,
    Boolean,
    Choice,
    FilePath,
    Integer,
    JsonObject,
    Names,
    Number,
    ShellWords,
    Text,
)

#: SGLang's names for its parts, as far as they make sense for models of the DeepSeek V3 family on
#: NVIDIA GPUs; with ``none``, KT_EXTRA_ARGS can give any other. A test looks them up in SGLang.
ATTENTION_BACKENDS = (
    "triton",
    "flashinfer",
    "flashmla",
    "cutedsl_mla",
    "trtllm_mla",
    "fa3",
    "fa4",
    "dsa",
    "torch_native",
)
#: Backends that can do V3.2's sparse attention.
SPARSE_BACKENDS = ("dsa",)
TOOL_CALL_PARSERS = ("deepseekv3", "deepseekv31", "deepseekv32", "kimi_k2")
REASONING_PARSERS = ("deepseek-r1", "deepseek-v3", "kimi_k2")
#: What `check` looks at, in the report's order; a test compares with the checks themselves.
CHECK_NAMES = (
    "sglang",
    "kernel",
    "instruction-set",
    "amx",
    "gpu",
    "compute-capability",
    "driver",
    "vram",
    "threads",
    "thread-pools",
    "cpu-limits",
    "memory",
    "numa-memory",
    "memory-policy",
    "overcommit",
    "memlock",
    "huge-pages",
    "shm",
    "disk",
    "run-dir",
    "home",
    "model",
    "weights",
    "port",
)


def _serve(name: str, *aliases: str, inverted: bool = False) -> tuple[Flag, ...]:
    return (Flag("serve", name, aliases, inverted=inverted),)


_BOOL = Boolean()

# Rows are denser than the formatter would have them, so that the table can be read as one.
# fmt: off
TABLE: tuple[Setting, ...] = (
    # --- what is downloaded ---------------------------------------------------------------------
    Setting(
        "KT_MODEL_ID", REPOSITORY, "deepseek-ai/DeepSeek-V3.2",
        "Repository on the Hub. `deepseek-ai/DeepSeek-V3.2-Speciale` is the other model of the "
        "tutorial (see `env/speciale.env`).",
        SHARED, ("download", "serve", "check"), tutorial="deepseek-ai/DeepSeek-V3.2",
    ),
    Setting(
        "KT_MODEL_REVISION", Text("a branch, tag or commit", r"\S+"), "main",
        "Revision to download. A branch or tag is resolved to a commit first; a full commit hash "
        "also works with no network once it is downloaded.",
        DOWNLOAD, ("download",),
    ),
    Setting(
        "KT_DOWNLOAD_WORKERS", Integer(1, 64), "8",
        "Files that are downloaded at the same time.",
        DOWNLOAD, ("download",),
    ),
    Setting(
        "KT_DOWNLOAD_RETRIES", Integer(0), "5",
        "Times to ask the Hub again when a request fails in a way that may pass: HTTP 429 and 5xx, "
        "a lost connection, no answer, half an answer. Counted for each request and file, and from "
        "the start again when more of the file has arrived.",
        DOWNLOAD, ("download",),
    ),
    Setting(
        "KT_VERIFY_DOWNLOAD", Choice(("sha256", "size")), "sha256",
        "What is checked of each file after the download: its digest, which reads everything once "
        "more, or its size only, except for files that an earlier run began.",
        DOWNLOAD, ("download",),
    ),
    Setting(
        "KT_PROGRESS_INTERVAL", Number(above=0), "30",
        "Seconds between progress lines when there is no terminal.",
        DOWNLOAD, ("download",),
    ),
    # --- the launch command, in the tutorial's order --------------------------------------------
    Setting(
        "KT_HOST", Text("a host name or address", r"[\w.:%-]+"), "0.0.0.0",
        "Address that the server listens on; `smoke` and `health` talk to it. `status` listens on "
        "it, too.",
        SERVE, ("serve", "check", "smoke", "health", "status"), _serve("--host"),
        tutorial="0.0.0.0",
    ),
    Setting(
        "KT_PORT", PORT, "30000",
        "Port that the server listens on; `smoke`, `health` and `status` talk to it.",
        SERVE, ("serve", "check", "smoke", "health", "status"), _serve("--port"), tutorial="30000",
    ),
    Setting(
        "KT_MODEL_PATH", FilePath(), "/models/deepseek-v3.2",
        "Directory of the checkpoint: `download` fills it, `convert` and `serve` read it.",
        SHARED, ("download", "convert", "serve", "check"),
        (Flag("serve", "--model", ("--model-path",)), Flag("convert", "--input-path", (), 1)),
        tutorial="/path/to/deepseek-v3.2",
    ),
    Setting(
        "KT_WEIGHT_PATH", FilePath(), "/weights/deepseek-v3.2-INT4",
        "Directory of the experts' packed weights: `convert` fills it, `serve` reads it.",
        SHARED, ("convert", "serve", "check"),
        (Flag("serve", "--kt-weight-path"), Flag("convert", "--output", (), 3)),
        tutorial="/path/to/deepseek-v3.2-INT4",
    ),
    Setting(
        "KT_CPUINFER", Integer(1), AUTO,
        "CPU threads for the experts and for the conversion. `auto` is the number of physical "
        "cores this process may use; `serve` leaves a CPU to SGLang's scheduler of each GPU and "
        "one to CUDA's host functions. More threads than it has CPUs is an error, because every "
        "layer waits for its slowest thread.",
        SHARED, ("convert", "serve", "check"),
        (Flag("serve", "--kt-cpuinfer"), Flag("convert", "--cpuinfer-threads", (), 5)),
        tutorial="60", auto=True,
    ),
    Setting(
        "KT_THREADPOOL_COUNT", Integer(1), AUTO,
        "Thread pools, one per NUMA node. `auto` is the number of NUMA nodes whose cores this "
        "process may use.",
        SHARED, ("convert", "serve", "check"),
        (Flag("serve", "--kt-threadpool-count"), Flag("convert", "--threadpool-count", (), 6)),
        tutorial="2", auto=True,
    ),
    Setting(
        "KT_NUM_GPU_EXPERTS", Integer(0), AUTO,
        "Routed experts of each layer that stay on the GPU. `auto` is what fits besides the KV "
        "cache (docs/gpu-memory.md), the tutorial's 1 without a GPU.",
        SERVE, ("serve", "check"), _serve("--kt-num-gpu-experts"), tutorial="1", auto=True,
    ),
    Setting(
        "KT_ATTENTION_BACKEND", Choice(ATTENTION_BACKENDS), AUTO,
        "Attention kernels. `auto` goes with `KT_DENSE_ATTENTION`: `triton` for dense attention, "
        "`dsa` for sparse. `none` leaves the choice to SGLang.",
        SERVE, ("serve", "check"), _serve("--attention-backend"), tutorial="triton",
        auto=True, none=True,
    ),
    Setting(
        "KT_TRUST_REMOTE_CODE", _BOOL, "1",
        "Let the checkpoint bring Python code of its own.",
        SERVE, ("serve",), _serve("--trust-remote-code"), tutorial="1",
    ),
    Setting(
        "KT_MEM_FRACTION_STATIC", Number(above=0, maximum=1), "0.98",
        "Share of the GPU's memory for weights and KV cache. `none` leaves it to SGLang.",
        SERVE, ("serve", "check"), _serve("--mem-fraction-static"), tutorial="0.98", none=True,
    ),
    Setting(
        "KT_CHUNKED_PREFILL_SIZE", Integer(1), AUTO,
        "Tokens of a prompt that are computed at a time. `auto` is the tutorial's 4096, or 2048 on "
        "a card that cannot hold its 40000 tokens besides.",
        SERVE, ("serve", "check"), _serve("--chunked-prefill-size"), tutorial="4096", auto=True,
    ),
    Setting(
        "KT_MAX_RUNNING_REQUESTS", Integer(1), AUTO,
        "Requests that are computed at the same time. `auto` is the tutorial's 32, or 8 on a card "
        "that cannot hold its 40000 tokens besides. `none` leaves it to SGLang.",
        SERVE, ("serve", "check"), _serve("--max-running-requests"), tutorial="32",
        auto=True, none=True,
    ),
    Setting(
        "KT_MAX_TOTAL_TOKENS", Integer(1), AUTO,
        "Tokens that the KV cache holds for all requests together. `auto` is what fits, up to one "
        "context of full length (docs/gpu-memory.md), the tutorial's 40000 without a GPU. `none` "
        "leaves it to SGLang.",
        SERVE, ("serve", "check"), _serve("--max-total-tokens"), tutorial="40000",
        auto=True, none=True,
    ),
    Setting(
        "KT_SERVED_MODEL_NAME", Text("a name without spaces", r"\S+"), "DeepSeek-V3.2",
        "Name of the model in the API.",
        SERVE, ("serve", "smoke"), _serve("--served-model-name"), tutorial="DeepSeek-V3.2",
    ),
    Setting(
        "KT_ENABLE_MIXED_CHUNK", _BOOL, "1",
        "Compute prefill and decode in the same batch.",
        SERVE, ("serve",), _serve("--enable-mixed-chunk"), tutorial="1",
    ),
    Setting(
        "KT_TENSOR_PARALLEL_SIZE", Integer(1), "1", "GPUs that share the model.",
        SERVE, ("serve", "check"), _serve("--tensor-parallel-size", "--tp-size"), tutorial="1",
    ),
    Setting(
        "KT_ENABLE_P2P_CHECK", _BOOL, "1",
        "Check that GPUs can reach each other's memory instead of assuming it.",
        SERVE, ("serve",), _serve("--enable-p2p-check"), tutorial="1",
    ),
    Setting(
        "KT_DISABLE_SHARED_EXPERTS_FUSION", _BOOL, "1",
        "Keep the shared expert apart from the routed ones, as CPU experts need it.",
        SERVE, ("serve",), _serve("--disable-shared-experts-fusion"), tutorial="1",
    ),
    Setting(
        "KT_METHOD", Choice(("AMXINT4", "AMXINT8")), "AMXINT4",
        "Kernel method; must fit the weights, which `KT_QUANT_METHOD` decides. The names are "
        "SGLang's: they run on every instruction set of the kernel, not on AMX only.",
        SERVE, ("serve", "check"), _serve("--kt-method"), tutorial="AMXINT4",
    ),
    Setting(
        "KT_IGNORE_CHECKS", Names(CHECK_NAMES), "",
        "Checks whose FAIL becomes a warning, so that `serve` starts all the same.",
        SHARED, ("serve", "check"),
    ),
    Setting(
        "KT_RUN_DIR", FilePath(), AUTO,
        "Directory of the state files that `health` and `status` read, one for each stage; each "
        "deployment on a host needs its own. `auto` is `kt-kernel` in `XDG_RUNTIME_DIR`, or "
        "`/tmp/kt-kernel-UID`.",
        SHARED, ("download", "convert", "serve", "check", "health", "status"), auto=True,
    ),
    # --- convert --------------------------------------------------------------------------------
    Setting(
        "KT_INPUT_TYPE", Choice(("fp8", "bf16", "fp16", "int4", "auto")), "fp8",
        "Type of the checkpoint's expert weights; `auto` takes what the files hold.",
        CONVERT, ("convert",), (Flag("convert", "--input-type", (), 2),), tutorial="fp8",
    ),
    Setting(
        "KT_QUANT_METHOD", Choice(("int4", "int4-4x8", "int8")), "int4",
        "Type of the packed weights. `int4` has 4.13 bits for each weight; `int4-4x8` has 4.25, "
        "which is 10 GB more for V3.2, and is more accurate; both are served with "
        "`KT_METHOD=AMXINT4`.",
        CONVERT, ("convert", "check"), (Flag("convert", "--quant-method", (), 4),), tutorial="int4",
    ),
    Setting(
        "KT_CONVERT_LAYERS", Text("layers as in 3-20", r"\d+(-\d+)?"), NONE,
        "Layers to convert, as in `3-20`, so that several hosts share the work on one directory; "
        "`none` converts all.",
        CONVERT, ("convert",), (Flag("convert", "--layers", (), 8),), none=True,
    ),
    Setting(
        "KT_NO_MERGE_SAFETENSOR", _BOOL, "1",
        "The tutorial's flag: one file per layer. It is the only way that this project writes.",
        CONVERT, ("convert",), (Flag("convert", "--no-merge-safetensor", (), 7),), tutorial="1",
    ),
    # --- serve: not in the tutorial -------------------------------------------------------------
    Setting(
        "KT_MAX_DEFERRED_EXPERTS_PER_TOKEN", Integer(0), NONE,
        "Experts of a token, those of smallest weight, that are added to the next layer's output "
        "instead of their own's, so that the CPU computes them during the next layer's attention: "
        "an approximation (docs/architecture.md). `none` defers none.",
        ADDED, ("serve",), _serve("--kt-max-deferred-experts-per-token"), none=True,
    ),
    Setting(
        "KT_DEVICE", Choice(("cuda", "cpu")), AUTO,
        "Where attention and the resident experts run. `auto` takes the GPU if there is one. "
        "`cpu` runs everything on the CPU: right for trying things out, slow for the real model.",
        SHARED, ("serve", "check"), _serve("--device"), tutorial="cuda", auto=True,
        adds="--device cpu",
        reason="only in CPU mode: without the environment that goes with CPU mode SGLang then "
        "stops instead of taking a GPU that happens to be there",
        turn_off="KT_DEVICE=cuda",
    ),
    Setting(
        "KT_DENSE_ATTENTION", Choice(("on", "off")), AUTO,
        "Replace V3.2's sparse attention by dense attention. `auto` says `off` on Hopper and "
        "Blackwell (compute capability 9.x and 10.x), and `on` in CPU mode, on other GPUs and "
        "wherever `KT_ATTENTION_BACKEND` names a backend that cannot do sparse attention.",
        ADDED, ("serve", "check"), tutorial="on", auto=True,
        adds="--json-model-override-args '{\"index_topk\": null}'",
        reason="the kernels of V3.2's indexer exist for Hopper and Blackwell only, and the "
        "`triton` backend refuses their result; without `index_topk` SGLang builds no indexer and "
        "attends to every token",
        turn_off="KT_DENSE_ATTENTION=off",
    ),
    Setting(
        "KT_MODEL_OVERRIDE_ARGS", JsonObject(), "",
        "Fields of the model's config to replace; merged with what `KT_DENSE_ATTENTION` does.",
        ADDED, ("serve",), _serve("--json-model-override-args"),
    ),
    Setting(
        "KT_PREFILL_CUDA_GRAPH", _BOOL, "0",
        "Capture CUDA graphs of the prefill. Has no effect in CPU mode.",
        ADDED, ("serve", "check"), _serve("--disable-prefill-cuda-graph", inverted=True),
        tutorial="0",
        adds="--disable-prefill-cuda-graph",
        reason="prefill is bound by the CPU experts, which a graph does not speed up, and its "
        "graphs take 1.5 GiB",
        turn_off="KT_PREFILL_CUDA_GRAPH=1",
    ),
    Setting(
        "KT_DECODE_CUDA_GRAPH", _BOOL, "1",
        "Capture CUDA graphs of the decode. Has no effect in CPU mode.",
        ADDED, ("serve", "check"), _serve("--disable-decode-cuda-graph", inverted=True),
        tutorial="1",
    ),
    Setting(
        "KT_TOOL_CALL_PARSER", Choice(TOOL_CALL_PARSERS), AUTO,
        "Turns the model's tool calls into the API's. `auto` is `deepseekv32`, and `none` for "
        "the Speciale model, which knows no tools.",
        ADDED, ("serve",), _serve("--tool-call-parser"), tutorial="deepseekv32",
        auto=True, none=True,
        adds="--tool-call-parser deepseekv32",
        reason="without it tool calls arrive as text in the answer",
        turn_off="KT_TOOL_CALL_PARSER=none",
    ),
    Setting(
        "KT_REASONING_PARSER", Choice(REASONING_PARSERS), "deepseek-v3",
        "Separates the model's reasoning from its answer.",
        ADDED, ("serve",), _serve("--reasoning-parser"), tutorial="deepseek-v3", none=True,
        adds="--reasoning-parser deepseek-v3",
        reason="without it `<think>` blocks arrive as text in the answer",
        turn_off="KT_REASONING_PARSER=none",
    ),
    Setting(
        "KT_DEFAULT_THINKING", _BOOL, AUTO,
        "Let the model think unless a request says otherwise (`chat_template_kwargs: "
        "{\"thinking\": false}`). `auto` is on for the Speciale model only, which was trained for "
        "nothing else.",
        ADDED, ("serve",), _serve("--default-chat-template-kwargs"), auto=True,
        adds="--default-chat-template-kwargs '{\"thinking\": true}'",
        reason="only for the Speciale model: V3.2's prompt format tells it not to think unless "
        "asked to",
        turn_off="KT_DEFAULT_THINKING=0",
    ),
    Setting(
        "KT_WATCHDOG_TIMEOUT", Number(above=0), "1800",
        "Seconds after which SGLang takes a batch for stuck and ends the server. `none` leaves "
        "it to SGLang.",
        ADDED, ("serve",), _serve("--watchdog-timeout"), tutorial="1800", none=True,
        adds="--watchdog-timeout 1800",
        reason="SGLang ends the server after 300 s; a chunk of 4096 tokens takes up to 40 s on "
        "the CPU with AMX and can take ten times that without",
        turn_off="KT_WATCHDOG_TIMEOUT=none",
    ),
    Setting(
        "KT_ENABLE_METRICS", _BOOL, "1", "Serve Prometheus metrics at `/metrics`.",
        ADDED, ("serve",), _serve("--enable-metrics"), tutorial="1",
        adds="--enable-metrics",
        reason="there is no `/metrics` without it",
        turn_off="KT_ENABLE_METRICS=0",
    ),
    Setting(
        "KT_API_KEY", TOKEN, "",
        "Key that clients must send. SGLang takes it on its command line and writes it to its "
        "log at start-up, so guard both.",
        ADDED, ("serve", "smoke"), _serve("--api-key"), secret=True,
    ),
    Setting(
        "KT_EXTRA_ARGS", ShellWords(), "",
        "Further flags of SGLang, appended as they are. A flag that a setting already gives is "
        "refused.",
        ADDED, ("serve",),
    ),
    # --- smoke ----------------------------------------------------------------------------------
    Setting(
        "KT_SMOKE_MAX_TOKENS", Integer(1), NONE,
        "Limit of the answer's length. `none` lets the model end it.",
        SMOKE, ("smoke",), none=True,
    ),
    Setting(
        "KT_SMOKE_TIMEOUT", Number(above=0), "600",
        "Seconds to wait for the server's next byte.",
        SMOKE, ("smoke",),
    ),
    # --- status ---------------------------------------------------------------------------------
    Setting(
        "KT_STATUS_PORT", PORT, "30001",
        "Port on which `status` answers `GET /health` in every stage.",
        STATUS, ("status",),
    ),
    Setting(
        "KT_STATUS_SERVER", URL, AUTO,
        "Where the server says how it is, as `status` reaches it. `auto` follows KT_HOST and "
        "KT_PORT.",
        STATUS, ("status",), auto=True,
    ),
    # --- the kernel -----------------------------------------------------------------------------
    Setting(
        "KT_TARGET", Choice(("scalar", "avx2", "avx512_vnni", "amx", "reference")), AUTO,
        "Instruction set of the CPU kernel. `auto` is the fastest that the CPU has; `reference` "
        "is for tests.",
        KERNEL, ("serve", "check"), auto=True,
    ),
    # --- other programs' variables --------------------------------------------------------------
    Setting(
        "HF_TOKEN", TOKEN, "",
        "Token for the Hub, for gated or private repositories and for better rate limits.",
        FOREIGN, ("download",), secret=True,
    ),
    Setting(
        "HF_ENDPOINT", URL, "", "Address of the Hub or of a mirror. Empty is the public Hub.",
        FOREIGN, ("download",),
    ),
    Setting(
        "HF_HOME", FilePath(), "", "Where the Hub's client keeps its cache.",
        FOREIGN, ("download", "serve"),
    ),
    Setting(
        "HF_HUB_OFFLINE", _BOOL, "", "Never ask the Hub; what is downloaded has to do.",
        FOREIGN, ("download", "serve"),
    ),
)
# fmt: on

#: Names besides the table's that an env file may set: read by the programs that a stage starts,
#: handed on unchecked to the stages named. A pattern in capitals that ends in _PROXY holds for any
#: case, as in the programs that read it.
HANDED_ON: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("SGLANG_*", "SGLang's own variables", ("serve", "check")),
    ("HF_HUB_*", "variables of the Hub's client", ("download", "serve")),
    (
        "HF_XET_*",
        "taken and not used: files come over HTTP, so that they can be continued",
        ("download",),
    ),
    ("HUGGING_FACE_HUB_TOKEN", "an older name of HF_TOKEN", ("download",)),
    ("NCCL_*", "NVIDIA's collective library", ("serve", "check")),
    (
        "CUDA_*",
        "the CUDA runtime; CUDA_VISIBLE_DEVICES chooses GPUs",
        ("convert", "serve", "check"),
    ),
    ("TRITON_*", "the Triton compiler", ("serve",)),
    ("OMP_*", "OpenMP threads of torch", ("convert", "serve")),
    (
        "*_PROXY",
        "HTTP_PROXY, HTTPS_PROXY, NO_PROXY, ALL_PROXY, in capitals or not: the way to the Hub. The "
        "server never gets them; it would ask itself through the proxy",
        ("download",),
    ),
    ("SSL_CERT_FILE", "certificates of a private network", ("download",)),
    ("REQUESTS_CA_BUNDLE", "the same, if SSL_CERT_FILE is not set", ("download",)),
)

BY_NAME: dict[str, Setting] = {setting.name: setting for setting in TABLE}
SECRETS: dict[str, Setting] = {s.file_name: s for s in TABLE if s.secret}


def stages_of(name: str) -> tuple[str, ...] | None:
    """The stages that get a variable; None for one that is not this project's: all get it."""
    setting = BY_NAME.get(name) or SECRETS.get(name)
    if setting is not None:
        return setting.stages
    found = [stages for pattern, _, stages in HANDED_ON if _matches(name, pattern)]
    return tuple(stage for stages in found for stage in stages) if found else None


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name.upper() if pattern.endswith("_PROXY") else name, pattern)


def is_for(name: str, stage: str) -> bool:
    """Whether a stage, and the programs it starts, get a variable."""
    stages = stages_of(name)
    return stages is None or stage in stages


def is_known(name: str) -> bool:
    """Whether a name may stand in an env file."""
    return stages_of(name) is not None


def known_names() -> list[str]:
    """Names of the table and of the files of its secrets, for suggestions."""
    return [*BY_NAME, *SECRETS]


def commanded(stage: str) -> list[tuple[Setting, Flag]]:
    """Settings that become flags in the command of ``stage``, in the command's order."""
    rows = [(s, flag) for s in TABLE for flag in s.flags if flag.stage == stage]
    return sorted(rows, key=lambda row: row[1].position)
