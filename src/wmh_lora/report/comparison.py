"""The table of a comparison of methods: one document of everything, tables, and Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wmh_lora.evaluation.cohort import Case, Unpaired
from wmh_lora.evaluation.measures import measure
from wmh_lora.evaluation.statistics import compare_paired, holm_adjusted
from wmh_lora.files import open_atomic
from wmh_lora.report import markdown as md
from wmh_lora.report.evaluation import (
    Evaluation,
    Failure,
    case_dictionary,
    case_table,
    evaluation_document,
)

__all__ = [
    "COMPARED",
    "OUTPUTS",
    "MethodCosts",
    "comparison_document",
    "comparison_markdown",
    "write_comparison",
]

#: Files of a report.
OUTPUTS = (
    "comparison.md",
    "comparison.tsv",
    "differences.tsv",
    "comparison.json",
    "cases.tsv",
    "cases.json",
)
#: Measures in which methods are compared.
COMPARED = ("dice", "hd95_mm", "lesion_f1", "avd_percent")

_SHOWN = ("dice", "hd95_mm", "lesion_f1")
_FEW_SUBJECTS = 10
_CLOCKS = {"cpu": "CPU s", "wall": "s"}


@dataclass(frozen=True)
class MethodCosts:
    """What a method took; empty for masks that came from elsewhere.

    Attributes
    ----------
    parameters, members
        Trained parameters, of all members together, and networks that are averaged.
    training_seconds, inference_seconds
        Of each fold, and of each test scan, by the clock of the comparison.
    settings
        By fold: steps, threshold, smallest component, validation Dice and notes.
    """

    parameters: int | None = None
    members: int = 1
    training_seconds: tuple[float, ...] = ()
    inference_seconds: tuple[float, ...] = ()
    settings: tuple[Mapping[str, Any], ...] = field(default=())


def comparison_document(
    folders: Mapping[str, tuple[Path, Path]],
    cases: Sequence[Case],
    costs: Mapping[str, MethodCosts],
    *,
    against: str,
    clock: str = "cpu",
    budget_seconds: float | None = None,
    failures: Sequence[Failure] = (),
    unpaired: Sequence[Unpaired] = (),
) -> dict[str, Any]:
    """Compute every number of a comparison.

    Parameters
    ----------
    folders
        Masks and references by method, in the order of the report.
    cases
        Scored scans of all methods. Cases of one reference file belong together.
    costs
        By method; those that are absent have none.
    against
        The method that differences are taken from.
    clock, budget_seconds
        Of the training.
    failures, unpaired
        What could not be scored.

    Returns
    -------
    dict
        JSON-ready: that of `wmh_lora.report.evaluation.evaluation_document`, with ``methods``,
        ``differences``, ``against`` and ``budget``.
    """
    evaluation = Evaluation("single", folders, list(cases), list(failures), list(unpaired))
    document = evaluation_document(evaluation)
    document.update(
        kind="comparison",
        against=against,
        budget={"seconds": budget_seconds, "clock": clock},
        methods=[
            _method(name, costs.get(name, MethodCosts()), document) for name in evaluation.series
        ],
        differences=_differences(evaluation, against),
    )
    return document


def _method(name: str, costs: MethodCosts, document: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    overall = {
        row["measure"]: row
        for row in document["summary"]
        if row["series"] == name and row["group"] == "overall"
    }
    volumes = next(row for row in document["agreement"] if row["series"] == name)
    row: dict[str, Any] = {
        "method": name,
        "scans": volumes["scans"],
        "subjects": volumes["subjects"],
        "parameters": costs.parameters,
        "members": costs.members,
        "training_seconds": _mean(costs.training_seconds),
        "inference_seconds": _mean(costs.inference_seconds),
    }
    for key in COMPARED:
        row[key] = overall[key]["mean"]
        row[f"{key}_interval"] = overall[key]["mean_interval"]
        row[f"{key}_undefined"] = overall[key]["undefined"]
    bias = volumes["bland_altman"]["bias"]
    row["volume_bias_ml"] = bias["value"]
    row["volume_bias_ml_interval"] = bias["interval"]
    row["folds"] = [dict(entry) for entry in costs.settings]
    return row


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 3) if values else None


def _differences(evaluation: Evaluation, against: str) -> list[dict[str, Any]]:
    """Compare every other method with one, on the scans that both were scored on."""
    base = {case.pair.reference.path.resolve(): case for case in evaluation.of(against)}
    others = [name for name in evaluation.series if name != against]
    rows: list[dict[str, Any]] = []
    for key in COMPARED:
        own = [
            {"method": name, "measure": key, **_difference(base, evaluation.of(name), key)}
            for name in others
        ]
        # NaN, of methods without a scan in common, does not count
        p_values = [float("nan" if row["p_value"] is None else row["p_value"]) for row in own]
        for row, adjusted in zip(own, holm_adjusted(p_values)):
            rows.append({**row, "p_holm": _number(adjusted)})
    return rows


def _difference(base: Mapping[Path, Case], cases: Sequence[Case], key: str) -> dict[str, Any]:
    """Compare one measure of two methods, scan by scan."""
    shared = {case.pair.reference.path.resolve(): case for case in cases}
    paths = [path for path in base if path in shared]
    values = compare_paired(
        [getattr(base[path].metrics, key) for path in paths],
        [getattr(shared[path].metrics, key) for path in paths],
        [base[path].pair.subject_key for path in paths],
    )
    return {
        **{name: _number(v) if isinstance(v, float) else v for name, v in asdict(values).items()},
        "interval": [_number(bound) for bound in values.interval],
    }


def _number(value: float) -> float | None:
    return float(f"{value:.9g}") if np.isfinite(value) else None


# --- files ------------------------------------------------------------------------------------


def write_comparison(document: Mapping[str, Any], out_dir: Path) -> None:
    """Write all files of `OUTPUTS`, in place of those that are there.

    Raises
    ------
    DataError
        If a file cannot be written.
    """
    texts = {
        "comparison.md": comparison_markdown(document),
        "comparison.tsv": _method_table(document),
        "differences.tsv": _difference_table(document),
        "comparison.json": _json(document),
        "cases.tsv": case_table(document["cases"]),
        "cases.json": _json(case_dictionary()),
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        with open_atomic(out_dir / name, overwrite=True) as stream:
            stream.write(text.encode("utf-8"))


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _method_table(document: Mapping[str, Any]) -> str:
    plain = ["method", "scans", "subjects", "parameters", "members"]
    plain += ["training_seconds", "inference_seconds"]
    estimates = [*COMPARED, "volume_bias_ml"]
    head = [*plain, *(f"{key}{end}" for key in estimates for end in ("", "_low", "_high"))]
    rows = [
        [
            *(row[key] for key in plain),
            *(value for key in estimates for value in (row[key], *row[f"{key}_interval"])),
        ]
        for row in document["methods"]
    ]
    return _tsv(head, rows)


def _difference_table(document: Mapping[str, Any]) -> str:
    plain = ["method", "measure", "scans", "subjects", "mean_first", "mean_second"]
    plain += ["mean_difference"]
    tests = ["nonzero", "p_value", "p_holm", "smallest_p", "rank_biserial"]
    rows = [
        [*(row[key] for key in plain), *row["interval"], *(row[key] for key in tests)]
        for row in document["differences"]
    ]
    return _tsv([*plain, "difference_low", "difference_high", *tests], rows)


def _tsv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t", lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        cells = (f"{v:.6g}" if isinstance(v, float) else v for v in row)
        writer.writerow([md.NOT_AVAILABLE if cell is None else cell for cell in cells])
    return buffer.getvalue()


# --- Markdown ---------------------------------------------------------------------------------


def comparison_markdown(document: Mapping[str, Any]) -> str:
    """Write the report as Markdown, from its document and from nothing else."""
    unit = _CLOCKS[document["budget"]["clock"]]
    seconds = document["budget"]["seconds"]
    parts = ["# Comparison of methods"]
    if seconds is not None:
        parts.append(
            f"Every method is trained on the same scans, for {seconds:g} {unit} a fold, and tested "
            "on people that neither its training nor the choice of its threshold has seen."
        )
    parts += [
        "Mean [95 % bootstrap interval over people]; of the volume bias the t interval of Bland "
        "and Altman (1999), over scans.",
        _methods_markdown(document, unit),
    ]
    parts += _notes(document)
    if document["differences"]:
        parts += [
            f"## Differences from {md.escape(document['against'])}",
            f"Method {md.MINUS} {md.escape(document['against'])} on the same scans, mean [95 % "
            "interval]; p of the Wilcoxon signed-rank test over people, adjusted for the number of "
            "methods (Holm, 1979).",
            _differences_markdown(document),
        ]
        tested = [row for row in document["differences"] if row["nonzero"]]
        least = min((row["nonzero"] for row in tested), default=_FEW_SUBJECTS)
        if least < _FEW_SUBJECTS:
            smallest = max(row["smallest_p"] for row in tested)
            parts.append(
                f"**Small sample.** A difference rests on as few as {least} people, with whom no "
                f"test can give a p below {smallest:.2g}: absence of significance says little."
            )
    settings = _settings_markdown(document)
    if settings:
        parts += ["## Settings by fold", settings]
    left_out = [(entry["series"], entry["message"]) for entry in document["failed"]] + [
        (f"{entry['series']}, {entry['role']} {entry['file']}", entry["reason"])
        for entry in document["unpaired"]
    ]
    if left_out:
        lines = (f"- {md.escape(what)}: {md.escape(why)}" for what, why in left_out)
        parts += ["## Left out", "\n".join(lines)]
    software = document["software"]
    parts.append(f"{software['name']} {software['version']}; measures as in `wmh-lora evaluate`.")
    return "\n\n".join(parts) + "\n"


def _methods_markdown(document: Mapping[str, Any], unit: str) -> str:
    head = ["Method", "Scans", "Trained parameters", f"Training, {unit} a fold"]
    head += [f"Inference, {unit} a scan", *(measure(key).title for key in _SHOWN)]
    head += ["Volume bias (mL)"]
    rows = []
    for row in document["methods"]:
        estimates = [
            md.with_interval(row[key], row[f"{key}_interval"], measure(key).digits)
            + (f" ({row[f'{key}_undefined']} undefined)" if row[f"{key}_undefined"] else "")
            for key in _SHOWN
        ]
        bias = md.with_interval(row["volume_bias_ml"], row["volume_bias_ml_interval"], 2, sign=True)
        parameters = row["parameters"]
        count = md.NOT_AVAILABLE if parameters is None else f"{parameters:,}"
        if row["members"] > 1:
            count += f" ({row['members']} networks)"
        times = [md.fixed(row[key], 1) for key in ("training_seconds", "inference_seconds")]
        rows.append([row["method"], str(row["scans"]), count, *times, *estimates, bias])
    return md.table(head, rows)


def _notes(document: Mapping[str, Any]) -> list[str]:
    counts = {row["method"]: row["scans"] for row in document["methods"]}
    if len(set(counts.values())) < 2:
        return []
    return [
        "**Methods were scored on different numbers of scans**; compare them by the differences "
        "below, which rest on the scans that both have."
    ]


def _differences_markdown(document: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(row["method"] for row in document["differences"]))
    rows = []
    for name in names:
        own = {r["measure"]: r for r in document["differences"] if r["method"] == name}
        cells = []
        for key in COMPARED:
            row = own[key]
            text = md.with_interval(
                row["mean_difference"], row["interval"], measure(key).digits, sign=True
            )
            p = row["p_holm"]
            text += "" if p is None else f", p = {p:.2g}"
            text += f" ({row['undefined']} undefined)" if row["undefined"] else ""
            cells.append(text)
        shared = own["dice"]["scans"] + own["dice"]["undefined"]
        rows.append([name, str(shared), *cells])
    return md.table(["Method", "Scans", *(measure(key).title for key in COMPARED)], rows)


def _settings_markdown(document: Mapping[str, Any]) -> str:
    rows = [
        [
            row["method"],
            fold["fold"],
            " + ".join(map(str, fold["steps"])) or "0",
            md.fixed(fold["threshold"], 2),
            str(fold["min_voxels"]),
            md.fixed(fold["validation_dice"], 3),
            fold["note"],
        ]
        for row in document["methods"]
        for fold in row["folds"]
    ]
    if not rows:
        return ""
    head = ["Method", "Fold", "Steps", "Threshold", "Smallest component", "Validation Dice"]
    return md.table([*head, "Note"], rows)
