"""What a page says about one scan: figures with their units, or the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from wmh_lora.postprocess import lesion_mask
from wmh_lora.quality import mean_uncertainty
from wmh_lora.report.segmented import Segmented

__all__ = [
    "DEEP_HOLDS",
    "VERDICTS",
    "Check",
    "Figure",
    "Quality",
    "Split",
    "key_figures",
    "quality_of",
    "setting_rows",
    "splits_of",
    "subtitle_of",
]

VERDICTS: Mapping[str, str] = {
    "pass": "Quality checks passed",
    "warn": "Read with care",
    "fail": "Quality checks failed",
    "none": "Quality not assessed",
}
"""What is written beside the sign of each verdict."""

_VIEWS = {"none": "1 view", "flip": "4 views (flips)", "d4": "8 views (flips and turns)"}
_NO_REGIONS = "This report was made without the analysis of regions."
_THRESHOLD_STEP = 0.1
_DIGEST_SHOWN = 12
DEEP_HOLDS = (
    "Deep includes juxtacortical, deep grey, brain stem and cerebellar lesions, which the model "
    "does not tell apart."
)
"""What is to be said of both rules."""

_RULES = {
    "component_contact": (
        "Contact rule",
        "A lesion that touches the ventricles (at most 1 mm of other tissue between) is "
        "periventricular as a whole; any other is deep.",
    ),
    "voxel_distance_10mm": (
        "10 mm rule",
        "Each lesion voxel within 10 mm of the ventricles is periventricular; any other is deep.",
    ),
}


@dataclass(frozen=True)
class Figure:
    """One number of the summary; without a value, the note says why."""

    label: str
    value: str | None
    unit: str = ""
    note: str = ""
    tag: str = ""


@dataclass(frozen=True)
class Split:
    """Lesion volume beside the ventricles and away from them, by one rule."""

    name: str
    rule: str
    periventricular_ml: float | None = None
    deep_ml: float | None = None
    periventricular_count: int | None = None
    deep_count: int | None = None
    reason: str = ""

    @property
    def share(self) -> float:
        """Periventricular part of the volume, in [0, 1]; 0 without lesions."""
        near, far = self.periventricular_ml or 0.0, self.deep_ml or 0.0
        return near / (near + far) if near + far > 0 else 0.0


@dataclass(frozen=True)
class Check:
    """One quality check; its verdict is ``none`` where it could not be made."""

    name: str
    verdict: str
    sentence: str


@dataclass(frozen=True)
class Quality:
    """The verdict on a scan and its segmentation, with what led to it."""

    verdict: str
    checks: tuple[Check, ...] = field(default_factory=tuple)

    @property
    def title(self) -> str:
        """The verdict in words."""
        return VERDICTS[self.verdict]

    @property
    def reasons(self) -> tuple[Check, ...]:
        """Checks that did not pass, the failed ones first."""
        return self._with("fail") + self._with("warn")

    @property
    def passed(self) -> tuple[Check, ...]:
        """Checks that passed."""
        return self._with("pass")

    @property
    def missing(self) -> tuple[Check, ...]:
        """Checks that could not be made."""
        return self._with("none")

    def _with(self, verdict: str) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.verdict == verdict)


def quality_of(report: Mapping[str, Any]) -> Quality:
    """Return the verdict of a report; ``none`` where quality was not assessed."""
    found = report.get("quality")
    if not found:
        return Quality("none")
    checks = tuple(
        Check(str(c["name"]).replace("_", " "), _check_verdict(c), str(c["sentence"]))
        for c in found.get("checks") or ()
    )
    return Quality(_verdict(found["verdict"]), checks)


def _check_verdict(check: Mapping[str, Any]) -> str:
    """Tell a check that passed from one that could not be made, which has no value."""
    verdict = _verdict(check["verdict"])
    return "none" if verdict == "pass" and check.get("value") is None else verdict


def _verdict(text: Any) -> str:
    return str(text) if text in VERDICTS else "none"


def key_figures(segmentation: Segmented, report: Mapping[str, Any]) -> tuple[Figure, ...]:
    """Return the figures of the summary in the order in which they are read."""
    regions = report.get("regions")
    return (
        _volume(segmentation, report),
        _count(report),
        _share_of_icv(regions),
        _fazekas(regions),
        _uncertainty(segmentation, report),
    )


def _volume(segmentation: Segmented, report: Mapping[str, Any]) -> Figure:
    settings = report["settings"]
    threshold = float(settings["threshold"])
    smallest, peak = int(settings["min_voxels"]), float(settings.get("min_peak", 0.0))
    voxel_ml = segmentation.volume.voxel_volume_ml
    parts = []
    for level in (threshold - _THRESHOLD_STEP, threshold + _THRESHOLD_STEP):
        if 0.0 < level < 1.0:
            mask = lesion_mask(segmentation.probability, level, smallest, peak)
            parts.append(f"{int(mask.sum()) * voxel_ml:.2f} mL at {level:.2f}")
    return Figure(
        "WMH volume",
        f"{report['wmh_volume_ml']:.2f}",
        "mL",
        f"Threshold {threshold:.2f}; it would be {', '.join(parts)}.",
    )


def _count(report: Mapping[str, Any]) -> Figure:
    lesions, grid = report["lesions"], report["grid"]
    smallest = report["settings"]["min_voxels"]
    note = f"From {smallest} voxels ({smallest * grid['voxel_volume_mm3']:.0f} mm³) up"
    if lesions:
        note += f"; the largest has {lesions[0]['volume_ml']:.2f} mL"
    return Figure("Lesions", str(report["lesion_count"]), "", f"{note}.")


def _share_of_icv(regions: Mapping[str, Any] | None) -> Figure:
    label = "Share of ICV"
    percent = (regions or {}).get("wmh_percent_of_icv")
    if regions is None or percent is None:
        return Figure(label, None, note=_reason(regions, "wmh_percent_of_icv"))
    note = f"Of {regions['icv_ml']:.0f} mL; the brain mask stands in for the intracranial volume."
    return Figure(label, f"{percent:.2f}", "%", note)


def _fazekas(regions: Mapping[str, Any] | None) -> Figure:
    label = "Fazekas-like"
    grades = (regions or {}).get("fazekas")
    if grades is None:
        return Figure(label, None, note=_reason(regions, "fazekas"), tag="estimate")
    return Figure(
        label,
        f"{grades['periventricular']} / {grades['deep']}",
        "PV / deep",
        f"Measured: reach from the ventricles {_cut(grades['periventricular_reach_mm'])} mm, "
        f"largest deep lesion {_cut(grades['deep_diameter_mm'])} mm. Not a visual rating.",
        tag="estimate",
    )


def _cut(length_mm: float) -> str:
    """Write a length without rounding up, which would reach limits that it is below."""
    return f"{math.floor(10.0 * length_mm) / 10.0:.1f}"


def _uncertainty(segmentation: Segmented, report: Mapping[str, Any]) -> Figure:
    label = "Uncertainty"
    if segmentation.uncertainty is None:
        return Figure(label, None, note=_why_seen_once(report["settings"]))
    mean = mean_uncertainty(segmentation.uncertainty, segmentation.mask)
    if mean is None:
        return Figure(label, None, note="No lesion was seen more than once.")
    note = "Of the lesion probability over all looks; mean in lesions. It can reach 0.5."
    return Figure(label, f"{mean:.2f}", "SD", note)


def _why_seen_once(settings: Mapping[str, Any]) -> str:
    if settings.get("tta") != "none":
        return "Not computed for this scan."
    closer = settings.get("zoom", 1.0) > 1.0  # was asked for
    why = ", for want of memory" if closer else " (--tta none, --zoom 1)"
    return f"It takes several looks; this scan was seen once{why}."


def splits_of(report: Mapping[str, Any]) -> tuple[Split, ...]:
    """Return periventricular and deep volumes by both rules, or why there are none."""
    regions = report.get("regions")
    splits = []
    for key, (name, rule) in _RULES.items():
        found = (regions or {}).get(key)
        if found is None:
            splits.append(Split(name, rule, reason=_reason(regions, key)))
        else:
            splits.append(Split(name, rule, **found))
    return tuple(splits)


def _reason(regions: Mapping[str, Any] | None, key: str) -> str:
    if regions is None:
        return _NO_REGIONS
    sentence = str(regions.get("unavailable", {}).get(key, "it was not computed"))
    return f"Not known: {sentence}."


def subtitle_of(report: Mapping[str, Any], analysed_on: date) -> str:
    """Return the line below the title: when, with what, and how."""
    settings, software = report["settings"], report["software"]
    parts = (
        f"Analysed {analysed_on.isoformat()}",
        f"{software['name']} {software['version']}",
        f"model {_model(report)}",
        f"threshold {settings['threshold']:g}",
        f"lesions from {settings['min_voxels']} voxels",
        _views(settings),
    )
    return " · ".join(parts)


def _model(report: Mapping[str, Any]) -> str:
    model = report["model"]
    digest = str(model.get("sha256", ""))[:_DIGEST_SHOWN]
    return f"{model['name']} ({digest})" if digest else str(model["name"])


def _views(settings: Mapping[str, Any]) -> str:
    views = str(settings.get("tta", "unknown views"))
    text = _VIEWS.get(views, views)
    used = settings.get("used", {})
    if used.get("planes", 1) > 1:
        text = f"{text}, in three planes"
    if used.get("zoom", 1.0) > 1.0:
        text = f"{text}, evidence once more {used['zoom']:g} times larger"
    # slices without evidence of a lesion were then seen in one view
    return f"{text}, adaptive" if settings.get("adaptive") and views != "none" else text


def setting_rows(report: Mapping[str, Any], analysed_on: date) -> list[tuple[str, str]]:
    """Return what a reader needs to repeat the analysis, as names and values."""
    settings, model, grid = report["settings"], report["model"], report["grid"]
    rows = [
        ("File", str(report["file"] or "not from a file")),
        ("Date of analysis", analysed_on.isoformat()),
        ("Model", _model(report)),
        ("Base encoder", str(model.get("base_encoder", "none"))),
        ("Software", f"{report['software']['name']} {report['software']['version']}"),
        ("Threshold", f"{settings['threshold']:g}"),
        ("Smallest lesion", f"{settings['min_voxels']} voxels"),
        ("Lesions reach a probability of", f"{settings.get('min_peak', 0):g}"),
        ("Least contrast", f"{settings.get('min_contrast', 0):g} of the scan's lesions"),
        ("Views averaged", _views(settings)),
        ("Device", str(settings.get("device", "unknown"))),
        ("Grid", f"{_times(grid['shape'])} voxels, {grid['orientation']}"),
        ("Voxel size", f"{_times(f'{mm:.2f}' for mm in grid['spacing_mm'])} mm"),
    ]
    if settings.get("t1"):
        moved = ", registered to the FLAIR" if settings.get("register_t1") else ""
        rows.append(("T1", f"{report.get('t1_file') or 'not from a file'}{moved}"))
    if "used" in settings:
        rows.append(("Precision", str(settings["used"]["precision"])))
    if report.get("file_sha256"):
        rows.append(("SHA-256 of the file", str(report["file_sha256"])))
    if report.get("t1_sha256"):
        rows.append(("SHA-256 of the T1", str(report["t1_sha256"])))
    return rows


def _times(values: Sequence[Any] | Any) -> str:
    return " × ".join(str(value) for value in values)
