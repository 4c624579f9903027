"""Where lesions are: beside the ventricles or deep in the white matter, and how much of the brain.

The split uses the ventricles that the network marks, on the scan's own grid. Two rules of the
literature are given side by side, because they answer different questions:

* *voxel distance*: a lesion voxel within 10 mm of the ventricles is periventricular, whatever it
  is connected to (DeCarli et al., Stroke 36:50, 2005);
* *component contact*: a 26-connected lesion that touches the ventricles is periventricular as a
  whole, any other is deep (the continuity rule, see Griffanti et al., NeuroImage 170:174, 2018).

Distances run between voxel centres in millimetres, along the scan's own axes and spacing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wmh_lora.lesion_geometry import (
    LesionVoxels,
    axial_diameters_mm,
    distances_mm,
    gaps_mm,
    lesion_voxels,
    surface_distances_mm,
)
from wmh_lora.structures import (
    Structure,
    check_grid,
    cut_faces,
    find_brain,
    find_ventricles,
)

__all__ = [
    "CONTACT_GAP_MM",
    "PERIVENTRICULAR_MM",
    "SIZE_LIMITS_MM",
    "SURFACE_MM",
    "SURFACE_SEARCH_MM",
    "FazekasEstimate",
    "LesionLocation",
    "RegionVolumes",
    "Regions",
    "SizeClass",
    "locate_lesions",
]

FloatArray = NDArray[np.float64]
Region = Literal["periventricular", "deep"]

PERIVENTRICULAR_MM = 10.0
"""Voxel distance rule: up to this far from the ventricles is periventricular."""
CONTACT_GAP_MM = 1.0
"""Component contact rule: up to this much other tissue between lesion and ventricles is contact."""
SURFACE_MM = 5.0
"""Lesions up to this far from the surface of the brain mask count as near it."""
SURFACE_SEARCH_MM = 15.0
"""The distance to that surface is looked for up to here."""
SIZE_LIMITS_MM = (3.0, 10.0, 20.0)
"""Diameters between the classes of lesion size."""

_FAZEKAS_PERIVENTRICULAR_MM = (5.0, 10.0)
_FAZEKAS_DEEP_MM = (10.0, 20.0)
_FAZEKAS_SMALLEST_ML = 0.01
_FAZEKAS_RULE = (
    "Estimate, not a reading. Periventricular: 95th percentile of the distance to the ventricles "
    f"over the voxels of lesions in contact; below {_FAZEKAS_PERIVENTRICULAR_MM[0]:g} mm 1, below "
    f"{_FAZEKAS_PERIVENTRICULAR_MM[1]:g} mm 2, else 3. Deep: largest axial diameter of a lesion "
    f"without contact; below {_FAZEKAS_DEEP_MM[0]:g} mm 1, below {_FAZEKAS_DEEP_MM[1]:g} mm 2, "
    f"else 3. Below {_FAZEKAS_SMALLEST_ML:g} mL 0. The limits are this package's."
)
_NO_INFRATENTORIAL = "the model marks neither cerebellum nor brain stem"


@dataclass(frozen=True)
class LesionLocation:
    """Where one lesion is, and how sure the network is of it.

    Attributes
    ----------
    index : int
        `Lesion.index` of the same mask: 1 is the largest lesion.
    volume_ml : float
        Volume in millilitres.
    diameter_mm : float
        Largest diameter within one axial slice, voxel size included.
    region : {"periventricular", "deep"} or None
        By the component contact rule; None without ventricles.
    within_10mm_ml : float or None
        Volume of its voxels that are periventricular by the voxel distance rule.
    distance_to_ventricles_mm : float or None
        Smallest distance between voxel centres; 0 where the masks overlap.
    distance_to_brain_surface_mm : float or None
        Smallest distance to the surface of the brain mask, which is not the cortex; None beyond
        `SURFACE_SEARCH_MM`.
    mean_probability, max_probability : float or None
        Of its voxels, in [0, 1].
    mean_uncertainty : float or None
        Mean standard deviation of the probability over views and looks.
    """

    index: int
    volume_ml: float
    diameter_mm: float
    region: Region | None
    within_10mm_ml: float | None
    distance_to_ventricles_mm: float | None
    distance_to_brain_surface_mm: float | None
    mean_probability: float | None
    max_probability: float | None
    mean_uncertainty: float | None


@dataclass(frozen=True)
class RegionVolumes:
    """Lesion volume by region under one rule; counts where the rule takes whole lesions."""

    periventricular_ml: float
    deep_ml: float
    periventricular_count: int | None = None
    deep_count: int | None = None


@dataclass(frozen=True)
class SizeClass:
    """Lesions whose axial diameter lies from ``from_mm`` to below ``below_mm`` (None: no limit)."""

    from_mm: float
    below_mm: float | None
    count: int
    volume_ml: float


@dataclass(frozen=True)
class FazekasEstimate:
    """Grades 0 to 3 in the manner of Fazekas et al. (AJR 149:351, 1987), from geometry alone.

    A visual rating judges shape (caps, halo, confluence); this is a ruler, and says so in `rule`.
    """

    periventricular: int
    deep: int
    periventricular_reach_mm: float
    deep_diameter_mm: float
    rule: str = _FAZEKAS_RULE


@dataclass(frozen=True)
class Regions:
    """Where the lesions of one scan are.

    Attributes
    ----------
    icv_ml : float or None
        Volume of the brain mask with its holes filled, fluid on the surface left out in part; it
        stands in for the intracranial volume.
    wmh_percent_of_icv : float or None
        Lesion volume as a percentage of it.
    ventricles_ml : float or None
        Volume of the ventricles.
    voxel_distance_10mm, component_contact : RegionVolumes or None
        The split by each rule.
    fazekas : FazekasEstimate or None
        Estimated grades.
    sizes : tuple of SizeClass
        Distribution of lesion size, the smallest class first.
    near_surface_count : int or None
        Lesions within `SURFACE_MM` of the surface of the brain mask: candidates for juxtacortical
        lesions, and for false ones.
    infratentorial_count : None
        Never known, see ``unavailable``.
    lesions : tuple of LesionLocation
        In the order of `describe_lesions`.
    unavailable : mapping of str to str
        Why a value above is None, by its name.
    """

    icv_ml: float | None
    wmh_percent_of_icv: float | None
    ventricles_ml: float | None
    voxel_distance_10mm: RegionVolumes | None
    component_contact: RegionVolumes | None
    fazekas: FazekasEstimate | None
    sizes: tuple[SizeClass, ...]
    near_surface_count: int | None
    infratentorial_count: None
    lesions: tuple[LesionLocation, ...]
    unavailable: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values, rounded well below measurement error."""
        rounded: dict[str, Any] = _rounded(asdict(self))
        return rounded


def locate_lesions(
    mask: NDArray[Any],
    affine: NDArray[np.float64],
    structure_masks: Mapping[str, NDArray[Any]],
    *,
    probability: NDArray[Any] | None = None,
    uncertainty: NDArray[Any] | None = None,
    contact_gap_mm: float = CONTACT_GAP_MM,
) -> Regions:
    """Say for each lesion and for the whole mask where the lesions are.

    Parameters
    ----------
    mask : array (I, J, K)
        Lesions are non-zero.
    affine : array (4, 4)
        Voxel indices to scanner millimetres (right, anterior, superior).
    structure_masks : mapping of str to array (I, J, K)
        ``"ventricles"`` and ``"brain"``, non-zero inside; either may be absent.
    probability, uncertainty : array (I, J, K), optional
        Lesion probability and its standard deviation over views and looks.
    contact_gap_mm : float
        Up to this much other tissue between a lesion and the ventricles is contact.

    Returns
    -------
    Regions
        What the structures do not allow to be known is None, with the reason in ``unavailable``.

    Raises
    ------
    DataError
        If the mask is not 3-D.
    GridMismatchError
        If an array has another shape than the mask.

    Examples
    --------
    >>> mask, ventricles = np.zeros((2, 40, 40, 40), np.uint8)
    >>> ventricles[10:30, 10:30, 10:30] = 1
    >>> mask[30:32, 20, 20] = mask[38, 20, 20] = 1
    >>> found = locate_lesions(mask, np.eye(4), {"ventricles": ventricles})
    >>> [(lesion.region, lesion.distance_to_ventricles_mm) for lesion in found.lesions]
    [('periventricular', 1.0), ('deep', 9.0)]
    >>> found.voxel_distance_10mm.deep_ml, found.unavailable["icv_ml"]
    (0.0, 'the model does not mark the brain')
    """
    extra = {"probability": probability, "uncertainty": uncertainty}
    maps = {name: values for name, values in extra.items() if values is not None}
    check_grid(mask.shape, {**structure_masks, **maps})
    affine = np.asarray(affine, dtype=np.float64)
    voxels = lesion_voxels(mask, affine)
    brain = find_brain(structure_masks, affine)
    ventricles = find_ventricles(structure_masks, affine, brain.mask)
    to_ventricles = gap = to_surface = None
    if ventricles.mask is not None:
        to_ventricles = distances_mm(voxels, ventricles.mask)
        gap = gaps_mm(voxels, ventricles.mask)
    if brain.mask is not None:
        to_surface = surface_distances_mm(voxels, brain.mask, SURFACE_SEARCH_MM)
    located = _lesion_rows(voxels, to_ventricles, gap, to_surface, maps, contact_gap_mm)
    return _totals(located, voxels, to_ventricles, brain, ventricles)


def _lesion_rows(
    voxels: LesionVoxels,
    to_ventricles: FloatArray | None,
    gap: FloatArray | None,
    to_surface: FloatArray | None,
    maps: Mapping[str, NDArray[Any]],
    contact_gap_mm: float,
) -> tuple[LesionLocation, ...]:
    at = tuple(voxels.indices)
    values = {name: np.asarray(array[at], dtype=np.float64) for name, array in maps.items()}
    sizes = np.bincount(voxels.owner, minlength=len(voxels.lesions))

    def column(operation: np.ufunc, array: NDArray[Any] | None, mean: bool = False) -> list[Any]:
        if array is None:
            return [None] * len(voxels.lesions)
        reduced = voxels.reduce(operation, array)
        listed: list[Any] = (reduced / sizes if mean else reduced).tolist()
        return listed

    def region(gap_mm: float) -> Region:
        return "periventricular" if gap_mm <= contact_gap_mm else "deep"

    near = None if to_ventricles is None else (to_ventricles <= PERIVENTRICULAR_MM).astype(float)
    columns = zip(
        voxels.lesions,
        axial_diameters_mm(voxels).tolist(),
        [None if mm is None else region(mm) for mm in column(np.minimum, gap)],
        column(np.add, None if near is None else near * voxels.voxel_ml),
        column(np.minimum, to_ventricles),
        [None if mm == np.inf else mm for mm in column(np.minimum, to_surface)],
        column(np.add, values.get("probability"), mean=True),
        column(np.maximum, values.get("probability")),
        column(np.add, values.get("uncertainty"), mean=True),
    )
    return tuple(
        LesionLocation(lesion.index, lesion.volume_ml, diameter, place, *rest)
        for lesion, diameter, place, *rest in columns
    )


def _totals(
    located: tuple[LesionLocation, ...],
    voxels: LesionVoxels,
    to_ventricles: FloatArray | None,
    brain: Structure,
    ventricles: Structure,
) -> Regions:
    unavailable = {"infratentorial_count": _NO_INFRATENTORIAL}
    icv_ml = brain.volume_ml if brain.mask is not None else None
    if brain.mask is not None and (cut := cut_faces(brain.mask, voxels.affine)):
        icv_ml, reason = None, f"the image cuts the brain off ({', '.join(cut)})"
        unavailable |= dict.fromkeys(("icv_ml", "wmh_percent_of_icv"), reason)
    elif brain.mask is None:
        of_brain = ("icv_ml", "wmh_percent_of_icv", "near_surface_count")
        unavailable |= dict.fromkeys(of_brain, str(brain.reason))
    by_distance = by_contact = fazekas = None
    if to_ventricles is None:
        names = ("ventricles_ml", "voxel_distance_10mm", "component_contact", "fazekas")
        unavailable |= dict.fromkeys(names, str(ventricles.reason))
    else:
        by_contact = _contact_volumes(located)
        near = int(np.sum(to_ventricles <= PERIVENTRICULAR_MM))
        far = len(to_ventricles) - near
        by_distance = RegionVolumes(near * voxels.voxel_ml, far * voxels.voxel_ml)
        fazekas = _fazekas(located, by_contact, voxels, to_ventricles)
    surface_mm = (lesion.distance_to_brain_surface_mm for lesion in located)
    near_surface = sum(mm is not None and mm <= SURFACE_MM for mm in surface_mm)
    total_ml = len(voxels.owner) * voxels.voxel_ml
    return Regions(
        icv_ml=icv_ml,
        wmh_percent_of_icv=None if icv_ml is None else 100.0 * total_ml / icv_ml,
        ventricles_ml=ventricles.volume_ml if ventricles.mask is not None else None,
        voxel_distance_10mm=by_distance,
        component_contact=by_contact,
        fazekas=fazekas,
        sizes=_size_classes(located),
        near_surface_count=None if brain.mask is None else near_surface,
        infratentorial_count=None,
        lesions=located,
        unavailable=unavailable,
    )


def _contact_volumes(located: Sequence[LesionLocation]) -> RegionVolumes:
    touching = [lesion.volume_ml for lesion in located if lesion.region == "periventricular"]
    others = [lesion.volume_ml for lesion in located if lesion.region == "deep"]
    return RegionVolumes(sum(touching), sum(others), len(touching), len(others))


def _fazekas(
    located: Sequence[LesionLocation],
    volumes: RegionVolumes,
    voxels: LesionVoxels,
    to_ventricles: FloatArray,
) -> FazekasEstimate:
    touching = np.array([lesion.region == "periventricular" for lesion in located], dtype=bool)
    reach = diameter = None  # of no such lesion; a reach of zero is one inside the ventricles' mask
    if volumes.periventricular_ml >= _FAZEKAS_SMALLEST_ML:
        reach = float(np.percentile(to_ventricles[touching[voxels.owner]], 95.0))
    if volumes.deep_ml >= _FAZEKAS_SMALLEST_ML:
        diameter = max(lesion.diameter_mm for lesion in located if lesion.region == "deep")
    return FazekasEstimate(
        periventricular=_grade(reach, _FAZEKAS_PERIVENTRICULAR_MM),
        deep=_grade(diameter, _FAZEKAS_DEEP_MM),
        periventricular_reach_mm=reach or 0.0,
        deep_diameter_mm=diameter or 0.0,
    )


def _grade(length_mm: float | None, limits_mm: Sequence[float]) -> int:
    if length_mm is None:
        return 0
    return 1 + sum(length_mm >= limit for limit in limits_mm)


def _size_classes(located: Sequence[LesionLocation]) -> tuple[SizeClass, ...]:
    lows = (0.0, *SIZE_LIMITS_MM)
    number = np.searchsorted(lows, [x.diameter_mm for x in located], side="right") - 1
    volumes = np.array([x.volume_ml for x in located])
    return tuple(
        SizeClass(low, high, int(np.sum(number == n)), float(volumes[number == n].sum()))
        for n, (low, high) in enumerate(zip(lows, (*SIZE_LIMITS_MM, None)))
    )


def _rounded(value: Any) -> Any:
    """Round every float in nested plain containers to six decimals."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return value
