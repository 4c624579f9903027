"""Planes are turned as a scan is viewed; what further looks find is averaged in its place."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, inv_ornt_aff
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.phantoms import brightness_model
from wmh_lora.config import PreprocessConfig
from wmh_lora.engine import WMHInferenceEngine
from wmh_lora.engine_looks import Looks, See, Stack, average_looks, whole_stack
from wmh_lora.engine_views import SliceMaps
from wmh_lora.models.registry import Model
from wmh_lora.preprocess import Prepared, preprocess
from wmh_lora.view import PLANES, Plane, choose_view, turn_planes
from wmh_lora.volume import Volume

CONFIG = PreprocessConfig(pixel_size_mm=3.0, margin_mm=6.0, multiple_px=8)
LESIONS = (
    (slice(22, 27), slice(30, 35), slice(24, 29)),
    (slice(34, 37), slice(20, 23), slice(12, 15)),
)


def isotropic_head(spacing_mm: tuple[float, float, float] = (3.0, 3.0, 3.0)) -> Volume:
    """An ellipsoid with a dark core and two lesions, of other extents along every axis."""
    shape = tuple(round(length / step) for length, step in zip((180, 210, 165), spacing_mm))
    x, y, z = np.meshgrid(*(np.linspace(-1.2, 1.2, n) for n in shape), indexing="ij")
    data = np.where(x**2 + y**2 + z**2 < 1.0, 300.0, 0.0)
    data[(np.abs(x) < 0.15) & (np.abs(y) < 0.35) & (np.abs(z) < 0.3)] = 60.0
    if spacing_mm == (3.0, 3.0, 3.0):
        for box in LESIONS:
            data[box] = 640.0
    noise = np.random.default_rng(0).normal(0.0, 4.0, shape)
    return Volume((data + noise).astype(np.float32), np.diag([*spacing_mm, 1.0]))


def bright(slices: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a network would say that looks at single pixels."""
    return np.asarray(1.0 / (1.0 + np.exp(-40.0 * (slices - 0.6))), np.float32)


def seen_as_bright(stack: Stack, shown: NDArray[np.bool_] | None) -> SliceMaps:
    probability = bright(stack.slices)
    if shown is not None:
        probability[~shown] = 0.0
    return SliceMaps(probability, None, {})


def _average(
    prepared: Prepared, first: SliceMaps, see: See, *, evidence_only: bool, **looks: Any
) -> SliceMaps:
    stack = whole_stack(prepared)
    chosen = Looks(**(looks or {"planes": 3}))
    return average_looks(stack, prepared, first, see, chosen, evidence_only=evidence_only)


def as_shown(stack: Stack, shown: NDArray[np.bool_] | None) -> SliceMaps:
    """What a network would say that repeats its picture."""
    return SliceMaps(stack.slices.copy(), None, {})


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA"])
@pytest.mark.parametrize("plane", PLANES)
def test_a_turned_stack_is_the_scan_viewed_in_that_plane(codes: str, plane: Plane) -> None:
    data = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    affine = inv_ornt_aff(axcodes2ornt(tuple(codes)), data.shape)
    volume = Volume(data, affine)
    for shown in PLANES:
        stack = choose_view(volume, 1.0, shown).to_view(data)
        expected = choose_view(volume, 1.0, plane).to_view(data)
        np.testing.assert_array_equal(turn_planes(stack, shown, plane), expected)


def test_a_plane_is_prepared_like_the_usual_one() -> None:
    volume = isotropic_head()
    axial, coronal = preprocess(volume, CONFIG), preprocess(volume, CONFIG, "coronal")
    assert (axial.view.plane, coronal.view.plane) == ("axial", "coronal")
    assert coronal.white_matter == pytest.approx(axial.white_matter, rel=0.02)
    box = LESIONS[0]
    for prepared in (axial, coronal):
        view = prepared.view
        whole = np.zeros(view.shape, np.float32)
        index = tuple(slice(*bounds) for bounds in (view.slices, view.rows, view.columns))
        inside = whole[index]
        inside[...] = prepared.slices[:, : inside.shape[1], : inside.shape[2]]
        native = np.zeros(volume.shape, np.float32)
        view.to_view(native)[...] = whole
        assert native[box].min() > 0.7


@pytest.mark.parametrize("evidence_only", [True, False])
@pytest.mark.parametrize("plane", PLANES)
def test_planes_that_agree_change_nothing(evidence_only: bool, plane: Plane) -> None:
    prepared = preprocess(isotropic_head(), CONFIG, plane)
    first = seen_as_bright(whole_stack(prepared), None)
    averaged = _average(prepared, first, seen_as_bright, evidence_only=evidence_only)
    np.testing.assert_allclose(averaged.probability, first.probability, atol=1e-6)
    assert averaged.deviation is not None
    assert averaged.deviation.max() < 1e-3
    assert (first.probability > 0.9).sum() > 100


@pytest.mark.parametrize("looks", [{"planes": 3}, {"zoom": 1.2}, {"zoom": 2.0}])
def test_slices_on_another_grid_come_back_in_place(looks: dict[str, Any]) -> None:
    prepared = preprocess(isotropic_head((2.0, 3.0, 4.0)), CONFIG)
    assert prepared.view.is_isotropic
    first = SliceMaps(prepared.slices.copy(), None, {})
    averaged = _average(prepared, first, as_shown, evidence_only=False, **looks)
    inner = (slice(6, -6), slice(16, -16), slice(16, -16))
    difference = np.abs(averaged.probability[inner] - first.probability[inner])
    assert difference.mean() < 0.01


def test_what_a_plane_alone_has_found_is_outvoted() -> None:
    prepared = preprocess(isotropic_head(), CONFIG)
    first = seen_as_bright(whole_stack(prepared), None)
    index = np.argwhere((prepared.slices > 0.35) & (prepared.slices < 0.45))[500]
    first.probability[tuple(index)] = 1.0
    averaged = _average(prepared, first, seen_as_bright, evidence_only=True)
    assert averaged.probability[tuple(index)] == pytest.approx(1 / 3, abs=0.01)
    assert averaged.deviation is not None
    assert averaged.deviation[tuple(index)] == pytest.approx(np.sqrt(2) / 3, abs=0.01)


def test_what_disappears_from_closer_by_is_halved() -> None:
    prepared = preprocess(isotropic_head(), CONFIG)
    first = seen_as_bright(whole_stack(prepared), None)
    alone = first.probability.copy()
    normal = (prepared.slices > 0.35) & (prepared.slices < 0.45)
    place = (slice(20, 21), slice(12, 20), slice(12, 20))
    assert normal[place].all()
    first.probability[place] = 1.0
    averaged = _average(prepared, first, seen_as_bright, evidence_only=True, zoom=1.25)
    np.testing.assert_allclose(averaged.probability[place], 0.5, atol=0.01)
    assert averaged.deviation is not None
    np.testing.assert_allclose(averaged.deviation[place], 0.5, atol=0.01)
    sure = alone > 0.999
    assert sure.sum() > 100
    assert averaged.probability[sure].min() > 0.5


@pytest.mark.parametrize("evidence_only", [True, False])
def test_closer_by_only_evidence_is_seen_with_a_margin_around_it(evidence_only: bool) -> None:
    prepared = preprocess(isotropic_head(), CONFIG)
    first = SliceMaps(np.zeros(prepared.slices.shape, np.float32), None, {})
    first.probability[20, 30:32, 24:26] = 0.2
    shown: list[tuple[Stack, NDArray[np.bool_]]] = []

    def see(stack: Stack, marked: NDArray[np.bool_]) -> SliceMaps:
        shown.append((stack, marked))
        probability = np.full(stack.slices.shape, 0.6, np.float32)
        probability[~marked] = 0.0
        return SliceMaps(probability, None, {})

    averaged = _average(prepared, first, see, evidence_only=evidence_only, zoom=1.5)
    ((stack, marked),) = shown
    assert (stack.plane, stack.context_offset) == (prepared.view.plane, prepared.context_offset)
    assert np.flatnonzero(marked).tolist() == [20]
    np.testing.assert_allclose(averaged.probability[20, 30:32, 24:26], 0.4, atol=1e-6)
    margin_px = 16 * 1.5 / 3  # on each side
    for start, size, first_px in (
        (stack.rows, stack.slices.shape[1], 30),
        (stack.columns, stack.slices.shape[2], 24),
    ):
        assert start <= 1.5 * first_px - margin_px + 1
        assert start + size >= 1.5 * (first_px + 2) + margin_px - 1
        assert size % CONFIG.multiple_px == 0
    untouched = np.arange(len(marked)) != 20
    assert not averaged.probability[untouched].any()


@pytest.mark.parametrize(
    ("looks", "evidence_only"),
    [
        ({"planes": 3}, True),
        ({"zoom": 1.2}, True),
        ({"zoom": 1.2}, False),
        ({"planes": 3, "zoom": 1.2}, True),
    ],
)
def test_without_evidence_nothing_further_is_seen(
    looks: dict[str, Any], evidence_only: bool
) -> None:
    prepared = preprocess(isotropic_head(), CONFIG)
    first = SliceMaps(np.full(prepared.slices.shape, 0.05, np.float32), None, {})

    def refuse(stack: Stack, shown: NDArray[np.bool_] | None) -> SliceMaps:
        raise AssertionError(f"{stack.plane} was shown")

    averaged = _average(prepared, first, refuse, evidence_only=evidence_only, **looks)
    np.testing.assert_allclose(averaged.probability, 0.05, atol=1e-6)


class PlaneNet(nn.Module):
    """Counts slices; finds what is bright."""

    seen: list[tuple[int, ...]]

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def forward(self, slices: Tensor) -> Tensor:
        self.seen.append(tuple(slices.shape))
        logits = 40.0 * (slices[:, 1:2] - 0.6)
        return torch.cat([logits, -logits, 20.0 + 0.0 * logits], dim=1)


def _model(**inference: object) -> Model:
    model = brightness_model(**inference)
    card = dataclasses.replace(model.card, preprocess=CONFIG)
    return dataclasses.replace(model, net=PlaneNet(), card=card)


@pytest.mark.parametrize(("tta", "zoom"), [("none", 1.0), ("flip", 1.0), ("none", 1.2)])
def test_the_engine_sees_isotropic_scans_in_all_planes(tta: str, zoom: float) -> None:
    steps: list[tuple[int, int]] = []
    volume = isotropic_head()
    one = WMHInferenceEngine(_model(tta=tta), "cpu").segment(volume)
    model = _model(tta=tta, planes="all", zoom=zoom)
    found = WMHInferenceEngine(model, "cpu").segment(
        volume, progress=lambda done, total: steps.append((done, total))
    )
    if zoom == 1.0:
        np.testing.assert_allclose(found.probability, one.probability, atol=1e-3)
        np.testing.assert_array_equal(found.mask, one.mask)
    for box in LESIONS:
        assert found.mask[box].all()
    assert found.uncertainty is not None
    assert (found.settings["planes"], found.settings["zoom"]) == ("all", zoom)
    whole, *cut = dict.fromkeys(shape[2:] for shape in model.net.seen)  # type: ignore[union-attr]
    assert cut
    assert all(height * width < whole[0] * whole[1] for height, width in cut)
    assert steps[-1][0] == steps[-1][1]
    assert all(before[0] <= after[0] for before, after in itertools.pairwise(steps))


def test_thick_slices_are_seen_in_their_own_plane_alone() -> None:
    volume = isotropic_head((3.0, 3.0, 6.0))
    engine = WMHInferenceEngine(_model(planes="all"), "cpu")
    assert not engine.prepare(volume).view.is_isotropic
    assert engine.segment(volume).uncertainty is None


def test_thick_slices_are_seen_from_closer_by() -> None:
    volume = isotropic_head()
    model = _model(zoom=1.2)  # one plane
    found = WMHInferenceEngine(model, "cpu").segment(volume)
    assert found.settings["zoom"] == 1.2
    assert found.uncertainty is not None
    for box in LESIONS:
        assert found.mask[box].mean() > 0.9
    whole, closer = dict.fromkeys(shape[2:] for shape in model.net.seen)  # type: ignore[union-attr]
    assert closer[0] * closer[1] < whole[0] * whole[1]
    once = WMHInferenceEngine(model, "cpu").segment(volume, zoom=1)
    assert once.uncertainty is None


def test_without_memory_for_further_looks_the_scan_is_seen_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    volume = isotropic_head()
    engine = WMHInferenceEngine(_model(planes="all", zoom=1.2), "cpu")
    monkeypatch.setattr("wmh_lora.engine_memory.resident_bytes", lambda: 0)
    monkeypatch.setattr("wmh_lora.engine_memory._OVERHEAD_BYTES", 0)
    limited = engine.segment(volume, max_memory="20M")
    assert any("gets one" in warning for warning in limited.warnings)
    assert limited.uncertainty is None
    assert (limited.settings["zoom"], limited.settings["used"]["zoom"]) == (1.2, 1.0)
    assert (limited.settings["planes"], limited.settings["used"]["planes"]) == ("all", 1)
    once = engine.segment(volume, planes="one", zoom=1)
    np.testing.assert_array_equal(limited.probability, once.probability)


@pytest.mark.parametrize(
    ("spacing_mm", "given", "expected"),
    [
        ((3.0, 3.0, 3.0), {}, 0.3),
        ((3.0, 3.0, 3.0), {"planes": "one"}, 0.8),
        ((3.0, 3.0, 3.0), {"threshold": 0.6}, 0.6),
        ((3.0, 3.0, 6.0), {}, 0.8),
    ],
)
def test_three_planes_have_a_threshold_of_their_own(
    spacing_mm: tuple[float, float, float], given: dict[str, Any], expected: float
) -> None:
    """A threshold that is given holds however the scan is seen."""
    model = _model(planes="all", threshold=0.8, threshold_three_planes=0.3, min_voxels=0)
    found = WMHInferenceEngine(model, "cpu").segment(isotropic_head(spacing_mm), **given)
    assert found.settings["threshold"] == expected
    np.testing.assert_array_equal(found.mask, found.probability >= np.float32(expected))


def test_closer_by_the_engine_shows_evidence_alone_whether_adaptive_or_not() -> None:
    shown = []
    for adaptive in (True, False):
        model = _model(zoom=1.2)
        WMHInferenceEngine(model, "cpu").segment(isotropic_head(), adaptive=adaptive)
        pictures: dict[tuple[int, ...], int] = {}
        for count, _, *size in model.net.seen:  # type: ignore[union-attr]
            pictures[tuple(size)] = pictures.get(tuple(size), 0) + count
        whole, closer = pictures.values()
        assert closer < whole
        shown.append(closer)
    assert shown[0] == shown[1]


@pytest.mark.parametrize("looks", [{"planes": "all"}, {"zoom": 1.2}])
def test_whole_looks_and_evidence_alone_give_the_same_mask(looks: dict[str, Any]) -> None:
    volume = isotropic_head()
    engine = WMHInferenceEngine(_model(**looks), "cpu")
    quick, whole = (engine.segment(volume, adaptive=adaptive) for adaptive in (True, False))
    np.testing.assert_array_equal(quick.mask, whole.mask)


@pytest.mark.parametrize("evidence_only", [True, False])
def test_a_t1_is_turned_and_enlarged_with_the_scan(evidence_only: bool) -> None:
    prepared = preprocess(isotropic_head(), CONFIG)
    t1 = 1.0 - prepared.slices
    shown = []

    def see(stack: Stack, marked: NDArray[np.bool_] | None) -> SliceMaps:
        assert stack.t1 is not None
        inside = stack.slices > 0  # beyond the picture both are zero
        np.testing.assert_allclose(stack.t1[inside], 1.0 - stack.slices[inside], atol=1e-6)
        shown.append((stack.plane, stack.zoom))
        return seen_as_bright(stack, marked)

    first = seen_as_bright(whole_stack(prepared), None)
    average_looks(
        whole_stack(prepared, t1),
        prepared,
        first,
        see,
        Looks(3, 1.2),
        evidence_only=evidence_only,
    )
    assert shown == [("coronal", 1.0), ("sagittal", 1.0), ("axial", 1.2)]
