"""Results as pandas data frames, for work in Python.

pandas is imported when a frame is asked for, and never by inference.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from wmh_lora.files import printable
from wmh_lora.postprocess import Lesion
from wmh_lora.regions import Regions
from wmh_lora.report.extras import require
from wmh_lora.report.tables import COHORT_COLUMNS, cohort_row, cohort_table

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["LESION_COLUMNS", "lesions_frame", "summary_frame"]

_AXES = ("right", "anterior", "superior")
LESION_COLUMNS: Mapping[str, str] = {
    "voxels": "int64",
    "volume_ml": "float64",
    **{f"centre_{axis}_mm": "float64" for axis in _AXES},
    **{f"extent_{axis}_mm": "float64" for axis in _AXES},
    "diameter_mm": "float64",
    "region": "string",
    "within_10mm_ml": "float64",
    "distance_to_ventricles_mm": "float64",
    "distance_to_brain_surface_mm": "float64",
    "mean_probability": "float64",
    "max_probability": "float64",
    "mean_uncertainty": "float64",
}
"""Columns of `lesions_frame` and their types, see `Lesion` and `LesionLocation`."""

_COUNTS = ("lesion_count", "min_voxels")
_TEXT = (
    "scan",
    "file",
    "status",
    "quality",
    "quality_concerns",
    "tta",
    "model",
    "version",
    "message",
)


def lesions_frame(lesions: Sequence[Lesion], regions: Regions) -> DataFrame:
    """Make a table of one row a lesion, the largest first.

    Parameters
    ----------
    lesions : sequence of Lesion
        Of one scan.
    regions : Regions
        Of the same mask.

    Returns
    -------
    pandas.DataFrame
        The columns of `LESION_COLUMNS`, indexed by ``lesion``, which is 1 for the largest. Centres
        and extents run along the scanner's axes, in mm. What is not known is missing (NaN, or NA
        for the region). A scan without lesions gives no row and the same columns.

    Raises
    ------
    ConfigError
        If pandas is not installed.
    """
    require("pandas", extra="tables", purpose="A data frame")
    import pandas

    located = {entry.index: asdict(entry) for entry in regions.lesions}
    rows = [
        {
            **located[lesion.index],
            "voxels": lesion.voxels,
            "volume_ml": lesion.volume_ml,
            **{f"centre_{axis}_mm": mm for axis, mm in zip(_AXES, lesion.centroid_mm)},
            **{f"extent_{axis}_mm": mm for axis, mm in zip(_AXES, lesion.extent_mm)},
        }
        for lesion in lesions
    ]
    index = pandas.Index([lesion.index for lesion in lesions], name="lesion", dtype="int64")
    frame = pandas.DataFrame(rows, index=index, columns=list(LESION_COLUMNS))
    return frame.astype(dict(LESION_COLUMNS))


def summary_frame(scan: str, report: Mapping[str, Any]) -> DataFrame:
    """Make a table of one row: the scan as ``wmh.tsv`` of a folder lists it.

    Parameters
    ----------
    scan : str
        Name of the scan.
    report : mapping
        From `wmh_lora.report.tables.scan_report`.

    Returns
    -------
    pandas.DataFrame
        Columns and units as `wmh_lora.report.tables.COHORT_DICTIONARY` describes them; numbers are
        numbers, and ``n/a`` is missing. Frames of several scans can be joined with
        ``pandas.concat``.

    Raises
    ------
    ConfigError
        If pandas is not installed.
    """
    require("pandas", extra="tables", purpose="A data frame")
    import pandas

    row = cohort_row(scan, report)
    row["file"] = report["file"] or "n/a"  # an image in memory has none
    types = dict.fromkeys(COHORT_COLUMNS, "float64")
    types |= dict.fromkeys(_COUNTS, "int64") | dict.fromkeys(_TEXT, "string")
    return pandas.read_csv(
        io.StringIO(printable(cohort_table([row]))),
        sep="\t",
        dtype=types,
        keep_default_na=False,
        na_values=["n/a"],
    )
