"""``wmh-lora adapt``: learn from a few labelled scans of a site."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wmh_lora.cli.training_process import prepare_for_training

if TYPE_CHECKING:
    from wmh_lora.training.adapt import CrossValidation

__all__ = ["adapt"]

_Folder = click.Path(path_type=Path, exists=True, file_okay=False)
_File = click.Path(path_type=Path, dir_okay=False)


@click.command(short_help="Learn from a few labelled scans of a site.")
@click.option("--images", type=_Folder, required=True, metavar="DIR", help="2 to 10 FLAIR scans.")
@click.option("--labels", type=_Folder, required=True, metavar="DIR", help="Their lesion masks.")
@click.option(
    "-o",
    "--output",
    "target",
    type=_File,
    required=True,
    metavar="FILE",
    help="Adapter to write, e.g. my-site.safetensors.",
)
@click.option(
    "--model",
    metavar="NAME|FILE",
    default="default",
    help="A name from `wmh-lora models list`, or a model file.",
)
@click.option(
    "--weights",
    "base_weights",
    metavar="FILE",
    type=_File,
    help="Weights of the model's base encoder; the cached or installed ones by default.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=15.0,
    show_default=True,
    metavar="N",
    help="Time for everything, cross-validation included.",
)
@click.option("--seed", type=click.IntRange(min=0), default=42, show_default=True, metavar="N")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads to use.")
@click.option("--force", is_flag=True, help="Write also what is not better than the model.")
@click.option("--overwrite", is_flag=True, help="Replace a file that exists.")
@click.option("--steps", type=click.IntRange(min=1), default=200, hidden=True)
@click.option(
    "--method", type=click.Choice(["lora", "full"]), default="lora", hidden=True
)  # full fine-tuning, which writes a whole model, is for the comparison in docs/studies
def adapt(
    images: Path,
    labels: Path,
    target: Path,
    model: str,
    base_weights: Path | None,
    threads: int | None,
    force: bool,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Learn from 2 to 10 labelled scans of a site, for `wmh-lora segment --adapter FILE`.

    Scans and masks are paired by subject and session in their names; both folders may be the same,
    or a BIDS data set. Masks hold 1 for lesion, 0 for background, and 2 for what is to be ignored.

    The result is cross-validated: its Dice on scans that it has not seen is compared with that of
    the model on the same scans. If it is not better, nothing is written.

    Exit code: 0 done; 1 the scans cannot be used or adaptation did not help; 2 wrong usage or
    settings.
    """
    started = time.monotonic()
    prepare_for_training()
    import torch

    from wmh_lora.logs import progress_bar
    from wmh_lora.models.registry import model_path
    from wmh_lora.training.adapt import AdaptConfig
    from wmh_lora.training.adapt import adapt as run_adaptation
    from wmh_lora.training.tune_cases import cases_of_folders

    if threads is not None:
        torch.set_num_threads(threads)
    with progress_bar() as progress:
        result = run_adaptation(
            cases_of_folders(images, labels),
            model_path(model),
            target,
            AdaptConfig(**settings),
            base_weights=base_weights,
            force=force,
            overwrite=overwrite,
            started=started,
            progress=progress,
        )
    click.echo("\n".join(_lines(result)))
    click.echo(target)


def _lines(result: CrossValidation) -> list[str]:
    """Say in words how well it went."""
    lines = ["Dice on held-out scans    model   adapted"]
    for name, before, after in zip(result.names, result.base, result.adapted, strict=True):
        lines.append(f"  {name:<22} {before:7.3f}   {after:7.3f}")
    lines.append(f"  {'mean':<22} {result.base.mean():7.3f}   {result.adapted.mean():7.3f}")
    lines.append(
        f"  model with its own settings: mean {result.default.mean():.3f}; "
        f"{int((result.adapted > result.base).sum())} of {len(result.names)} scans are better"
    )
    lines.append(
        f"threshold {result.setting.threshold:g}, smallest lesion {result.setting.min_voxels} "
        f"voxels; {result.seconds / 60:.1f} minutes"
    )
    return lines
