"""``wmh-lora data``: list labelled scans, divide them, and fetch the public ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from wmh_lora.cli.errors import EXIT_INPUT
from wmh_lora.errors import ConfigError

if TYPE_CHECKING:
    from wmh_lora.data.manifest import Manifest, Scan
    from wmh_lora.data.split import SplitFile

__all__ = ["data"]

_SHOWN = 8  # scans named for each problem; the manifest has all
_WITHOUT_T1, _WITHOUT_MASK = "kept, without the T1", "kept, without that mask"
_EFFECTS = {
    "unreadable-t1": _WITHOUT_T1,
    "t1-apart": _WITHOUT_T1,
    "unreadable-structure": _WITHOUT_MASK,
    "structure-grid": _WITHOUT_MASK,
}


@click.group()
def data() -> None:
    """Prepare labelled scans for training and evaluation."""


# --- prepare ----------------------------------------------------------------------------------


@data.command()
@click.argument("source", metavar="SOURCE", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "out",
    metavar="MANIFEST.json",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The manifest to write.",
)
@click.option(
    "--layout",
    type=click.Choice(["auto", "challenge", "bids", "flat"]),
    default="auto",
    show_default=True,
    help="How SOURCE is arranged; auto looks.",
)
@click.option(
    "--derivatives",
    metavar="NAME",
    help="In BIDS, the folder of derivatives/ whose masks are the reference.",
)
@click.option("--overwrite", is_flag=True, help="Replace a manifest that exists.")
@click.pass_context
def prepare(
    ctx: click.Context,
    /,
    source: Path,
    out: Path,
    layout: Any,
    derivatives: str | None,
    overwrite: bool,
) -> None:
    """Find the labelled FLAIR scans of a folder, check every file, and write a manifest.

    \b
    SOURCE is arranged as
      challenge  [training|test/]<site>/[<scanner>/]<subject>/pre/FLAIR.nii.gz, wmh.nii.gz
      bids       sub-*/[ses-*/]anat/*_FLAIR.nii.gz, derivatives/*/sub-*/.../*label-WMH*mask.nii.gz
      flat       X_FLAIR.nii.gz and X_mask.nii.gz, or images/ and labels/, imagesTr/ and labelsTr/

    Exit code: 0 all scans can be used; 1 some cannot, they are marked in the manifest; 2 wrong
    usage.
    """  # noqa: D301 -- \b keeps click from joining the lines of the list
    from wmh_lora.data.catalog import make_manifest
    from wmh_lora.data.manifest import write_manifest
    from wmh_lora.logs import progress_bar

    if not source.is_dir():
        raise ConfigError(f"{source} is not a folder; give the folder that holds the scans.")
    _refuse_target(out, overwrite)
    with progress_bar() as progress:
        manifest = make_manifest(source, layout, derivatives=derivatives, progress=progress)
    manifest = write_manifest(manifest, out, overwrite=overwrite)
    click.echo("\n".join(_manifest_summary(manifest)))
    if len(manifest.usable) < len(manifest.scans):
        ctx.exit(EXIT_INPUT)


def _refuse_target(path: Path, overwrite: bool) -> None:
    """Find out before minutes of work that its result may not be written."""
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is not an existing folder; create it first.")
    if os.path.lexists(path) and not overwrite:
        raise ConfigError(
            f"{path} exists already; add --overwrite to replace it, or choose another name with -o."
        )


def _manifest_summary(manifest: Manifest) -> list[str]:
    scans, usable = manifest.scans, manifest.usable
    lines = [
        f"{_count(scans, 'scan')} of {_count({scan.subject for scan in scans}, 'subject')}, "
        f"{len(usable)} usable (layout {manifest.layout})"
    ]
    rows = [("site", "subjects", "scans", "usable", "with T1", "reference mL", "voxel mm")]
    for site in sorted({scan.site for scan in scans}):
        here = [scan for scan in scans if scan.site == site]
        rows.append(
            (
                site,
                str(len({scan.subject for scan in here})),
                str(len(here)),
                str(sum(scan.usable for scan in here)),
                str(sum(bool(scan.usable_t1) for scan in here)),
                _load(here),
                " x ".join(_range(axis) for axis in _spacings(here)) or "-",
            )
        )
    lines += _aligned(rows)
    for code in sorted({problem.code for scan in scans for problem in scan.problems}):
        lines += _problem_lines(code, scans)
    if manifest.unmatched_masks:
        shown = ", ".join(_first(manifest.unmatched_masks))
        lines.append(f"{_count(manifest.unmatched_masks, 'mask')} without an image: {shown}")
    lines.append(f"-> {manifest.path}")
    return lines


def _spacings(scans: Sequence[Scan]) -> list[tuple[float, ...]]:
    return list(zip(*(scan.spacing_mm for scan in scans if scan.spacing_mm is not None)))


def _problem_lines(code: str, scans: Sequence[Scan]) -> list[str]:
    """Name the scans with a problem; what differs between them is told scan by scan."""
    from wmh_lora.data.manifest import UNUSABLE

    found = [(s.name, p.message) for s in scans for p in s.problems if p.code == code]
    effect = "not usable" if code in UNUSABLE else _EFFECTS.get(code, "kept, please check")
    head = f"{code} ({effect}), {_count(found, 'scan')}"
    if len({message for _, message in found}) == 1:
        return [f"{head}: {found[0][1]}", f"  {', '.join(_first([name for name, _ in found]))}"]
    return [f"{head}:", *(f"  {line}" for line in _first([f"{n}: {m}" for n, m in found]))]


# --- split ------------------------------------------------------------------------------------


@data.command()
@click.argument("manifest_file", metavar="MANIFEST.json", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "out",
    metavar="SPLIT.json",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The split to write.",
)
@click.option(
    "--fractions",
    nargs=3,
    type=float,
    metavar="TRAIN VALIDATION TEST",
    help="Shares of the subjects.  [default: 0.7 0.15 0.15]",
)
@click.option("--folds", type=int, metavar="K", help="K folds, each the test part once.")
@click.option("--leave-one-site-out", "by_site", is_flag=True, help="Each site the test part once.")
@click.option("--seed", type=click.IntRange(min=0), default=42, show_default=True, metavar="N")
@click.option("--no-verify", is_flag=True, help="Do not hash the scans again before.")
@click.option("--overwrite", is_flag=True, help="Replace a split that exists.")
def split(
    manifest_file: Path,
    out: Path,
    fractions: tuple[float, float, float] | None,
    folds: int | None,
    by_site: bool,
    seed: int,
    no_verify: bool,
    overwrite: bool,
) -> None:
    """Divide the subjects of a manifest into train, validation and test.

    All scans of a subject stay together, and so do subjects with the same image file. Sites and
    lesion loads (below 2, 2 to 10, above 10 mL) are spread evenly. The same manifest and seed give
    the same split.
    """
    from wmh_lora.data.manifest import read_manifest
    from wmh_lora.data.split import (
        DEFAULT_FRACTIONS,
        leave_one_site_out,
        split_folds,
        split_fractions,
        write_split,
    )
    from wmh_lora.logs import progress_bar

    if folds is not None and (by_site or fractions is not None):
        raise ConfigError("--folds goes with neither --fractions nor --leave-one-site-out.")
    _refuse_target(out, overwrite)
    with progress_bar() as progress:
        manifest = read_manifest(manifest_file, verify=not no_verify, progress=progress)
    if folds is not None:
        made = split_folds(manifest, folds, seed=seed)
    elif by_site:
        made = leave_one_site_out(manifest, fractions or DEFAULT_FRACTIONS, seed=seed)
    else:
        made = split_fractions(manifest, fractions or DEFAULT_FRACTIONS, seed=seed)
    write_split(made, out, overwrite=overwrite)
    click.echo("\n".join([*_split_summary(made, manifest), f"-> {out}"]))


def _split_summary(made: SplitFile, manifest: Manifest) -> list[str]:
    from wmh_lora.data.split import PARTS

    rows = [("split", "part", "subjects", "scans", "sites", "reference mL")]
    for division in made.splits:
        for name in PARTS:
            subjects = set(division.part(name))
            scans = [scan for scan in manifest.usable if scan.subject in subjects]
            rows.append(
                (
                    division.name,
                    name,
                    str(len(subjects)),
                    str(len(scans)),
                    str(len({scan.site for scan in scans})),
                    _load(scans),
                )
            )
    lines = _aligned(rows)
    if left := len(manifest.scans) - len(manifest.usable):
        lines.append(f"{left} of {_count(manifest.scans, 'scan')} left out as not usable")
    return lines


# --- fetch ------------------------------------------------------------------------------------


@data.command()
@click.argument("name", metavar="NAME", type=click.Choice(["wmh-challenge"]))
@click.option(
    "-o",
    "--output",
    "out_dir",
    metavar="DIR",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the data; it is made if needed.",
)
@click.option(
    "--source",
    type=click.Choice(["dataverse", "kaggle"]),
    default="dataverse",
    show_default=True,
    help="The publisher's server, or a copy on Kaggle.",
)
@click.option(
    "--kaggle-dataset", metavar="OWNER/NAME", help="The copy on Kaggle; check who made it, and how."
)
@click.option("--all", "everything", is_flag=True, help="All files, not only what training reads.")
@click.option("--accept-licence", is_flag=True, help="You accept the licence that is shown.")
def fetch(
    name: str,
    out_dir: Path,
    source: str,
    kaggle_dataset: str | None,
    everything: bool,
    accept_licence: bool,
) -> None:
    """Fetch public labelled scans; NAME is wmh-challenge.

    Files are compared with the published checksums. Run the command again to go on with an
    interrupted download. Kaggle needs your own credentials (KAGGLE_USERNAME and KAGGLE_KEY, or
    ~/.kaggle/kaggle.json).
    """
    from wmh_lora.data.fetch import (
        LICENCE_NOTICE,
        fetch_dataverse,
        fetch_kaggle,
        kaggle_credentials,
    )
    from wmh_lora.logs import progress_bar

    if (source == "kaggle") != (kaggle_dataset is not None):
        raise ConfigError("--source kaggle and --kaggle-dataset OWNER/NAME go together.")
    if everything and source == "kaggle":
        raise ConfigError("--all is for --source dataverse; a copy on Kaggle comes whole.")
    click.echo(LICENCE_NOTICE, err=True)
    if not accept_licence:
        raise ConfigError("Nothing was fetched: add --accept-licence if you accept these terms.")
    with progress_bar() as progress:
        if kaggle_dataset is None:
            paths = fetch_dataverse(out_dir, everything=everything, progress=progress)
        else:
            paths = fetch_kaggle(out_dir, kaggle_dataset, kaggle_credentials(), progress=progress)
    click.echo(f"{_count(paths, 'file')} of {name} -> {out_dir}")
    click.echo(f"Next: wmh-lora data prepare {out_dir} -o manifest.json")


# --- text -------------------------------------------------------------------------------------


def _count(items: Sequence[Any] | set[Any], noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def _first(lines: Sequence[str]) -> list[str]:
    rest = len(lines) - _SHOWN
    return [*lines[:_SHOWN], *([f"and {rest} more"] if rest > 0 else [])]


def _range(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = f"{min(known):.2f}", f"{max(known):.2f}"
    return low if low == high else f"{low}-{high}"


def _load(scans: Iterable[Scan]) -> str:
    """Median and range of the lesion load."""
    known = [scan.reference_ml for scan in scans if scan.reference_ml is not None]
    return f"{median(known):.2f} ({_range(known)})" if len(known) > 1 else _range(known)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows)
    return [line.rstrip() for line in lines]
