"""``wmh-lora longitudinal``: what changed between the visits of one person."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wmh_lora.cli.segment import inference_options

if TYPE_CHECKING:
    from wmh_lora.cli.options import Options
    from wmh_lora.longitudinal.study import FollowUp, Visit

__all__ = ["longitudinal"]

_RESOURCES = frozenset({"device", "backend", "threads", "max_memory"})
"""Options that scripts may give to every command: they change no result."""

_KINDS = ("new", "grown", "shrunk", "stable", "vanished", "doubtful", "not assessable", "too small")


class _ManyFiles(click.Command):
    """Lets ``--masks`` take all paths up to the next option, as it takes one for each visit."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        masks = False
        for number, word in enumerate(args):
            if word == "--":
                spread += args[number:]
                break
            if word.startswith("-"):
                masks = word == "--masks"
                if not masks:
                    spread.append(word)
            else:
                spread += ["--masks", word] if masks else [word]
        if args and args[-1] == "--masks":
            spread.append("--masks")  # click says that a path is missing
        return super().parse_args(ctx, spread)


@click.command(cls=_ManyFiles)
@click.argument(
    "scans", metavar="VISIT1 VISIT2...", nargs=-1, required=True, type=click.Path(path_type=Path)
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
    "--masks",
    metavar="M1 M2...",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Lesion masks of the visits, on the scans' own grids, instead of segmenting.",
)
@click.option(
    "--no-register", is_flag=True, help="The headers place all visits in one space already."
)
@click.option(
    "--within-subject-cv",
    type=click.FloatRange(min=0),
    metavar="PERCENT",
    help="Variation of the volume between repeated scans, if known; sets the limit of totals.",
)
@click.option(
    "--min-change-ml",
    type=click.FloatRange(min=0),
    metavar="ML",
    default=0.05,
    show_default=True,
    help="Smallest change of a grown or shrunk lesion.",
)
@click.option(
    "--min-change-percent",
    type=click.FloatRange(min=0),
    metavar="PERCENT",
    default=25.0,
    show_default=True,
    help="The same, as a percentage of the smaller volume.",
)
@click.option(
    "--boundary-sd",
    "boundary_sd_voxels",
    type=click.FloatRange(min=0),
    metavar="VOXELS",
    default=0.29,
    show_default=True,
    help="How well the boundary of a lesion is known; sets the limits of repeatability.",
)
@inference_options
@click.option("--overwrite", is_flag=True, help="Replace results that exist.")
@click.pass_context
def longitudinal(
    ctx: click.Context,
    /,
    scans: tuple[Path, ...],
    out_dir: Path,
    masks: tuple[Path, ...],
    no_register: bool,
    within_subject_cv: float | None,
    min_change_ml: float,
    min_change_percent: float,
    boundary_sd_voxels: float,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Compare FLAIR scans of two or more visits of one person, in the order given.

    Each scan is segmented as it is; the scans are registered half-way between the visits, where
    lesions are matched as new, grown, shrunk, stable, vanished or doubtful. docs/longitudinal.md
    has the rules and the files.

    Exit code: 0 done; 1 an input failed; 2 wrong usage or settings.
    """
    from wmh_lora.errors import ConfigError

    if len(scans) < 2:
        raise ConfigError("Give two or more scans of one person.")
    if masks and len(masks) != len(scans):
        raise ConfigError(
            f"--masks needs one mask for each visit: {len(scans)} expected, {len(masks)} found."
        )
    if masks:
        _refuse_segmentation_options(ctx, settings.keys() - _RESOURCES)
    from wmh_lora.cli.options import Options
    from wmh_lora.longitudinal.changes import Rules
    from wmh_lora.longitudinal.study import compare_visits
    from wmh_lora.report.longitudinal import follow_up_files, save_follow_up

    options = Options(out_dir=out_dir, overwrite=overwrite, **settings)
    rules = Rules(
        min_change_ml=min_change_ml,
        min_change_percent=min_change_percent,
        boundary_sd_voxels=boundary_sd_voxels,
    )
    stem, names = subject_stem(scans), visit_names(scans)
    if not overwrite:
        _refuse_existing(follow_up_files(out_dir, stem, names, segmented=not masks))
    visits = _read_masks(scans, masks, names) if masks else _segment(scans, names, options)
    if len(subjects := {_entity("sub", path) for path in scans}) > 1:
        text = f"the scans are of {len(subjects)} subjects by their names"
        click.echo(f"wmh-lora: {text}.", err=True)
        visits[0] = replace(visits[0], warnings=(*visits[0].warnings, text))
    result = compare_visits(
        visits,
        rules=rules,
        within_subject_cv_percent=within_subject_cv,
        register=not no_register,
    )
    files = save_follow_up(result, out_dir, stem=stem, overwrite=overwrite)
    for line in _summary(result):
        click.echo(line)
    click.echo(f"-> {files['report']}")


def visit_names(scans: Sequence[Path]) -> list[str]:
    """Name visits by the BIDS session in their file or folder names, or else by their order.

    Examples
    --------
    >>> visit_names([Path("sub-1_ses-a_FLAIR.nii.gz"), Path("ses-b/FLAIR.nii.gz")])
    ['ses-a', 'ses-b']
    >>> visit_names([Path("a.nii"), Path("b.nii")])
    ['visit-1', 'visit-2']
    """
    found = [_entity("ses", path) for path in scans]
    if None in found or len(set(found)) < len(found):
        return [f"visit-{n}" for n in range(1, len(scans) + 1)]
    return [name for name in found if name is not None]


def subject_stem(scans: Sequence[Path]) -> str:
    """Start the file names with the BIDS subject of all scans, or else with the first's name.

    Examples
    --------
    >>> subject_stem([Path("sub-1_ses-a_FLAIR.nii.gz"), Path("sub-1_ses-b_FLAIR.nii.gz")])
    'sub-1'
    """
    from wmh_lora.files import image_stem

    subjects = {_entity("sub", path) for path in scans}
    only = subjects.pop() if len(subjects) == 1 else None
    return only or image_stem(scans[0])


def _entity(key: str, path: Path) -> str | None:
    for part in (path.name, *(parent.name for parent in path.absolute().parents)):
        match = re.search(rf"(?:^|_)({key}-[A-Za-z0-9]+)", part)
        if match:
            return match[1]
    return None


def _refuse_segmentation_options(ctx: click.Context, names: Set[str]) -> None:
    """Fail on options that choose how to segment where masks are given instead."""
    for option in ctx.command.params:
        source = ctx.get_parameter_source(option.name or "")
        if option.name in names and source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option.opts[0]} is for segmenting; --masks takes its place.")


def _refuse_existing(files: Mapping[str, Path]) -> None:
    """Ask before the work rather than after it."""
    from wmh_lora.errors import ConfigError

    for path in files.values():
        if path.exists():
            raise ConfigError(
                f"{path} exists already and is left as it is; add --overwrite to replace results, "
                "or choose another output folder."
            )


def _read_masks(scans: Sequence[Path], masks: Sequence[Path], names: Sequence[str]) -> list[Visit]:
    from wmh_lora.errors import GridMismatchError
    from wmh_lora.evaluation.masks import check_labels, lesion_of_labels
    from wmh_lora.logs import collect_warnings
    from wmh_lora.longitudinal.study import Visit
    from wmh_lora.volume import Volume, grid_difference

    visits = []
    for scan, path, name in zip(scans, masks, names, strict=True):
        with collect_warnings() as warnings:
            volume, mask = Volume.read(scan), Volume.read(path, allow_constant=True)
        if difference := grid_difference(volume, mask):
            raise GridMismatchError(
                f"{path} does not lie on the grid of {scan}: {difference}; give the mask on the "
                "scan's own grid."
            )
        check_labels(path, mask.data)
        lesion = lesion_of_labels(mask.data)
        visits.append(Visit(name, volume, lesion.astype("uint8"), warnings=tuple(warnings)))
    return visits


def _segment(scans: Sequence[Path], names: Sequence[str], options: Options) -> list[Visit]:
    from wmh_lora.cli.options import make_engine
    from wmh_lora.logs import collect_warnings
    from wmh_lora.longitudinal.study import Visit
    from wmh_lora.volume import Volume

    read = []
    for path in scans:  # a bad file is told before a model loads
        with collect_warnings() as warnings:
            read.append((Volume.read(path), warnings))
    engine = make_engine(options)
    visits = []
    for name, (volume, warnings) in zip(names, read, strict=True):
        visit = Visit.of(name, engine.segment(volume, **options.inference))
        visits.append(replace(visit, warnings=(*warnings, *visit.warnings)))
    return visits


def _summary(result: FollowUp) -> list[str]:
    lines = [
        f"{visit.name}: {volumes.volume_ml:.2f} mL in {volumes.lesions} lesions"
        for visit, volumes in zip(result.visits, result.volumes, strict=True)
    ]
    for number, total in enumerate(result.totals):
        names = [result.visits[i].name for i in (total.before, total.after)]
        percent = "" if total.percent is None else f" ({total.percent:+.1f} %)"
        verdict = "within" if total.within_repeatability else "beyond"
        kinds = [lesion.changes[number].kind for lesion in result.lesions]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in _KINDS if kinds.count(kind))
        lines.append(
            f"{names[0]} to {names[1]}: {total.change_ml:+.2f} mL{percent}, {verdict} the "
            f"repeatability of {total.limit_ml:.2f} mL; {counts or 'no lesions'}"
        )
    return lines
