"""The split of lesions by two rules, and what is left open without structures."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from nibabel.orientations import apply_orientation, inv_ornt_aff

from wmh_lora.errors import GridMismatchError
from wmh_lora.postprocess import describe_lesions
from wmh_lora.regions import Regions, locate_lesions

SPACING = (2.0, 2.0, 4.0)
AFFINE = np.diag([*SPACING, 1.0])
VOXEL_ML = 0.016


def head() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """1166 mL of brain inside the image, ventricles of 12.8 mL, and four lesions."""
    shape = (72, 88, 36)
    brain, ventricles, mask = (np.zeros(shape, np.uint8) for _ in range(3))
    brain[8:62, 10:70, 6:31][:, :, :] = 1
    ventricles[30:40, 30:50, 16:20] = 1
    mask[40:50, 32:34, 17] = 1  # touches, and reaches 20 mm out
    mask[30, 52, 20] = 1  # diagonal neighbour but one: 2 mm of tissue in between
    mask[20:23, 20:23, 26:28] = 1  # far off
    mask[8:10, 40, 12] = 1  # at the brain's surface
    return mask, {"ventricles": ventricles, "brain": brain}


def located(**changes) -> Regions:
    mask, structures = head()
    return locate_lesions(mask, AFFINE, {**structures, **changes})


def test_both_rules() -> None:
    found = located()
    by_contact, by_distance = found.component_contact, found.voxel_distance_10mm
    assert by_contact is not None
    assert by_distance is not None
    assert by_contact.periventricular_ml == pytest.approx(20 * VOXEL_ML)
    assert (by_contact.periventricular_count, by_contact.deep_count) == (1, 3)
    # centres 2, 4, 6, 8, 10 mm away, two voxels each; and the single voxel
    assert by_distance.periventricular_ml == pytest.approx(11 * VOXEL_ML)
    total_ml = int(head()[0].sum()) * VOXEL_ML
    for split in (by_contact, by_distance):
        assert split.periventricular_ml + split.deep_ml == pytest.approx(total_ml)


def test_rows_tell_where_each_lesion_is() -> None:
    touching, far, surface, near = located().lesions
    assert [x.region for x in (touching, far, surface, near)] == [
        "periventricular",
        "deep",
        "deep",
        "deep",
    ]
    assert touching.distance_to_ventricles_mm == pytest.approx(2.0)
    assert touching.within_10mm_ml == pytest.approx(10 * VOXEL_ML)
    assert touching.diameter_mm == pytest.approx(20.0, rel=0.03)
    # (0, 3, 1) voxels apart
    assert near.distance_to_ventricles_mm == pytest.approx(np.hypot(6.0, 4.0))
    assert surface.distance_to_brain_surface_mm == 0.0
    assert touching.distance_to_brain_surface_mm is None


def test_contact_does_not_depend_on_slice_thickness() -> None:
    """A lesion in the slice above touches, though its centre is 8 mm away."""
    mask, structures = head()
    mask[:] = 0
    mask[35, 40, 20] = 1
    for thick in (1.0, 8.0):
        scale = 4.0 / thick  # keeps volumes plausible
        affine = np.diag([2.0 * scale**0.5, 2.0 * scale**0.5, thick, 1.0])
        (lesion,) = locate_lesions(mask, affine, structures).lesions
        assert lesion.region == "periventricular"
        assert lesion.distance_to_ventricles_mm == pytest.approx(thick)


def test_totals() -> None:
    found = located()
    assert found.icv_ml == pytest.approx(54 * 60 * 25 * VOXEL_ML)
    assert found.icv_ml is not None
    assert found.ventricles_ml == pytest.approx(800 * VOXEL_ML)
    assert found.wmh_percent_of_icv == pytest.approx(100 * 41 * VOXEL_ML / found.icv_ml)
    assert found.near_surface_count == 1
    assert [(x.from_mm, x.below_mm, x.count) for x in found.sizes] == [
        (0.0, 3.0, 1),
        (3.0, 10.0, 2),
        (10.0, 20.0, 0),
        (20.0, None, 1),
    ]
    assert sum(x.volume_ml for x in found.sizes) == pytest.approx(41 * VOXEL_ML)


@pytest.mark.parametrize(
    ("reach", "wide", "grades"),
    [(0, 0, (0, 0)), (2, 3, (1, 1)), (4, 6, (2, 2)), (10, 14, (3, 3))],
)
def test_grades_follow_reach_and_diameter(reach: int, wide: int, grades: tuple[int, int]) -> None:
    """Lengths in voxels of 2 mm: 4, 8 and 20 mm of reach; 6, 12 and 28 mm of diameter."""
    mask, structures = head()
    mask[:] = 0
    mask[40 : 40 + reach, 35:38, 17:19] = 1
    mask[20 : 20 + wide, 14:16, 26:28] = 1
    estimate = locate_lesions(mask, AFFINE, structures).fazekas
    assert estimate is not None
    assert (estimate.periventricular, estimate.deep) == grades
    assert "Estimate" in estimate.rule


def test_a_lesion_within_the_outlined_ventricles_is_graded() -> None:
    """Both outlines are the network's, and may overlap."""
    _, structures = head()
    mask = np.zeros_like(structures["ventricles"])
    mask[tuple(np.argwhere(structures["ventricles"])[:40].T)] = 1
    estimate = locate_lesions(mask, AFFINE, structures).fazekas
    assert estimate is not None
    assert (estimate.periventricular, estimate.periventricular_reach_mm) == (1, 0.0)


def test_what_is_not_known_says_why() -> None:
    found = locate_lesions(head()[0], AFFINE, {})
    whole = ("icv_ml", "wmh_percent_of_icv", "near_surface_count", "infratentorial_count")
    split = ("ventricles_ml", "voxel_distance_10mm", "component_contact", "fazekas")
    for name in (*whole, *split):
        assert getattr(found, name) is None
        assert "does not mark" in found.unavailable[name] or "neither" in found.unavailable[name]
    assert {x.region for x in found.lesions} == {None}
    assert found.sizes[1].count == 2
    known = located()
    assert set(known.unavailable) == {"infratentorial_count"}


def test_cut_brain_has_no_intracranial_volume() -> None:
    mask, structures = head()
    cut = {name: values[:, :, 12:] for name, values in structures.items()}
    found = locate_lesions(mask[:, :, 12:], AFFINE, cut)
    assert found.icv_ml is None
    assert found.wmh_percent_of_icv is None
    assert found.unavailable["icv_ml"] == "the image cuts the brain off (inferior)"
    assert found.component_contact is not None


def test_probability_and_uncertainty_of_each_lesion() -> None:
    mask, structures = head()
    probability = np.where(mask > 0, 0.5, 0.0).astype(np.float32)
    probability[40, 32, 17] = 0.9
    found = locate_lesions(
        mask, AFFINE, structures, probability=probability, uncertainty=probability / 10
    )
    first = found.lesions[0]
    assert first.max_probability == pytest.approx(0.9)
    assert first.mean_probability == pytest.approx(0.5 + 0.4 / 20)
    assert first.mean_uncertainty == pytest.approx(0.052)


def test_no_lesions() -> None:
    _, structures = head()
    found = locate_lesions(np.zeros((72, 88, 36)), AFFINE, structures)
    assert found.lesions == ()
    assert found.wmh_percent_of_icv == 0.0
    assert found.component_contact is not None
    assert found.component_contact.deep_ml == 0.0
    assert found.fazekas is not None
    assert (found.fazekas.periventricular, found.fazekas.deep) == (0, 0)


def test_does_not_depend_on_the_storage_order() -> None:
    mask, structures = head()
    expected = located()
    rows = [lesion.index for lesion in describe_lesions(mask, AFFINE)]
    assert rows == [lesion.index for lesion in expected.lesions]
    for axes, signs in itertools.product(
        itertools.permutations(range(3)), [(1, 1, 1), (-1, 1, -1), (1, -1, -1)]
    ):
        turn = np.array(list(zip(axes, signs, strict=True)), dtype=float)
        affine = AFFINE @ inv_ornt_aff(turn, mask.shape)
        turned = {name: apply_orientation(values, turn) for name, values in structures.items()}
        found = locate_lesions(apply_orientation(mask, turn), affine, turned)
        assert _flat(found.as_dict()) == pytest.approx(_flat(expected.as_dict()), abs=1e-5)


def _flat(value, prefix: str = "") -> dict[str, object]:
    """Paths to leaves, so that approx compares nested reports."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, x in value.items() for k, v in _flat(x, f"{prefix}/{key}").items()}


def test_is_ready_for_json() -> None:
    text = json.dumps(located().as_dict(), allow_nan=False)
    document = json.loads(text)
    assert document["lesions"][0]["region"] == "periventricular"
    assert document["voxel_distance_10mm"]["periventricular_count"] is None


def test_another_grid_is_refused() -> None:
    with pytest.raises(GridMismatchError, match="brain map has shape"):
        located(brain=np.ones((3, 3, 3)))


def test_rounding_in_the_header_changes_nothing() -> None:
    """The same head, turned by a little, with the affine as float32 headers keep it."""
    mask, structures = np.zeros((72, 88, 36), np.uint8), head()[1]
    mask[41:51, 35, 17] = 1  # a voxel off the ventricles, and its last voxel 22 mm away
    mask[20, 20:25, 26] = 1  # 10 mm long, which a size class begins with
    facts = set()
    for turn_deg in (0.0, *np.random.default_rng(0).uniform(-10.0, 10.0, 12)):
        a = np.deg2rad(turn_deg)
        turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1.0]])
        affine = np.eye(4)
        affine[:3, :3] = (turn @ np.diag((1.0, 2.0, 4.0))).astype(np.float32)
        found = locate_lesions(mask, affine, structures)
        assert found.component_contact is not None
        assert found.voxel_distance_10mm is not None
        assert found.fazekas is not None
        facts.add(
            (
                found.component_contact.periventricular_count,
                round(found.voxel_distance_10mm.periventricular_ml, 4),
                (found.fazekas.periventricular, found.fazekas.deep),
                tuple(size.count for size in found.sizes),
            )
        )
    assert len(facts) == 1
