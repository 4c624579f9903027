"""How much of lesions that are known, because they were painted into a scan, models find again.

    python -m benchmarks.painted FLAIR.nii.gz [MASK.nii.gz] -o DIR
        (--lesions DIR [--exclude SUBJECT] | --vascular 8)
        [--slices 5] [--extract] [--zoom 1] [--model NAME|FILE]...

Lays every lesion mask of ``--lesions`` (``*_mask.nii.gz``, in MNI152 space) into the scan beside
the lesions of MASK, at about the brightness of those (`wmh_lora.data.real_painting`), and segments
what comes of it. Everything else in the picture is the scanner's own, so that one labelled scan, or
one without lesions, tells of many loads, which its reader never drew. ``--vascular N`` paints N
patterns of small-vessel disease, of 10 to 130 mL, in their place. With ``--slices N`` the painted
scans are averaged over N slices along their last axis, as thick slices are; with ``--extract`` the
brain alone is shown.

Scans and labels stay in ``-o`` and are used again. Prints means by lesion load as JSON; a table of
them is written beside the scans.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.contrast import average_slices, thick_scan
from benchmarks.harness import publish
from wmh_lora.data.lesions import MaskBank, draw_lesions, ventricle_distance, within_hosts
from wmh_lora.data.real_painting import RealAnatomy, paint_lesions, real_anatomy
from wmh_lora.data.sources import read_masks
from wmh_lora.data.synthesis import Case
from wmh_lora.engine import WMHInferenceEngine, load_model
from wmh_lora.errors import DataError
from wmh_lora.evaluation.masks import OTHER_PATHOLOGY_LABEL, WMH_LABEL
from wmh_lora.evaluation.metrics import ChallengeMetrics, evaluate
from wmh_lora.volume import Volume, write_nifti

SEED = 42
VASCULAR_ML = (10.0, 130.0)
MOST_DRAWS = 200
LEAST_SEEN = 0.6
"""Of a vascular pattern's volume that has to be bright enough to be called lesion."""
BANDS_ML = (0.0, 5.0, 20.0, 50.0, 1000.0)
MEASURES = ("dice", "lesion_f1", "lesion_recall", "recall", "precision")
STRUCTURES_BY = "flair-compact-v1"
"""Whose brain and ventricles tell where lesions may lie: the same for every model compared."""

Pattern = Callable[[np.random.Generator, Case, RealAnatomy], Case]
"""Paints lesions into a scan."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Paint, segment and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("image", type=Path)
    parser.add_argument("reference", type=Path, nargs="?")
    shapes = parser.add_mutually_exclusive_group(required=True)
    shapes.add_argument("--lesions", type=Path)
    shapes.add_argument("--vascular", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--exclude", action="append", default=[])
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="of the masks, by name")
    parser.add_argument("--extract", action="store_true")
    parser.add_argument("--zoom", type=float, help="see wmh-lora segment; the model's by default")
    parser.add_argument("--model", action="append", default=[])
    options = parser.parse_args(arguments)
    patterns: dict[str, Pattern]
    if options.lesions:
        masks = MaskBank.paths(options.lesions, tuple(options.exclude))[:: options.every]
        patterns = {path.name.split("_")[0]: functools.partial(_laid_in, path) for path in masks}
    else:
        patterns = {f"vascular-{number:02d}": vascular for number in range(options.vascular)}
    missing = {
        name: pattern
        for name, pattern in patterns.items()
        if not _files(options.output, name)[1].exists()
    }
    known = known_structures(options.image) if missing or options.extract else {}
    if missing:
        build_scans(options.image, options.reference, known, missing, options.output)
    brain = known["brain"] > 0 if options.extract else None
    rows = [["model", "load", "scans", *MEASURES, "found mL", "reference mL"]]
    results = []
    for model in options.model or ["default"]:
        engine = WMHInferenceEngine(load_model(model), "cpu")
        scores = list(
            measure_scans(
                engine, options.output, list(patterns), options.slices, options.zoom, brain=brain
            )
        )
        for band, means in by_load(scores).items():
            results.append({"model": model, "load": band, **means})
            rows.append([model, band, *(f"{value:.3g}" for value in means.values())])
    document = {
        "benchmark": "painted",
        "slices": options.slices,
        "extracted": options.extract,
        "seed": SEED,
        "rows": results,
    }
    publish(document, rows, options.output / "result.json", options.output / "result.md")


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}_FLAIR.nii.gz", folder / f"{name}_label-WMH_mask.nii.gz"


def _laid_in(path: Path, rng: np.random.Generator, case: Case, anatomy: RealAnatomy) -> Case:
    """Paint one real mask in."""
    drawn = MaskBank.read_files([path]).draw(rng, anatomy.to_mni_mm, anatomy.tissue.shape)
    return paint_lesions(rng, case, anatomy, within_hosts(drawn, anatomy.tissue))


def vascular(rng: np.random.Generator, case: Case, anatomy: RealAnatomy) -> Case:
    """Paint patterns of small-vessel disease until one has `VASCULAR_ML`, most of it to be seen."""
    distance_mm = ventricle_distance(anatomy.tissue)
    own_ml = np.count_nonzero(case.masks["wmh"]) * case.volume.voxel_volume_ml
    for _ in range(MOST_DRAWS):
        drawn = draw_lesions(rng, anatomy.tissue, anatomy.to_mni_mm, distance_mm, None)
        drawn_ml = np.count_nonzero(drawn) / 1000.0
        if not VASCULAR_ML[0] <= drawn_ml <= VASCULAR_ML[1]:
            continue
        painted = paint_lesions(rng, case, anatomy, drawn)
        seen_ml = np.count_nonzero(painted.masks["wmh"]) * case.volume.voxel_volume_ml - own_ml
        if seen_ml >= LEAST_SEEN * drawn_ml:
            return painted
    raise DataError(f"{case.volume.path}: no pattern can be seen in this scan; choose another.")


def known_structures(image: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Let `STRUCTURES_BY` find brain and ventricles."""
    engine = WMHInferenceEngine(load_model(STRUCTURES_BY), "cpu")
    found = engine.segment(image).structure_masks
    return {name: (mask > 0).astype(np.float32) for name, mask in found.items()}


def build_scans(
    image: Path,
    reference: Path | None,
    known: Mapping[str, npt.NDArray[np.float32]],
    patterns: Mapping[str, Pattern],
    output: Path,
) -> None:
    """Write the scan once for every pattern, with that painted in, and its labels.

    ``known`` are its brain and ventricles. Each pattern is drawn by its name, whatever others
    there are.
    """
    own = read_masks(image, [("wmh", reference)] if reference else [])
    none = {"wmh": np.zeros(own.volume.shape, np.float32)}
    case = Case(own.volume, {**none, **own.masks, **known})
    anatomy = real_anatomy(case)
    if anatomy is None:
        raise DataError(f"{image}: brain or ventricles are not found; choose another scan.")
    output.mkdir(parents=True, exist_ok=True)
    for name, pattern in patterns.items():
        painted = pattern(np.random.default_rng([SEED, *name.encode()]), case, anatomy)
        scan, label = _files(output, name)
        write_nifti(scan, painted.volume.data, own.volume, overwrite=True)
        write_nifti(label, painted.lesion_labels, own.volume, overwrite=True)


def measure_scans(
    engine: WMHInferenceEngine,
    folder: Path,
    names: Sequence[str],
    slices: int,
    zoom: float | None = None,
    *,
    brain: npt.NDArray[np.bool_] | None = None,
) -> Iterator[ChallengeMetrics]:
    """Segment every scan, or what of it ``brain`` (I, J, K) marks, and compare."""
    for name in names:
        scan, labels = (Volume.read(path, allow_constant=True) for path in _files(folder, name))
        if brain is not None:
            scan = replace(scan, data=np.where(brain, scan.data, 0.0).astype(np.float32))
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
