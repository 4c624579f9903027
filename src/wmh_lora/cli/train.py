"""``wmh-lora train``: train a model from a preset or a configuration file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from wmh_lora.cli.training_process import prepare_for_training

__all__ = ["train"]


def _list_presets(ctx: click.Context, parameter: click.Parameter, asked: bool) -> None:
    """Print the presets, and end."""
    if not asked or ctx.resilient_parsing:
        return
    from wmh_lora.training.presets import preset_summary, presets

    writer = ctx.make_formatter()
    writer.write_dl([(name, preset_summary(path)) for name, path in presets().items()])
    click.echo(writer.getvalue(), nl=False)
    ctx.exit()


@click.command("train", short_help="Train a model from a preset or a configuration file.")
@click.argument("config", metavar="PRESET|CONFIG.toml")
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_presets,
    help="List the presets and exit.",
)
@click.option("--show", is_flag=True, help="Print the configuration file and exit.")
@click.option(
    "--set",
    "overrides",
    metavar="KEY.KEY=VALUE",
    multiple=True,
    help="Replace one setting, e.g. data.root=PATH or training.steps=8000. Repeatable.",
)
@click.option(
    "--weights",
    "base_weights",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Weights of the base encoder; the cached or installed ones by default.",
)
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint of the folder.")
@click.option(
    "-o",
    "--output",
    "run_dir",
    metavar="RUN_DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the run.  [default: runs/<name of the preset or file>]",
)
def train(
    config: str,
    show: bool,
    overrides: tuple[str, ...],
    base_weights: Path | None,
    resume: bool,
    run_dir: Path | None,
) -> None:
    """Train a model as a preset, or a configuration file of your own, says.

    --list names the presets. For a file of your own, begin with one of them:

    \b
      wmh-lora train compact --show > mine.toml

    The run folder receives the resolved configuration, metrics.jsonl, checkpoints, and the models
    best.safetensors and last.safetensors. Ctrl-C or SIGTERM finishes the step, writes a checkpoint
    and ends with exit code 1; --resume then continues as if nothing had happened.

    For several GPUs or processes: accelerate launch -m wmh_lora train PRESET ...
    """  # noqa: D301 -- \b keeps click from joining the lines
    from wmh_lora.training.presets import config_path

    config_file = config_path(config)
    if show:
        click.echo(config_file.read_text(encoding="utf-8"), nl=False)
        return
    prepare_for_training()
    from wmh_lora.logs import configure_logging, progress_bar
    from wmh_lora.training.run import train as run_training
    from wmh_lora.training.settings import read_run_config

    # Of the processes of `accelerate launch`, one speaks; the others only warn.
    speaks = os.environ.get("RANK", "0") == "0"
    on_terminal = speaks and sys.stderr.isatty()
    # On a terminal the progress bar says what the lines of a log file say.
    configure_logging(verbose=speaks and not on_terminal)
    if base_weights is not None:
        overrides = (*overrides, f"training.base_weights={base_weights}")
    settings = read_run_config(config_file, overrides)
    run_dir = run_dir or Path("runs") / config_file.stem
    with progress_bar(enabled=on_terminal) as progress:

        def show_step(step: int, steps: int, loss: float) -> None:
            progress(step, steps, f"loss {loss:.4f}")

        finished = run_training(settings, run_dir, resume=resume, on_step=show_step)
    if not finished:
        click.echo(f"Stopped early; continue with --resume -o {run_dir}.", err=True)
        raise click.exceptions.Exit(1)
    best = run_dir / "best.safetensors"
    if speaks:
        click.echo(best if best.is_file() else run_dir / "last.safetensors")
