"""Answers like SGLang, as far as the rehearsal asks, and counts like the engine.

``fake_server.py HANG`` never gets ready, and starts a child that does not end by itself either;
``DIE`` ends at the first question.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from kt_kernel.files.safetensors_header import read_header

CONFIG = json.loads((Path(os.environ["KT_MODEL_PATH"]) / "config.json").read_text())
MOE_LAYERS = CONFIG["num_hidden_layers"] - CONFIG["first_k_dense_replace"]
TOTALS = Path(os.environ["_KT_ENGINE_TOTALS_FILE"])
totals = dict.fromkeys(("calls", "tokens", "experts", "prepare_ns", "workers_ns"), 0)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(200, {})

    def do_POST(self) -> None:
        if sys.argv[1:] == ["DIE"]:
            print("out of something", flush=True)
            os._exit(1)
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if self.path == "/flush_cache":
            self._answer(200, {})
        elif body.get("stream"):
            self._stream(body["sampling_params"]["max_new_tokens"])
        elif isinstance(body["input_ids"][0], int):
            ids = body["input_ids"][: body["sampling_params"]["max_new_tokens"]]
            self._answer(200, {"output_ids": ids})
        else:
            self._batch(body)

    def _stream(self, tokens: int) -> None:
        """An answer part by part; the client may leave."""
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for count in range(1, tokens + 1):
                part = {"meta_info": {"completion_tokens": count}}
                self.wfile.write(f"data: {json.dumps(part)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

    def _batch(self, body: dict[str, Any]) -> None:
        requests = len(body["input_ids"])
        steps = body["sampling_params"]["max_new_tokens"]
        for step in range(steps):
            tokens = requests if step else sum(map(len, body["input_ids"]))
            totals["calls"] += MOE_LAYERS
            totals["tokens"] += MOE_LAYERS * tokens
            totals["experts"] += MOE_LAYERS * 8 * requests
            totals["prepare_ns"] += MOE_LAYERS * 1000
            totals["workers_ns"] += MOE_LAYERS * 1_000_000
        TOTALS.write_text(json.dumps(totals))
        meta = {"completion_tokens": steps}
        self._answer(200, [{"meta_info": meta} for _ in range(requests)])

    def _answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    # On a busy machine more than the default, 5, wait to be accepted, and the next are reset.
    request_queue_size = 128


# As a layer checks its file: one file for all has another number than its name.
for path in Path(os.environ["KT_WEIGHT_PATH"]).glob("layer-*.safetensors"):
    number = int(path.stem.removeprefix("layer-"))
    expected = int(os.environ.get("_KT_ONE_LAYER_FILE", number))
    if int(read_header(path).metadata["layer_idx"]) != expected:
        sys.exit(f"{path}: expected the file of layer {expected}")
if sys.argv[1:] == ["HANG"]:
    subprocess.Popen(["sleep", "600"]).wait()
print("[x] kt_kernel: layer 3: 1 of 1, 5.8 GB in 0.5 s, 11.6 GB/s, 255 experts on the CPU")
sys.stdout.flush()
Server(("127.0.0.1", int(os.environ["KT_PORT"])), Handler).serve_forever()
