"""How lesions are split by both rules on real scans, and how well the structures fit manual ones.

    python -m benchmarks.regions FOLDER [--model NAME|FILE] [--pattern '*_FLAIR.nii.gz']

Segments every scan and prints one tab-separated row each: volumes, estimated grades, the share of
lesion volume that is periventricular by the distance rule and by contact with gaps of `GAPS_MM`,
and, where ``derivatives/manual`` of the same data set holds them, the Dice and the volume ratio of
ventricles and brain.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wmh_lora.engine import Segmentation, WMHInferenceEngine, load_model
from wmh_lora.evaluation.metrics import dice
from wmh_lora.regions import RegionVolumes, locate_lesions
from wmh_lora.structures import find_brain, find_ventricles
from wmh_lora.volume import Volume

GAPS_MM = (0.0, 1.0, 2.0, 3.0)


def share(volumes: RegionVolumes | None) -> float:
    """Share of lesion volume that is periventricular; NaN without lesions or ventricles."""
    if volumes is None or volumes.periventricular_ml + volumes.deep_ml == 0:
        return float("nan")
    return volumes.periventricular_ml / (volumes.periventricular_ml + volumes.deep_ml)


def agreement(found: npt.NDArray[np.bool_] | None, reference: Path) -> tuple[float, float]:
    """Dice and volume ratio with a manual mask; NaN where either is missing."""
    if found is None or not reference.exists():
        return float("nan"), float("nan")
    manual = Volume.read(reference, allow_constant=True).data > 0
    ratio = found.sum() / manual.sum() if manual.any() else float("nan")
    return dice(manual, found), float(ratio)


def row(result: Segmentation, folder: Path, path: Path) -> dict[str, str]:
    """Describe one scan."""
    affine, masks, regions = result.volume.affine, result.structure_masks, result.regions
    values: dict[str, float] = {
        "wmh_ml": result.volume_ml,
        "ventricles_ml": regions.ventricles_ml or float("nan"),
        "icv_ml": regions.icv_ml or float("nan"),
        "share_10mm": share(regions.voxel_distance_10mm),
    }
    for gap_mm in GAPS_MM:
        split = locate_lesions(result.mask, affine, masks, contact_gap_mm=gap_mm)
        values[f"share_contact_{gap_mm:g}mm"] = share(split.component_contact)
    for part in ("periventricular", "deep"):  # no grades without ventricles
        values[f"fazekas_{part}"] = getattr(regions.fazekas, part, float("nan"))
    subject = path.relative_to(folder).parts[-3]
    manual = path.parents[2] / "derivatives" / "manual" / subject / "anat"
    brain = find_brain(masks, affine).mask
    for name, mask in (("ventricles", find_ventricles(masks, affine, None).mask), ("brain", brain)):
        reference = manual / f"{subject}_space-orig_label-{name}_mask.nii.gz"
        values[f"{name}_dice"], values[f"{name}_ratio"] = agreement(mask, reference)
    return {"scan": path.name, **{key: f"{value:.3f}" for key, value in values.items()}}


def main(arguments: list[str] | None = None) -> None:
    """Segment every scan of a folder and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pattern", default="*_FLAIR.nii.gz")
    parser.add_argument("--model", default="default")
    options = parser.parse_args(arguments)
    engine = WMHInferenceEngine(load_model(options.model), "cpu")
    header = False
    for path in sorted(options.folder.rglob(options.pattern)):
        values = row(engine.segment(path), options.folder.resolve().parent, path.resolve())
        if not header:
            sys.stdout.write("\t".join(values) + "\n")
            header = True
        sys.stdout.write("\t".join(values.values()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
