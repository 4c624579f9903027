"""The numbers of an evaluation: one document of everything, and the table of all scans."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from wmh_lora._version import __version__
from wmh_lora.evaluation.agreement import agree
from wmh_lora.evaluation.cohort import Case, Pair, Unpaired
from wmh_lora.evaluation.measures import LOAD_BANDS, MEASURES, Measure, load_band, measure
from wmh_lora.evaluation.statistics import (
    LEVEL,
    RESAMPLES,
    SEED,
    compare_paired,
    holm_adjusted,
    mean_shift,
    summarise,
)

__all__ = [
    "MAIN_MEASURES",
    "Evaluation",
    "Failure",
    "case_dictionary",
    "case_table",
    "evaluation_document",
]

DOCUMENT_FORMAT = 1
"""Raised whenever the meaning of a key in the document changes."""

#: The five measures of the challenge, which tables and comparisons show.
MAIN_MEASURES: tuple[Measure, ...] = tuple(
    measure(key) for key in ("dice", "hd95_mm", "avd_percent", "lesion_recall", "lesion_f1")
)

_NOT_AVAILABLE = "n/a"  # as BIDS writes it

_IDENTITY_COLUMNS = {
    "series": "Cohort, or the method where two are compared.",
    "scan": "Site, subject, session and scan, as far as the file names tell them.",
    "subject": "Label of the subject.",
    "session": "Label of the visit.",
    "site": "Centre or scanner, from the participants table or the folders.",
    "load_band": "Band of lesion load, by the reference volume.",
    "status": "Whether the scan could be scored.",
}
_CLOSING_COLUMNS = {
    "grid_note": "How the affines of the two files differ, where by more than 0.001; shapes agree.",
    "message": "Why a scan was not scored, or what a reader should know.",
    "prediction": "File of the prediction, below its folder.",
    "reference": "File of the reference, below its folder.",
}


@dataclass(frozen=True)
class Failure:
    """A pair that could not be scored, or a cohort without pairs (`pair` is None)."""

    series: str
    message: str
    pair: Pair | None = None


@dataclass(frozen=True)
class Evaluation:
    """Everything that was found out about some cohorts, or about two methods on one.

    Attributes
    ----------
    kind : str
        ``single``, ``cohorts`` (compared as groups) or ``methods`` (compared scan by scan).
    folders : mapping
        Prediction and reference folder by series, in the order in which they are reported.
    cases : sequence of Case
        Scored pairs.
    failures, unpaired : sequences
        What could not be scored; nothing else is missing.
    """

    kind: Literal["single", "cohorts", "methods"]
    folders: Mapping[str, tuple[Path, Path]]
    cases: Sequence[Case]
    failures: Sequence[Failure] = field(default_factory=tuple)
    unpaired: Sequence[Unpaired] = field(default_factory=tuple)

    @property
    def series(self) -> list[str]:
        """Names of the series with at least one scored pair, in their order."""
        return [name for name in self.folders if self.of(name)]

    def of(self, series: str) -> list[Case]:
        """Return the cases of one series."""
        return [case for case in self.cases if case.pair.series == series]

    def shown_path(self, series: str, path: Path) -> str:
        """Name a file below its folder: where it lay on somebody's disk is not passed on."""
        for folder in self.folders[series]:
            if path.is_relative_to(folder):
                return path.relative_to(folder).as_posix()
        return path.name

    def shown_message(self, series: str, message: str, pair: Pair | None = None) -> str:
        """Return a message in which files, and folders, are named as `shown_path` does."""
        for file in (pair.prediction, pair.reference) if pair else ():
            message = message.replace(str(file.path), self.shown_path(series, file.path))
        for folder in self.folders[series]:
            if folder.is_absolute():  # others tell nothing, and may be as short as a dot
                message = message.replace(str(folder), folder.name)
        return message


def evaluation_document(
    evaluation: Evaluation, *, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, Any]:
    """Compute every summary, comparison and measure of agreement of an evaluation.

    Parameters
    ----------
    evaluation : Evaluation
        With at least one case.
    resamples, seed : int
        Of the bootstrap.

    Returns
    -------
    dict
        JSON-ready; undefined numbers are None. Equal input gives an equal document.
    """
    options = {"resamples": resamples, "seed": seed}
    rows = case_rows(evaluation)
    document = {
        "format": DOCUMENT_FORMAT,
        "software": {"name": "wmh-lora", "version": __version__},
        "settings": {"bootstrap_resamples": resamples, "bootstrap_seed": seed, "level": LEVEL},
        "kind": evaluation.kind,
        "series": [_series_entry(evaluation, name) for name in evaluation.folders],
        "summary": [
            row
            for name in evaluation.series
            for row in _summaries(name, evaluation.of(name), options)
        ],
        "agreement": [
            {"series": name, **_agreement(evaluation.of(name))} for name in evaluation.series
        ],
        "comparison": _comparison(evaluation, options),
        "domain_shift": _domain_shift(evaluation, options),
        "cases": rows,
        "unpaired": [
            {
                "series": entry.series,
                "role": entry.role,
                "file": evaluation.shown_path(entry.series, entry.path),
                "reason": entry.reason,
            }
            for entry in evaluation.unpaired
        ],
        "failed": [
            {
                "series": failure.series,
                "scan": failure.pair.name if failure.pair else None,
                "message": evaluation.shown_message(failure.series, failure.message, failure.pair),
            }
            for failure in evaluation.failures
        ],
    }
    return dict(_json_ready(document))


def case_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return a row for every pair, scored or not, in the order of series and names."""
    rows = []
    for case in evaluation.cases:
        row = _identity(evaluation, case.pair)
        row.update(
            load_band=load_band(case.metrics.reference_ml),
            status="done",
            **case.metrics.to_dict(),
            grid_note=case.grid_note,
            message=evaluation.shown_message(case.pair.series, case.note, case.pair),
        )
        rows.append(row)
    for failure in evaluation.failures:
        if failure.pair is not None:
            row = _identity(evaluation, failure.pair)
            message = evaluation.shown_message(failure.series, failure.message, failure.pair)
            rows.append({**row, "status": "failed", "message": message})
    order = list(evaluation.folders)
    rows.sort(key=lambda row: (order.index(row["series"]), row["site"], row["scan"]))
    return rows


def case_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Write rows of `case_rows` as tab-separated text, one line a scan; ``n/a`` is undefined."""
    columns = [*_IDENTITY_COLUMNS, *(entry.key for entry in MEASURES), *_CLOSING_COLUMNS]
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t", lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(column)) for column in columns])
    return buffer.getvalue()


def case_dictionary() -> dict[str, dict[str, Any]]:
    """Describe the columns of `case_table`, as BIDS describes those of a table."""
    dictionary: dict[str, dict[str, Any]] = {
        column: {"Description": text} for column, text in _IDENTITY_COLUMNS.items()
    }
    dictionary["load_band"]["Levels"] = {band: f"{band} in the reference" for band in LOAD_BANDS}
    dictionary["status"]["Levels"] = {"done": "scored", "failed": "not scored, see message"}
    for entry in MEASURES:
        dictionary[entry.key] = {"LongName": entry.label, "Description": entry.meaning}
        if entry.unit:
            dictionary[entry.key]["Units"] = entry.unit
    dictionary |= {column: {"Description": text} for column, text in _CLOSING_COLUMNS.items()}
    return dictionary


def _identity(evaluation: Evaluation, pair: Pair) -> dict[str, Any]:
    return {
        "series": pair.series,
        "scan": pair.name,
        "subject": pair.reference.subject,
        "session": pair.session,
        "site": pair.site,
        "prediction": evaluation.shown_path(pair.series, pair.prediction.path),
        "reference": evaluation.shown_path(pair.series, pair.reference.path),
    }


def _series_entry(evaluation: Evaluation, name: str) -> dict[str, Any]:
    cases = evaluation.of(name)
    predictions, references = evaluation.folders[name]
    return {
        "series": name,
        "prediction_folder": predictions.resolve().name,
        "reference_folder": references.resolve().name,
        "scans": len(cases),
        "subjects": len({case.pair.subject_key for case in cases}),
        "failed": sum(failure.series == name for failure in evaluation.failures),
        "unpaired": sum(entry.series == name for entry in evaluation.unpaired),
        "grid_notes": sum(bool(case.grid_note) for case in cases),
    }


def _summaries(
    series: str, cases: Sequence[Case], options: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Summarise all scans, those of each site, and those of each band of lesion load."""
    groups: list[tuple[str, str, list[Case]]] = [("overall", "all", list(cases))]
    if any(case.pair.site for case in cases):
        for site in sorted({case.pair.site for case in cases}, key=lambda name: (not name, name)):
            own = [case for case in cases if case.pair.site == site]
            groups.append(("site", site or _NOT_AVAILABLE, own))
    for band in LOAD_BANDS:
        own = [case for case in cases if load_band(case.metrics.reference_ml) == band]
        groups.append(("load", band, own))
    return [
        {
            "series": series,
            "group": group,
            "level": level,
            "measure": entry.key,
            **_summary(own, entry, options),
        }
        for group, level, own in groups
        if own
        for entry in MEASURES
    ]


def _summary(cases: Sequence[Case], entry: Measure, options: Mapping[str, int]) -> dict[str, Any]:
    return asdict(summarise(_values(cases, entry), _subjects(cases), **options))


def _agreement(cases: Sequence[Case]) -> dict[str, Any]:
    reference = [case.metrics.reference_ml for case in cases]
    prediction = [case.metrics.prediction_ml for case in cases]
    subjects = len(set(_subjects(cases)))
    return {"scans": len(cases), "subjects": subjects, **asdict(agree(reference, prediction))}


def _comparison(evaluation: Evaluation, options: Mapping[str, int]) -> dict[str, Any] | None:
    if evaluation.kind != "methods" or len(evaluation.series) < 2:
        return None
    first_name, second_name = evaluation.series
    first, second = (
        {case.pair.reference.path: case for case in evaluation.of(name)}
        for name in (first_name, second_name)
    )
    shared = [path for path in first if path in second]
    subjects = _subjects([first[path] for path in shared])
    rows: list[dict[str, Any]] = []
    for entry in MAIN_MEASURES:
        values = [_values([side[path] for path in shared], entry) for side in (first, second)]
        result = compare_paired(values[0], values[1], subjects, **options)
        rows.append({"measure": entry.key, "better": entry.better, **asdict(result)})
    for row, adjusted in zip(rows, holm_adjusted([r["p_value"] for r in rows]), strict=True):
        row["p_holm"] = adjusted
    return {
        "first": first_name,
        "second": second_name,
        "scans": len(shared),
        "only_first": len(first) - len(shared),
        "only_second": len(second) - len(shared),
        "rows": rows,
    }


def _domain_shift(evaluation: Evaluation, options: Mapping[str, int]) -> list[dict[str, Any]]:
    if evaluation.kind != "cohorts":
        return []
    base, *others = evaluation.series
    rows = []
    for name in others:
        for entry in MAIN_MEASURES:
            own, theirs = evaluation.of(name), evaluation.of(base)
            difference, interval = mean_shift(
                _values(theirs, entry),
                _subjects(theirs),
                _values(own, entry),
                _subjects(own),
                **options,
            )
            rows.append(
                {
                    "series": name,
                    "minus": base,
                    "measure": entry.key,
                    "difference": difference,
                    "interval": interval,
                }
            )
    return rows


def _values(cases: Sequence[Case], entry: Measure) -> list[Any]:
    return [getattr(case.metrics, entry.key) for case in cases]


def _subjects(cases: Sequence[Case]) -> list[Any]:
    return [case.pair.subject_key for case in cases]


def _cell(value: Any) -> str:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return _NOT_AVAILABLE
    if isinstance(value, float):
        return f"{value:.6g}"
    # tabs and line breaks inside a cell would break the table for simple readers
    return " ".join(str(value).split())


def _json_ready(value: Any) -> Any:
    """Turn NaN into None, named tuples into lists, and round what is beyond any accuracy."""
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _json_ready(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(entry) for entry in value]
    return value
