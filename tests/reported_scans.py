"""A phantom with everything that a report can show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.phantoms import head
from wmh_lora.postprocess import describe_lesions
from wmh_lora.quality import QualityCheck, QualityReport
from wmh_lora.regions import locate_lesions
from wmh_lora.report.outputs import Segmentation
from wmh_lora.volume import Volume, write_nifti


def segmented_head(
    folder: Path | None = None, *, name: str = "sub-01_FLAIR.nii.gz"
) -> Segmentation:
    """Return the two lesions of the phantom, with structures and uncertainty; read from a file."""
    volume, mask = head()
    if folder is not None:
        write_nifti(folder / name, volume.data, volume)
        volume = Volume.read(folder / name)
    brain = (volume.data > 150).astype(np.uint8)
    ventricles = np.zeros_like(mask)
    ventricles[21:27, 20:36, 2:4] = 1
    probability = np.where(mask > 0, 0.9, 0.02 * brain).astype(np.float32)
    return Segmentation(
        volume=volume,
        probability=probability,
        mask=mask,
        lesions=tuple(describe_lesions(mask, volume.affine)),
        volume_ml=int(mask.sum()) * volume.voxel_volume_ml,
        settings={"threshold": 0.6, "min_voxels": 3, "tta": "flip", "device": "cpu"},
        model={"name": "phantom-v1", "sha256": "ab" * 32, "base_encoder": "none"},
        structure_masks={"brain": brain, "ventricles": ventricles},
        uncertainty=(probability * (1 - probability)).astype(np.float32),
    )


def full_report(segmentation: Segmentation) -> dict[str, Any]:
    """Return its report with regions, and with one check of each verdict."""
    regions = locate_lesions(
        segmentation.mask,
        segmentation.volume.affine,
        segmentation.structure_masks,
        probability=segmentation.probability,
        uncertainty=segmentation.uncertainty,
    )
    quality = QualityReport(
        (
            QualityCheck("brain", "pass", "The brain measures 1200 mL.", 1200.0, {}),
            QualityCheck("noise", "warn", "Noise is high.", 0.1, {"warn_above": 0.09}),
            QualityCheck("ghosting", "pass", "Not measured: no air.", None, {}),
        )
    )
    return {
        **segmentation.report(),
        "regions": regions.as_dict(),
        "quality": quality.as_dict(),
    }
