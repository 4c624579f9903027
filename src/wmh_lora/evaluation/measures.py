"""What every measure of a scan is called, counted in and means: one table for all outputs."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LOAD_BANDS", "MEASURES", "Measure", "load_band", "measure"]


@dataclass(frozen=True)
class Measure:
    """One measure of `wmh_lora.evaluation.metrics.ChallengeMetrics`.

    Attributes
    ----------
    key : str
        Its attribute there, and its column in tables.
    label : str
        How it is written in reports and on axes, without the unit.
    unit : str
        Empty for shares and counts.
    digits : int
        Decimals in reports.
    better : str
        ``higher``, ``lower``, or empty where neither is better.
    meaning : str
        One sentence or two, with what an undefined value means.
    """

    key: str
    label: str
    unit: str
    digits: int
    better: str
    meaning: str

    @property
    def title(self) -> str:
        """Return the label with its unit, for axes and heads of tables."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


MEASURES: tuple[Measure, ...] = (
    Measure(
        "dice",
        "Dice",
        "",
        3,
        "higher",
        "2 |R and P| / (|R| + |P|) over voxels, without smoothing. Undefined when both masks are "
        "empty.",
    ),
    Measure(
        "hd95_mm",
        "HD95",
        "mm",
        2,
        "lower",
        "Larger of the two directed 95th percentiles of the distance between in-plane boundaries. "
        "Undefined when either mask is empty.",
    ),
    Measure(
        "avd_percent",
        "AVD",
        "%",
        1,
        "lower",
        "Absolute volume difference in percent of the reference volume. Undefined when the "
        "reference is empty.",
    ),
    Measure(
        "lesion_recall",
        "Lesion recall",
        "",
        3,
        "higher",
        "Share of 26-connected reference lesions touched by at least one predicted voxel; 1 when "
        "the reference holds none.",
    ),
    Measure(
        "lesion_f1",
        "Lesion F1",
        "",
        3,
        "higher",
        "Harmonic mean of lesion recall and lesion precision; 0 when both are 0.",
    ),
    Measure(
        "lesion_precision",
        "Lesion precision",
        "",
        3,
        "higher",
        "Share of 26-connected predicted lesions that touch at least one reference voxel; 1 when "
        "nothing is predicted.",
    ),
    Measure(
        "precision",
        "Voxel precision",
        "",
        3,
        "higher",
        "Share of predicted voxels that the reference holds. Undefined when nothing is predicted.",
    ),
    Measure(
        "recall",
        "Voxel recall",
        "",
        3,
        "higher",
        "Share of reference voxels that were predicted. Undefined when the reference is empty.",
    ),
    Measure("reference_ml", "Reference volume", "mL", 2, "", "Lesion volume of the reference."),
    Measure(
        "prediction_ml",
        "Predicted volume",
        "mL",
        2,
        "",
        "Predicted lesion volume, voxels of other pathology (label 2 of the reference) left out.",
    ),
    Measure(
        "reference_lesions",
        "Reference lesions",
        "",
        1,
        "",
        "Number of 26-connected components of the reference.",
    ),
    Measure(
        "prediction_lesions",
        "Predicted lesions",
        "",
        1,
        "",
        "Number of 26-connected components of the prediction.",
    ),
)

#: Bands of lesion load, by the reference volume in mL.
LOAD_BANDS: tuple[str, ...] = ("< 2 mL", "2-10 mL", "> 10 mL")


def measure(key: str) -> Measure:
    """Return the measure of that key.

    Examples
    --------
    >>> measure("hd95_mm").title
    'HD95 (mm)'
    """
    return next(entry for entry in MEASURES if entry.key == key)


def load_band(reference_ml: float) -> str:
    """Return the member of `LOAD_BANDS` that a reference volume in mL belongs to.

    Examples
    --------
    >>> [load_band(volume) for volume in (0.0, 2.0, 10.0, 10.1)]
    ['< 2 mL', '2-10 mL', '2-10 mL', '> 10 mL']
    """
    if reference_ml < 2.0:
        return LOAD_BANDS[0]
    return LOAD_BANDS[1] if reference_ml <= 10.0 else LOAD_BANDS[2]
