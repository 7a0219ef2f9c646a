"""``--verify``: checks a finished output, layer by layer, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from convert import read_back
from convert.layer_choice import shown_layers
from convert.manifest import Manifest
from convert.manifest_file import LayerRecord, read_description, read_layers, read_manifest
from convert.output import check_sums
from convert.pipeline import Options, identify
from convert.source.checkpoint import Checkpoint
from convert.source.experts import ExpertSource
from convert.source_digest import read_source_digest
from convert.workers import StopRequest, worker_pool
from convert.writer import hash_file
from kt_kernel.errors import UserError
from kt_kernel.files.foreign import FileMissing
from kt_kernel.files.safetensors_header import read_header
from kt_kernel.files.units import gigabytes
from kt_kernel.packed import MANIFEST_NAME, PackedLayout, check_layer_header, layer_file_name


def verify_output(options: Options, stop: StopRequest, say: Callable[[str], None]) -> None:
    """Check every layer file of an output, and its source if ``options.input_path`` is given.

    Without a source: the manifest, and each file's size, header and SHA-256. With one: also that
    the manifest is of this source, that the bytes each layer was made from are the same still, and
    that a sample of its experts gives these weights.

    Raises:
        UserError: something is not as it should be; says how many layers and which.
        Stopped: a stop was requested.
    """
    try:
        manifest = read_manifest(options.output / MANIFEST_NAME)
    except FileMissing as error:
        raise UserError(f"{error}: --output must be the result of a conversion") from None
    description, records = read_description(manifest), read_layers(manifest)
    layout = description.layout
    moe_layers = description.moe_layers
    wanted = options.layers.of(moe_layers) if options.layers else moe_layers
    with ExitStack() as stack:
        pool = worker_pool(options.threads, options.nodes)
        stack.callback(pool.shutdown)
        source = None
        if options.input_path is not None:
            checkpoint = stack.enter_context(Checkpoint(options.input_path))
            source = ExpertSource(checkpoint, description.input_type)
            identity = identify(source, layout.method, options.output)
            Manifest(options.output, identity).load()
        audit = _Audit(options, layout, source, pool, stop)
        bad = []
        for layer_idx in wanted:
            try:
                say(f"layer {layer_idx}: {audit.check(layer_idx, records.get(layer_idx))}")
            except UserError as error:
                say(f"layer {layer_idx}: BAD: {error}")
                bad.append(layer_idx)
    if bad:
        raise UserError(
            f"{len(bad)} of {len(wanted)} layers of {options.output} are not as they should be "
            f"({shown_layers(bad)}): delete the layer files named above and convert again"
        )
    say(f"verified: {options.output}, {len(wanted)} layers")


@dataclass
class _Audit:
    options: Options
    layout: PackedLayout
    source: ExpertSource | None
    pool: ThreadPoolExecutor
    stop: StopRequest

    def check(self, layer_idx: int, record: LayerRecord | None) -> str:
        """Check one layer; what to say of it.

        Raises:
            UserError: what is wrong with it.
        """
        if record is None:
            raise UserError("it is not converted yet")
        path = self.options.output / layer_file_name(layer_idx)
        self._check_file(path, layer_idx, record)
        said = f"ok, {gigabytes(record.bytes)}"
        if self.source is None:
            return said
        errors = self._check_source(self.source, path, layer_idx, record)
        return f"{said}, source unchanged, error {errors:.4f}"

    def _check_file(self, path: Path, layer_idx: int, record: LayerRecord) -> None:
        header = read_header(path)
        if header.file_size != record.bytes:
            raise UserError(f"{path} has {header.file_size} bytes, expected {record.bytes}")
        check_layer_header(header, self.layout, layer_idx)
        try:
            sha256 = hash_file(path, self.stop)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if sha256 != record.sha256:
            where = check_sums(header, self.stop) or f"{path}: its header"
            raise UserError(f"{where.removesuffix(' does not match its checksum')} has changed")

    def _check_source(
        self, source: ExpertSource, path: Path, layer_idx: int, record: LayerRecord
    ) -> float:
        """Mean error of the sample, which is quantised once more."""
        checkpoint, tensors = source.checkpoint, source.layer_tensors(layer_idx)
        names = [name for shard in tensors.values() for name in shard]
        found = read_source_digest(checkpoint, names, self.pool, self.stop)
        for shard, digest in found.items():
            if digest != record.source.get(shard):
                raise UserError(
                    f"{checkpoint.path / shard} is not what layer {layer_idx} was made from: "
                    f"download that shard again, or convert again if it was replaced on purpose"
                )
        errors = read_back.check_sample(
            path,
            layer_idx,
            self.layout,
            source,
            self.pool,
            self.stop,
        )
        return sum(errors.values()) / len(errors)
