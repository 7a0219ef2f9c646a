"""Settings that do not fit the model: `serve` would end after a minute of loading."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.checks.model import check_model_settings
from deploy.checks.result import Status
from deploy.settings.config import load
from kt_kernel.errors import UserError
from tests.deploy.checks.situations import one, situation, tiny
from tests.deploy.helpers import LAPTOP, Prepared

CPU = {"KT_DEVICE": "cpu"}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("KT_NUM_GPU_EXPERTS", "9999", "KT_NUM_GPU_EXPERTS of at most "),
        ("KT_MAX_DEFERRED_EXPERTS_PER_TOKEN", "100", "KT_MAX_DEFERRED_EXPERTS_PER_TOKEN of at "),
        (
            "KT_MODEL_OVERRIDE_ARGS",
            '{"num_hidden_layers": "x", "index_topk": null, "new": 1}',
            "num_hidden_layers in KT_MODEL_OVERRIDE_ARGS to be a number",
        ),
    ],
)
def test_more_than_the_model_has(
    name: str, value: str, expected: str, tmp_path: Path, prepared: Prepared
) -> None:
    result = one(check_model_settings, tmp_path, LAPTOP, **{**CPU, **tiny(prepared), name: value})
    assert result.status is Status.FAIL
    assert result.expected.startswith(expected)


def test_what_fits_passes(tmp_path: Path, prepared: Prepared) -> None:
    more = {"KT_NUM_GPU_EXPERTS": "1", "KT_MODEL_OVERRIDE_ARGS": '{"num_hidden_layers": 2}'}
    result = one(check_model_settings, tmp_path, LAPTOP, **CPU, **tiny(prepared), **more)
    assert result.status is Status.PASS
    assert not [*check_model_settings(situation(tmp_path, LAPTOP, **CPU))]  # no model, no word


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KT_MAX_TOTAL_TOKENS", "3"),
        ("KT_MAX_TOTAL_TOKENS", "9" * 18),
        ("KT_TENSOR_PARALLEL_SIZE", "9" * 23),
        ("KT_CHUNKED_PREFILL_SIZE", "9" * 18),
    ],
)
def test_numbers_that_no_server_takes(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{name}: expected an integer from "):
        load({name: value})
