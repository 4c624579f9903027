"""``wmh-lora train``: train a model from a configuration file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

__all__ = ["train"]


@click.command("train", short_help="Train a model from a configuration file.")
@click.argument("config_file", metavar="CONFIG.toml", type=click.Path(path_type=Path))
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
    help="Folder of the run.  [default: runs/<name of CONFIG>]",
)
def train(
    config_file: Path,
    overrides: tuple[str, ...],
    base_weights: Path | None,
    resume: bool,
    run_dir: Path | None,
) -> None:
    """Train a model as CONFIG.toml says.

    The run folder receives the resolved configuration, metrics.jsonl, checkpoints, and the models
    best.safetensors and last.safetensors. Ctrl-C or SIGTERM finishes the step, writes a checkpoint
    and ends with exit code 1; --resume then continues as if nothing had happened.

    For several GPUs or processes: accelerate launch -m wmh_lora train CONFIG.toml ...
    """
    # Must be set before torch is loaded. Threads that spin while they wait take the processor from
    # those that they wait for: measured 4 times slower beside one other busy process.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # NumPy's products are made by the workers that draw samples, which get one core each.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
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
    config = read_run_config(config_file, overrides)
    run_dir = run_dir or Path("runs") / config_file.stem
    with progress_bar(enabled=on_terminal) as progress:

        def show(step: int, steps: int, loss: float) -> None:
            progress(step, steps, f"loss {loss:.4f}")

        finished = run_training(config, run_dir, resume=resume, on_step=show)
    if not finished:
        click.echo(f"Stopped early; continue with --resume -o {run_dir}.", err=True)
        raise click.exceptions.Exit(1)
    best = run_dir / "best.safetensors"
    if speaks:
        click.echo(best if best.is_file() else run_dir / "last.safetensors")
