"""The report of an evaluation as Markdown, written from its document and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wmh_lora.evaluation.measures import MEASURES, measure
from wmh_lora.report import markdown as md
from wmh_lora.report.evaluation import MAIN_MEASURES

__all__ = ["evaluation_markdown"]

_Document = Mapping[str, Any]
_SMALL_SAMPLE = 10

_TITLES = {
    "single": "Agreement of WMH masks with the reference",
    "cohorts": "Agreement of WMH masks with the reference, by cohort",
    "methods": "Comparison of two sets of WMH masks",
}
_GROUP_HEADS = {"site": "By site", "load": "By lesion load of the reference"}


def evaluation_markdown(document: _Document, figures: Mapping[str, str] | None = None) -> str:
    """Write the report.

    Parameters
    ----------
    document : mapping
        From `wmh_lora.report.evaluation.evaluation_document`.
    figures : mapping, optional
        Caption by the path of a picture, relative to the report.

    Returns
    -------
    str
        Markdown with pipe tables.
    """
    parts = [f"# {_TITLES[document['kind']]}", _overview(document)]
    for entry in document["series"]:
        if entry["scans"]:
            parts += _series_parts(document, entry["series"])
    if document["comparison"]:
        parts += _comparison_parts(document["comparison"])
    if document["domain_shift"]:
        parts += _shift_parts(document["domain_shift"])
    parts += _left_out_parts(document)
    if figures:
        parts.append("## Figures")
        parts += [
            f"![Figure {number}]({path})\n\n*Figure {number}. {caption}*"
            for number, (path, caption) in enumerate(figures.items(), start=1)
        ]
    parts += ["## Methods", _methods(document)]
    return "\n\n".join(parts) + "\n"


def _overview(document: _Document) -> str:
    rows = [
        [
            entry["series"],
            str(entry["scans"]),
            str(entry["subjects"]),
            str(entry["failed"]),
            str(entry["unpaired"]),
            str(entry["grid_notes"]),
        ]
        for entry in document["series"]
    ]
    head = ["Series", "Scans scored", "Subjects", "Failed", "Unpaired files", "Grid notes"]
    table = md.table(head, rows)
    if any(entry["failed"] or entry["unpaired"] for entry in document["series"]):
        table += (
            "\n\n**Some files could not be scored; they are listed under *Left out*, and no "
            "number below counts them.**"
        )
    return table


def _series_parts(document: _Document, series: str) -> list[str]:
    rows = [row for row in document["summary"] if row["series"] == series]
    overall = [row for row in rows if row["group"] == "overall"]
    parts = [f"## {md.escape(series)}", _overall_table(overall)]
    for group, head in _GROUP_HEADS.items():
        levels = [row for row in rows if row["group"] == group]
        if levels:
            parts += [f"### {head}", "Mean [95 % interval].", _group_table(levels)]
    agreement = next(row for row in document["agreement"] if row["series"] == series)
    parts += ["### Agreement of volumes", *_agreement_parts(agreement)]
    return parts


def _overall_table(rows: Sequence[_Document]) -> str:
    body = []
    for row in rows:
        entry = measure(row["measure"])
        least, sd, most = (md.fixed(row[key], entry.digits) for key in ("minimum", "sd", "maximum"))
        body.append(
            [
                entry.title,
                str(row["scans"]),
                str(row["undefined"]),
                md.with_interval(row["mean"], row["mean_interval"], entry.digits),
                md.with_interval(row["median"], row["median_interval"], entry.digits),
                sd,
                f"{least} to {most}",
            ]
        )
    head = ["Measure", "n", "Undefined", "Mean [95 %]", "Median [95 %]", "SD", "Range"]
    return md.table(head, body)


def _group_table(rows: Sequence[_Document]) -> str:
    levels = list(dict.fromkeys(row["level"] for row in rows))
    body = []
    for level in levels:
        own = {row["measure"]: row for row in rows if row["level"] == level}
        scans = own["reference_ml"]["scans"]  # a volume is always defined
        cells = [
            md.with_interval(own[m.key]["mean"], own[m.key]["mean_interval"], m.digits)
            + _undefined_note(own[m.key]["undefined"])
            for m in MAIN_MEASURES
        ]
        body.append([level, str(scans), str(own["reference_ml"]["subjects"]), *cells])
    return md.table(["Group", "Scans", "Subjects", *(m.title for m in MAIN_MEASURES)], body)


def _agreement_parts(row: _Document) -> list[str]:
    plot = row["bland_altman"]

    def cell(estimate: _Document, digits: int) -> str:
        return md.with_interval(estimate["value"], estimate["interval"], digits)

    body = [
        [f"Bias, prediction {md.MINUS} reference (mL)", cell(plot["bias"], 2)],
        ["Lower limit of agreement (mL)", cell(plot["lower"], 2)],
        ["Upper limit of agreement (mL)", cell(plot["upper"], 2)],
        ["SD of the differences (mL)", md.fixed(plot["sd"], 2)],
        ["Proportional bias: slope of difference on mean", cell(plot["slope"], 3)],
        ["p of the slope", _p_value(plot["slope_p"])],
        ["Pearson R²", md.fixed(row["pearson_r2"], 3)],
        ["ICC(2,1), absolute agreement", cell(row["icc"], 3)],
        ["Lin's concordance correlation", cell(row["ccc"], 3)],
    ]
    parts = [md.table(["Quantity", "Estimate [95 %]"], body)]
    if row["scans"] < _SMALL_SAMPLE:
        parts.append(f"Only {row['scans']} scans: these intervals rest on little.")
    if row["scans"] > row["subjects"]:
        parts.append(
            f"{row['scans']} scans come from {row['subjects']} subjects; this table treats them as "
            "independent, so its intervals are too narrow."
        )
    return parts


def _comparison_parts(comparison: _Document) -> list[str]:
    first, second = comparison["first"], comparison["second"]
    body = []
    for row in comparison["rows"]:
        entry = measure(row["measure"])
        body.append(
            [
                f"{entry.title}, {entry.better} is better",
                str(row["scans"]),
                str(row["subjects"]),
                md.fixed(row["mean_first"], entry.digits),
                md.fixed(row["mean_second"], entry.digits),
                md.with_interval(row["mean_difference"], row["interval"], entry.digits, sign=True),
                md.fixed(row["rank_biserial"], 2, sign=True),
                _p_value(row["p_value"]),
                _p_value(row["p_holm"]),
            ]
        )
    head = ["Measure", "Scans", "Subjects", f"Mean {first}", f"Mean {second}"]
    head += ["Mean difference [95 %]", "Rank-biserial r", "p", "p (Holm)"]
    parts = [
        f"## {md.escape(second)} against {md.escape(first)}",
        f"Differences are {md.escape(second)} {md.MINUS} {md.escape(first)}, on the same scans.",
        md.table(head, body),
        *_comparison_notes(comparison),
    ]
    return parts


def _comparison_notes(comparison: _Document) -> list[str]:
    notes = []
    rows = comparison["rows"]
    tested = [row for row in rows if row["nonzero"]]
    if not any(row["scans"] for row in rows):
        notes.append("No scan was scored for both.")
    elif not tested:
        notes.append("The two agree in every measure of every scan: there is nothing to test.")
    elif (least := min(tested, key=lambda row: row["nonzero"]))["nonzero"] < _SMALL_SAMPLE:
        notes.append(
            f"**Small sample.** {measure(least['measure']).label} differs in "
            f"{least['nonzero']} subjects only, with which the exact test cannot give a p below "
            f"{md.fixed(least['smallest_p'], 3)}: absence of significance says little."
        )
    alone = comparison["only_first"] + comparison["only_second"]
    if alone:
        notes.append(f"{alone} scans were scored for one of the two only, and are left out here.")
    return notes


def _shift_parts(rows: Sequence[_Document]) -> list[str]:
    base = rows[0]["minus"]
    names = list(dict.fromkeys(row["series"] for row in rows))
    body = []
    for name in names:
        own = {row["measure"]: row for row in rows if row["series"] == name}
        cells = [
            md.with_interval(own[m.key]["difference"], own[m.key]["interval"], m.digits, sign=True)
            for m in MAIN_MEASURES
        ]
        body.append([name, *cells])
    text = f"Mean of each cohort {md.MINUS} mean of {md.escape(base)} [95 % interval]."
    table = md.table(["Cohort", *(m.title for m in MAIN_MEASURES)], body)
    return ["## Domain shift", text, table]


def _left_out_parts(document: _Document) -> list[str]:
    parts = []
    if document["failed"]:
        lines = [
            f"- {md.escape(entry['series'])}, {md.escape(entry['scan'] or 'all scans')}: "
            f"{md.escape(entry['message'])}"
            for entry in document["failed"]
        ]
        parts += ["### Failed", "\n".join(lines)]
    if document["unpaired"]:
        rows = [[e["series"], e["role"], e["file"], e["reason"]] for e in document["unpaired"]]
        parts += ["### Unpaired", md.table(["Series", "Role", "File", "Why"], rows)]
    noted = [case for case in document["cases"] if case.get("grid_note")]
    if noted:
        rows = [[case["series"], case["scan"], case["grid_note"]] for case in noted]
        text = (
            "These scans were scored voxel by voxel, as the challenge does, although the two files "
            "place their voxels differently. Check that the masks overlay."
        )
        noted_parts = ["## Grids", text, md.table(["Series", "Scan", "Note"], rows)]
    else:
        noted_parts = []
    return [*(["## Left out", *parts] if parts else []), *noted_parts]


def _methods(document: _Document) -> str:
    settings = document["settings"]
    definitions = "\n".join(f"- **{entry.title}**: {entry.meaning}" for entry in MEASURES)
    return (
        f"wmh-lora {document['software']['version']}. Measures are those of the WMH Segmentation "
        "Challenge (Kuijf et al., 2019, doi:10.1109/TMI.2019.2905770): only the shapes of the two "
        "files must agree, the reference's voxel size is used, and voxels that the reference marks "
        "as other pathology (label 2) are taken out of the prediction.\n\n"
        f"{definitions}\n\n"
        "Undefined values are counted and left out; they are never replaced. Intervals of means, "
        "medians and their differences are 95 % percentile bootstrap intervals over subjects, not "
        f"scans ({settings['bootstrap_resamples']:,} resamples, seed "
        f"{settings['bootstrap_seed']}). Methods are compared by the Wilcoxon signed-rank test on "
        "the mean difference of each subject, with the matched-pairs rank-biserial correlation as "
        "effect size (Kerby, 2014) and Holm's adjustment for the number of measures. Limits of "
        "agreement and their intervals follow Bland and Altman (1999), ICC(2,1) Shrout and Fleiss "
        "(1979), and the concordance correlation Lin (1989, corrected 2000)."
    )


def _undefined_note(count: int) -> str:
    return f" ({count} undefined)" if count else ""


def _p_value(p: float | None) -> str:
    if p is None:
        return md.NOT_AVAILABLE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
