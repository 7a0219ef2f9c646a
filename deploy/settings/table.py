"""The one table of settings.

A setting is declared here and nowhere else: its environment variable, type, default, help, the
value in the tutorial, and the flag it becomes in the command of a stage. The command lines,
``--help``, ``docs/configuration.md``, ``.env.example`` and ``env/tutorial.env`` follow from it.

The rows that belong to the launch command (``launch_rows.py``) stand in the tutorial's order,
because the command is printed in the table's order; the flags that this project adds come last.
"""

from __future__ import annotations

from deploy.settings.launch_rows import LAUNCH, MOST
from deploy.settings.row import (
    ADDED,
    AUTO,
    CONVERT,
    DOWNLOAD,
    FOREIGN,
    KERNEL,
    NONE,
    SHARED,
    SMOKE,
    STATUS,
    Flag,
    Setting,
    served,
)
from deploy.settings.sglang_names import REASONING_PARSERS, TOOL_CALL_PARSERS
from deploy.settings.value_types import (
    BOOLEAN,
    HOST,
    ORIGINS,
    PORT,
    REPOSITORY,
    TOKEN,
    URL,
    AlwaysTrue,
    Choice,
    CpuList,
    FilePath,
    Integer,
    JsonObject,
    Number,
    ShellWords,
    Text,
)
from kt_kernel.packed import METHODS

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
    *LAUNCH,
    # --- convert --------------------------------------------------------------------------------
    Setting(
        "KT_INPUT_TYPE", Choice(("fp8", "bf16", "fp16", "int4", "auto")), "fp8",
        "Type of the checkpoint's expert weights; `auto` takes what the files hold.",
        CONVERT, ("convert",), (Flag("convert", "--input-type", (), 2),), tutorial="fp8",
    ),
    Setting(
        "KT_QUANT_METHOD", Choice(tuple(METHODS)), "int4",
        "Type of the packed weights. `int4` has 4.13 bits for each weight; `int4-4x8` has 4.25, "
        "which is 10 GB more for V3.2, and is more accurate; both are served with "
        "`KT_METHOD=AMXINT4`.",
        CONVERT, ("convert", "check"), (Flag("convert", "--quant-method", (), 4),), tutorial="int4",
    ),
    Setting(
        "KT_CONVERT_LAYERS", Text("layers as in 3-20 or 2/8", r"\d+(-\d+|/\d+)?"), NONE,
        "Layers to convert, as in `3-20`, or a part of them, as in `2/8` (the second of eight), so "
        "that several hosts share the work on one directory; `none` converts all.",
        CONVERT, ("convert",), (Flag("convert", "--layers", (), 8),), none=True,
    ),
    Setting(
        "KT_NO_MERGE_SAFETENSOR", AlwaysTrue(), "1",
        "The tutorial's flag: one file per layer. It is the only way that this project writes.",
        CONVERT, ("convert",), (Flag("convert", "--no-merge-safetensor", (), 7),), tutorial="1",
    ),
    # --- serve: not in the tutorial -------------------------------------------------------------
    Setting(
        "KT_WEIGHT_CACHE", FilePath(), "",
        "Directory on a disk of this host. `serve` copies the packed weights there if they are not "
        "there yet, and loads them from it; servers of the host share the copy "
        "(docs/clusters.md#a-copy-of-the-weights-on-each-host). Empty loads from `KT_WEIGHT_PATH`.",
        ADDED, ("serve", "check"),
    ),
    Setting(
        "KT_ENDPOINT_PATH", FilePath(), "",
        "File in which `serve` keeps the server's address, for routers and clients on other hosts: "
        "from when it is ready until it is told to end; the requests under way are finished then.",
        ADDED, ("serve", "check"),
    ),
    Setting(
        "KT_ENDPOINT_URL", URL, AUTO,
        "The address in it. `auto` has the host's name, or KT_HOST if that is one address.",
        ADDED, ("serve",), auto=True, private=True,
    ),
    Setting(
        "KT_DRAIN_SECONDS", Integer(0), NONE,
        "Seconds for the requests under way when the server is told to end (SIGTERM); after them "
        "it is killed. `none` waits as long as they take, or whoever told it does.",
        ADDED, ("serve",), none=True,
    ),
    Setting(
        "KT_MAX_DEFERRED_EXPERTS_PER_TOKEN", Integer(0, MOST), NONE,
        "Experts of a token, those of smallest weight, that are added to the next layer's output "
        "instead of their own's, so that the CPU computes them during the next layer's attention: "
        "an approximation (docs/architecture.md). `none` defers none.",
        ADDED, ("serve", "check"), served("--kt-max-deferred-experts-per-token"), none=True,
    ),
    Setting(
        "KT_EXPERT_PLACEMENT", Choice(("first", "measured")), "first",
        "Which experts of each layer stay on the GPU, `KT_NUM_GPU_EXPERTS` of them: those of the "
        "lowest ids, or those that were used most since counting began "
        "(docs/gpu-memory.md#the-most-used-experts).",
        ADDED, ("serve",), served("--init-expert-location"),
    ),
    Setting(
        "KT_EXPERT_COUNTS", FilePath(), AUTO,
        "File in which the server adds up how often each expert is used. `auto` is a file for each "
        "checkpoint, `kt-kernel/experts-CHECKPOINT.json` in `XDG_CACHE_HOME` or `~/.cache`.",
        ADDED, ("serve", "check"), auto=True,
    ),
    Setting(
        "KT_GPU_PREFILL_TOKEN_THRESHOLD", Integer(1), AUTO,
        "Tokens of a batch from which on the GPU computes part of the CPU experts, too: their "
        "packed weights stream to it meanwhile (docs/architecture.md). `auto` is 64; `none` leaves "
        "all of them to the CPUs.",
        ADDED, ("serve", "check"), auto=True, none=True, by_name=True,
    ),
    Setting(
        "KT_DEVICE", Choice(("cuda", "cpu")), AUTO,
        "Where attention and the resident experts run. `auto` takes the GPU if there is one. "
        "`cpu` runs everything on the CPU: right for trying things out, slow for the real model.",
        SHARED, ("serve", "check"), served("--device"), tutorial="cuda", auto=True,
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
        ADDED, ("serve", "check"), served("--json-model-override-args"),
    ),
    Setting(
        "KT_PREFILL_CUDA_GRAPH", BOOLEAN, "0",
        "Capture CUDA graphs of the prefill. Has no effect in CPU mode.",
        ADDED, ("serve", "check"), served("--disable-prefill-cuda-graph", inverted=True),
        tutorial="0",
        adds="--disable-prefill-cuda-graph",
        reason="prefill is bound by the CPU experts, which a graph does not speed up, and its "
        "graphs take 1.5 GiB",
        turn_off="KT_PREFILL_CUDA_GRAPH=1",
    ),
    Setting(
        "KT_DECODE_CUDA_GRAPH", BOOLEAN, "1",
        "Capture CUDA graphs of the decode. Has no effect in CPU mode.",
        ADDED, ("serve", "check"), served("--disable-decode-cuda-graph", inverted=True),
        tutorial="1",
    ),
    Setting(
        "KT_TOOL_CALL_PARSER", Choice(TOOL_CALL_PARSERS), AUTO,
        "Turns the model's tool calls into the API's. `auto` is `deepseekv32`, and `none` for "
        "the Speciale model, which knows no tools.",
        ADDED, ("serve",), served("--tool-call-parser"), tutorial="deepseekv32",
        auto=True, none=True,
        adds="--tool-call-parser deepseekv32",
        reason="without it tool calls arrive as text in the answer",
        turn_off="KT_TOOL_CALL_PARSER=none",
    ),
    Setting(
        "KT_REASONING_PARSER", Choice(REASONING_PARSERS), "deepseek-v3",
        "Separates the model's reasoning from its answer.",
        ADDED, ("serve",), served("--reasoning-parser"), tutorial="deepseek-v3", none=True,
        adds="--reasoning-parser deepseek-v3",
        reason="without it `<think>` blocks arrive as text in the answer",
        turn_off="KT_REASONING_PARSER=none",
    ),
    Setting(
        "KT_DEFAULT_THINKING", BOOLEAN, AUTO,
        "Let the model think unless a request says otherwise (`chat_template_kwargs: "
        "{\"thinking\": false}`). `auto` is on for the Speciale model only, which was trained for "
        "nothing else.",
        ADDED, ("serve",), served("--default-chat-template-kwargs"), auto=True,
        adds="--default-chat-template-kwargs '{\"thinking\": true}'",
        reason="only for the Speciale model: V3.2's prompt format tells it not to think unless "
        "asked to",
        turn_off="KT_DEFAULT_THINKING=0",
    ),
    Setting(
        "KT_WATCHDOG_TIMEOUT", Number(above=0), "1800",
        "Seconds after which SGLang takes a batch for stuck and ends the server. `none` leaves "
        "it to SGLang.",
        ADDED, ("serve",), served("--watchdog-timeout"), tutorial="1800", none=True,
        adds="--watchdog-timeout 1800",
        reason="SGLang ends the server after 300 s; a chunk of 4096 tokens takes up to 40 s on "
        "the CPU with AMX and can take ten times that without",
        turn_off="KT_WATCHDOG_TIMEOUT=none",
    ),
    Setting(
        "KT_ENABLE_METRICS", BOOLEAN, "1", "Serve Prometheus metrics at `/metrics`.",
        ADDED, ("serve",), served("--enable-metrics"), tutorial="1",
        adds="--enable-metrics",
        reason="there is no `/metrics` without it",
        turn_off="KT_ENABLE_METRICS=0",
    ),
    Setting(
        "KT_API_KEY", TOKEN, "",
        "Key that clients must send (`Authorization: Bearer KEY`). It opens the routes that "
        "compute answers, and no others (SECURITY.md).",
        ADDED, ("serve", "check", "smoke"), secret=True, instead_of=("--api-key",),
    ),
    Setting(
        "KT_ADMIN_KEY", TOKEN, "",
        "Key that opens all routes, also those that change the server: profiling, flushing its "
        "cache, loading weights. Without one nobody may ask them.",
        ADDED, ("serve", "check"), secret=True, instead_of=("--admin-api-key",),
    ),
    Setting(
        "KT_CORS_ORIGINS", ORIGINS, "",
        "Origins whose web pages may ask the server; no other page may.",
        ADDED, ("serve",), by_name=True,
    ),
    Setting(
        "KT_PUBLISHED_HOST", HOST, "",
        "Address of the host on which a container's port is published, which KT_HOST does not "
        "tell there; docker-compose.yml sets it. Empty is KT_HOST.",
        ADDED, ("serve", "check"),
    ),
    Setting(
        "KT_EXTRA_ARGS", ShellWords(), "",
        "Further flags of SGLang, appended as they are. A flag that a setting already gives is "
        "refused. Their values are masked wherever they are shown.",
        ADDED, ("serve",), private=True,
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
        STATUS, ("status",), auto=True, private=True,
    ),
    Setting(
        "KT_STATUS_SERVERS", Integer(minimum=1), "1",
        "How many servers are behind KT_STATUS_SERVER. Of several, behind SGLang's router and its "
        "`GET /readiness`, `status` says how many are ready.",
        STATUS, ("status",),
    ),
    # --- the kernel -----------------------------------------------------------------------------
    Setting(
        "KT_TARGET", Choice(("scalar", "avx2", "avx512_vnni", "amx", "reference")), AUTO,
        "Instruction set of the CPU kernel. `auto` is the fastest that the CPU has; `reference` "
        "is for tests.",
        KERNEL, ("serve", "check"), auto=True, by_name=True,
    ),
    Setting(
        "KT_CPUS", CpuList(), "",
        "CPUs that the experts' threads, and the conversion, may take. Empty is all that this "
        "process may use; servers of one host take others than each other's in any case.",
        KERNEL, ("convert", "serve", "check"), by_name=True,
    ),
    Setting(
        "KT_CPU_LOCKS", FilePath(), "",
        "Directory in which servers of one host tell each other which CPUs they compute on. Empty "
        "is `kt-kernel-cpus` in /tmp; containers need one that they share.",
        KERNEL, ("serve", "check"), by_name=True,
    ),
    # --- other programs' variables --------------------------------------------------------------
    Setting(
        "HF_TOKEN", TOKEN, "",
        "Token for the Hub, for gated or private repositories and for better rate limits.",
        FOREIGN, ("download",), secret=True, by_name=True,
    ),
    Setting(
        "HF_ENDPOINT", URL, "", "Address of the Hub or of a mirror. Empty is the public Hub.",
        FOREIGN, ("download",), by_name=True, private=True,
    ),
    Setting(
        "HF_HOME", FilePath(), "", "Where the Hub's client keeps its cache.",
        FOREIGN, ("download", "serve"), by_name=True,
    ),
    Setting(
        "HF_HUB_OFFLINE", BOOLEAN, "", "Never ask the Hub; use what is downloaded already.",
        FOREIGN, ("download", "serve"), by_name=True,
    ),
    Setting(
        "PYTORCH_CUDA_ALLOC_CONF",
        Text("options as in expandable_segments:True,name:value", r"\s*\w+\s*:.+"), "",
        "How PyTorch takes memory of the GPU. Empty is `expandable_segments:True` on one GPU, and "
        "PyTorch's own way on several, in WSL, on a card without virtual memory, and with "
        "`--enable-memory-saver` or `--disaggregation-mode` in `KT_EXTRA_ARGS`.",
        FOREIGN, ("serve",), by_name=True,
        adds="PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        reason="on one GPU only, a variable of the server's environment: otherwise prompts of many "
        "lengths leave up to 3 GiB in pieces that no later one can use (docs/gpu-memory.md), which "
        "a card of 24 GB does not have",
        turn_off="PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False",
    ),
)
# fmt: on
