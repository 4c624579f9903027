"""How much of lesions that are known, because they were painted into a scan, models find again.

    python -m benchmarks.painted FLAIR.nii.gz MASK.nii.gz --lesions DIR -o DIR
        [--exclude SUBJECT] [--slices 5] [--zoom 1] [--model NAME|FILE]...

Lays every lesion mask of ``--lesions`` (``*_mask.nii.gz``, in MNI152 space) into the scan beside
the lesions of MASK, at about the brightness of those (`wmh_lora.data.real_painting`), and segments
what comes of it. Everything else in the picture is the scanner's own, so that one labelled scan
tells of many loads, which its reader never drew. With ``--slices N`` the painted scans are averaged
over N slices along their last axis, as thick slices are.

Scans and labels stay in ``-o`` and are used again. Prints means by lesion load as JSON; a table of
them is written beside the scans.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contrast import average_slices, thick_scan
from benchmarks.harness import publish
from wmh_lora.data.lesions import MaskBank, within_hosts
from wmh_lora.data.real_painting import paint_lesions, real_anatomy
from wmh_lora.data.sources import read_masks
from wmh_lora.data.synthesis import Case
from wmh_lora.engine import WMHInferenceEngine, load_model
from wmh_lora.errors import DataError
from wmh_lora.evaluation.masks import OTHER_PATHOLOGY_LABEL, WMH_LABEL
from wmh_lora.evaluation.metrics import ChallengeMetrics, evaluate
from wmh_lora.volume import Volume, write_nifti

SEED = 42
BANDS_ML = (0.0, 5.0, 20.0, 1000.0)
MEASURES = ("dice", "lesion_f1", "lesion_recall", "recall", "precision")
STRUCTURES_BY = "flair-compact-v1"
"""Whose brain and ventricles tell where lesions may lie: the same for every model compared."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Paint, segment and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("image", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--lesions", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--exclude", action="append", default=[])
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="of the masks, by name")
    parser.add_argument("--zoom", type=float, help="see wmh-lora segment; the model's by default")
    parser.add_argument("--model", action="append", default=[])
    options = parser.parse_args(arguments)
    masks = MaskBank.paths(options.lesions, tuple(options.exclude))[:: options.every]
    names = [path.name.split("_")[0] for path in masks]
    missing = [
        path for path, name in zip(masks, names) if not _files(options.output, name)[1].exists()
    ]
    if missing:
        build_scans(options.image, options.reference, missing, options.output)
    rows = [["model", "load", "scans", *MEASURES, "found mL", "reference mL"]]
    results = []
    for model in options.model or ["default"]:
        engine = WMHInferenceEngine(load_model(model), "cpu")
        scores = list(measure_scans(engine, options.output, names, options.slices, options.zoom))
        for band, means in by_load(scores).items():
            results.append({"model": model, "load": band, **means})
            rows.append([model, band, *(f"{value:.3g}" for value in means.values())])
    document = {"benchmark": "painted", "slices": options.slices, "seed": SEED, "rows": results}
    publish(document, rows, options.output / "result.json", options.output / "result.md")


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}_FLAIR.nii.gz", folder / f"{name}_label-WMH_mask.nii.gz"


def build_scans(image: Path, reference: Path, masks: Sequence[Path], output: Path) -> None:
    """Write the scan once for every mask, with that painted in, and its labels."""
    engine = WMHInferenceEngine(load_model(STRUCTURES_BY), "cpu")
    own = read_masks(image, [("wmh", reference)])
    structures = engine.segment(own.volume).structure_masks
    known = {name: (mask > 0).astype(np.float32) for name, mask in structures.items()}
    case = Case(own.volume, own.masks | known)
    anatomy = real_anatomy(case)
    if anatomy is None:
        raise DataError(f"{image}: brain or ventricles are not found; choose another scan.")
    output.mkdir(parents=True, exist_ok=True)
    for path in masks:
        name = path.name.split("_")[0]
        rng = np.random.default_rng([SEED, *name.encode()])
        drawn = MaskBank.read_files([path]).draw(rng, anatomy.to_mni_mm, anatomy.tissue.shape)
        painted = paint_lesions(rng, case, anatomy, within_hosts(drawn, anatomy.tissue))
        scan, label = _files(output, name)
        write_nifti(scan, painted.volume.data, own.volume, overwrite=True)
        write_nifti(label, painted.lesion_labels, own.volume, overwrite=True)


def measure_scans(
    engine: WMHInferenceEngine,
    folder: Path,
    names: Sequence[str],
    slices: int,
    zoom: float | None = None,
) -> Iterator[ChallengeMetrics]:
    """Segment every scan and compare."""
    for name in names:
        scan, labels = (Volume.read(path, allow_constant=True) for path in _files(folder, name))
        volume = thick_scan(scan, slices)
        lesion, other = (
            average_slices((labels.data == value).astype(np.float32), slices)
            for value in (WMH_LABEL, OTHER_PATHOLOGY_LABEL)
        )
        reference = np.where(lesion + other >= 0.5, OTHER_PATHOLOGY_LABEL, 0)
        reference[lesion >= 0.5] = WMH_LABEL
        found = engine.segment(volume, zoom=zoom).mask
        metrics = evaluate(reference, found, volume.spacing_mm)
        sys.stderr.write(f"{name} {metrics}\n")
        yield metrics


def by_load(scores: Sequence[ChallengeMetrics]) -> dict[str, dict[str, Any]]:
    """Average the scans of each band of lesion load, and all of them."""
    groups: dict[str, list[ChallengeMetrics]] = {
        f"{low:g} to {high:g} mL": [s for s in scores if low <= s.reference_ml < high]
        for low, high in pairwise(BANDS_ML)
    }
    groups["all"] = list(scores)
    return {
        band: {
            "scans": len(group),
            **{key: float(np.mean([getattr(s, key) for s in group])) for key in MEASURES},
            "found_ml": float(np.mean([s.prediction_ml for s in group])),
            "reference_ml": float(np.mean([s.reference_ml for s in group])),
        }
        for band, group in groups.items()
        if group
    }


if __name__ == "__main__":
    main()
