"""Layer after layer: quantise, write aside, prove, rename, record."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from convert import preflight, quantize, verify
from convert.checkpoint import Checkpoint
from convert.manifest import Identity, LayerRecord, Manifest
from convert.output import OutputDirectory
from convert.preflight import gigabytes
from convert.workers import Stopped, StopRequest, run_all, worker_pool
from convert.writer import LayerWriter, file_bytes
from kt_kernel import _ext
from kt_kernel.packed import layer_file_name


@dataclass(frozen=True)
class Options:
    """One conversion; see ``python -m convert --help``."""

    input_path: Path
    input_type: str
    output: Path
    method: str
    threads: int
    nodes: int


@dataclass(frozen=True)
class LayerResult:
    """What one finished layer cost: seconds, source and file bytes, mean error of the sample."""

    layer_idx: int
    seconds: float
    read_bytes: int
    record: LayerRecord
    error: float


def convert_checkpoint(
    options: Options,
    stop: StopRequest,
    say: Callable[[str], None],
    on_layers: Callable[[int, int], None] = lambda finished, total: None,
) -> None:
    """Convert a checkpoint, or what earlier runs left of it to do.

    Args:
        options: what to convert and how.
        stop: asked between two pieces of work.
        say: receives every line of progress.
        on_layers: is told the finished layers and their total, at the start and after each layer.

    Raises:
        UserError: the source, the output or the disk is not as it should be.
        Stopped: a stop was requested; the message says how much is finished.
    """
    started = time.monotonic()
    preflight.check_output_path(options.input_path, options.output)
    with Checkpoint(options.input_path) as checkpoint:
        origin = checkpoint.origin()
        layout = preflight.packed_layout(checkpoint, options.method)
        preflight.check_source(checkpoint, options.input_type, layout)
        identity = Identity(
            fingerprint=checkpoint.fingerprint(),
            layout=layout,
            model_type=checkpoint.dims.model_type,
            moe_layers=tuple(checkpoint.dims.moe_layers()),
            quantizer=quantize.quantizer_settings(options.method),
            input_type=options.input_type,
            origin=origin,
        )
        say(
            f"source: {options.input_path}, {identity.model_type}, {len(identity.moe_layers)} MoE "
            f"layers of {layout.num_experts} experts, {options.input_type}"
        )
        with OutputDirectory(options.output) as output:
            _convert_layers(checkpoint, output, identity, options, stop, say, on_layers)
        size = sum(file_bytes(layout, identity.layer_metadata(idx)) for idx in identity.moe_layers)
        say(
            f"done: {options.output}, {len(identity.moe_layers)} files, {gigabytes(size)}, "
            f"{layout.bits_per_weight():.3f} bits/weight, {time.monotonic() - started:.1f} s"
        )


def _convert_layers(
    checkpoint: Checkpoint,
    output: OutputDirectory,
    identity: Identity,
    options: Options,
    stop: StopRequest,
    say: Callable[[str], None],
    on_layers: Callable[[int, int], None],
) -> None:
    manifest = output.survey(identity, stop, say)
    todo = [idx for idx in identity.moe_layers if idx not in manifest.layers]
    total = len(identity.moe_layers)
    needed = sum(file_bytes(identity.layout, identity.layer_metadata(idx)) for idx in todo)
    free = preflight.check_free_space(output.path, needed)
    manifest.save()
    say(
        f"output: {output.path}, {options.method}, {total - len(todo)} of {total} layers finished "
        f"before, {gigabytes(needed)} to write, {gigabytes(free)} free, {options.threads} threads"
    )
    on_layers(total - len(todo), total)
    seconds = 0.0
    pool = worker_pool(options.threads, options.nodes)
    try:
        for count, layer_idx in enumerate(todo, start=1):
            result = _convert_layer(checkpoint, output, manifest, layer_idx, pool, stop)
            seconds += result.seconds
            remaining = seconds / count * (len(todo) - count)
            finished = total - len(todo) + count
            say(progress_line(result, identity, finished, remaining))
            on_layers(finished, total)
    except Stopped as stopped:
        raise Stopped(stopped.signum, f"{len(manifest.layers)} of {total} layers") from None
    finally:
        pool.shutdown()


def _convert_layer(
    checkpoint: Checkpoint,
    output: OutputDirectory,
    manifest: Manifest,
    layer_idx: int,
    pool: ThreadPoolExecutor,
    stop: StopRequest,
) -> LayerResult:
    """Convert one layer; its file and its manifest entry exist afterwards, or neither does."""
    started = time.monotonic()
    identity = manifest.identity
    layout, method = identity.layout, identity.layout.method
    items = checkpoint.expert_projections(layer_idx)
    final = output.path / layer_file_name(layer_idx)
    with LayerWriter(final, layout, identity.layer_metadata(layer_idx)) as writer:
        if layout.has_tables:
            writer.write_tensor("tables", _ext.int4_tables(method))
        run_all(
            pool,
            [
                functools.partial(
                    quantize.convert_projection,
                    checkpoint,
                    item,
                    identity.input_type,
                    method,
                    writer,
                )
                for item in items
            ],
            stop,
        )
        writer.seal(pool, stop)
        sha256, error = verify.verify_layer_file(
            writer.temporary, layer_idx, layout, checkpoint, identity.input_type, pool, stop
        )
        writer.publish()
    record = LayerRecord(final.name, writer.size, sha256)
    manifest.add(layer_idx, record)
    read_bytes = sum(checkpoint.nbytes(item.weight) for item in items)
    return LayerResult(layer_idx, time.monotonic() - started, read_bytes, record, error)


def progress_line(result: LayerResult, identity: Identity, finished: int, remaining: float) -> str:
    """The line a finished layer prints; ``remaining`` is the time for the rest in seconds."""
    weights = identity.layout.num_weights
    moved = result.read_bytes + result.record.bytes
    seconds = max(result.seconds, 1e-9)
    return (
        f"layer {result.layer_idx}: {finished} of {len(identity.moe_layers)}, "
        f"{gigabytes(result.record.bytes)} in {result.seconds:.1f} s, "
        f"{weights / seconds / 1e6:.1f} M weights/s, {moved / seconds / 1e9:.3f} GB/s, "
        f"error {result.error:.4f}, ETA {duration(remaining)}"
    )


def duration(seconds: float) -> str:
    """``2 h 05 min``, ``3 min 07 s``, ``12 s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole} s"
