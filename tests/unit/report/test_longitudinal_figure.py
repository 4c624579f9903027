"""The picture of a follow-up: a change that matters is shown, however small it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ImageDraw

from tests.followed_heads import FIRST, visit
from wmh_lora.longitudinal.changes import CHANGES
from wmh_lora.longitudinal.study import FollowUp, compare_visits
from wmh_lora.report.longitudinal_figure import COLOURS_RGB, follow_up_figure

GREY = {"not assessable"}  # occurs at the edges of letters, too


@pytest.fixture(scope="module")
def followed() -> FollowUp:
    one = visit("ses-1", FIRST, shape=(40, 48, 36), spacing_mm=(4.0, 4.0, 4.0))
    return compare_visits([one, visit("ses-2", FIRST, shape=(40, 48, 36), spacing_mm=(4, 4, 4))])


@pytest.mark.parametrize("kind", ["new", "vanished"])
def test_what_matters_outranks_what_is_large(followed: FollowUp, kind: str) -> None:
    changes = np.zeros(followed.labels.shape, np.uint8)
    middle: NDArray[np.int_] = np.array(changes.shape) // 2
    changes[tuple(slice(m - 9, m + 10) for m in middle)] = CHANGES["grown"]
    # one voxel, in the slice that shows least of what has grown, whichever way slices lie
    for step in np.vstack([np.eye(3, dtype=int), -np.eye(3, dtype=int)]):
        changes[tuple(middle + step)] = 0
    changes[tuple(middle)] = CHANGES[kind]
    assert shown(followed, changes) >= {"grown", kind}


def test_without_changes_the_lesions_are_shown(followed: FollowUp) -> None:
    stable = np.where(followed.labels > 0, CHANGES["stable"], 0).astype(np.uint8)
    assert stable.any()
    assert shown(followed, stable) - GREY == {"stable"}


def shown(followed: FollowUp, changes: NDArray[np.uint8]) -> set[str]:
    """Kinds whose outlines the picture holds, below title and legend."""
    scan = np.full(changes.shape, 100.0, np.float32)
    picture = np.asarray(follow_up_figure(followed, [scan, scan], changes))[80:]
    return {kind for kind, rgb in COLOURS_RGB.items() if (picture == rgb).all(axis=-1).any()}


def test_the_picture_names_its_interval_and_sides(
    followed: FollowUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text cannot be read back from pixels; what is written is noted instead."""
    written: list[str] = []
    draw_text = ImageDraw.ImageDraw.text

    def noted(self: ImageDraw.ImageDraw, xy: object, text: str, *rest: Any, **options: Any) -> None:
        written.append(text)
        draw_text(self, xy, text, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    less = [replace(v, common_ml=v.volume_ml - 1.0) for v in followed.volumes]
    partly = replace(followed, volumes=tuple(less))
    changes = np.where(followed.labels > 0, CHANGES["stable"], 0).astype(np.uint8)
    scan = np.random.default_rng(0).uniform(0.0, 100.0, changes.shape).astype(np.float32)
    follow_up_figure(partly, [scan, scan], changes)
    assert any(text.startswith("ses-1 to ses-2: +0.00 mL") for text in written)
    assert written.count("R") == written.count("L") >= 2
    assert any(text.startswith("z ") and text.endswith(" mm") for text in written)
    assert any("in common view" in text for text in written)
    assert any("not a medical device" in text for text in written)
