"""A program that calls everything that the extension binds with bad arguments.

A line for each call that no exception answered, then one that names what was called, and ``done``.
It leaves a long call to the workers and a thread that waits for it, as a server that is stopped.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from kt_kernel import _ext as typed
from kt_kernel.host.cpus import allowed_cpus

_ext: Any = typed  # what is called wrongly here

E, K, H, INNER = 4, 2, 256, 64
TOKENS = 3
CPU = allowed_cpus()[0].id
HUGE = 2**63 - 1

engine = _ext.Engine([[CPU]], 1, "scalar")
layer = _ext.Layer(engine, E, K, H, INNER, "int8")
WEIGHTS = [np.ones(shape, np.float32) for shape in ((E, INNER, H), (E, INNER, H), (E, H, INNER))]
layer.load_matrices(WEIGHTS, "fp32", list(range(E)))
empty = _ext.Layer(engine, E, K, H, INNER, "int4")
floats = np.ones((64, 64), np.float32)
packed = _ext.quantize_projection(floats, "fp32", None, "int4")
tables = _ext.int4_tables("int4")


def unaligned(array: np.ndarray) -> np.ndarray:
    memory = np.zeros(array.nbytes + 1, np.uint8)
    return memory[1:].view(array.dtype).reshape(array.shape)


def gaps(array: np.ndarray) -> np.ndarray:
    return np.repeat(array, 2, axis=-1)[..., ::2]


def swapped(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder())


def variants(array: np.ndarray, *other_dtypes: type) -> list[Any]:
    """What is no such array."""
    flat = [array[:-1], np.stack([array, array]), *([array.reshape(-1)] if array.ndim > 1 else [])]
    broken = [gaps(array), swapped(array)] if array.itemsize > 1 else [gaps(array)]
    if array.itemsize > 1:
        broken.append(unaligned(array))
    return [*flat, *broken, *(array.astype(t) for t in other_dtypes), None, 0, "x", []]


Calls = list[Callable[[], Any]]


def with_each(call: Callable[..., Any], good: dict[str, Any], bad: dict[str, list[Any]]) -> Calls:
    """The call with each bad value in turn in place of the good one."""
    return [
        (lambda values={**good, name: value}: call(**values))  # type: ignore[misc]
        for name, values in bad.items()
        for value in values
    ]


COUNTS: list[Any] = [-1, 0, HUGE, 2**64, 1.5, None, "1"]
SIZES: list[Any] = [-64, 0, 63, 100, 131072 + 64, HUGE - 63, 2**64, 64.5, None]
TEXTS: list[Any] = ["", "int3", None, 4, b"\xff"]


def submitted(
    x: Any, ids: Any, weights: Any, out: Any, deferred: Any = 0, before: Any = None
) -> Any:
    return layer.submit(x, ids, weights, out, deferred, before)


def call_inputs() -> dict[str, Any]:
    x = np.ones((TOKENS, H), np.float32)
    ids = np.zeros((TOKENS, K), np.int32)
    weights = np.ones((TOKENS, K), np.float32)
    return {"x": x, "ids": ids, "weights": weights, "out": engine.take_buffer(x.nbytes)}


def left_of(tokens: int) -> Any:
    """What a call of so many tokens leaves."""
    x = np.ones((tokens, H), np.float32)
    ids = np.tile(np.arange(K, dtype=np.int32), (tokens, 1))
    weights = np.ones((tokens, K), np.float32)
    return layer.submit(x, ids, weights, engine.take_like(x), 1)[1]


def bad_ids() -> list[Any]:
    values = [E, -2, HUGE, -HUGE - 1, 2**32, 2**32 - 1, -(2**32)]
    return [np.full((TOKENS, K), value, np.int64) for value in values]


def cases(stream_library: str) -> dict[str, Calls]:
    """Bad calls by what they call."""
    good = call_inputs()
    context = _ext.StreamContext(stream_library)
    on_stream = _ext.StreamLayer(context, layer, 0)
    staging = _ext.Staging(None, [CPU], 1, 1, 64)
    fp8 = np.ones((256, 64), np.uint8)
    submit_stream = {
        "stream": 1,
        "x": 64,
        "dtype": "fp32",
        "tokens": 1,
        "ids": 64,
        "int64_ids": False,
        "weights": 64,
    }
    return {
        "targets": [lambda: _ext.targets(1)],
        "cpu_features": [lambda: _ext.cpu_features(1)],
        "cpu_brand": [lambda: _ext.cpu_brand(1)],
        "resolve_target": with_each(_ext.resolve_target, {}, {"name": TEXTS[1:]}),
        "assume_target_supported": with_each(_ext.assume_target_supported, {}, {"name": TEXTS}),
        "replace_target": with_each(
            _ext.replace_target, {}, {"address": [0, 8, -1, id(E), HUGE, 2**64, None]}
        ),
        "codes_shape": with_each(
            _ext.codes_shape,
            {"n": 64, "k": 64, "method": "int4"},
            {"n": SIZES, "k": SIZES, "method": TEXTS},
        ),
        "int4_tables": with_each(_ext.int4_tables, {}, {"method": [*TEXTS, "int8"]}),
        "quantize_projection": [
            *with_each(
                _ext.quantize_projection,
                {"weight": floats, "dtype": "fp32", "scale_inv": None, "method": "int8"},
                {
                    "weight": variants(floats, np.float64, np.int32, np.uint16),
                    "dtype": [*TEXTS, "bf16", "fp8_e4m3"],
                    "scale_inv": [np.ones((1, 1), np.float32)],
                    "method": TEXTS,
                    "target": ["none", None, 1],
                },
            ),
            *with_each(
                _ext.quantize_projection,
                {"weight": fp8, "dtype": "fp8_e4m3", "scale_inv": None, "method": "int8"},
                {"scale_inv": variants(np.ones((2, 1), np.float32), np.float64, np.int32)},
            ),
        ],
        "dequantize_projection": with_each(
            _ext.dequantize_projection,
            {**packed, "tables": tables, "n": 64, "k": 64, "method": "int4"},
            {
                "codes": variants(packed["codes"], np.int8),
                "scales": variants(packed["scales"], np.int16),
                "table_index": variants(packed["table_index"], np.int8),
                "tables": variants(tables, np.uint8),
                "n": [*SIZES, 128],
                "k": [*SIZES, 128],
                "method": [*TEXTS, "int8"],
            },
        ),
        "Job": [lambda: _ext.Job()],
        "Job.wait": [lambda: _ext.Job.wait(None)],
        "Deferred": [lambda: _ext.Deferred()],
        "Engine": with_each(
            _ext.Engine,
            {"cpus": [[CPU]], "slices": 1, "target": "scalar"},
            {
                "cpus": [[], [[]], [[-1]], [[2**31 - 1]], [[2**40]], [[CPU], [CPU]], None, [[""]]],
                "slices": COUNTS,
                "target": TEXTS[1:],
            },
        ),
        "Engine.take_buffer": with_each(engine.take_buffer, {}, {"bytes": [-1, *COUNTS[2:]]}),
        "Engine.take_like": with_each(engine.take_like, {}, {"array": [None, 0, "x"]}),
        "ExpertMask": with_each(_ext.ExpertMask, {}, {"num_experts": COUNTS}),
        "Layer": with_each(
            _ext.Layer,
            {
                "engine": engine,
                "num_experts": E,
                "top_k": K,
                "hidden_size": H,
                "intermediate_size": INNER,
                "method": "int8",
            },
            {
                "engine": [None, 1, layer],
                "num_experts": [*COUNTS, 65537],
                "top_k": [*COUNTS, E + 1],
                "hidden_size": SIZES,
                "intermediate_size": SIZES,
                "method": TEXTS,
                "on_gpu": [_ext.ExpertMask(E + 1), 0, good["ids"]],
            },
        ),
        "Layer.load_file": with_each(
            empty.load_file,
            {
                "path": __file__,
                "offsets": [[0, 0, 0]] * 3,
                "tables": tables,
                "source": list(range(E)),
            },
            {
                "path": ["", "/", "/nowhere", None, 3],
                "offsets": [
                    [],
                    [[0, 0, 0]] * 2,
                    [[0, 0]] * 3,
                    [[-1, 0, 0]] * 3,
                    [[0, HUGE, 0]] * 3,
                    [[0, 0, 2**64]] * 3,
                    None,
                ],
                "tables": variants(tables, np.uint8),
                "source": [[], [0], [0, 1, 2, E], [0, 1, 2, -2], [0, 1, 2, 2**64], [0.5] * E, None],
            },
        ),
        "Layer.load_matrices": [
            *with_each(
                empty.load_matrices,
                {"weights": WEIGHTS, "dtype": "fp32", "source": list(range(E))},
                {
                    "weights": [
                        [],
                        WEIGHTS[:2],
                        [0, 0, 0],
                        [None] * 3,
                        *([*WEIGHTS[:2], w] for w in variants(WEIGHTS[2], np.float64, np.int32)),
                        [WEIGHTS[2]] * 3,
                        [np.full_like(w, np.nan) for w in WEIGHTS],
                    ],
                    "dtype": [*TEXTS, "bf16", "fp8_e4m3"],
                    "source": [[], [0], [0, 1, 2, E], [0, 1, 2, -2], [2**64] * E, None],
                },
            ),
            lambda: empty.load_matrices(
                [w.astype(np.uint8) for w in WEIGHTS], "fp8_e4m3", list(range(E))
            ),
        ],
        "Layer.submit": [
            *with_each(
                submitted,
                good,
                {
                    "x": variants(good["x"], np.float64, np.int32, np.float16),
                    "ids": [*variants(good["ids"], np.int16, np.float32), *bad_ids()],
                    "weights": variants(good["weights"], np.float64, np.int32),
                    "out": [
                        *variants(good["out"], np.int8),
                        np.zeros_like(good["out"]),
                        engine.take_buffer(good["x"].nbytes + 1),
                        engine.take_buffer(2 * good["x"].nbytes)[good["x"].nbytes :],
                    ],
                    "deferred": [-1, -HUGE, 2**64, 0.5, None],
                    "before": [layer, 0, left_of(TOKENS + 1)],
                },
            ),
            lambda: empty.submit(**good),
        ],
        "StreamContext": with_each(
            _ext.StreamContext, {}, {"library": ["", "/nowhere", "libc.so.6", None, 1]}
        ),
        "StreamContext.end_overdue": with_each(
            context.end_overdue, {}, {"seconds": [-1, np.nan, np.inf, 1e300, None, "1"]}
        ),
        "StreamContext.use_flags": with_each(
            context.use_flags,
            {"driver": stream_library, "seconds": 1.0, "nap": 0.01},
            {
                "driver": ["", "/nowhere", "libc.so.6", None, 1],
                "seconds": [-1, np.nan, 1e300],
                "nap": [-1, np.nan, 1e300],
            },
        ),
        "StreamContext.register_memory": with_each(
            context.register_memory,
            {},
            {"memory": [gaps(np.ones(8, np.uint8)), np.ones(8, np.int64), None, 0, "x"]},
        ),
        "StreamContext.unregister_memory": with_each(
            context.unregister_memory,
            {},
            {
                "memory": [
                    gaps(np.ones(8, np.uint8)),
                    np.ones(8, np.uint8),  # never registered
                    np.ones(8, np.int64),
                    None,
                    0,
                    "x",
                ]
            },
        ),
        "StreamContext.pin_outputs": with_each(
            context.pin_outputs, {}, {"engine": [None, layer, 0]}
        ),
        "StreamLayer": with_each(
            _ext.StreamLayer,
            {"context": context, "layer": layer, "layer_idx": 0},
            {
                "context": [None, layer, 0],
                "layer": [None, context, 0],
                "layer_idx": [-1, 2**31, 2**64, 0.5, None],
            },
        ),
        "StreamLayer.submit": with_each(
            on_stream.submit,
            submit_stream,
            {
                "stream": [-1, 2**64, None],
                "x": [0, -1, None],
                "dtype": [*TEXTS, "fp16"],
                "tokens": [-1, HUGE, 2**31, 2**64, 0.5, None],
                "ids": [0, -1, None],
                "weights": [0, -1, None],
                "deferred": [-1, 2**64, 0.5, None],
                "before": [layer, 0, on_stream],
            },
        ),
        "StreamLayer.sync": [
            lambda: on_stream.sync(1, 0),
            lambda: on_stream.sync(1, 64),
            lambda: on_stream.sync(None, 64),
            lambda: on_stream.sync(1, -1),
        ],
        "Staging": with_each(
            _ext.Staging,
            {"context": None, "cpus": [CPU], "threads": 1, "buffers": 1, "buffer_bytes": 64},
            {
                "context": [layer, 0],
                "cpus": [[], [-1], [2**31 - 1], [2**40], None, [""]],
                "threads": [0, -1, 65, 2**31, 0.5, None],
                "buffers": [0, -1, 1025, 2**31, 0.5, None],
                "buffer_bytes": [0, -1, 2**30 + 1, 2**64, 0.5, None],
            },
        ),
        "Staging.copy": with_each(
            staging.copy,
            {"memory": np.ones(8, np.uint8), "to": good["x"].ctypes.data, "stream": 0},
            {
                "memory": [gaps(np.ones(8, np.uint8)), np.ones(8, np.int64), None, 0, "x"],
                "to": [0, -1, 2**64, None],
                "stream": [-1, 2**64, None],
            },
        ),
    }


def bound_names() -> set[str]:
    """Functions, classes and methods of the extension; properties take no arguments."""
    names = set()
    for name, value in vars(_ext).items():
        if name.startswith("_"):
            continue
        names.add(name)
        if isinstance(value, type):
            names |= {
                f"{name}.{method}"
                for method, what in vars(value).items()
                if not method.startswith("_") and not isinstance(what, property)
            }
    return names


def main() -> None:
    called = cases(sys.argv[1])
    for name, calls in called.items():
        for i, call in enumerate(calls):
            try:
                call()
            except (ValueError, TypeError, RuntimeError, MemoryError):
                continue
            print(f"{name}: bad call {i} was taken")
    print("never called:", *sorted(bound_names() - set(called)))
    # What was refused has left everything as it was.
    out = engine.take_buffer(TOKENS * H * 4)
    layer.submit(**{**call_inputs(), "out": out})[0].wait()
    assert np.isfinite(out.view(np.float32)).all()
    x = np.ones((4000, H), np.float32)
    memory = engine.take_buffer(x.nbytes)
    weights = np.ones((4000, K), np.float32)
    job, _ = layer.submit(x, np.zeros((4000, K), np.int64), weights, memory)
    threading.Thread(target=job.wait, daemon=True).start()
    print("done")


if __name__ == "__main__":
    main()
