"""``wmh-lora evaluate``: score masks against references, and write tables, a report and figures."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wmh_lora.cli.errors import EXIT_INPUT, describe_error
from wmh_lora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from wmh_lora.evaluation.cohort import Case, Pairing
    from wmh_lora.report.error_maps import Example
    from wmh_lora.report.evaluation import Evaluation, Failure

__all__ = ["evaluate"]

REPORT, TABLE, DICTIONARY, DOCUMENT = "report.md", "cases.tsv", "cases.json", "evaluation.json"
FIGURE_FOLDER = "figures"

# Starting a process takes as long as scoring some ten pairs.
_PAIRS_PER_JOB = 16

_Folder = click.Path(path_type=Path, exists=True, file_okay=False)
_File = click.Path(path_type=Path, exists=True, dir_okay=False)


@dataclass(frozen=True)
class _Options:
    """What the user chose."""

    kind: Any  # of an `Evaluation`
    folders: dict[str, tuple[Path, Path]]  # predictions and references by series
    out_dir: Path
    layout: str
    participants: tuple[Path, ...]
    site_column: str
    images: tuple[Path, ...]
    cases: tuple[str, ...]
    figures: bool
    jobs: int | None
    overwrite: bool
    debug: bool

    def of_series(self, paths: tuple[Path, ...], series: str) -> Path | None:
        """Return the path of a series: its own, or the only one there is."""
        if len(paths) <= 1:
            return paths[0] if paths else None
        return paths[list(self.folders).index(series)]


@click.command()
@click.option("--prediction", type=_Folder, metavar="DIR", help="Masks to score.")
@click.option("--reference", type=_Folder, metavar="DIR", help="Masks to score them against.")
@click.option(
    "--compare", type=_Folder, metavar="DIR", help="A second folder of masks of the same scans."
)
@click.option(
    "--names",
    nargs=2,
    metavar="A B",
    help="What the two folders are called.  [default: their names]",
)
@click.option(
    "--dataset",
    "datasets",
    type=(str, _Folder, _Folder),
    multiple=True,
    metavar="NAME PRED REF",
    help="A cohort with its two folders, instead of --prediction and --reference. Repeatable.",
)
@click.option(
    "-o",
    "--output",
    "out_dir",
    metavar="OUT",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for the results; it is made if needed.",
)
@click.option(
    "--layout",
    type=click.Choice(["auto", "bids", "challenge", "flat", "ukb", "adni"]),
    default="auto",
    show_default=True,
    help="How the references lie in their folder.",
)
@click.option(
    "--participants",
    type=_File,
    multiple=True,
    metavar="TSV",
    help="Table of sites by participant_id; one, or one a --dataset in their order.",
)
@click.option(
    "--site-column", default="site", show_default=True, metavar="NAME", help="Its column of sites."
)
@click.option(
    "--images",
    type=_Folder,
    multiple=True,
    metavar="DIR",
    help="FLAIR images, for pictures of single scans; one, or one a --dataset in their order.",
)
@click.option(
    "--case",
    "cases",
    multiple=True,
    metavar="SCAN",
    help="Scan to show. Repeatable.  [default: the worst, the middle and the best by Dice]",
)
@click.option("--figures/--no-figures", default=True, help="Draw figures (needs matplotlib).")
@click.option(
    "--jobs", type=click.IntRange(min=1), metavar="N", help="Processes.  [default: as it pays]"
)
@click.option("--overwrite", is_flag=True, help="Replace results that exist.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON document.")
@click.pass_context
def evaluate(ctx: click.Context, /, as_json: bool, **given: Any) -> None:
    """Score masks against reference masks, as the WMH Segmentation Challenge does.

    Files are paired by subject, session and scan; those without a counterpart are listed.

    \b
    OUT receives:
      report.md         summary, groups, agreement of volumes, comparisons
      cases.tsv         one row a scan, described in cases.json
      evaluation.json   everything
      figures/          PNG and SVG

    Exit code: 0 all done; 1 some files failed or were unpaired, the rest are done; 2 wrong usage.
    """  # noqa: D301 -- \b keeps click from joining the lines of the list
    from wmh_lora.report.extras import require

    options = _options(given, debug=ctx.obj["debug"])
    if options.figures:
        require("matplotlib", extra="evaluate", purpose="A figure", instead="add --no-figures")
    _refuse_existing(options)
    evaluation = _score(options)
    if not evaluation.cases:
        raise DataError("No pair of masks could be scored; nothing is written.")
    troubles: list[str] = []
    document = _write(evaluation, options, troubles)
    if as_json:
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        _print_summary(document, options)
    left_out = len(evaluation.failures) + len(evaluation.unpaired)
    if left_out:
        click.echo(
            f"wmh-lora: {len(evaluation.failures)} failed and {len(evaluation.unpaired)} unpaired; "
            "they are listed in the report.",
            err=True,
        )
    if left_out or troubles:
        ctx.exit(EXIT_INPUT)


def _options(given: dict[str, Any], *, debug: bool) -> _Options:
    """Check what the options say together.

    Raises
    ------
    click.UsageError
        They contradict each other, or something is missing.
    """
    datasets, compare = given.pop("datasets"), given.pop("compare")
    prediction, reference = given.pop("prediction"), given.pop("reference")
    names = given.pop("names")
    folders: dict[str, tuple[Path, Path]]
    if datasets:
        if prediction or reference or compare:
            raise click.UsageError(
                "Give either --dataset, or --prediction and --reference with or without --compare."
            )
        labels = [name for name, _, _ in datasets]
        folders = {name: (predictions, references) for name, predictions, references in datasets}
        kind = "cohorts" if len(datasets) > 1 else "single"
    else:
        if not (prediction and reference):
            raise click.UsageError("Give --prediction DIR and --reference DIR, or --dataset.")
        labels = [prediction.resolve().name]
        if compare:
            labels = list(names or (*labels, compare.resolve().name))
        elif names:
            raise click.UsageError("--names belongs to --compare.")
        folders = dict(zip(labels, ((d, reference) for d in (prediction, compare) if d)))
        kind = "methods" if compare else "single"
    if len(folders) < len(labels):
        raise click.UsageError(
            f"Two of {', '.join(labels)} have one name; use --names or other names for --dataset."
        )
    for option in ("participants", "images"):
        if len(given[option]) > 1 and (kind != "cohorts" or len(given[option]) != len(folders)):
            raise click.UsageError(f"Give --{option} once, or once for each --dataset.")
    return _Options(kind=kind, folders=folders, debug=debug, **given)


def _refuse_existing(options: _Options) -> None:
    """Find out before the work that its results may not be written."""
    if options.overwrite:
        return
    for name in (REPORT, TABLE, DICTIONARY, DOCUMENT, FIGURE_FOLDER):
        path = options.out_dir / name
        if path.exists():
            raise ConfigError(
                f"{path} exists already; add --overwrite to replace results, or choose another "
                "folder with -o."
            )


def _score(options: _Options) -> Evaluation:
    """Pair the files and score the pairs; whatever cannot be scored is told and kept."""
    from wmh_lora.evaluation.cohort import evaluate_pairs
    from wmh_lora.logs import progress_bar
    from wmh_lora.report.evaluation import Evaluation, Failure

    failures: list[Failure] = []
    pairings = _pairings(options, failures)
    pairs = [pair for pairing in pairings for pair in pairing.pairs]
    unpaired = [entry for pairing in pairings for entry in pairing.unpaired]
    for entry in unpaired:
        click.echo(f"wmh-lora: unpaired {entry.role} {entry.path}: {entry.reason}.", err=True)
    cases = []
    with progress_bar() as progress:
        scored = evaluate_pairs(pairs, jobs=options.jobs or _worthwhile_jobs(len(pairs)))
        for done, (pair, outcome) in enumerate(scored):
            progress(done, len(pairs), pair.name)
            try:
                cases.append(outcome())
            except Exception as error:  # noqa: BLE001 -- told to the user, and shown with --debug
                message = _told(error, str(pair.prediction.path), options)
                failures.append(Failure(pair.series, message, pair))
    return Evaluation(options.kind, options.folders, cases, failures, unpaired)


def _pairings(options: _Options, failures: list[Failure]) -> list[Pairing]:
    """Pair the files of every series. Of several cohorts, one without pairs does not stop others.

    Raises
    ------
    DataError
        A folder holds no mask or no pair, and the rest makes no sense without.
    """
    from wmh_lora.evaluation.cohort import pair_folders, read_participants
    from wmh_lora.report.evaluation import Failure

    pairings = []
    for name, (predictions, references) in options.folders.items():
        table = options.of_series(options.participants, name)
        sites = read_participants(table, options.site_column) if table else {}
        try:
            pairing = pair_folders(
                name, predictions, references, layout=options.layout, sites=sites
            )
            pairings.append(pairing)
            if table:
                _warn_of_missing_sites(table, sites, pairing)
        except DataError as error:
            if options.kind != "cohorts":
                raise
            failures.append(Failure(name, _told(error, name, options)))
    return pairings


def _warn_of_missing_sites(table: Path, sites: Mapping[str, str], pairing: Pairing) -> None:
    """Say that a table does not know subjects; spreadsheets make 1 of 001."""
    subjects = {pair.reference.bare_subject for pair in pairing.pairs}
    if missing := sorted(subjects - sites.keys()):
        click.echo(
            f"wmh-lora: {table} tells no site of {len(missing)} of {len(subjects)} subjects, such "
            f"as {missing[0]}; compare its participant_id with the file names.",
            err=True,
        )


def _told(error: Exception, subject: str, options: _Options) -> str:
    if options.debug:
        click.echo("".join(traceback.format_exception(error)), err=True)
    message = describe_error(error)
    told = message if subject in message else f"{subject}: {message}"
    click.echo(f"wmh-lora: {told}", err=True)
    return message


def _worthwhile_jobs(pairs: int) -> int:
    import os

    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cores, pairs // _PAIRS_PER_JOB))


def _write(evaluation: Evaluation, options: _Options, troubles: list[str]) -> dict[str, Any]:
    """Write all results, and return the document; `troubles` receives what could not be shown."""
    from wmh_lora.files import open_atomic
    from wmh_lora.report.evaluation import case_dictionary, case_table, evaluation_document
    from wmh_lora.report.evaluation_text import evaluation_markdown
    from wmh_lora.report.outputs import output_folder

    document = evaluation_document(evaluation)
    with output_folder(options.out_dir):
        captions = _write_figures(evaluation, options, troubles) if options.figures else {}
        texts = {
            TABLE: case_table(document["cases"]),
            DICTIONARY: _as_json(case_dictionary()),
            DOCUMENT: _as_json(document),
            REPORT: evaluation_markdown(document, captions),
        }
        for name, text in texts.items():
            with open_atomic(options.out_dir / name, overwrite=options.overwrite) as stream:
                stream.write(text.encode("utf-8", "backslashreplace"))
    return document


def _write_figures(
    evaluation: Evaluation, options: _Options, troubles: list[str]
) -> dict[str, str]:
    """Draw and write the figures; return captions by the path that the report uses."""
    from wmh_lora.report.evaluation_figures import FIGURES, draw_figures
    from wmh_lora.report.figures import save_figure

    figures = draw_figures(evaluation, _examples(evaluation, options, troubles))
    folder = options.out_dir / FIGURE_FOLDER
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        save_figure(figure, folder / name, overwrite=options.overwrite)
    return {f"{FIGURE_FOLDER}/{name}.png": FIGURES[name] for name in figures}


def _examples(evaluation: Evaluation, options: _Options, troubles: list[str]) -> list[Example]:
    """Read the scans to show; one that cannot be read does not stop the rest."""
    from wmh_lora.report.evaluation_figures import example_of, images_of, shown_cases

    images: dict[Path, Path] = {}
    for name in evaluation.series:
        folder = options.of_series(options.images, name)
        if folder is None:
            continue
        try:
            found = images_of(evaluation, name, folder)
            if not found:
                raise DataError(f"No image in {folder} belongs to a scan of {name}; none is shown.")
            images |= found
        except DataError as error:
            troubles.append(_told(error, str(folder), options))
    shown: list[Case] = []
    for names in [[name] for name in options.cases] or [[]]:
        try:
            shown += shown_cases(evaluation, images, names)
        except ConfigError as error:
            troubles.append(_told(error, "--case", options))
    examples = []
    for case in shown:
        image = images[case.pair.reference.path]
        try:
            examples.append(example_of(case, image, with_series=len(evaluation.series) > 1))
        except DataError as error:
            troubles.append(_told(error, str(image), options))
    return examples


def _print_summary(document: dict[str, Any], options: _Options) -> None:
    overall = {
        (row["series"], row["measure"]): row
        for row in document["summary"]
        if row["group"] == "overall"
    }
    for entry in document["series"]:
        if not entry["scans"]:
            continue
        name = entry["series"]
        click.echo(
            f"{name}: {entry['scans']} scans, "
            + ", ".join(_short(overall[name, key], label, unit) for key, label, unit in _PRINTED)
        )
    click.echo(f"-> {options.out_dir / REPORT}")


_PRINTED: Sequence[tuple[str, str, str]] = (
    ("dice", "Dice", ""),
    ("hd95_mm", "HD95", " mm"),
    ("avd_percent", "AVD", " %"),
    ("lesion_f1", "lesion F1", ""),
)


def _short(row: dict[str, Any], label: str, unit: str) -> str:
    if row["mean"] is None:
        return f"{label} undefined"
    low, high = row["mean_interval"]
    interval = "" if low is None else f" [{low:.3g}, {high:.3g}]"
    return f"{label} {row['mean']:.3g}{interval}{unit}"


def _as_json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
