"""Garbage collection pauses while large packages are imported, and goes on as it was."""

from __future__ import annotations

import gc

import pytest

from wmh_lora.cli.imports import without_collection


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_off_within_and_as_it_was_after(enabled: bool) -> None:
    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with without_collection():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        (gc.enable if was_enabled else gc.disable)()
