"""Numbers of a run: the JSON report of one scan and the table of a cohort."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nibabel.orientations import aff2axcodes

from wmh_lora._version import __version__
from wmh_lora.files import file_sha256
from wmh_lora.postprocess import Lesion
from wmh_lora.volume import Volume

__all__ = ["COHORT_COLUMNS", "cohort_row", "cohort_table", "failed_row", "scan_report"]

REPORT_FORMAT = 1
"""Raised whenever the meaning of a key in the report changes."""

COHORT_COLUMNS = (
    "scan",
    "file",
    "status",
    "wmh_volume_ml",
    "lesion_count",
    "largest_lesion_ml",
    "voxel_volume_mm3",
    "threshold",
    "min_voxels",
    "tta",
    "model",
    "version",
    "message",
)

_NOT_AVAILABLE = "n/a"  # as BIDS writes it


def scan_report(
    *,
    volume: Volume,
    lesions: Sequence[Lesion],
    volume_ml: float,
    settings: Mapping[str, Any],
    model: Mapping[str, Any],
    warnings: Sequence[str] = (),
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

    Returns
    -------
    dict
        JSON-ready; the same scan and settings give the same report.
    """
    name, digest = None, None
    if volume.path is not None:
        name, digest = volume.path.name, file_sha256(volume.path)
        # a report is passed on; where the scan lay on somebody's disk is not
        warnings = [text.replace(str(volume.path), name) for text in warnings]
    return {
        "format": REPORT_FORMAT,
        "file": name,
        "file_sha256": digest,
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
    return {
        "scan": scan,
        "file": str(report["file"]),
        "status": "done",
        "wmh_volume_ml": f"{report['wmh_volume_ml']:.4f}",
        "lesion_count": str(report["lesion_count"]),
        "largest_lesion_ml": f"{lesions[0]['volume_ml']:.4f}" if lesions else "0.0000",
        "voxel_volume_mm3": f"{report['grid']['voxel_volume_mm3']:.4f}",
        "threshold": str(settings["threshold"]),
        "min_voxels": str(settings["min_voxels"]),
        "tta": str(settings["tta"]),
        "model": str(report["model"]["name"]),
        "version": str(report["software"]["version"]),
        "message": "; ".join(report["warnings"]) or _NOT_AVAILABLE,
    }


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
