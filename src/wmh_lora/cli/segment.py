"""``wmh-lora segment``: find lesions in scans, and write masks, numbers and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from wmh_lora.cli.errors import EXIT_INPUT

__all__ = ["inference_options", "segment"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_INFERENCE_OPTIONS = (
    click.option(
        "--model",
        metavar="NAME|FILE",
        default="default",
        help="A name from `wmh-lora models list`, or a model file.",
    ),
    click.option(
        "--weights",
        "base_weights",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Weights of the model's base encoder; the cached or installed ones by default.",
    ),
    click.option(
        "--adapter",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="What `wmh-lora adapt` learned of the model at a site.",
    ),
    click.option(
        "--tta",
        type=click.Choice(["none", "flip", "d4"]),
        help="Views averaged: 1, 4 flips, or 8 flips and turns; each costs the time of one.",
    ),
    click.option(
        "--planes",
        type=click.Choice(["one", "all"]),
        help="all: average three planes of scans that are as fine in each; longer, more reliable.",
    ),
    click.option(
        "--zoom",
        type=click.FloatRange(1, 2),
        metavar="X",
        help="See slices with evidence of a lesion once more, so many times larger; 1 does not.",
    ),
    click.option(
        "--adaptive/--no-adaptive",
        default=None,
        help="Compute no slices without head, and further views only near evidence of a lesion.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        help="Of the network's products; auto takes half precision where it is faster.",
    ),
    click.option(
        "--threshold",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        metavar="X",
        help="Probability from which a voxel is lesion; lower finds more.",
    ),
    click.option(
        "--min-voxels",
        type=click.IntRange(min=0),
        metavar="N",
        help="Smallest lesion kept, in voxels of the scan.",
    ),
    click.option(
        "--min-peak",
        type=click.FloatRange(0, 1),
        metavar="X",
        help="Lesions whose highest probability is lower are left out.",
    ),
    click.option(
        "--min-contrast",
        type=click.FloatRange(0, 1, max_open=True),
        metavar="X",
        help="Least brightness over the tissue around, as a share of what the scan's lesions have.",
    ),
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda", "mps"]),
        default="auto",
        show_default=True,
        help="Where the network runs; auto takes a GPU if there is one.",
    ),
    click.option(
        "--backend",
        type=click.Choice(["torch", "onnxruntime", "openvino"]),
        default="torch",
        show_default=True,
        help="What computes the network; the others take their packages and run on the CPU.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        metavar="N",
        help="CPU threads to use; all cores by default.",
    ),
    click.option(
        "--max-memory",
        metavar="SIZE",
        help="Memory to stay within, such as 2G; no limit by default.",
    ),
)


def inference_options(function: _Function) -> _Function:
    """Add the options that choose model, settings and device; the model file has the defaults."""
    for option in reversed(_INFERENCE_OPTIONS):
        function = option(function)
    return function


@click.command()
@click.argument(
    "inputs", metavar="INPUT...", nargs=-1, required=True, type=click.Path(path_type=Path)
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
    "--t1",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="T1 of the same session, for a model that takes one and a single INPUT.",
)
@click.option(
    "--register-t1",
    is_flag=True,
    help="Correct movement between T1 and FLAIR first; needs the registration extra.",
)
@inference_options
@click.option(
    "--report",
    "page",
    type=click.Choice(["html", "pdf", "none"]),
    default="html",
    show_default=True,
    help="Report for a reader: a page with a slice viewer, a PDF (needs matplotlib), or none.",
)
@click.option("--overwrite", is_flag=True, help="Replace results that exist.")
@click.option("--strict", is_flag=True, help="Count a scan that fails a quality check as failed.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON document.")
@click.pass_context
def segment(
    ctx: click.Context,
    /,
    inputs: tuple[Path, ...],
    out_dir: Path,
    strict: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Find white matter hyperintensities in FLAIR scans.

    INPUT is any number of .nii, .nii.gz, .mgz or .nrrd files, and folders, which are searched with
    their subfolders. Where a folder holds scans named *_FLAIR, only those are taken.

    \b
    For each scan, <stem> being its name without _FLAIR and extension:
      <stem>_space-orig_label-WMH_mask.nii.gz      the lesions, on the scan's own grid
      <stem>_space-orig_label-WMH_probseg.nii.gz   their probability
      <stem>_wmh.json                              volume, lesions, settings, model
      <stem>_wmh.png                               slices with outlines
      <stem>_wmh.html                              all of it on one page, with a slice viewer
    and, for folders or several files, wmh.tsv with one row a scan and wmh.html, which links them.

    Exit code: 0 all done; 1 some inputs failed (with --strict: or a quality check), the rest are
    done; 2 wrong usage or settings.
    """  # noqa: D301 -- \b keeps click from joining the lines of the list
    from wmh_lora.cli.batch import Outcome, run_plan
    from wmh_lora.cli.options import Options
    from wmh_lora.cli.plan import plan_scans

    if settings["register_t1"] and settings["t1"] is None:
        raise click.UsageError("--register-t1 needs the T1: name it with --t1 FILE.")
    options = Options(out_dir=out_dir, quiet=as_json, debug=ctx.obj["debug"], **settings)
    outcome: Outcome = run_plan(plan_scans(inputs), options)
    if as_json:
        document = {
            "scans": [
                {
                    "scan": done.scan.name,
                    **done.report,
                    "outputs": {
                        key: str(path)
                        for key, path in done.files._asdict().items()
                        if path is not None
                    },
                }
                for done in outcome.done
            ],
            "failed": [
                {"scan": failure.name, "file": str(failure.source), "message": failure.message}
                for failure in outcome.failures
            ],
            "table": None if outcome.table is None else str(outcome.table),
            "page": None if outcome.page is None else str(outcome.page),
        }
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    elif outcome.table is not None:
        shown = outcome.table if outcome.page is None else outcome.page
        click.echo(f"{len(outcome.done)} scans -> {shown}")
    rejected = [done for done in outcome.done if strict and done.quality == "fail"]
    for done in rejected:
        click.echo(
            f"wmh-lora: {done.scan.source}: failed a quality check; its results are kept.", err=True
        )
    failed = len(outcome.failures) + len(rejected)
    if failed:
        total = len(outcome.done) + len(outcome.failures)
        if total > 1:
            click.echo(f"wmh-lora: {failed} of {total} inputs failed.", err=True)
        ctx.exit(EXIT_INPUT)
