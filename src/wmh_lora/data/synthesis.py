"""Labelled FLAIR-like scans out of anatomies and lesion shapes (domain randomisation).

``anatomy -> deform -> lesions -> paint -> acquire``: each step lives in its own module and draws
from the generator that it is handed, so a seed makes the same scan again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial.transform import Rotation

from wmh_lora.data.acquisition import acquire
from wmh_lora.data.anatomy import FIELD_STEP_MM, Anatomy, Tissue, mni_anatomy
from wmh_lora.data.fields import FloatArray, smooth_field, uniform, upsample
from wmh_lora.data.lesions import MaskBank, draw_lesions, ventricle_distance
from wmh_lora.data.painting import paint
from wmh_lora.data.painting_t1 import paint_t1
from wmh_lora.data.visibility import judge_visibility
from wmh_lora.evaluation.masks import OTHER_PATHOLOGY_LABEL
from wmh_lora.volume import Volume

LabelArray = npt.NDArray[np.uint8]

STRUCTURES = ("wmh", "ventricles", "brain")

IGNORED = "ignored"
"""Name, among a case's masks, of what is neither lesion nor background."""

LESION_SHARE = 0.4
"""Of a voxel that a lesion fills: readers outline what looks bright in a slice, also where it fills
a little less than half."""

_NORMAL = (Tissue.WHITE_MATTER, Tissue.BRAINSTEM, Tissue.CEREBELLAR_WHITE)
"""What lesions are compared with."""


@dataclass(frozen=True)
class Case:
    """A scan with its labels.

    Attributes
    ----------
    volume
        The scan.
    masks
        Structure name to (I, J, K) float32 in [0, 1]; a structure that nobody drew is absent.
        `IGNORED` may be among them.
    files
        Where they were read from; empty for synthetic scans.
    t1
        A T1 of the same head, on a grid of its own, of synthetic scans that were asked for one.
    """

    volume: Volume
    masks: dict[str, FloatArray]
    files: tuple[Path, ...] = ()
    t1: Volume | None = None

    @property
    def lesion_labels(self) -> LabelArray:
        """(I, J, K) as files hold them: 1 lesion, `OTHER_PATHOLOGY_LABEL` what is ignored."""
        labels = self.masks["wmh"].astype(np.uint8)
        if IGNORED in self.masks:
            labels[self.masks[IGNORED] > 0] = OTHER_PATHOLOGY_LABEL
        return labels


def synthesize(
    rng: np.random.Generator, anatomy: Anatomy, bank: MaskBank | None, *, with_t1: bool = False
) -> Case:
    """Make one labelled scan.

    Parameters
    ----------
    rng
        Source of randomness: the same state makes the same scan.
    anatomy
        Whose tissues to deform and paint.
    bank
        Real lesion masks to lay in, or None for vascular patterns alone.
    with_t1
        Make a T1 of the head as well; it does not change the FLAIR.

    Returns
    -------
    Case
        All three of :data:`STRUCTURES`, on the scan's grid, and what of the lesions is too faint
        there to tell (`IGNORED`).
    """
    return synthesize_with_normal(rng, anatomy, bank, with_t1=with_t1)[0]


def synthesize_with_normal(
    rng: np.random.Generator, anatomy: Anatomy, bank: MaskBank | None, *, with_t1: bool = False
) -> tuple[Case, npt.NDArray[np.bool_]]:
    """Return what `synthesize` does, and (I, J, K) where white matter is no lesion."""
    tissue, to_mni_mm = deform(rng, anatomy)
    distance_mm = ventricle_distance(tissue)
    lesions = draw_lesions(rng, tissue, to_mni_mm, distance_mm, bank)
    painted, reference = paint(rng, tissue, lesions, distance_mm, to_mni_mm)
    solid = ((tissue > Tissue.CSF) & (tissue < Tissue.BONE)).astype(np.float32)
    smooth = ndimage.gaussian_filter(solid, 2.5)
    keep = None
    if not anatomy.has_head or rng.random() < 0.45:
        keep = _brain_extraction(rng, smooth)
    masks = np.stack(
        [reference, tissue == Tissue.VENTRICLE, smooth > 0.35, np.isin(tissue, _NORMAL)],
        dtype=np.float32,
        casting="unsafe",
    )
    scan = acquire(rng, painted, masks, keep)
    volume = Volume(scan.image, scan.affine)
    least = np.array([LESION_SHARE, 0.5, 0.5, 0.5])[:, None, None, None]
    lesion, *structures, normal = scan.masks > least
    visible, doubtful = judge_visibility(scan.image, lesion, normal, volume.spacing_mm)
    named = dict(zip((*STRUCTURES, IGNORED), (visible, *structures, doubtful), strict=True))
    t1 = _acquire_t1(rng.spawn(1)[0], tissue, lesions, keep) if with_t1 else None
    case = Case(volume, {name: mask.astype(np.float32) for name, mask in named.items()}, t1=t1)
    return case, normal & ~lesion


def _acquire_t1(
    rng: np.random.Generator, tissue: LabelArray, lesions: FloatArray, keep: FloatArray | None
) -> Volume:
    """Paint and acquire the T1 of a head, which has moved a little since the FLAIR."""
    painted = paint_t1(rng, tissue, lesions)
    kept = keep if rng.random() < 0.5 else None
    scan = acquire(rng, painted, np.empty((0, *painted.shape), np.float32), kept)
    movement = np.eye(4)
    turn = Rotation.from_rotvec(rng.normal(0.0, np.deg2rad(0.4), 3)).as_matrix()
    middle = (np.array(painted.shape) - 1) / 2
    movement[:3, :3] = turn
    movement[:3, 3] = middle - turn @ middle + rng.normal(0.0, 0.4, 3)
    return Volume(scan.image, movement @ scan.affine)


_NODE_MM = 4
"""Between the nodes of the coarse fields that move an anatomy."""

_ROOM = 0.1
"""Of an anatomy's width and depth, added at each side, so that no turned head is cut off there."""

_AIR_NODES = 2
"""Nodes of air that are kept at each side of what was moved."""


def deform(rng: np.random.Generator, anatomy: Anatomy) -> tuple[LabelArray, FloatArray]:
    """Pose, stretch and bend an anatomy, and widen or narrow its ventricles.

    Returns
    -------
    tissue : array (X, Y, Z) uint8
        Deformed labels, cut below and above at random.
    to_mni_mm : array (3, x, y, z) float32
        The anatomy's field to MNI millimetres, deformed alike.
    """
    source = anatomy.tissue
    cut = int(uniform(rng, 0.0, 0.3) * source.shape[2]) if rng.random() < 0.7 else 0
    top = int(uniform(rng, 0.0, 0.08) * source.shape[2]) if rng.random() < 0.2 else 0
    room = [round(_ROOM * n) for n in source.shape[:2]]
    size_mm = (*(n + 2 * more for n, more in zip(source.shape, room)), source.shape[2] - cut - top)
    axes = [np.arange(-(-(n - 1) // _NODE_MM) + 1, dtype=np.float32) * _NODE_MM for n in size_mm]
    where: FloatArray = np.stack(np.meshgrid(*axes, indexing="ij"))
    where[:2] -= np.reshape(room, (2, 1, 1, 1))
    where[2] += cut
    middle = (np.array(source.shape, dtype=np.float32) - 1)[:, None, None, None] / 2
    where = (np.tensordot(_pose(rng), where - middle, axes=1) + middle).astype(np.float32)
    bend_mm = uniform(rng, 0.0, 3.5)
    nodes = (len(axes[0]), len(axes[1]), len(axes[2]))
    bends = [smooth_field(rng, nodes, uniform(rng, 5.0, 10.0)) for _ in range(3)]
    where += bend_mm * np.stack(bends)
    where += _ventricle_shift(rng, source, where)
    where = _without_air(source, where)
    to_mni = np.stack(
        [
            ndimage.map_coordinates(c, where / FIELD_STEP_MM, order=1, mode="nearest")
            for c in anatomy.to_mni_mm
        ]
    ).astype(np.float32)
    x, y, z = (_NODE_MM * (n - 1) + 1 for n in where.shape[1:])
    tissue = _nearest(source, (upsample(voxel, (x, y, z)) for voxel in where))
    _widen_sulci(rng, tissue)
    return tissue, to_mni


def _without_air(source: LabelArray, where: FloatArray) -> FloatArray:
    """Cut nodes off at the sides that show nothing: they would cost time at every later step."""
    present = _nearest(source, where) != Tissue.AIR
    sides = []
    for axis in (0, 1):
        shown = np.flatnonzero(present.any(axis=(1 - axis, 2)))
        if not shown.size:
            return where
        sides.append(slice(max(0, shown[0] - _AIR_NODES), shown[-1] + _AIR_NODES + 1))
    return np.ascontiguousarray(where[:, sides[0], sides[1]])


def _nearest(source: LabelArray, where: Iterable[FloatArray]) -> LabelArray:
    """Look up labels at fractional voxels, an array of coordinates for each axis; air beyond."""
    flat: npt.NDArray[np.int64] | int = 0
    outside: npt.NDArray[np.bool_] | bool = False
    for voxel, size in zip(where, source.shape):
        index = np.rint(voxel).astype(np.int64)
        outside = outside | (index < 0) | (index >= size)
        flat = flat * size + np.clip(index, 0, size - 1)
    found = source.ravel()[flat]
    found[outside] = Tissue.AIR
    return found


def _widen_sulci(rng: np.random.Generator, tissue: LabelArray) -> None:
    """Let fluid take the outermost millimetre of cortex here and there, as with age."""
    if rng.random() < 0.6:
        return
    cortex = tissue == Tissue.CORTEX
    outer = ndimage.binary_dilation(tissue == Tissue.CSF) & cortex
    shape = (tissue.shape[0], tissue.shape[1], tissue.shape[2])
    tissue[outer & (smooth_field(rng, shape, 20.0) > uniform(rng, -1.0, 1.0))] = Tissue.CSF


def _pose(rng: np.random.Generator) -> FloatArray:
    """Draw a rotation (nodding most), unequal scales and some shear; half are mirrored."""
    angles = np.deg2rad(rng.normal(0.0, [8.0, 5.0, 7.0]))
    matrix = np.diag(np.exp(rng.normal(0.0, 0.06, 3)))
    for axis, angle in enumerate(angles):
        i, j = [a for a in range(3) if a != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    matrix = matrix + rng.normal(0.0, 0.02, (3, 3))
    if rng.random() < 0.5:
        matrix[:, 0] *= -1.0  # left and right are alike
    return matrix.astype(np.float32)


def _ventricle_shift(rng: np.random.Generator, source: LabelArray, where: FloatArray) -> FloatArray:
    """Return (3, x, y, z) a shift towards the ventricles: they grow, as with age, or shrink."""
    growth_mm = 12.0 * rng.random() ** 2 - 2.0 if rng.random() < 0.75 else 0.0
    coarse = ndimage.distance_transform_edt(source[::4, ::4, ::4] != Tissue.VENTRICLE) * 4.0
    slope = np.stack(np.gradient(ndimage.gaussian_filter(coarse, 1.0), 4.0))
    at = where / 4.0
    distance = ndimage.map_coordinates(coarse, at, order=1, mode="nearest")
    pull = growth_mm * np.exp(-distance / 12.0)
    return np.stack(
        [-pull * ndimage.map_coordinates(s, at, order=1, mode="nearest") for s in slope]
    ).astype(np.float32)


def _brain_extraction(rng: np.random.Generator, smooth: FloatArray) -> FloatArray:
    """Imitate a brain extraction, tight or generous, with a ragged edge."""
    shape = (smooth.shape[0], smooth.shape[1], smooth.shape[2])
    level = uniform(rng, 0.12, 0.6)
    ragged = uniform(rng, 0.0, 0.12) * smooth_field(rng, shape, uniform(rng, 4.0, 12.0))
    return (smooth + ragged > level).astype(np.float32)


def demo_case(seed: int) -> tuple[FloatArray, npt.NDArray[np.float64], LabelArray]:
    """Make the scan of ``wmh-lora demo``: MNI152 anatomy with vascular lesions.

    Seed 45 gives 3 mm slices with 12 mL of clearly visible lesions.

    Returns
    -------
    image : array (I, J, K) float32
    affine : array (4, 4) float64
    reference_labels : array (I, J, K) uint8
        1 lesion, `OTHER_PATHOLOGY_LABEL` where the scan does not tell.
    """
    case = synthesize(np.random.default_rng(seed), mni_anatomy(), None)
    return case.volume.data, case.volume.affine, case.lesion_labels
