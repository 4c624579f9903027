"""``wmh-lora bids``: a BIDS-App, from a BIDS data set to BIDS derivatives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wmh_lora.cli.errors import EXIT_INPUT
from wmh_lora.cli.segment import inference_options
from wmh_lora.errors import ConfigError

__all__ = ["bids"]


class _BidsAppCommand(click.Command):
    """Takes several labels after one option, as BIDS-Apps do: ``--participant-label 01 02``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        several = {
            name
            for option in self.params
            if isinstance(option, click.Option) and option.multiple
            for name in option.opts
        }
        repeated: list[str] = []
        option, has_value = None, False
        for position, word in enumerate(args):
            if word == "--":
                repeated += args[position:]
                break
            if word.startswith("-"):
                name, equals, _ = word.partition("=")
                option, has_value = (name, bool(equals)) if name in several else (None, False)
            elif option is not None:
                repeated += [option] if has_value else []
                has_value = True
            repeated.append(word)
        return super().parse_args(ctx, repeated)


_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command(cls=_BidsAppCommand)
@click.argument("bids_dir", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.argument("out_dir", type=_FOLDER)
@click.argument("level", metavar="participant|group", type=click.Choice(["participant", "group"]))
@click.option(
    "--participant-label",
    "--participant_label",
    "participants",
    multiple=True,
    metavar="LABEL...",
    help="Participants, with or without sub-; all by default.",
)
@click.option(
    "--session-id",
    "--session-label",
    "--session_label",
    "sessions",
    multiple=True,
    metavar="LABEL...",
    help="Sessions, with or without ses-; all by default.",
)
@click.option(
    "--bids-filter-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help='JSON that chooses among scans, such as {"flair": {"acquisition": "3d"}}.',
)
@click.option(
    "--t1",
    "with_t1",
    is_flag=True,
    help="Show the T1w of the session beside each FLAIR, where there is one, to a model for it.",
)
@click.option(
    "--register-t1",
    is_flag=True,
    help="Correct movement between T1 and FLAIR first; needs the registration extra.",
)
@click.option(
    "-w",
    "--work-dir",
    type=_FOLDER,
    metavar="DIR",
    help="Folder for the tracebacks of scans that fail; none are kept by default.",
)
@click.option(
    "--n-procs",
    "--nprocs",
    "processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Scans done at a time; --threads and --max-memory are divided among them.",
)
@click.option(
    "--skip-bids-validation",
    is_flag=True,
    help="Do without a valid dataset_description.json in the data set.",
)
@inference_options
@click.option("--overwrite", is_flag=True, help="Do finished scans again, replace their results.")
@click.pass_context
def bids(
    ctx: click.Context,
    /,
    bids_dir: Path,
    out_dir: Path,
    level: str,
    participants: tuple[str, ...],
    sessions: tuple[str, ...],
    overwrite: bool,
    **settings: Any,
) -> None:
    """Segment the FLAIR scans of a BIDS data set, as a BIDS-App.

    \b
    participant   find and segment FLAIRs of all sessions and runs of BIDS_DIR, write BIDS
                  derivatives to OUT_DIR; scans that are finished are kept
    group         write OUT_DIR/wmh.tsv from these derivatives, wmh.json describing its columns,
                  and the page wmh.html

    Exit code: 0 all done; 1 some scans failed, the rest are done; 2 wrong usage or settings.
    """  # noqa: D301 -- \b keeps click from joining the lines of the list
    if level == "group":
        _group(ctx, out_dir, participants, sessions, overwrite=overwrite)
        return
    from wmh_lora.cli.bids_run import RunOptions, run_participants
    from wmh_lora.cli.options import Options

    with_t1 = settings.pop("with_t1")
    if settings["register_t1"] and not with_t1:
        raise click.UsageError("--register-t1 needs --t1.")
    if with_t1:
        _check_t1_options(settings)
    scans = _prepare(
        bids_dir,
        out_dir,
        participants,
        sessions,
        filter_file=settings.pop("bids_filter_file"),
        check=not settings.pop("skip_bids_validation"),
        with_t1=with_t1,
    )
    work_dir = settings.pop("work_dir")
    if work_dir is not None:
        _make_work_dir(work_dir, bids_dir)
    processes = settings.pop("processes")
    options = RunOptions(
        Options(out_dir=out_dir, overwrite=overwrite, debug=ctx.obj["debug"], **settings),
        processes=processes,
        work_dir=work_dir,
        verbose=ctx.parent is not None and bool(ctx.parent.params.get("verbose")),
    )
    outcome = run_participants(scans, options)
    click.echo(
        f"{len(outcome.done)} scans segmented, {len(outcome.finished_before)} finished before, "
        f"{len(outcome.failed)} failed -> {out_dir}"
    )
    if outcome.failed:
        ctx.exit(EXIT_INPUT)


def _group(
    ctx: click.Context,
    out_dir: Path,
    participants: tuple[str, ...],
    sessions: tuple[str, ...],
    *,
    overwrite: bool,
) -> None:
    from wmh_lora.bids.group import collect_group, write_group

    table = collect_group(out_dir, participants=participants, sessions=sessions)
    path = write_group(table, out_dir, overwrite=overwrite)
    click.echo(f"{len(table.rows)} scans -> {path}")
    if table.failures:
        click.echo(
            f"wmh-lora: {len(table.failures)} scans have incomplete results; the table says which.",
            err=True,
        )
        ctx.exit(EXIT_INPUT)


def _prepare(
    bids_dir: Path,
    out_dir: Path,
    participants: tuple[str, ...],
    sessions: tuple[str, ...],
    *,
    filter_file: Path | None,
    check: bool,
    with_t1: bool,
) -> tuple[Any, ...]:
    """Find the scans, and set the derivatives up."""
    from wmh_lora.bids.derivatives import write_dataset_files
    from wmh_lora.bids.discovery import find_flairs, read_dataset_description, read_filters
    from wmh_lora.errors import DataError
    from wmh_lora.report.outputs import output_folder

    try:
        description = read_dataset_description(bids_dir)
    except DataError:
        if check:
            raise
        description = {}
    filters = None if filter_file is None else read_filters(filter_file)
    found = find_flairs(
        bids_dir, participants=participants, sessions=sessions, filters=filters, with_t1=with_t1
    )
    alone = sum(scan.t1 is None for scan in found.scans)
    if with_t1 and alone:
        click.echo(f"{alone} FLAIR scans have no T1w and are segmented without.", err=True)
    if found.without:
        listed = ", ".join(found.without[:10]) + (", ..." if len(found.without) > 10 else "")
        click.echo(f"{len(found.without)} participants have no such FLAIR: {listed}", err=True)
    if not found.scans:
        raise DataError(
            f"{bids_dir} has no FLAIR (sub-*/[ses-*/]anat/*_FLAIR.nii[.gz]) of the chosen "
            "participants, sessions and filters."
        )
    with output_folder(out_dir):
        write_dataset_files(out_dir, bids_dir, description)
    return found.scans


def _check_t1_options(settings: dict[str, Any]) -> None:
    """Refuse what cannot take a T1, before scans are looked for."""
    from wmh_lora.cli.options import require_t1_backend
    from wmh_lora.models.model_file import read_model_card
    from wmh_lora.models.registry import model_path
    from wmh_lora.t1 import require_t1_channels

    card = read_model_card(model_path(settings["model"]))
    require_t1_channels(card.name, card.model.t1_channels)
    require_t1_backend(settings["backend"])


def _make_work_dir(work_dir: Path, bids_dir: Path) -> None:
    if work_dir.resolve().is_relative_to(bids_dir.resolve()):
        raise ConfigError(
            f"The work folder {work_dir} lies in the data set; choose one outside it."
        )
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"Cannot make the work folder {work_dir}: {error.strerror}; choose another."
        ) from error
