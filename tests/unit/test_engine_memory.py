"""Batches within a limit of memory."""

from __future__ import annotations

import mmap
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.phantoms import brightness_model, head
from wmh_lora import engine_memory
from wmh_lora.engine import WMHInferenceEngine
from wmh_lora.engine_looks import Looks
from wmh_lora.engine_memory import ScanSize, batch_within, looks_within, resident_bytes
from wmh_lora.errors import ConfigError
from wmh_lora.logs import collect_warnings
from wmh_lora.sizes import format_size, parse_size

SCAN = ScanSize(
    voxels=256 * 256 * 40,
    slices=40,
    pixels=224 * 192,
    turned_pixels=120 * 224,
    views=1,
    looks=Looks(),
)


@pytest.fixture(autouse=True)
def _process_of_known_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_memory, "resident_bytes", lambda: 300 * 2**20)


def test_batch_grows_with_the_limit_up_to_what_is_wanted() -> None:
    found = [batch_within(f"{mb}M", SCAN, "litemedsam", 8) for mb in (600, 800, 1000, 4000)]
    assert found == sorted(found)
    assert found[0] < found[-1] == 8


def test_a_small_network_gets_more_slices() -> None:
    assert batch_within("800M", SCAN, "compact", 64) > batch_within("800M", SCAN, "litemedsam", 64)


def test_too_little_says_what_would_do() -> None:
    with pytest.raises(ConfigError, match="one slice at a time") as caught:
        batch_within("350M", SCAN, "litemedsam", 2)
    (enough,) = re.findall(r"it takes (\S+) with", str(caught.value))
    assert batch_within(enough, SCAN, "litemedsam", 2) >= 1


def test_views_take_memory_and_leaving_them_out_is_advised() -> None:
    several = replace(SCAN, views=8)
    assert several.native_bytes > SCAN.native_bytes
    with pytest.raises(ConfigError, match="test-time augmentation"):
        batch_within("310M", several, "compact", 1)


def test_a_larger_look_takes_more_memory() -> None:
    plain, again, larger = (
        replace(SCAN, looks=looks).grid_bytes for looks in (Looks(), Looks(3), Looks(3, 1.5))
    )
    assert plain < again < larger
    once, twice = SCAN, replace(SCAN, looks=Looks(zoom=1.5))
    assert (once.largest_pixels, twice.largest_pixels) == (SCAN.pixels, 2.25 * SCAN.pixels)


def test_slices_of_other_planes_can_be_the_largest() -> None:
    tall = replace(SCAN, turned_pixels=2 * SCAN.pixels)
    assert tall.largest_pixels == SCAN.pixels
    assert replace(tall, looks=Looks(3, 1.2)).largest_pixels == 2 * SCAN.pixels
    assert replace(tall, looks=Looks(3, 1.5)).largest_pixels == 2.25 * SCAN.pixels


def test_sizes_are_those_of_the_prepared_scan() -> None:
    volume, _ = head()
    engine = WMHInferenceEngine(brightness_model(), "cpu")
    prepared = engine.prepare(volume)
    size = ScanSize.of(prepared, 1, Looks(3))
    slices, height, width = prepared.slices.shape
    spacing = prepared.view.spacing_mm[0] / prepared.config.pixel_size_mm
    assert (size.slices, size.pixels) == (slices, height * width)
    assert size.turned_pixels == round(slices * spacing) * max(height, width)


def test_without_room_for_all_looks_one_is_seen_and_it_is_said() -> None:
    isotropic = replace(
        SCAN,
        voxels=512 * 512 * 400,
        slices=400,
        pixels=208 * 176,
        turned_pixels=200 * 208,
        looks=Looks(3),
    )
    with collect_warnings() as warnings:
        assert looks_within("8G", isotropic, "compact", 2) == (Looks(3), 2)
        assert not warnings
        assert looks_within("2G", isotropic, "compact", 2) == (Looks(), 2)
    assert "no room for 3 looks" in warnings[0]
    with pytest.raises(ConfigError, match="one slice at a time"):
        looks_within("400M", isotropic, "compact", 2)


def test_engine_takes_smaller_batches_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    volume, _ = head()
    model = brightness_model(batch_size=6)
    net: Any = model.net
    engine = WMHInferenceEngine(model, "cpu")
    plain = engine.segment(volume)
    monkeypatch.setattr(engine_memory, "_MOST_ACTIVATIONS", 2**20)
    net.seen_shapes.clear()
    limited = engine.segment(volume, max_memory="3000M")
    assert max(shape[0] for shape in net.seen_shapes) < 6
    np.testing.assert_array_equal(limited.probability, plain.probability)
    with pytest.raises(ConfigError, match="within 400M"):
        engine.segment(volume, max_memory="400M")


@pytest.mark.parametrize("text", ["", "2 apples", "-1G", "0", "G", "1e9"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="2G"):
        parse_size(text)


@pytest.mark.parametrize("size_bytes", [1, 5 * 2**20 + 1, 2**30, 2**30 + 1, 123_456_789_012])
def test_written_sizes_are_enough(size_bytes: int) -> None:
    assert size_bytes <= parse_size(format_size(size_bytes)) <= size_bytes * 1.11 + 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system has no /proc")
def test_resident_memory_follows_what_is_held() -> None:
    before = resident_bytes()
    # straight from the system: an allocator might hand out again what other tests have freed
    with mmap.mmap(-1, 64 * 2**20) as held:
        held[:: mmap.PAGESIZE] = b"x" * (len(held) // mmap.PAGESIZE)  # a page exists once used
        assert resident_bytes() - before > 0.9 * len(held)
