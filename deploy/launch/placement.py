"""Which experts the GPU keeps: the counts of earlier starts, and what SGLang is told of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.source.config import ModelConfig
from deploy.settings.row import AUTO
from deploy.state import run_directory
from kt_kernel.errors import UserError
from kt_kernel.files.foreign import FileMissing
from kt_kernel.files.safetensors_header import read_header
from kt_kernel.packed import layer_file_name
from kt_kernel.placement.counts import Model, expert_map, share_of
from kt_kernel.placement.counts_file import read_counts

_FINGERPRINT = re.compile("[0-9a-f]{16}")
_MAP_FILE = "serve-expert-map.json"  # in KT_RUN_DIR, made anew at each start


@dataclass(frozen=True)
class Placement:
    """What a server is told.

    Attributes:
        note: how the GPU's experts were chosen, for people.
        path: of the map for ``--init-expert-location``; None leaves experts where they are.
        content: of the map.
    """

    note: str
    path: Path | None = None
    content: bytes = b""


def counts_path(values: Mapping[str, Any], model: Model) -> Path:
    """The file of this model's counts: ``KT_EXPERT_COUNTS``, with ``auto`` resolved.

    Raises:
        UserError: it is auto, and there is no home directory.
    """
    setting = values["KT_EXPERT_COUNTS"]
    if setting != AUTO:
        return Path(setting)
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(cache) if cache else Path.home() / ".cache"
    except RuntimeError:
        raise UserError("there is no home directory: set KT_EXPERT_COUNTS to a file") from None
    # It comes from a file that a stranger may have made: no path, and not empty.
    known = _FINGERPRINT.match(model.fingerprint)
    return folder / "kt-kernel" / f"experts-{known[0] if known else 'unknown'}.json"


def counted_model(values: Mapping[str, Any]) -> Model:
    """What the counts of these weights belong to.

    Raises:
        UserError: model or weights are not there, or damaged.
    """
    dims = ModelConfig(Path(values["KT_MODEL_PATH"])).dims()
    layers = dims.moe_layers()
    if not layers:
        raise UserError(f"the model in {values['KT_MODEL_PATH']} has no layer with routed experts")
    file = Path(values["KT_WEIGHT_PATH"]) / layer_file_name(layers[0])
    return Model(read_header(file).metadata.get("source_fingerprint", ""), dims.num_experts)


def place(values: Mapping[str, Any]) -> Placement:
    """The most used experts first, if there are counts; a warning if not.

    Args:
        values: the settings of ``serve``, with every ``auto`` replaced.
    """
    resident = values["KT_NUM_GPU_EXPERTS"]
    if resident == 0:
        return Placement("KT_EXPERT_PLACEMENT=measured has no effect: KT_NUM_GPU_EXPERTS is 0")
    try:
        layers = ModelConfig(Path(values["KT_MODEL_PATH"])).dims().num_layers
        model = counted_model(values)
        counts = read_counts(counts_path(values, model), model)
        ordered = expert_map(counts, layers, model.num_experts, resident)
    except UserError as error:
        why = f"nothing has been counted yet ({error})" if isinstance(error, FileMissing) else error
        return Placement(
            f"warning: KT_EXPERT_PLACEMENT=measured: {why}; the GPU gets experts 0 to "
            f"{resident - 1} of each layer, as with KT_EXPERT_PLACEMENT=first"
        )
    share = share_of(counts, resident)
    return Placement(
        f"KT_EXPERT_PLACEMENT=measured: the GPU gets the {resident} most used experts of each "
        f"layer, which took {share.measured:.1%} of the {share.pairs} pairs of token and expert "
        f"counted so far; experts 0 to {resident - 1} took {share.first:.1%}",
        run_directory(values["KT_RUN_DIR"]) / _MAP_FILE,
        json.dumps({"physical_to_logical_map": ordered}).encode(),
    )
