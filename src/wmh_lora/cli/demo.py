"""``wmh-lora demo``: make a synthetic FLAIR scan with known lesions, segment it, score it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wmh_lora.cli.errors import EXIT_INPUT
from wmh_lora.cli.segment import inference_options

__all__ = ["demo"]


@click.command()
@click.option(
    "-o",
    "--output",
    "out_dir",
    metavar="OUT",
    default="wmh-lora-demo",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for the scan and the results; an earlier demo in it is replaced.",
)
@click.option("--seed", type=click.IntRange(min=0), default=45, show_default=True, metavar="N")
@inference_options
@click.pass_context
def demo(ctx: click.Context, /, out_dir: Path, seed: int, **settings: Any) -> None:
    """Segment a synthetic FLAIR scan whose lesions are known.

    The scan is made here and holds nobody's data. It shows what the tool writes; agreement on it
    says nothing about agreement on real scans.
    """
    from wmh_lora.cli.batch import run_plan
    from wmh_lora.cli.options import Options
    from wmh_lora.cli.plan import Plan, Scan
    from wmh_lora.report.outputs import output_folder

    options = Options(out_dir=out_dir, overwrite=True, debug=ctx.obj["debug"], **settings)
    with output_folder(out_dir):
        scan_path, reference_path = _write_case(out_dir, seed)
        click.echo(f"Synthetic scan: {scan_path}")
        plan = Plan([Scan(scan_path, reference=reference_path)], failures=[], with_table=False)
        outcome = run_plan(plan, options)
    if outcome.failures:
        ctx.exit(EXIT_INPUT)
    (done,) = outcome.done
    click.echo(_score(reference_path, done.files.mask))
    click.echo(f"Picture (found: orange, reference: blue): {done.files.picture}")


def _write_case(out_dir: Path, seed: int) -> tuple[Path, Path]:
    from wmh_lora.data.synthesis import demo_case
    from wmh_lora.volume import Volume, write_nifti

    image, affine, reference = demo_case(seed)
    volume = Volume(data=image, affine=affine)
    scan_path = out_dir / "demo_FLAIR.nii.gz"
    reference_path = out_dir / "demo_space-orig_label-WMH_desc-reference_mask.nii.gz"
    write_nifti(scan_path, image, volume, overwrite=True)
    write_nifti(reference_path, reference, volume, overwrite=True)
    return scan_path, reference_path


def _score(reference_path: Path, mask_path: Path) -> str:
    from wmh_lora.evaluation.metrics import evaluate
    from wmh_lora.volume import Volume

    reference = Volume.read(reference_path, allow_constant=True)
    mask = Volume.read(mask_path, allow_constant=True)
    scores = evaluate(reference.data, mask.data, reference.spacing_mm)
    return "\n".join(
        (
            "Agreement with the known lesions:",
            f"  Dice              {scores.dice:.3f}",
            f"  HD95              {scores.hd95_mm:.1f} mm",
            f"  volume            {scores.prediction_ml:.2f} mL found, "
            f"{scores.reference_ml:.2f} mL there",
            f"  lesion recall     {scores.lesion_recall:.3f}",
            f"  lesion precision  {scores.lesion_precision:.3f}",
            f"  lesion F1         {scores.lesion_f1:.3f}",
        )
    )
