"""The exception tree, which callers and the exit codes rely on."""

from __future__ import annotations

import pytest

from wmh_lora import errors


@pytest.mark.parametrize(
    ("name", "parent"),
    [
        ("ConfigError", "WMHError"),
        ("DataError", "WMHError"),
        ("GridMismatchError", "DataError"),
        ("UnreadableImageError", "DataError"),
        ("WeightsError", "WMHError"),
        ("ChecksumError", "WeightsError"),
        ("AdapterMismatchError", "WeightsError"),
        ("DeviceError", "WMHError"),
    ],
)
def test_direct_parent(name: str, parent: str) -> None:
    assert getattr(errors, name).__bases__ == (getattr(errors, parent),)


def test_root_is_an_exception_and_all_is_complete() -> None:
    assert errors.WMHError.__bases__ == (Exception,)
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined == set(errors.__all__)
