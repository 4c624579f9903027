from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.phantoms import head
from wmh_lora.comparators.brightness import brain_of, brightness_map, choose_k, scale_of
from wmh_lora.config import PreprocessConfig
from wmh_lora.evaluation.metrics import dice
from wmh_lora.preprocess import preprocess, to_model_grid
from wmh_lora.volume import Volume

GRID = PreprocessConfig(pixel_size_mm=2.0, margin_mm=8.0, multiple_px=8)


def _whole_head(
    spread: float = 20.0, lesion: float = 460.0
) -> tuple[Volume, NDArray[np.uint8], NDArray[np.bool_]]:
    """Brain of 300 within dark bone and scalp of 700; a lesion, and where the brain is."""
    shape = (96, 112, 6)
    x, y, z = np.meshgrid(*(np.linspace(-1.2, 1.2, n) for n in shape), indexing="ij")
    radius = np.sqrt(x**2 + y**2 + (0.5 * z) ** 2)
    noise = np.random.default_rng(3).normal(0.0, 1.0, shape)
    brain = radius < 0.8
    data = np.where(radius < 1.0, 20.0, 0.0) + noise
    data[(radius > 0.95) & (radius < 1.1)] = 700.0
    data[brain] = (300.0 + spread * noise)[brain]
    data[(np.abs(x) < 0.15) & (np.abs(y) < 0.3) & brain] = 20.0
    mask = np.zeros(shape, np.uint8)
    mask[30:36, 50:58, 2:4] = 1
    data[mask > 0] = lesion
    volume = Volume(data.astype(np.float32), np.diag([2.0, 2.0, 8.0, 1.0]))
    return volume, mask, np.asarray(brain)


def test_the_brain_is_found_without_bone_and_scalp() -> None:
    volume, _, brain = _whole_head()
    prepared = preprocess(volume, GRID)
    found = brain_of(prepared)
    expected = to_model_grid(brain, prepared) > 0.5
    assert not (found & ~expected).any()
    assert dice(expected, found) > 0.9


def test_a_picture_without_a_brain_has_none() -> None:
    volume, mask = head()
    prepared = preprocess(volume, PreprocessConfig(pixel_size_mm=4.0))
    thin = np.zeros_like(prepared.slices)
    thin[:, ::6, :] = 0.4
    object.__setattr__(prepared, "slices", thin)
    assert not brain_of(prepared).any()
    assert not brightness_map(prepared, 4.0).any()
    assert mask.any()


def test_the_map_counts_spreads_above_white_matter() -> None:
    volume, mask, _ = _whole_head(spread=20.0, lesion=460.0)
    found = brightness_map(preprocess(volume, GRID), 10.0)
    # 460 is 8 spreads of 20 above 300
    assert 10 * np.median(found[mask > 0]) == pytest.approx(8.0, rel=0.15)
    assert found[0].max() == 0  # outside the brain nothing, whatever its brightness


def test_the_multiple_with_the_best_dice_is_chosen() -> None:
    volume, mask, _ = _whole_head()
    grid = [1.0, 2.0, 3.0, 5.0, 6.0, 12.0]
    k = choose_k([("a", volume, mask)], GRID, grid)
    # with noise of one spread, five leave it out; the lesion is eight above
    assert k in (5.0, 6.0)
    found = brightness_map(preprocess(volume, GRID), scale_of(grid)) >= k / scale_of(grid)
    assert dice(mask > 0, found) > 0.95


def test_people_without_lesions_do_not_choose() -> None:
    volume, mask, _ = _whole_head()
    healthy = ("b", volume, np.zeros_like(mask))
    assert choose_k([healthy], GRID, [1.0, 2.0, 3.0]) == 2.0
    both = choose_k([healthy, ("a", volume, mask)], GRID, [1.0, 5.0])
    assert both == choose_k([("a", volume, mask)], GRID, [1.0, 5.0]) == 5.0
