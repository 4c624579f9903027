"""``wmh-lora compare``: train and score several methods side by side, or score their masks."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wmh_lora.cli.errors import EXIT_INPUT, describe_error
from wmh_lora.cli.training_process import prepare_for_training
from wmh_lora.errors import ConfigError

if TYPE_CHECKING:
    from wmh_lora.comparators.results import FoldResult
    from wmh_lora.comparators.run import Comparison
    from wmh_lora.data.manifest import Manifest
    from wmh_lora.evaluation.cohort import Case, Unpaired
    from wmh_lora.report.comparison import MethodCosts
    from wmh_lora.report.evaluation import Failure

__all__ = ["compare"]

_Folder = click.Path(path_type=Path, exists=True, file_okay=False)


def _named_folders(
    ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, Path]:
    """Read NAME=DIR."""
    folders: dict[str, Path] = {}
    for value in values:
        name, separator, folder = value.partition("=")
        if not (separator and name and folder):
            raise click.BadParameter(f"{value!r} is not of the form NAME=DIR.")
        if not Path(folder).is_dir():
            raise click.BadParameter(f"{folder} is no folder.")
        if name in folders:
            raise click.BadParameter(f"two folders are called {name!r}.")
        folders[name] = Path(folder)
    return folders


@click.command("compare", short_help="Train and score several methods side by side.")
@click.argument("config", metavar="[PRESET|CONFIG.toml]", required=False)
@click.option(
    "--set",
    "overrides",
    metavar="KEY.KEY=VALUE",
    multiple=True,
    help="Replace one setting, e.g. data.root=PATH or comparison.seconds=60. Repeatable.",
)
@click.option(
    "--prediction",
    "predictions",
    metavar="NAME=DIR",
    multiple=True,
    callback=_named_folders,
    help="Masks of another method, of any program. Repeatable.",
)
@click.option(
    "--reference",
    type=_Folder,
    metavar="DIR",
    help="References of the masks.  [default: the scans of the configuration's manifest]",
)
@click.option("--against", metavar="NAME", help="Method that differences are taken from.")
@click.option("--resume", is_flag=True, help="Keep the results that are there, and do the rest.")
@click.option("--overwrite", is_flag=True, help="Replace the tables of masks compared before.")
@click.option(
    "-o",
    "--output",
    "out_dir",
    metavar="OUT",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the results; it is made if needed.",
)
def compare(
    config: str | None,
    overrides: tuple[str, ...],
    predictions: dict[str, Path],
    reference: Path | None,
    against: str | None,
    resume: bool,
    overwrite: bool,
    out_dir: Path,
) -> None:
    """Compare methods on the same scans: trained as a configuration says, or by their masks.

    Presets are challenge and small, see docs/comparison.md.

    Every method is trained on each fold of the split within the same budget, its threshold is
    chosen on the validation part, and its masks of the test part are scored. A method that is done
    in a fold stays done: --resume goes on after any interruption, kill -9 included.

    \b
    OUT receives:
      comparison.md     the table, differences, settings
      comparison.tsv, differences.tsv, comparison.json
      cases.tsv         one row a scan and method, described in cases.json
      masks/            a folder of masks a method
      folds/            checkpoints and results

    Exit code: 0 all done; 1 some masks failed or were unpaired, the rest is done; 2 wrong usage.
    """  # noqa: D301 -- \b keeps click from joining the lines of the list
    prepare_for_training()
    from wmh_lora.logs import configure_logging

    configure_logging(verbose=not sys.stderr.isatty())
    if config is None and not predictions:
        raise click.UsageError("Give a configuration, or --prediction NAME=DIR.")
    if config is None and reference is None:
        raise click.UsageError("--prediction without a configuration needs --reference DIR.")
    if config is None and overrides:
        raise click.UsageError("--set changes a configuration, and there is none.")
    if config is None:
        _refuse_existing(out_dir, overwrite or resume)
        _check_against(predictions, against)
        collected = _Collected()
        assert reference is not None
        _add_predictions(collected, predictions, reference)
    else:
        comparison = _comparison(config, overrides, out_dir, resume)
        collected = _Collected(
            {n: (f, comparison.manifest.root) for n, f in comparison.mask_folders.items()},
            budget_seconds=comparison.config.comparison.seconds,
            clock=comparison.config.comparison.clock,
        )
        if twice := sorted(set(predictions) & set(collected.folders)):
            raise ConfigError(f"Two methods are called {twice[0]!r}; rename the --prediction.")
        against = against or comparison.config.against
        _check_against([*collected.folders, *predictions], against)
        _add_predictions(collected, predictions, reference or comparison.manifest)
        _train(comparison, collected, against)
    _print_table(_write(collected, against, out_dir), out_dir)
    if collected.failures or collected.unpaired:
        raise click.exceptions.Exit(EXIT_INPUT)


@dataclass
class _Collected:
    """What is known so far."""

    folders: dict[str, tuple[Path, Path]] = field(default_factory=dict)
    cases: list[Case] = field(default_factory=list)
    costs: dict[str, MethodCosts] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    unpaired: list[Unpaired] = field(default_factory=list)
    budget_seconds: float | None = None
    clock: str = "cpu"


def _comparison(config: str, overrides: tuple[str, ...], out_dir: Path, resume: bool) -> Comparison:
    from wmh_lora.comparators.run import Comparison
    from wmh_lora.comparators.settings import read_comparison

    return Comparison(read_comparison(config, overrides), out_dir, resume=resume)


def _train(comparison: Comparison, collected: _Collected, against: str) -> None:
    """Run what has no result yet; the tables are written anew after every result."""
    from wmh_lora.comparators.results import case_of
    from wmh_lora.logs import progress_bar

    with progress_bar() as progress:

        def show(done: int, total: int, label: str, share: float) -> None:
            progress(round(1000 * (done + share)), 1000 * total, label)

        for result in comparison.run(show):
            collected.cases += [
                case_of(result.method, scored, comparison.out_dir, comparison.manifest)
                for scored in result.scans
            ]
            collected.costs[result.method] = _with_result(
                collected.costs.get(result.method), result
            )
            _write(collected, against, comparison.out_dir)


def _with_result(costs: MethodCosts | None, result: FoldResult) -> MethodCosts:
    from wmh_lora.report.comparison import MethodCosts

    before = costs or MethodCosts()
    entry = {
        "fold": result.fold,
        "steps": list(result.steps),
        "threshold": result.threshold,
        "min_voxels": result.min_voxels,
        "validation_dice": result.validation_dice,
        "note": result.note,
    }
    return MethodCosts(
        parameters=result.parameters,
        members=result.members,
        training_seconds=(*before.training_seconds, result.training_seconds),
        inference_seconds=(
            *before.inference_seconds,
            *(scored.inference_seconds for scored in result.scans),
        ),
        settings=(*before.settings, entry),
    )


def _add_predictions(
    collected: _Collected, predictions: Mapping[str, Path], references: Path | Manifest
) -> None:
    """Pair and score the masks of other programs: with a folder, or with a manifest's scans."""
    from wmh_lora.comparators.results import reference_of
    from wmh_lora.evaluation.cohort import evaluate_pairs, pair_folders, pair_with
    from wmh_lora.report.evaluation import Failure

    for name, folder in predictions.items():
        if isinstance(references, Path):
            pairing = pair_folders(name, folder, references)
            collected.folders[name] = (folder, references)
        else:
            known = [reference_of(scan, references) for scan in references.usable if scan.mask]
            pairing = pair_with(name, folder, known, f"of {references.path}")
            collected.folders[name] = (folder, references.root)
        collected.unpaired += pairing.unpaired
        for entry in pairing.unpaired:
            click.echo(f"wmh-lora: unpaired {entry.role} {entry.path}: {entry.reason}.", err=True)
        for pair, outcome in evaluate_pairs(pairing.pairs):
            try:
                collected.cases.append(outcome())
            except Exception as error:  # noqa: BLE001 -- told to the user, and in the report
                message = describe_error(error)
                click.echo(f"wmh-lora: {message}", err=True)
                collected.failures.append(Failure(name, message, pair))


def _check_against(methods: Collection[str], against: str | None) -> None:
    """Find out before minutes of work that there is nothing to take differences from."""
    if against is not None and against not in methods:
        raise ConfigError(
            f"There is no method {against!r} to compare with; choose one of {', '.join(methods)}."
        )


def _write(collected: _Collected, against: str | None, out_dir: Path) -> dict[str, Any]:
    from wmh_lora.report.comparison import comparison_document, write_comparison

    document = comparison_document(
        collected.folders,
        collected.cases,
        collected.costs,
        against=against or next(iter(collected.folders)),
        clock=collected.clock,
        budget_seconds=collected.budget_seconds,
        failures=collected.failures,
        unpaired=collected.unpaired,
    )
    write_comparison(document, out_dir)
    return document


def _refuse_existing(out_dir: Path, allowed: bool) -> None:
    from wmh_lora.report.comparison import OUTPUTS

    for name in OUTPUTS:
        if (out_dir / name).exists() and not allowed:
            raise ConfigError(
                f"{out_dir / name} exists already; add --overwrite to replace results, or choose "
                "another folder with -o."
            )


def _print_table(document: Mapping[str, Any], out_dir: Path) -> None:
    from wmh_lora.report.comparison import comparison_markdown

    click.echo(comparison_markdown(document))
    click.echo(f"-> {out_dir / 'comparison.md'}", err=True)
