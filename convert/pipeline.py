"""Layer after layer: quantise, write aside, read back, rename, record."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Collection, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from convert import preflight, quantize, read_back
from convert.layer_choice import LayerChoice, shown_layers
from convert.loss_report import Cost, check_report_path, make_report, summary, write_report
from convert.manifest import Identity, Manifest, changed_files
from convert.manifest_file import LayerRecord, read_description, read_manifest
from convert.output import OutputDirectory
from convert.progress_bar import Progress
from convert.source.checkpoint import Checkpoint
from convert.source.experts import ExpertSource
from convert.source.origin import read_origin
from convert.source_digest import SourceDigest, read_source_digest
from convert.workers import Stopped, StopRequest, run_all, worker_pool
from convert.writer import SOURCE_KEY, TEMPORARY_SUFFIX, LayerWriter, file_bytes, read_digests
from kt_kernel import _ext
from kt_kernel.errors import UserError
from kt_kernel.files.safetensors_header import read_header
from kt_kernel.files.units import gigabytes
from kt_kernel.packed import MANIFEST_NAME, PROJECTIONS, layer_file_name

#: Seconds between two looks at a layer that another process has.
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Options:
    """One conversion; see ``python -m convert --help``."""

    input_path: Path
    input_type: str
    output: Path
    method: str
    threads: int
    nodes: int
    layers: LayerChoice | None = None
    report: Path | None = None


@dataclass(frozen=True)
class LayerResult:
    """What one finished layer cost: seconds and source bytes; and its record."""

    layer_idx: int
    seconds: float
    read_bytes: int
    record: LayerRecord


def identify(source: ExpertSource, method: str, output: Path) -> Identity:
    """Check the source and say what a conversion of it is.

    Raises:
        UserError: the source is not as it should be; names the files that have changed since
            ``output`` was made from it.
    """
    checkpoint = source.checkpoint
    try:
        layout = source.layout(method)
        source.check(layout)
    except UserError as error:
        try:
            found = read_description(read_manifest(output / MANIFEST_NAME))
            changed = changed_files(found, checkpoint.file_digests())
        except UserError:
            changed = ""
        if not changed:
            raise
        raise UserError(f"{error} ({output} was made when {changed} was another)") from None
    layers = checkpoint.dims.moe_layers()
    return Identity(
        fingerprint=checkpoint.fingerprint(),
        layout=layout,
        model_type=checkpoint.dims.model_type,
        moe_layers=tuple(layers),
        quantizer=quantize.quantizer_settings(method),
        input_type=source.format.name,
        files=checkpoint.file_digests(),
        shards={idx: tuple(source.layer_tensors(idx)) for idx in layers},
        origin=read_origin(checkpoint.path),
    )


def convert_checkpoint(
    options: Options,
    stop: StopRequest,
    progress: Progress,
    on_layers: Callable[[int, int], None] = lambda finished, total: None,
) -> None:
    """Convert a checkpoint, or what earlier runs left of it to do.

    Args:
        options: what to convert and how.
        stop: asked between two pieces of work.
        progress: shows it.
        on_layers: is told the finished layers and their total, at the start and after each layer.

    Raises:
        UserError: the source, the output or the disk is not as it should be.
        Stopped: a stop was requested; the message says how much is finished.
    """
    started = time.monotonic()
    say = progress.say
    preflight.check_output_path(options.input_path, options.output)
    if options.report is not None:
        check_report_path(options.report)
    with Checkpoint(options.input_path) as checkpoint:
        source = ExpertSource(checkpoint, options.input_type)
        identity = identify(source, options.method, options.output)
        layout = identity.layout
        wanted = options.layers.of(identity.moe_layers) if options.layers else identity.moe_layers
        say(
            f"source: {options.input_path}, {identity.model_type}, {len(identity.moe_layers)} MoE "
            f"layers of {layout.num_experts} experts, {identity.input_type}"
        )
        shared = options.layers is not None
        pool = worker_pool(options.threads, options.nodes)
        try:
            with OutputDirectory(options.output, shared) as output:
                manifest = Manifest(output.path, identity, output.manifest_lock)
                conversion = _Conversion(source, output, manifest, options, pool, stop, progress)
                cost = conversion.run(wanted, on_layers)
        finally:
            pool.shutdown()
        report = make_report(manifest, cost)
        say(summary(report))
        if options.report is not None:
            say(write_report(options.report, report))
        size = sum(record.bytes for record in manifest.layers.values())
        missing = [idx for idx in identity.moe_layers if idx not in manifest.layers]
        say(
            f"{'done' if not missing else 'this part is done'}: {options.output}, "
            f"{len(manifest.layers)} files, {gigabytes(size)}, "
            f"{layout.bits_per_weight():.3f} bits/weight, {time.monotonic() - started:.1f} s"
        )
        if missing:
            say(f"not converted yet: {len(missing)} layers, {shown_layers(missing)}")


@dataclass
class _Conversion:
    """A run of the command, between the checks and the last line."""

    source: ExpertSource
    output: OutputDirectory
    manifest: Manifest
    options: Options
    pool: ThreadPoolExecutor
    stop: StopRequest
    progress: Progress

    def say(self, line: str) -> None:
        self.progress.say(line)

    def run(self, wanted: Collection[int], on_layers: Callable[[int, int], None]) -> Cost:
        """Bring every wanted layer to its end, here or in another process that has it."""
        identity, output, manifest = self.manifest.identity, self.output, self.manifest
        total = len(identity.moe_layers)
        damage = manifest.load()
        output.check_files(identity)
        if damage:
            self.say(f"{damage}; making it again from the layer files")
        if not output.shared:
            output.remove_temporaries()
        todo = self._survey(wanted)
        if todo:
            output.require_writable()
        finished_before = len(manifest.layers)
        needed = sum(file_bytes(identity.layout, identity.layer_metadata(idx)) for idx in todo)
        free = preflight.check_free_space(output.path, needed)
        self.say(
            f"output: {output.path}, {self.options.method}, {finished_before} of {total} layers "
            f"finished before, {gigabytes(needed)} to write, {gigabytes(free)} free, "
            f"{self.options.threads} threads"
        )
        on_layers(finished_before, total)
        matrices = len(PROJECTIONS) * identity.layout.num_experts
        self.progress.start(len(todo) * matrices)
        seconds, converted, done = 0.0, 0, 0
        try:
            # Closed here, not by the garbage collector: its locks need the directory's file.
            with contextlib.closing(self._in_turn(todo)) as layers:
                for layer_idx in layers:
                    done += 1
                    if layer_idx in manifest.layers:  # by another process
                        self.progress.step(matrices)
                    else:
                        result = self._convert_layer(layer_idx)
                        seconds, converted = seconds + result.seconds, converted + 1
                        remaining = seconds / converted * (len(todo) - done)
                        line = progress_line(result, identity, len(manifest.layers), remaining)
                        self.say(line)
                    on_layers(len(manifest.layers), total)
        except Stopped as stopped:
            raise Stopped(stopped.signum, f"{len(manifest.layers)} of {total} layers") from None
        return Cost(converted, converted * identity.layout.num_weights, seconds)

    def _survey(self, wanted: Collection[int]) -> list[int]:
        """The layers that are to be converted or that another process has."""
        todo = []
        for layer_idx in wanted:
            with self.output.layer_lock(layer_idx) as free:
                if not free or not self._is_finished(layer_idx):
                    todo.append(layer_idx)
        return todo

    def _in_turn(self, todo: list[int]) -> Generator[int]:
        """Each layer with its lock held; those that others have come last.

        A layer that is in the manifest then was finished by another process.
        """
        busy = []
        for layer_idx in todo:
            with self.output.layer_lock(layer_idx) as free:
                if free:
                    self._refresh(layer_idx)
                    yield layer_idx
                else:
                    busy.append(layer_idx)
        if busy:
            self.say(f"another conversion has layers {shown_layers(busy)}: waiting for them")
        for layer_idx in busy:
            while True:
                with self.output.layer_lock(layer_idx) as free:
                    if free:
                        self._refresh(layer_idx)
                        yield layer_idx
                        break
                self.stop.check()
                time.sleep(_POLL_SECONDS)

    def _refresh(self, layer_idx: int) -> None:
        if self.output.shared:
            self.manifest.load()
            self._is_finished(layer_idx)

    def _is_finished(self, layer_idx: int) -> bool:
        """Whether a layer, whose lock is held, is finished; the manifest says so afterwards."""
        manifest = self.manifest
        path = self.output.path / layer_file_name(layer_idx)
        problem = self.output.find_problem(manifest, layer_idx, self.stop)
        record = manifest.layers.get(layer_idx)
        if problem == "":
            try:
                known = record or self._read_back(path, layer_idx)
                problem = self._changed_source(path, layer_idx, known)
                if not problem and record is None:
                    manifest.update({layer_idx: known})
            except UserError as error:
                problem = str(error)
        if problem:
            self.say(f"{problem}; converting layer {layer_idx} again")
            manifest.update(drop=[layer_idx])
        return problem == ""

    def _changed_source(self, path: Path, layer_idx: int, record: LayerRecord) -> str:
        """Name a shard that was written to after the layer and holds other bytes now.

        Like ``make``, this trusts the files' times; ``--verify`` reads everything.
        """
        made = path.stat().st_mtime_ns
        checkpoint = self.source.checkpoint
        tensors = self.source.layer_tensors(layer_idx)
        newer = {
            shard: names
            for shard, names in tensors.items()
            if (checkpoint.path / shard).stat().st_mtime_ns > made
        }
        for shard, names in newer.items():
            found = read_source_digest(checkpoint, names, self.pool, self.stop)
            if found[shard] != record.source.get(shard):
                return (
                    f"{checkpoint.path / shard} has changed since layer {layer_idx} was made "
                    f"from it"
                )
        if newer:
            with contextlib.suppress(OSError):  # the same bytes: the next run need not read them
                os.utime(path)
        return ""

    def _read_back(self, path: Path, layer_idx: int) -> LayerRecord:
        """Compare a file with the source; what the manifest should say of it.

        Raises:
            UserError: the file is not what the source gives.
        """
        layout = self.manifest.identity.layout
        sha256, errors = read_back.verify_layer_file(
            path, layer_idx, layout, self.source, self.pool, self.stop
        )
        header = read_header(path)
        source = read_digests(header, SOURCE_KEY)
        return LayerRecord(
            path.name.removesuffix(TEMPORARY_SUFFIX), header.file_size, sha256, source, errors
        )

    def _convert_layer(self, layer_idx: int) -> LayerResult:
        """Convert one layer; its file and its manifest entry exist afterwards, or neither does."""
        started = time.monotonic()
        identity, source, checkpoint = self.manifest.identity, self.source, self.source.checkpoint
        layout, method = identity.layout, identity.layout.method
        digest = SourceDigest(checkpoint)
        items = source.items(layer_idx)
        final = self.output.path / layer_file_name(layer_idx)
        with LayerWriter(final, layout, identity.layer_metadata(layer_idx)) as writer:
            if layout.has_tables:
                writer.write_tensor("tables", _ext.int4_tables(method))

            def fetch(place: int) -> None:
                for name in source.tensors(items[place]) if place < len(items) else ():
                    checkpoint.fetch(name)

            def convert(place: int) -> None:
                fetch(place + self.options.threads)  # while this one is quantised
                quantize.convert_projection(source, items[place], method, writer, digest)
                for name in source.tensors(items[place]):
                    checkpoint.drop(name)
                self.progress.step()

            tasks = [functools.partial(convert, place) for place in range(len(items))]
            run_all(self.pool, tasks, self.stop)
            writer.seal(self.pool, self.stop, digest.by_shard())
            record = self._read_back(writer.temporary, layer_idx)
            writer.publish()
        self.manifest.update({layer_idx: record})
        read_bytes = sum(checkpoint.nbytes(source.tensors(item)[0]) for item in items)
        return LayerResult(layer_idx, time.monotonic() - started, read_bytes, record)


def progress_line(result: LayerResult, identity: Identity, finished: int, remaining: float) -> str:
    """The line a finished layer prints; ``remaining`` is the time for the rest in seconds."""
    weights = identity.layout.num_weights
    moved = result.read_bytes + result.record.bytes
    seconds = max(result.seconds, 1e-9)
    return (
        f"layer {result.layer_idx}: {finished} of {len(identity.moe_layers)}, "
        f"{gigabytes(result.record.bytes)} in {result.seconds:.1f} s, "
        f"{weights / seconds / 1e6:.1f} M weights/s, {moved / seconds / 1e9:.3f} GB/s, "
        f"error {mean_error(result.record):.4f}, ETA {duration(remaining)}"
    )


def mean_error(record: LayerRecord) -> float:
    """Mean relative error of the sampled matrices."""
    return sum(record.errors.values()) / max(1, len(record.errors))


def duration(seconds: float) -> str:
    """``2 h 05 min``, ``3 min 07 s``, ``12 s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole} s"
