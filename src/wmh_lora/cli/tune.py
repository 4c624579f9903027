"""``wmh-lora tune``: choose threshold, component size and views on validation scans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wmh_lora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from wmh_lora.training.tune_cases import TuningCase

__all__ = ["tune"]

_MOST_VALUES = 1000

_Folder = click.Path(path_type=Path, exists=True, file_okay=False)
_File = click.Path(path_type=Path, exists=True, dir_okay=False)


def _numbers(kind: type[int] | type[float]) -> Callable[..., tuple[Any, ...]]:
    """Read numbers separated by commas, or a range FIRST:LAST:STEP that holds its end."""

    def read(ctx: click.Context, parameter: click.Parameter, text: str) -> tuple[Any, ...]:
        try:
            if ":" not in text:
                return tuple(kind(part) for part in text.split(",") if text)
            first, last, step = (kind(part) for part in text.split(":"))
            count = int((last - first) / step + 1e-6) + 1
            if not 1 <= count <= _MOST_VALUES:
                raise ValueError
            return tuple(kind(round(first + step * n, 6)) for n in range(count))
        except (ValueError, ZeroDivisionError, OverflowError):
            raise click.BadParameter(f"{text!r} is neither A,B,C nor FIRST:LAST:STEP.") from None

    return read


@click.command(short_help="Choose threshold, component size and views on validation scans.")
@click.argument("run", metavar="RUN|MODEL")
@click.option(
    "--checkpoint",
    type=click.Choice(["best", "last"]),
    default="best",
    show_default=True,
    help="Which model of the run folder.",
)
@click.option(
    "--metric",
    type=click.Choice(["dice", "f1", "avd"]),
    default="dice",
    show_default=True,
    help="Dice, F1 of lesions, or absolute volume difference.",
)
@click.option(
    "--thresholds",
    callback=_numbers(float),
    default="",
    metavar="LIST",
    help="A,B,C or FIRST:LAST:STEP.  [default: 0.05:0.95:0.05, then 0.01 around the best]",
)
@click.option(
    "--min-voxels",
    callback=_numbers(int),
    default="",
    metavar="LIST",
    help="Smallest components to compare.  [default: 1,2,3,5,8,12,20]",
)
@click.option(
    "--no-tta", is_flag=True, help="Compute the single view alone, which takes the least time."
)
@click.option("--images", type=_Folder, metavar="DIR", help="FLAIR scans, with --references.")
@click.option("--references", type=_Folder, metavar="DIR", help="Their masks.")
@click.option("--manifest", type=_File, metavar="FILE", help="Manifest of scans, with --split.")
@click.option("--split", type=_File, metavar="FILE", help="Split of the manifest's subjects.")
@click.option("--split-name", metavar="NAME", help="Which split, where the file holds several.")
@click.option(
    "--part",
    type=click.Choice(["train", "validation", "test"]),
    default="validation",
    show_default=True,
    help="Part of the split.",
)
@click.option(
    "--data-root",
    type=_Folder,
    metavar="DIR",
    help="Folder of the run's data, where it is not what the run says.",
)
@click.option(
    "--weights",
    "base_weights",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Weights of the model's base encoder; the cached or installed ones by default.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    default="auto",
    show_default=True,
    help="Where the network runs; auto takes a GPU if there is one.",
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads to use.")
@click.option(
    "--save-as",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the tuned model here and leave the model as it is.",
)
@click.option(
    "-o",
    "--output",
    "out_dir",
    metavar="OUT",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for report and kept maps.  [default: RUN/tuning]",
)
@click.option("--dry-run", is_flag=True, help="Print the result; change no model, write no report.")
@click.option("--overwrite", is_flag=True, help="Replace a report or --save-as file that exists.")
def tune(
    run: str,
    metric: str,
    thresholds: tuple[float, ...],
    min_voxels: tuple[int, ...],
    no_tta: bool,
    base_weights: Path | None,
    device: str,
    threads: int | None,
    save_as: Path | None,
    out_dir: Path | None,
    dry_run: bool,
    overwrite: bool,
    **choice: Any,
) -> None:
    """Choose threshold, smallest component and test-time augmentation on validation scans.

    RUN is the folder of a training run, whose validation scans are used; or a model file or name,
    with --images and --references or with --manifest and --split.

    The choice is written into the model file; its weights stay as they are. OUT receives
    tuning.tsv (every setting), tuning.json, tuning.md, threshold.png and .svg, and maps/ with the
    probability maps, which make a second search quick.

    Exit code: 0 done; 1 a scan or output failed, and nothing was changed; 2 wrong usage or
    settings.
    """
    model = _model_file(run, choice["checkpoint"])
    target = _target(model, save_as, dry_run=dry_run, overwrite=overwrite)
    folder = out_dir or _default_folder(run, model)
    import torch

    from wmh_lora.config import TTA_MODES
    from wmh_lora.engine_maps import ProbabilityMaps
    from wmh_lora.logs import progress_bar
    from wmh_lora.models.allocator import keep_freed_memory
    from wmh_lora.models.model_file import read_model_card, rewrite_card, weights_sha256
    from wmh_lora.report.extras import require
    from wmh_lora.report.tuning import OUTPUTS, summary_lines, write_tuning
    from wmh_lora.training.tune import tune as search
    from wmh_lora.training.tune import tuned_card

    cases = _cases(run, choice)
    if not dry_run:
        require(
            "matplotlib",
            extra="evaluate",
            purpose="The report's figure",
            instead="add --dry-run to print the result only",
        )
        _prepare_folder(folder, OUTPUTS, overwrite)
    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    card = read_model_card(model)
    maps = ProbabilityMaps(model, folder / "maps", base_weights=base_weights, device=device)
    with progress_bar() as progress:
        tuning = search(
            cases,
            maps,
            card.inference,
            metric=metric,
            thresholds=thresholds,
            min_voxels=min_voxels,
            views=TTA_MODES[:1] if no_tta else TTA_MODES,
            progress=progress,
        )
    click.echo("\n".join(summary_lines(tuning)))
    if dry_run:
        return
    description = {"name": card.name, "weights_sha256": weights_sha256(model)}
    write_tuning(tuning, description, folder, overwrite=overwrite)
    rewrite_card(model, tuned_card(card, tuning), target=target, overwrite=overwrite)
    click.echo(f"{target or model}\n{folder / 'tuning.md'}")


def _model_file(run: str, checkpoint: str) -> Path:
    """Find the model that is tuned."""
    folder = Path(run)
    if not folder.is_dir():
        from wmh_lora.models.registry import model_path

        return model_path(run)
    path = folder / f"{checkpoint}.safetensors"
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no {path.name}; give the folder of a training run, another "
            "--checkpoint, or a model file."
        )
    return path


def _target(model: Path, save_as: Path | None, *, dry_run: bool, overwrite: bool) -> Path | None:
    """Where the tuned model goes; None for its own place. Refused before the work is done."""
    if dry_run:
        return None
    if save_as is None:
        from wmh_lora.models.registry import packaged_models

        if model.resolve() in {path.resolve() for path in packaged_models().values()}:
            raise ConfigError(
                f"{model.stem} is part of the package and stays as it is; name a file for the "
                "tuned model with --save-as, or use --dry-run."
            )
    elif save_as.exists() and not overwrite:
        raise DataError(f"{save_as} exists already; add --overwrite, or choose another name.")
    elif not save_as.parent.is_dir():
        raise DataError(f"{save_as.parent} is not an existing folder; create it first.")
    return save_as


def _default_folder(run: str, model: Path) -> Path:
    return Path(run) / "tuning" if Path(run).is_dir() else Path(f"{model.stem}-tuning")


def _prepare_folder(folder: Path, names: tuple[str, ...], overwrite: bool) -> None:
    """Find out before minutes of work that the report may not be written."""
    if not overwrite and any((folder / name).exists() for name in names):
        raise DataError(
            f"{folder} holds a report already; add --overwrite to replace it, or choose another "
            "folder with -o."
        )
    from wmh_lora.files import write_failure

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"Cannot make {folder}: {write_failure(folder, error)}.") from error


def _cases(run: str, choice: dict[str, Any]) -> list[TuningCase]:
    from wmh_lora.training.run import read_run_folder
    from wmh_lora.training.tune_cases import cases_of_folders, cases_of_manifest, cases_of_run

    images, references = choice["images"], choice["references"]
    manifest, split = choice["manifest"], choice["split"]
    if (images is None) != (references is None) or (manifest is None) != (split is None):
        raise ConfigError("Give --images with --references, and --manifest with --split.")
    if images is not None and manifest is not None:
        raise ConfigError("Give either --images and --references, or --manifest and --split.")
    if images is not None:
        return cases_of_folders(images, references)
    if manifest is not None:
        return cases_of_manifest(manifest, split, choice["part"], choice["split_name"])
    if not Path(run).is_dir():
        raise ConfigError(
            "A model file names no scans: give --images and --references, or --manifest and "
            "--split."
        )
    config = read_run_folder(Path(run))
    if choice["data_root"] is not None:
        from dataclasses import replace

        config = replace(config, data={**config.data, "root": str(choice["data_root"])})
    if not config.validation:
        raise ConfigError(
            f"The run {run} names no validation scans; give --images and --references, or "
            "--manifest and --split."
        )
    return cases_of_run(config)
