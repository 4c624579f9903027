"""Anatomies that synthetic scans are painted on: tissue label maps on a 1 mm RAS grid.

Two sources: the MNI152 tissue maps (brain only; packaged, made by ``tools/build_mni_tissues.py``)
and whole-head label maps with FreeSurfer codes, as published with SynthSeg. Every anatomy carries a
field that leads from its voxels to MNI152 millimetres, so that lesion masks drawn in MNI space can
be laid into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from importlib import resources
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wmh_lora.components import largest_component
from wmh_lora.data.registration import register_to_template
from wmh_lora.errors import DataError
from wmh_lora.files import open_atomic
from wmh_lora.volume import Volume

LabelArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

_CEREBELLUM = (7, 8, 46, 47)
_NEEDED = {"cerebellum": _CEREBELLUM, "lateral ventricle": (4, 43)}
"""FreeSurfer codes of what every head has, of the left and the right."""


class Tissue(IntEnum):
    """What a voxel of an anatomy holds."""

    AIR = 0
    CSF = 1
    VENTRICLE = 2
    CORTEX = 3
    WHITE_MATTER = 4
    DEEP_GREY = 5
    PALLIDUM = 6
    LIMBIC = 7
    BRAINSTEM = 8
    CEREBELLAR_CORTEX = 9
    CEREBELLAR_WHITE = 10
    BONE = 11
    MARROW = 12
    SOFT = 13
    SKIN = 14
    OTHER = 15


BRAIN_TISSUES = tuple(range(Tissue.VENTRICLE, Tissue.BONE))
FIELD_STEP_MM = 8
"""Spacing of the nodes of the field that leads to MNI space."""


@dataclass(frozen=True)
class Anatomy:
    """One subject's tissues.

    Attributes
    ----------
    name
        For messages and seeds.
    tissue
        (X, Y, Z) uint8 of :class:`Tissue`, 1 mm, axes to the right, anterior and superior.
    to_mni_mm
        (3, x, y, z) float32: MNI152 millimetres at every eighth voxel.
    has_head
        Whether skull and scalp are there.
    """

    name: str
    tissue: LabelArray
    to_mni_mm: FloatArray
    has_head: bool

    def save(self, path: Path) -> None:
        """Write to an ``.npz`` file."""
        with open_atomic(path, overwrite=True) as stream:
            np.savez_compressed(
                stream, tissue=self.tissue, to_mni_mm=self.to_mni_mm, has_head=self.has_head
            )

    @classmethod
    def load(cls, path: Path) -> Anatomy:
        """Read what :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            return cls(path.stem, stored["tissue"], stored["to_mni_mm"], bool(stored["has_head"]))


@lru_cache(maxsize=1)
def mni_anatomy() -> Anatomy:
    """Return the packaged MNI152 anatomy (brain only)."""
    with resources.as_file(resources.files("wmh_lora") / "assets" / "mni_tissues.nii.gz") as path:
        image = nib.Nifti1Image.from_filename(path)
        tissue = np.asarray(image.dataobj, dtype=np.uint8)
        affine = np.asarray(image.affine)
    return Anatomy("mni152", tissue, _field(affine, tissue.shape), has_head=False)


def head_anatomy(path: Path) -> Anatomy:
    """Read a whole-head label map (FreeSurfer codes, 1 mm) and register it to MNI152.

    Parameters
    ----------
    path
        NIfTI file of integer codes; codes of tissue outside the brain that exceed 255 are wrapped
        in these files (skull reads as 3, marrow as 4), which is undone by where they lie.

    Raises
    ------
    UnreadableImageError
        The file is damaged, or holds no 3-D image.
    DataError
        It has no cerebellum, or no ventricles: it is not the label map of a whole head.
    """
    volume = Volume.read(path)
    for name, needed in _NEEDED.items():
        if not np.isin(volume.data, needed).any():
            listed = ", ".join(map(str, needed))
            raise DataError(
                f"{path} has no {name} (codes {listed}); label maps of whole heads with FreeSurfer "
                "codes are needed: take the file out of the folder."
            )
    image = nib.as_closest_canonical(nib.Nifti1Image(volume.data, volume.affine))
    codes = _crop_neck(np.asarray(image.dataobj, dtype=np.int16))
    tissue = tissues_of_codes(codes)
    return Anatomy(path.name.split(".")[0], tissue, register_anatomy(tissue), True)


def register_anatomy(tissue: LabelArray) -> FloatArray:
    """Find the field of an `Anatomy` that leads from its voxels (X, Y, Z) to MNI152."""
    template = mni_anatomy()
    field = register_to_template(
        _landmark_maps(tissue), _landmark_maps(template.tissue), FIELD_STEP_MM
    )
    # from the template's voxels to millimetres: its grid is 1 mm and axis-aligned
    origin_mm = template.to_mni_mm[:, 0, 0, 0]
    return np.asarray(field + origin_mm[:, None, None, None])


def tissues_of_codes(codes: npt.NDArray[np.int16]) -> LabelArray:
    """Turn FreeSurfer codes of a whole head into :class:`Tissue`."""
    table = {
        Tissue.CSF: (24,),
        Tissue.VENTRICLE: (14, 15, 43, 44, 72, 136, 137, 163, 164),  # with choroid plexus
        Tissue.CORTEX: (42,),
        Tissue.WHITE_MATTER: (25, 41, 57, 77, 85),  # lesions of the donors count as white matter
        Tissue.DEEP_GREY: (10, 11, 12, 26, 28, 49, 50, 51, 58, 60),
        Tissue.PALLIDUM: (13, 52),
        Tissue.LIMBIC: (17, 18, 53, 54),
        Tissue.BRAINSTEM: (16,),
        Tissue.CEREBELLAR_CORTEX: (8, 47),
        Tissue.CEREBELLAR_WHITE: (7, 46),
        Tissue.SOFT: (251,),
        Tissue.SKIN: (255,),
    }
    tissue = np.full(codes.shape, Tissue.OTHER, dtype=np.uint8)
    tissue[codes == 0] = Tissue.AIR
    for name, values in table.items():
        tissue[np.isin(codes, values)] = name
    _resolve_wrapped(codes, tissue)
    return tissue


def _resolve_wrapped(codes: npt.NDArray[np.int16], tissue: LabelArray) -> None:
    """Tell left-hemisphere codes 2 to 5 from head tissues stored under the same numbers."""
    # opened first: dural sinuses share the code and touch white matter here and there
    core = largest_component(ndimage.binary_erosion(codes == 2, iterations=2))
    white = ndimage.binary_dilation(core, iterations=7, mask=codes == 2)
    tissue[white] = Tissue.WHITE_MATTER
    tissue[(codes == 2) & ~white] = Tissue.OTHER
    nuclei = np.isin(codes, (10, 11, 12, 17, 18))
    near_nuclei = ndimage.binary_dilation(nuclei, iterations=6)
    for code, elsewhere in ((4, Tissue.MARROW), (5, Tissue.OTHER)):
        labels, _ = ndimage.label(codes == code)
        inside = np.unique(labels[near_nuclei & (labels > 0)])
        ventricle = np.isin(labels, inside) & (labels > 0)
        tissue[(codes == code) & ~ventricle] = elsewhere
        tissue[ventricle] = Tissue.VENTRICLE
    # grey ribbon hugs white matter; the skull lies nearer to scalp and marrow
    shell = np.isin(tissue, (Tissue.SOFT, Tissue.SKIN, Tissue.MARROW, Tissue.AIR))
    to_shell = ndimage.distance_transform_edt(~largest_component(shell | (codes == 0)))
    to_white = ndimage.distance_transform_edt(~white)
    cortex = (codes == 3) & (to_white <= 7.0) & (to_white < to_shell + 1.0)
    cortex = ndimage.binary_opening(cortex, iterations=1) | (cortex & (to_white <= 3.0))
    tissue[(codes == 3) & ~cortex] = Tissue.BONE
    tissue[cortex] = Tissue.CORTEX


def _crop_neck(codes: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """Keep the head with a margin of air, down to 40 mm below the cerebellum."""
    cerebellum = np.flatnonzero(np.isin(codes, _CEREBELLUM).any(axis=(0, 1)))
    bottom = max(0, cerebellum[0] - 40)
    present = codes[:, :, bottom:] > 0
    # single stray voxels far outside do not count
    bounds = []
    for axis in range(3):
        counts = present.sum(axis=tuple(a for a in range(3) if a != axis))
        kept = np.flatnonzero(counts > 50)
        bounds.append((max(0, kept[0] - 4), kept[-1] + 5))
    (x0, x1), (y0, y1), (_, z1) = bounds
    return codes[x0:x1, y0:y1, bottom : bottom + z1]


def _landmark_maps(tissue: LabelArray) -> FloatArray:
    """Return (3, X, Y, Z): brain, white matter and ventricles, the last weighted for its size."""
    return np.stack(
        [
            np.isin(tissue, BRAIN_TISSUES),
            tissue == Tissue.WHITE_MATTER,
            2.0 * (tissue == Tissue.VENTRICLE),
        ]
    ).astype(np.float32)


def _field(affine: npt.NDArray[np.float64], shape: tuple[int, ...]) -> FloatArray:
    axes = [np.arange(0, n + FIELD_STEP_MM, FIELD_STEP_MM) for n in shape]
    nodes = np.meshgrid(*axes, indexing="ij")
    voxels = np.stack(nodes).reshape(3, -1)
    mm = affine[:3, :3] @ voxels + affine[:3, 3:]
    return mm.reshape(3, *nodes[0].shape).astype(np.float32)
