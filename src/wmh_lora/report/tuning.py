"""What a tuning found: its numbers, the table of all settings, the summary and the figure."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wmh_lora._version import __version__
from wmh_lora.evaluation.selection import mean_interval
from wmh_lora.evaluation.statistics import LEVEL, RESAMPLES, SEED, Interval
from wmh_lora.evaluation.sweep import SWEPT_MEASURES
from wmh_lora.files import open_atomic
from wmh_lora.report import markdown as md
from wmh_lora.training.tune import Tuning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "OUTPUTS",
    "summary_lines",
    "tuning_document",
    "tuning_figure",
    "tuning_markdown",
    "tuning_table",
    "write_tuning",
]

DOCUMENT_FORMAT = 1
"""Raised whenever the meaning of a key in the document changes."""

#: Files of a report.
OUTPUTS = ("tuning.tsv", "tuning.json", "tuning.md", "threshold.png", "threshold.svg")

_FEW_SUBJECTS = 10
_SETTING = ("threshold", "min_voxels", "tta")


def tuning_document(tuning: Tuning, model: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the numbers of a tuning, JSON-ready; what is undefined is None.

    Parameters
    ----------
    tuning : Tuning
        From `wmh_lora.training.tune.tune`.
    model : mapping
        Name and checksum of the model.
    """
    rows: dict[str, Any] = {"chosen": _row(tuning, tuning.chosen)}
    rows["best_mean"] = _row(tuning, tuning.best)
    rows["before"] = None if tuning.present is None else _row(tuning, tuning.present)
    document = {
        "format": DOCUMENT_FORMAT,
        "software": {"name": "wmh-lora", "version": __version__},
        "model": dict(model),
        "metric": tuning.metric.key,
        "subjects": len(tuning.subjects),
        "scans": tuning.scans,
        "healthy_scans": tuning.healthy_scans,
        "threshold_holds_for": tuning.scope,
        "settings_compared": len(tuning.settings),
        "bootstrap": {"resamples": RESAMPLES, "seed": SEED, "level": LEVEL},
        **rows,
        "left_out": _left_out(tuning),
        "per_subject": [
            _subject(tuning, number, name) for number, name in enumerate(tuning.subjects)
        ],
    }
    ready = _json_ready(document)
    assert isinstance(ready, dict)
    return ready


def tuning_table(tuning: Tuning) -> str:
    """Write every setting with its scores as tab-separated text."""
    rows = [_row(tuning, column) for column in range(len(tuning.settings))]
    marks = {tuning.best: "best mean"}
    if tuning.present is not None:
        marks[tuning.present] = "before"
    marks[tuning.chosen] = "chosen"
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t", lineterminator="\n")
    writer.writerow([*rows[0], "mark"])
    for column, row in enumerate(rows):
        writer.writerow([*(_cell(value) for value in row.values()), marks.get(column, "")])
    return buffer.getvalue()


def tuning_figure(tuning: Tuning) -> Figure:
    """Draw the metric against the threshold, at the chosen size and views (needs matplotlib)."""
    from wmh_lora.report.figures import threshold_curve  # numbers can be had without matplotlib

    columns = _curve(tuning)
    low, high = tuning.low[columns], tuning.high[columns]
    return threshold_curve(
        [tuning.settings[column].threshold for column in columns],
        tuning.mean[columns],
        low,
        high,
        tuning.setting.threshold,
        label=f"Mean {tuning.metric.title}",
    )


def summary_lines(tuning: Tuning) -> list[str]:
    """Say the result in a few lines of plain text."""
    name, digits = tuning.metric.label, tuning.metric.digits
    rows = [("best mean", tuning.best), ("chosen", tuning.chosen)]
    if tuning.present is not None:
        rows.insert(0, ("before", tuning.present))
    lines = [
        f"{_counted(tuning)}; {len(tuning.settings)} settings compared by mean {name}",
    ]
    for label, column in rows:
        setting = tuning.settings[column]
        interval = Interval(tuning.low[column], tuning.high[column])
        line = (
            f"{label:9}  threshold {setting.threshold:.2f}, min voxels {setting.min_voxels:2d}, "
            f"tta {setting.tta:4}  {name} {_estimate(tuning.mean[column], interval, digits)}"
        )
        if tuning.healthy_scans:
            line += f"; {tuning.false_positive_ml[column]:.2f} mL where there is no lesion"
        lines.append(line)
    lines.append(_scope_sentence(tuning))
    lines.append(_left_out_sentence(tuning))
    if len(tuning.subjects) < _FEW_SUBJECTS:
        lines.append(
            f"Caution: {len(tuning.subjects)} subject{'s' * (len(tuning.subjects) > 1)} cannot "
            "tell settings apart that are nearly as good; take the choice as a hint."
        )
    return lines


def tuning_markdown(document: Mapping[str, Any], tuning: Tuning) -> str:
    """Write the summary as Markdown with pipe tables."""
    metric = tuning.metric
    parts = [
        f"# Threshold, component size and views of {md.escape(str(document['model']['name']))}",
        f"{_counted(tuning)}. {len(tuning.settings)} settings were compared by the mean "
        f"{metric.label} over subjects (whole volumes; {metric.better} is better).",
        _comparison(tuning),
        _scope_sentence(tuning),
        _left_out_sentence(tuning),
    ]
    if len(tuning.subjects) < _FEW_SUBJECTS:
        parts.append(
            f"**With {len(tuning.subjects)} subject{'s' * (len(tuning.subjects) > 1)} the choice "
            "is a hint, not a finding: neighbouring settings cannot be told apart.**"
        )
    setting = tuning.setting
    parts += [
        f"![{metric.label} against the threshold](threshold.png)\n\n*Mean {metric.label} over "
        f"subjects against the threshold, at min voxels {setting.min_voxels} and tta "
        f"{setting.tta}{', with the 95 % bootstrap interval' * (len(tuning.subjects) > 1)}.*",
        "## By subject",
        _by_subject(document, tuning),
        "## Methods",
        _methods(tuning),
    ]
    return "\n\n".join(parts) + "\n"


def write_tuning(
    tuning: Tuning, model: Mapping[str, Any], folder: Path, *, overwrite: bool = False
) -> None:
    """Write the files of `OUTPUTS` into an existing folder (needs matplotlib).

    Raises
    ------
    DataError
        A file exists, or cannot be written.
    """
    from wmh_lora.report.figures import save_figure

    document = tuning_document(tuning, model)
    texts = {
        "tuning.tsv": tuning_table(tuning),
        "tuning.json": json.dumps(document, indent=2, ensure_ascii=False) + "\n",
        "tuning.md": tuning_markdown(document, tuning),
    }
    for name, text in texts.items():
        with open_atomic(folder / name, overwrite=overwrite) as stream:
            stream.write(text.encode("utf-8"))
    save_figure(tuning_figure(tuning), folder / "threshold", overwrite=overwrite)


# --- numbers ----------------------------------------------------------------------------------


def _row(tuning: Tuning, column: int) -> dict[str, Any]:
    setting = tuning.settings[column]
    others = [key for key in SWEPT_MEASURES if key != tuning.metric.key]
    return {
        "threshold": setting.threshold,
        "min_voxels": setting.min_voxels,
        "tta": setting.tta,
        "mean": float(tuning.mean[column]),
        "low": float(tuning.low[column]),
        "high": float(tuning.high[column]),
        **{key: float(tuning.scores[key][:, column].mean()) for key in others},
        "false_positive_ml": float(tuning.false_positive_ml[column]),
    }


def _left_out(tuning: Tuning) -> dict[str, Any] | None:
    """Estimate that has not seen its subjects, and its gain over the settings before."""
    if not tuning.left_out:
        return None
    scores = tuning.left_out_scores
    mean, interval = mean_interval(scores)
    result: dict[str, Any] = {"mean": mean, "low": interval.low, "high": interval.high}
    if tuning.present is not None:
        difference = scores - tuning.scores[tuning.metric.key][:, tuning.present]
        gain, interval = mean_interval(difference)
        result["gain"] = {"mean": gain, "low": interval.low, "high": interval.high}
    return result


def _subject(tuning: Tuning, number: int, name: str) -> dict[str, Any]:
    values = tuning.scores[tuning.metric.key][number]
    row = {
        "subject": name,
        "before": math.nan if tuning.present is None else float(values[tuning.present]),
        "chosen": float(values[tuning.chosen]),
        "left_out": math.nan,
        "left_out_setting": None,
    }
    if tuning.left_out:
        column = tuning.left_out[number]
        setting = tuning.settings[column]
        row["left_out"] = float(values[column])
        row["left_out_setting"] = {key: getattr(setting, key) for key in _SETTING}
    return row


def _curve(tuning: Tuning) -> list[int]:
    chosen = tuning.setting
    return [
        column
        for column, setting in enumerate(tuning.settings)
        if (setting.min_voxels, setting.tta) == (chosen.min_voxels, chosen.tta)
    ]


def _json_ready(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_ready(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if np.isfinite(value) else None
    return value


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if np.isfinite(value) else md.NOT_AVAILABLE
    return str(value)


# --- words ------------------------------------------------------------------------------------


def _counted(tuning: Tuning) -> str:
    subjects, scans, healthy = len(tuning.subjects), tuning.scans, tuning.healthy_scans
    text = f"{subjects} subject{'s' * (subjects != 1)} with lesions"
    if scans != subjects:
        text += f" ({scans} scans)"
    if healthy:
        text += f" and {healthy} scan{'s' * (healthy != 1)} without"
    return text


def _estimate(mean: float, interval: Interval, digits: int) -> str:
    text = f"{mean:.{digits}f}"
    if np.isfinite(interval.low):
        text += f" [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
    return text


def _scope_sentence(tuning: Tuning) -> str:
    if tuning.scope == "every scan":
        return "The threshold holds for every scan, seen in one plane or in three."
    return (
        f"The threshold holds for scans that are seen in {tuning.scope}, as these were; the "
        "model's other threshold stays as it was."
    )


def _left_out_sentence(tuning: Tuning) -> str:
    found, digits = _left_out(tuning), tuning.metric.digits
    if found is None:
        return (
            "No unbiased estimate: choosing and scoring on the same one subject flatters the "
            "result, and leaving it out leaves none."
        )
    interval = Interval(found["low"], found["high"])
    text = (
        f"Leave-one-out estimate of the tuned {tuning.metric.label}: "
        f"{_estimate(found['mean'], interval, digits)}"
    )
    if (gain := found.get("gain")) is not None:
        interval = Interval(gain["low"], gain["high"])
        text += f"; change from before {_estimate(gain['mean'], interval, digits)}"
    return text + "."


def _comparison(tuning: Tuning) -> str:
    digits = tuning.metric.digits
    rows = []
    named = [("before", tuning.present), ("best mean", tuning.best), ("chosen", tuning.chosen)]
    for label, column in named:
        if column is None:
            continue
        row = _row(tuning, column)
        false = row["false_positive_ml"]
        rows.append(
            [
                label,
                f"{row['threshold']:.2f}",
                str(row["min_voxels"]),
                row["tta"],
                _estimate(row["mean"], Interval(row["low"], row["high"]), digits),
                f"{false:.2f}" if np.isfinite(false) else md.NOT_AVAILABLE,
            ]
        )
    head = ["", "Threshold", "Min voxels", "TTA", f"{tuning.metric.label} [95 %]"]
    return md.table([*head, "False-positive mL, lesion-free scans"], rows)


def _by_subject(document: Mapping[str, Any], tuning: Tuning) -> str:
    rows = []
    for row in document["per_subject"]:
        setting = row["left_out_setting"]
        without = "" if setting is None else " / ".join(str(setting[key]) for key in _SETTING)
        shown = (row[key] for key in ("before", "chosen", "left_out"))
        scores = [md.fixed(score, tuning.metric.digits) for score in shown]
        rows.append([row["subject"], *scores, without])
    return md.table(["Subject", "Before", "Chosen", "Left out", "Chosen without it"], rows)


def _methods(tuning: Tuning) -> str:
    return (
        "Each scan went through the network once a view. Masks were made as `wmh-lora segment` "
        "makes them and scored on whole volumes as by the WMH Segmentation Challenge; voxels of "
        "other pathology (label 2) do not count. Scans of one subject were averaged. Scans "
        "without lesions have no score; what was found in them is given in mL. Among settings "
        "whose mean shortfall from the best mean is within one standard error of that shortfall, "
        "the one with fewest views, then with the threshold and the component size nearest to the "
        f"model's own was chosen. Intervals are 95 % percentile bootstrap intervals over subjects "
        f"({RESAMPLES} resamples). *Left out*: the choice was repeated without the subject and "
        f"scored on it. {tuning.metric.label}: {tuning.metric.meaning}"
    )
