"""Numbers of a run: the JSON report of one scan and the table of a cohort."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nibabel.orientations import aff2axcodes

from wmh_lora._version import __version__
from wmh_lora.errors import DataError
from wmh_lora.files import file_sha256
from wmh_lora.postprocess import Lesion
from wmh_lora.quality import QualityReport
from wmh_lora.regions import Regions
from wmh_lora.volume import Volume

__all__ = [
    "COHORT_COLUMNS",
    "COHORT_DICTIONARY",
    "cohort_row",
    "cohort_table",
    "failed_row",
    "name_and_sha256",
    "scan_report",
]

REPORT_FORMAT = 1
"""Raised whenever the meaning of a key in the report changes."""

COHORT_DICTIONARY: Mapping[str, Mapping[str, Any]] = {
    "scan": {"Description": "Name of the scan in this run"},
    "file": {"Description": "Name of the image file"},
    "status": {
        "Description": "Whether the scan was segmented",
        "Levels": {"done": "Results were written", "failed": "See message; other columns are n/a"},
    },
    "wmh_volume_ml": {
        "Description": "Volume of white matter hyperintensities",
        "Units": "mL",
    },
    "lesion_count": {"Description": "Number of 26-connected lesions"},
    "largest_lesion_ml": {"Description": "Volume of the largest lesion", "Units": "mL"},
    "icv_ml": {
        "Description": "Volume of the brain mask with holes filled, which stands in for the "
        "intracranial volume; n/a where the image cuts the brain off or the mask is implausible",
        "Units": "mL",
    },
    "wmh_percent_icv": {
        "Description": "Volume of white matter hyperintensities as a percentage of icv_ml",
        "Units": "percent",
    },
    "periventricular_ml": {
        "Description": "Volume of lesion voxels within 10 mm of the ventricles",
        "Units": "mL",
    },
    "deep_ml": {
        "Description": "Volume of lesion voxels farther than 10 mm from the ventricles",
        "Units": "mL",
    },
    "quality": {
        "Description": "Worst verdict of the quality checks",
        "Levels": {
            "pass": "Nothing was noticed",
            "warn": "Look at the scan before using its numbers",
            "fail": "Do not use the numbers without a reason to",
        },
    },
    "quality_concerns": {"Description": "Names of the quality checks that did not pass"},
    "voxel_volume_mm3": {"Description": "Volume of a voxel", "Units": "mm^3"},
    "threshold": {"Description": "Probability from which a voxel counts as lesion"},
    "min_voxels": {"Description": "Smallest lesion that was kept, in voxels"},
    "tta": {"Description": "Test-time augmentation: none, flip (4 views) or d4 (8 views)"},
    "model": {"Description": "Name of the model"},
    "version": {"Description": "Version of the software"},
    "message": {"Description": "Warnings, or why the scan failed"},
}
"""What the columns of ``wmh.tsv`` mean, as a BIDS sidecar describes the columns of a table."""

COHORT_COLUMNS = tuple(COHORT_DICTIONARY)

_NOT_AVAILABLE = "n/a"  # as BIDS writes it


def scan_report(
    *,
    volume: Volume,
    lesions: Sequence[Lesion],
    volume_ml: float,
    settings: Mapping[str, Any],
    model: Mapping[str, Any],
    warnings: Sequence[str] = (),
    regions: Regions | None = None,
    quality: QualityReport | None = None,
    t1_path: Path | None = None,
) -> dict[str, Any]:
    """Collect what ``<stem>_wmh.json`` says about one scan.

    Parameters
    ----------
    volume : Volume
        The scan as it was read.
    lesions : sequence of Lesion
        From `wmh_lora.postprocess.describe_lesions`.
    volume_ml : float
        Total lesion volume in millilitres.
    settings : mapping
        Threshold, smallest lesion size, test-time augmentation and device, as used.
    model : mapping
        Name, sha256 and base encoder of the model, as used.
    warnings : sequence of str
        What a reader should know before trusting the numbers.
    regions : Regions, optional
        Where the lesions are; without it there is no key of that name.
    quality : QualityReport, optional
        Checks of scan and result; without it there is no key of that name.
    t1_path : Path, optional
        File of the T1 that was shown beside the scan.

    Returns
    -------
    dict
        JSON-ready; the same scan and settings give the same report.
    """
    name, digest = name_and_sha256(volume.path)
    t1_name, t1_digest = name_and_sha256(t1_path)
    for path in (volume.path, t1_path):
        if path is not None:  # a report is passed on; where a scan lay on somebody's disk is not
            warnings = [text.replace(str(path), path.name) for text in warnings]
    report = {
        "format": REPORT_FORMAT,
        "file": name,
        "file_sha256": digest,
        "t1_file": t1_name,
        "t1_sha256": t1_digest,
        "wmh_volume_ml": round(volume_ml, 6),
        "lesion_count": len(lesions),
        "lesions": [lesion.to_dict() for lesion in lesions],
        "grid": {
            "shape": [int(n) for n in volume.shape],
            "spacing_mm": [round(float(s), 6) for s in volume.spacing_mm],
            "orientation": "".join(aff2axcodes(volume.affine)),
            "voxel_volume_mm3": round(volume.voxel_volume_ml * 1000.0, 6),
        },
        "settings": dict(settings),
        "model": dict(model),
        "software": {"name": "wmh-lora", "version": __version__},
        "warnings": list(warnings),
    }
    if regions is not None:
        report["regions"] = regions.as_dict()
    if quality is not None:
        report["quality"] = quality.as_dict()
    return report


def name_and_sha256(path: Path | None) -> tuple[str, str] | tuple[None, None]:
    """Return what a report says of the file of an image; nothing of an image in memory.

    Raises
    ------
    DataError
        If the file cannot be read any more.
    """
    if path is None:
        return None, None
    try:
        return path.name, file_sha256(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read any more ({error.strerror}), so its checksum is not known; "
            "leave scans where they are until their results are written."
        ) from error


def cohort_row(scan: str, report: Mapping[str, Any]) -> dict[str, str]:
    """Reduce the report of one scan to its row of ``wmh.tsv``.

    Parameters
    ----------
    scan : str
        Name of the scan in this run.
    report : mapping
        From `scan_report`.
    """
    lesions = report["lesions"]
    settings = report["settings"]
    regions = report.get("regions") or {}
    split = regions.get("voxel_distance_10mm") or {}
    quality = report.get("quality") or {"checks": []}
    concerns = [check["name"] for check in quality["checks"] if check["verdict"] != "pass"]
    return {
        "scan": scan,
        "file": str(report["file"]),
        "status": "done",
        "wmh_volume_ml": f"{report['wmh_volume_ml']:.4f}",
        "lesion_count": str(report["lesion_count"]),
        "largest_lesion_ml": f"{lesions[0]['volume_ml']:.4f}" if lesions else "0.0000",
        "icv_ml": _number(regions.get("icv_ml"), 1),
        "wmh_percent_icv": _number(regions.get("wmh_percent_of_icv"), 4),
        "periventricular_ml": _number(split.get("periventricular_ml"), 4),
        "deep_ml": _number(split.get("deep_ml"), 4),
        "quality": str(quality.get("verdict", _NOT_AVAILABLE)),
        "quality_concerns": ", ".join(concerns) or _NOT_AVAILABLE,
        "voxel_volume_mm3": f"{report['grid']['voxel_volume_mm3']:.4f}",
        "threshold": str(settings["threshold"]),
        "min_voxels": str(settings["min_voxels"]),
        "tta": str(settings["tta"]),
        "model": str(report["model"]["name"]),
        "version": str(report["software"]["version"]),
        "message": "; ".join(report["warnings"]) or _NOT_AVAILABLE,
    }


def _number(value: float | None, decimals: int) -> str:
    return _NOT_AVAILABLE if value is None else f"{value:.{decimals}f}"


def failed_row(scan: str, file: str, message: str) -> dict[str, str]:
    """Give a scan that could not be done its row: a table without it would look complete."""
    row = dict.fromkeys(COHORT_COLUMNS, _NOT_AVAILABLE)
    row.update(scan=scan, file=file, status="failed", message=message, version=__version__)
    return row


def cohort_table(rows: Iterable[Mapping[str, str]]) -> str:
    """Write rows as tab-separated text with a header, one line a scan.

    Examples
    --------
    >>> text = cohort_table([failed_row("sub-01", "sub-01_FLAIR.nii.gz", "It is empty.")])
    >>> text.splitlines()[1].split()[:4]
    ['sub-01', 'sub-01_FLAIR.nii.gz', 'failed', 'n/a']
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_MINIMAL)
    writer.writerow(COHORT_COLUMNS)
    for row in rows:
        # tabs and line breaks inside a cell would break the table for simple readers
        writer.writerow([" ".join(row[column].split()) for column in COHORT_COLUMNS])
    return buffer.getvalue()
