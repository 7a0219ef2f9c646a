"""SGLang finds the plugin."""

import pytest

from kt_kernel.errors import UserError
from kt_kernel.sglang_plugin import check_registered, launch_environment, registration


def test_the_installed_package_announces_the_plugin() -> None:
    check_registered()


def test_a_source_tree_that_was_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "entry_points", lambda **selection: ())
    with pytest.raises(UserError, match="no installed package has the entry point kt_kernel"):
        check_registered()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("restriction", "expected"),
    [
        (None, None),
        ("", None),
        ("kt_kernel", None),
        ("other, kt_kernel", None),
        ("other", "other,kt_kernel"),
    ],
)
def test_a_list_of_plugins_gets_ours(
    device: str, restriction: str | None, expected: str | None
) -> None:
    environ = {} if restriction is None else {"SGLANG_PLUGINS": restriction}
    assert launch_environment(device, environ).get("SGLANG_PLUGINS") == expected
