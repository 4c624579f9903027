"""Each check notices what it is for on a phantom, and nothing else changes its mind."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from benchmarks.quality import CHANGES
from tests.unit.test_preprocess import all_axis_codes, stored_as
from wmh_lora.errors import DataError, GridMismatchError
from wmh_lora.quality import QualityReport, assess_quality, check_measures
from wmh_lora.quality_measures import measure_scan
from wmh_lora.volume import Volume

SPACING = (1.0, 1.0, 6.0)
AIR, FLUID, GREY, WHITE, LESION, SCALP, BONE = range(7)
FLAIR = (0.02, 0.1, 1.25, 1.0, 1.8, 1.1, 0.05)
T1 = (0.02, 0.25, 0.7, 1.0, 0.8, 1.3, 0.05)
T2 = (0.02, 2.6, 1.4, 1.0, 1.7, 0.9, 0.05)
CT = (-1000.0, 5.0, 38.0, 30.0, 25.0, 40.0, 1000.0)


@cache
def tissues() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of a head with folds of cortex, its brain and its ventricles; (168, 200, 20)."""
    shape = (168, 200, 20)
    grids = (np.arange(n) - (n - 1) / 2 for n in shape)
    x, y, z = np.meshgrid(*grids, indexing="ij")
    z = z * SPACING[2]
    radius = np.sqrt((x / 68) ** 2 + (y / 84) ** 2 + (z / 56) ** 2)
    folds = np.random.default_rng(5).standard_normal(shape)
    folds = ndimage.gaussian_filter(folds, (1.6, 1.6, 0.4))
    folds /= folds.std()
    labels = np.full(shape, AIR)
    labels[radius < 1.16] = SCALP
    labels[radius < 1.09] = BONE
    labels[radius < 1.0] = WHITE
    labels[(radius < 1.0) & (folds > 1.2 - 0.9 * radius)] = GREY
    labels[(radius > 0.75) & (radius < 1.0) & (folds < -1.1)] = FLUID
    ventricles = (np.abs(np.abs(x) - 10) < 6) & (np.abs(y) < 30) & (np.abs(z) < 20)
    labels[ventricles] = FLUID
    labels[22 + 60 : 28 + 60, 145:152, 9:11] = LESION
    return labels, radius < 1.0, ventricles


def scan(levels=FLAIR, noise: float = 0.025) -> Volume:
    """Paint the head; the affine puts it near the origin."""
    labels = tissues()[0]
    rng = np.random.default_rng(6)
    step = abs(levels[WHITE] - levels[FLUID])
    scale = 1.0 if levels is CT else 300.0
    data = scale * ndimage.gaussian_filter(np.array(levels)[labels], (0.4, 0.4, 0.0))
    data = data + scale * noise * step * rng.standard_normal(data.shape)
    if levels[AIR] >= 0:
        data = np.abs(data)
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = [-84.0, -100.0, -60.0]
    return Volume(data.astype(np.float32), affine)


def report(volume: Volume | None = None, **changes) -> QualityReport:
    labels, brain, ventricles = tissues()
    lesions = (labels == LESION).astype(np.uint8)
    given = {
        "probability": np.where(lesions, np.float32(0.9), np.float32(0.0)),
        "mask": lesions,
        "threshold": 0.35,
        "structure_masks": {
            "brain": brain.astype(np.uint8),
            "ventricles": ventricles.astype(np.uint8),
        },
    }
    return assess_quality(volume or scan(), **{**given, **changes})


def verdicts(found: QualityReport) -> dict[str, str]:
    return {check.name: check.verdict for check in found.checks if check.verdict != "pass"}


def test_a_good_scan_passes_every_check() -> None:
    found = report()
    assert verdicts(found) == {}
    assert found.verdict == "pass"
    assert found.concerns == ()
    unmeasured = [check.name for check in found.checks if check.value is None]
    assert unmeasured == ["agreement"]  # a single view


@pytest.mark.parametrize(
    ("levels", "word"), [(T1, "T1-weighted"), (T2, "T2-weighted"), (CT, "as in CT")]
)
def test_another_contrast_fails_and_is_named(levels, word: str) -> None:
    (contrast,) = (check for check in report(scan(levels)).checks if check.name == "contrast")
    assert contrast.verdict == "fail"
    assert word in contrast.sentence


@pytest.mark.parametrize("levels", [T1, T2])
def test_contrast_is_recognised_without_skull_and_without_masks(levels) -> None:
    volume = scan(levels)
    extracted = replace(volume, data=np.where(tissues()[1], volume.data, np.float32(0.0)))
    found = report(extracted, structure_masks={})
    assert verdicts(found)["contrast"] == "fail"
    flair = scan()
    extracted = replace(flair, data=np.where(tissues()[1], flair.data, np.float32(0.0)))
    assert verdicts(report(extracted)) == {}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_each_change_trips_its_check(name: str) -> None:
    change, check = CHANGES[name]
    volume = scan()
    changed = replace(volume, data=change(volume, np.random.default_rng(0)))
    assert check in verdicts(report(changed))


def test_unsuppressed_fluid() -> None:
    volume = scan()
    ventricles = tissues()[2]
    data = volume.data.copy()
    data[ventricles] = 290.0
    assert "fluid_suppression" in verdicts(report(replace(volume, data=data)))


def test_cut_field_of_view() -> None:
    volume = scan()
    labels, brain, ventricles = tissues()
    masks = {"brain": brain[:, :, 4:], "ventricles": ventricles[:, :, 4:]}
    lesions = labels[:, :, 4:] == LESION
    found = assess_quality(
        Volume(np.ascontiguousarray(volume.data[:, :, 4:]), volume.affine),
        probability=lesions.astype(np.float32),
        mask=lesions,
        threshold=0.35,
        structure_masks=masks,
    )
    assert verdicts(found)["field_of_view"] == "warn"
    (check,) = (check for check in found.checks if check.name == "field_of_view")
    assert "inferior" in check.sentence


@pytest.mark.parametrize(
    ("stretch", "verdict"), [((1, 1, 1.5), "warn"), ((1, 1, 2.2), "fail"), ((1.6, 1.6, 1), "warn")]
)
def test_large_voxels(stretch, verdict: str) -> None:
    volume = scan()
    stretched = Volume(volume.data, volume.affine @ np.diag([*stretch, 1.0]))
    assert verdicts(report(stretched))["voxel_size"] == verdict


def test_brain_that_cannot_be_one() -> None:
    nothing = np.zeros(scan().shape, np.uint8)
    found = report(structure_masks={"brain": nothing, "ventricles": nothing})
    assert verdicts(found) == {"brain": "fail"}
    assert verdicts(report(structure_masks={"brain": tissues()[0] == GREY}))["brain"] == "fail"


def test_missing_values_inside_the_head_count_and_outside_do_not() -> None:
    volume = scan()
    data = volume.data.copy()
    data[~tissues()[1]] = np.nan
    assert "missing_values" not in verdicts(report(replace(volume, data=data)))
    data = volume.data.copy()
    data[70:90, 80:100, 8:12] = np.nan
    assert verdicts(report(replace(volume, data=data)))["missing_values"] == "warn"


def test_lesions_beyond_belief() -> None:
    labels, brain, _ = tissues()
    found = report(mask=brain & (labels == WHITE))
    assert verdicts(found)["lesion_volume"] == "fail"


def test_doubtful_lesions() -> None:
    lesions = tissues()[0] == WHITE
    probability = np.where(lesions, np.float32(0.4), np.float32(0.0))
    found = verdicts(report(probability=probability, mask=lesions))
    assert found["confidence"] == "warn"
    uncertainty = np.full(lesions.shape, 0.3, np.float32)
    assert verdicts(report(uncertainty=uncertainty)) == {"agreement": "warn"}


def test_does_not_depend_on_storage_order_gain_or_offset() -> None:
    volume = scan()
    expected = [check.value for check in check_measures(measure_scan(volume))]
    for codes in list(all_axis_codes())[::17]:
        found = check_measures(measure_scan(stored_as(volume, codes)))
        assert [check.value for check in found] == pytest.approx(expected, abs=1e-4)
    moved = replace(volume, data=volume.data * np.float32(7.0) + np.float32(50.0))
    found = check_measures(measure_scan(moved))
    for check, value in zip(found, expected, strict=True):
        if check.name != "ghosting":  # is relative to zero, as signal is
            assert check.value == pytest.approx(value, abs=2e-3)


def test_report_is_ready_for_json() -> None:
    document = json.loads(json.dumps(report().as_dict(), allow_nan=False))
    assert document["verdict"] == "pass"
    assert set(document["checks"][0]) == {"name", "verdict", "sentence", "value", "limits"}
    assert len({check["name"] for check in document["checks"]}) == len(document["checks"])
    assert all(check["sentence"].endswith((".", "?")) for check in document["checks"])


def test_concerns_list_failures_first() -> None:
    found = report(
        scan(T1),
        probability=np.full(scan().shape, 0.36, np.float32),
        mask=tissues()[0] == WHITE,
    )
    assert found.verdict == "fail"
    order = [check.verdict for check in found.concerns]
    assert order == sorted(order, key=["fail", "warn"].index)


def test_errors() -> None:
    with pytest.raises(GridMismatchError, match="mask map has shape"):
        report(mask=np.zeros((2, 2, 2)))
    with pytest.raises(DataError):
        measure_scan(Volume(np.ones((40, 40, 10), np.float32), np.eye(4)))


@pytest.mark.parametrize("tilt_deg", [20.0, 30.0])
def test_the_volume_of_the_head_is_the_same_under_a_tilted_gantry(tilt_deg: float) -> None:
    upright = scan()
    shear = np.eye(4)
    shear[1, 2] = np.tan(np.deg2rad(tilt_deg))
    tilted = Volume(upright.data, shear @ upright.affine)
    expected = measure_scan(upright).head_ml
    assert measure_scan(tilted).head_ml == pytest.approx(expected, rel=0.02)
