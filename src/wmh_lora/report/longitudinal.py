"""Files of a follow-up: numbers, lesion table, maps and scans in the half-way space, and a picture.

All appear together or not at all.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wmh_lora._version import __version__
from wmh_lora.longitudinal.changes import CHANGES
from wmh_lora.longitudinal.study import FollowUp, TotalChange, intervals_between
from wmh_lora.registration import turn_and_shift
from wmh_lora.report.longitudinal_figure import follow_up_figure
from wmh_lora.report.saving import saved_together
from wmh_lora.report.tables import name_and_sha256
from wmh_lora.volume import Volume, write_nifti

__all__ = [
    "CHANGES_DICTIONARY",
    "change_map",
    "changes_table",
    "follow_up_files",
    "follow_up_report",
    "save_follow_up",
]

_FORMAT = 1
_NOT_AVAILABLE = "n/a"

CHANGES_DICTIONARY: Mapping[str, Mapping[str, Any]] = {
    "lesion": {"Description": "Number of the lesion in the labelled map; 1 is the largest"},
    "before": {"Description": "Name of the earlier visit"},
    "after": {"Description": "Name of the later visit"},
    "change": {
        "Description": "What became of the lesion; the rules are in the JSON report",
        "Levels": {
            "new": "Not within one voxel of any lesion of the earlier visit",
            "grown": "Larger by at least the rules' volume and percentage",
            "shrunk": "Smaller by at least the rules' volume and percentage",
            "stable": "Seen at both visits, neither grown nor shrunk",
            "vanished": "Not within one voxel of any lesion of the later visit",
            "doubtful": "In the mask of one visit only, but with some probability at the other",
            "not assessable": "Lies outside the field of view of one of the visits",
            "too small": "Seen at one visit only, and smaller than the rules' smallest lesion",
        },
    },
    "before_ml": {"Description": "Volume at the earlier visit, on its own voxels", "Units": "mL"},
    "after_ml": {"Description": "Volume at the later visit, on its own voxels", "Units": "mL"},
    "change_ml": {"Description": "after_ml less before_ml", "Units": "mL"},
    "change_percent": {
        "Description": "change_ml as a percentage of before_ml; n/a for new lesions",
        "Units": "percent",
    },
    "limit_ml": {"Description": "Estimated limit of repeatability of change_ml", "Units": "mL"},
    "within_repeatability": {
        "Description": "Whether change_ml is within limit_ml",
        "Levels": {"yes": "Chance can explain the change", "no": "It exceeds the limit"},
    },
    "parts_before": {"Description": "Components of the lesion at the earlier visit"},
    "parts_after": {"Description": "Components of the lesion at the later visit"},
    "event": {
        "Description": "Whether parts came together or apart",
        "Levels": {"merged": "Fewer parts later", "split": "More parts later"},
    },
    "x_mm": {"Description": "Centre in the half-way space, to the right", "Units": "mm"},
    "y_mm": {"Description": "Centre in the half-way space, to the front", "Units": "mm"},
    "z_mm": {"Description": "Centre in the half-way space, to the top", "Units": "mm"},
}
"""What the columns of ``<stem>_changes.tsv`` mean, as a BIDS sidecar describes them."""


def follow_up_report(result: FollowUp) -> dict[str, Any]:
    """Collect what ``<stem>_longitudinal.json`` says.

    Returns
    -------
    dict
        JSON-ready; the same scans and settings give the same report.
    """
    if result.within_subject_cv_percent is None:
        rule = (
            "1.96 times the root of the sum of both visits' variances, estimated from the lesions' "
            f"surfaces with a boundary known to {result.rules.boundary_sd_voxels} voxels (SD)"
        )
    else:
        rule = (
            f"1.96 sqrt(2) times {result.within_subject_cv_percent} % of the mean volume "
            "(the within-subject coefficient of variation that was given)"
        )
    paths = [visit.volume.path for visit in result.visits]
    warnings = list(result.warnings)
    for path in paths:  # a report is passed on; where a scan lay on somebody's disk is not
        if path is not None:
            warnings = [text.replace(str(path), path.name) for text in warnings]
    return {
        "format": _FORMAT,
        "visits": [_visit(result, i) for i in range(len(result.visits))],
        "changes": [_total(result, total) for total in result.totals],
        "repeatability": {
            "rule": rule,
            "within_subject_cv_percent": result.within_subject_cv_percent,
        },
        "rules": asdict(result.rules),
        "half_way_grid": {
            "shape": list(result.alignment.shape),
            "affine": _rounded(result.alignment.affine),
        },
        "change_labels": {kind: n for kind, n in CHANGES.items() if n},
        "software": {"name": "wmh-lora", "version": __version__},
        "warnings": warnings,
    }


def _visit(result: FollowUp, i: int) -> dict[str, Any]:
    visit, volumes = result.visits[i], result.volumes[i]
    name, digest = name_and_sha256(visit.volume.path)
    middle = result.alignment.affine @ [*((np.array(result.alignment.shape) - 1) / 2), 1.0]
    turn_deg, shift_mm = turn_and_shift(result.alignment.to_visit[i], middle[:3])
    inconsistency = result.alignment.inconsistency_mm[i]
    done = visit.segmentation
    return {
        "name": visit.name,
        "file": name,
        "file_sha256": digest,
        "wmh_volume_ml": round(volumes.volume_ml, 6),
        "wmh_volume_in_common_view_ml": round(volumes.common_ml, 6),
        "wmh_volume_sd_ml": round(volumes.sd_ml, 6),
        "lesion_count": volumes.lesions,
        "voxel_volume_mm3": round(visit.volume.voxel_volume_ml * 1000.0, 6),
        "turn_to_half_way_deg": round(turn_deg, 3),
        "shift_to_half_way_mm": round(shift_mm, 3),
        "registration_inconsistency_mm": None if inconsistency is None else round(inconsistency, 3),
        "settings": None if done is None else dict(done.settings),
        "model": None if done is None else dict(done.model),
    }


def _total(result: FollowUp, total: TotalChange) -> dict[str, Any]:
    changes = [
        (change.kind, change.change_ml)
        for lesion in result.lesions
        for change in lesion.changes
        if (change.before, change.after) == (total.before, total.after)
    ]
    counts = Counter(kind for kind, _ in changes)
    kinds = [kind for kind, number in CHANGES.items() if number]
    return {
        "before": result.visits[total.before].name,
        "after": result.visits[total.after].name,
        "change_ml": round(total.change_ml, 6),
        "change_percent": None if total.percent is None else round(total.percent, 3),
        "repeatability_limit_ml": round(total.limit_ml, 6),
        "within_repeatability": total.within_repeatability,
        "lesions": {kind: counts[kind] for kind in kinds},
        "change_by_kind_ml": {
            kind: round(sum(ml for name, ml in changes if name == kind), 6) for kind in kinds
        },
    }


def changes_table(result: FollowUp) -> str:
    """Write one line a lesion and interval, tab-separated; see `CHANGES_DICTIONARY`."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t", lineterminator="\n")
    writer.writerow(CHANGES_DICTIONARY)
    for lesion in result.lesions:
        for change in lesion.changes:
            if change.kind == "absent":
                continue
            first, second = lesion.volume_ml[change.before], lesion.volume_ml[change.after]
            percent = f"{100 * change.change_ml / first:.1f}" if first > 0 else _NOT_AVAILABLE
            writer.writerow(
                [
                    lesion.index,
                    result.visits[change.before].name,
                    result.visits[change.after].name,
                    change.kind,
                    f"{first:.4f}",
                    f"{second:.4f}",
                    f"{change.change_ml:.4f}",
                    percent,
                    f"{change.limit_ml:.4f}",
                    "yes" if change.within_repeatability else "no",
                    lesion.parts[change.before],
                    lesion.parts[change.after],
                    change.event or _NOT_AVAILABLE,
                    *(f"{c:.1f}" for c in lesion.centroid_mm),
                ]
            )
    return buffer.getvalue()


def change_map(result: FollowUp, interval: int) -> npt.NDArray[np.uint8]:
    """Return the kind of change (`CHANGES`) of each half-way voxel for one interval."""
    numbers = [0, *(CHANGES[lesion.changes[interval].kind] for lesion in result.lesions)]
    return np.asarray(np.array(numbers, dtype=np.uint8)[result.labels], dtype=np.uint8)


def follow_up_files(
    out_dir: str | Path, stem: str, visits: Sequence[str], *, segmented: bool
) -> dict[str, Path]:
    """Name the files of a follow-up by what they hold.

    Parameters
    ----------
    out_dir : path
        Where they are.
    stem : str
        Start of their names.
    visits : sequence of str
        Names of the visits.
    segmented : bool
        Whether the visits' masks are written as well, having been made for the follow-up.
    """
    names = {
        "report": f"{stem}_longitudinal.json",
        "picture": f"{stem}_longitudinal.png",
        "changes": f"{stem}_changes.tsv",
        "dictionary": f"{stem}_changes.json",
        "lesions": f"{stem}_space-halfway_desc-lesions_dseg.nii.gz",
    }
    intervals = intervals_between(len(visits))
    for n, (before, after) in enumerate(intervals):
        start = f"{stem}_{visits[before]}_to_{visits[after]}" if len(intervals) > 1 else stem
        names[f"change {n}"] = f"{start}_space-halfway_desc-change_dseg.nii.gz"
    for i, visit in enumerate(visits):
        start = f"{stem}_{visit}"
        names[f"scan {i}"] = f"{start}_space-halfway_FLAIR.nii.gz"
        names[f"transform {i}"] = f"{start}_from-halfway_to-orig_xfm.txt"
        if segmented:
            names[f"mask {i}"] = f"{start}_space-orig_label-WMH_mask.nii.gz"
    return {key: Path(out_dir) / name for key, name in names.items()}


def save_follow_up(
    result: FollowUp, out_dir: str | Path, *, stem: str, overwrite: bool = False
) -> dict[str, Path]:
    """Write every file of a follow-up.

    Parameters
    ----------
    result : FollowUp
        From `wmh_lora.longitudinal.study.compare_visits`.
    out_dir : path
        Made if it is absent.
    stem : str
        Start of the file names.
    overwrite : bool
        Replace files that are there already.

    Returns
    -------
    dict
        Paths by what they hold.

    Raises
    ------
    DataError
        If files exist and ``overwrite`` is not set, or cannot be written; nothing is left behind.
    ConfigError
        If the folder cannot be made or written to.
    """
    segmented = all(visit.segmentation is not None for visit in result.visits)
    names = [visit.name for visit in result.visits]
    files = follow_up_files(out_dir, stem, names, segmented=segmented)
    scans = [result.alignment.scan(i, visit.volume) for i, visit in enumerate(result.visits)]
    grid = Volume(scans[0], result.alignment.affine)
    with saved_together(list(files.values()), overwrite=overwrite) as temporary:
        partial = {key: temporary[path] for key, path in files.items()}
        _write_json(partial["report"], follow_up_report(result))
        _write_json(partial["dictionary"], CHANGES_DICTIONARY)
        partial["changes"].write_text(changes_table(result), encoding="utf-8")
        write_nifti(partial["lesions"], result.labels, grid)
        for n in range(len(result.totals)):
            write_nifti(partial[f"change {n}"], change_map(result, n), grid)
        for i, visit in enumerate(result.visits):
            write_nifti(partial[f"scan {i}"], scans[i], grid)
            matrix = _matrix_text(result.alignment.to_visit[i], visit.name)
            partial[f"transform {i}"].write_text(matrix, encoding="utf-8")
            if segmented:
                write_nifti(partial[f"mask {i}"], visit.mask, visit.volume)
        follow_up_figure(result, scans, change_map(result, len(result.totals) - 1)).save(
            partial["picture"]
        )
    return files


def _matrix_text(matrix: npt.NDArray[np.float64], name: str) -> str:
    lines = [f"# half-way space to {name}, in RAS millimetres: 4 x 4 matrix, applied to columns"]
    lines += [" ".join(f"{value:.9f}" for value in row) for row in matrix]
    return "\n".join(lines) + "\n"


def _rounded(matrix: npt.NDArray[np.float64]) -> list[list[float]]:
    return [[round(float(value), 6) for value in row] for row in matrix]


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
