"""What a training step costs beside the bare arithmetic.

    python -m benchmarks.training [--steps N] [--json FILE] [--markdown FILE]
    python -m benchmarks.training --memory-of litemedsam [--batch-size N]

The same steps in turns: ``trainer`` takes its samples from two loader workers, as `wmh-lora train`
does; ``bare`` is forward, loss and backward on samples that lie ready, and ``optimiser`` adds
clipping and AdamW. Records and checkpoints, which training writes now and then, are left out.
``trainer`` should take at most 1.10 times as long as ``bare``. Loader workers need cores of their
own: on a machine with fewer than ``workers + 1`` free ones the ratios tell the cost of making the
samples as well, and the output says so. Prints JSON.

``--memory-of`` prints the resident memory of one micro-batch of a configuration instead: forward,
backward and optimiser on the CPU, in its precision, on random weights.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from benchmarks.harness import Timings, machine, publish, report_peak_memory, time_in_turns
from wmh_lora.models.network import build_network
from wmh_lora.models.presets import model_preset
from wmh_lora.training.batches import batch_loader
from wmh_lora.training.losses import SegmentationLoss
from wmh_lora.training.settings import RunConfig, TrainingConfig, read_run_config
from wmh_lora.training.trainer import Trainer

WORKERS = 2
ENCODER = "compact"
LIMIT = 1.10  # of the time of the bare step
SEED = 0
TRAINER, BARE, OPTIMISER = "trainer", "bare", "optimiser"


class _Sample(NamedTuple):
    image: npt.NDArray[np.float32]
    target: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]


class _Noise:
    """Samples that cost next to nothing to make: the overhead of the loop is what is measured."""

    def __init__(self, structures: int, crop: int, channels: int = 3) -> None:
        self.structures, self.crop, self.channels = structures, crop, channels

    def item(self, index: int) -> _Sample:
        rng = np.random.default_rng(index)
        image = rng.random((self.channels, self.crop, self.crop), dtype=np.float32)
        target = np.zeros((self.structures, self.crop, self.crop), np.float32)
        target[:, 40:60, 40:60] = 1
        return _Sample(image, target, np.ones(self.structures, np.bool_))


def _trainer(folder: Path, steps: int) -> Trainer:
    model, _ = model_preset(ENCODER)
    config = TrainingConfig(
        steps=10_000, batch_size=4, crop=128, workers=WORKERS, precision="fp32", log_steps=steps
    )
    return Trainer(
        build_network(model, None, for_training=True, seed=SEED),
        SegmentationLoss(model.structures),
        _Noise(len(model.structures), config.crop),
        config,
        folder,
    )


def _bare_steps(trainer: Trainer) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward pass on one batch that is always the same, without and with a step."""
    config = trainer.config
    batch = next(iter(batch_loader(trainer.stream, replace(config, workers=0), 0)))

    def gradients() -> None:
        trainer.optimizer.zero_grad(set_to_none=True)
        output = trainer.net.forward_train(batch.image)
        trainer.loss(output, batch.target, batch.valid).total.backward()

    def step() -> None:
        gradients()
        nn.utils.clip_grad_norm_(trainer.parameters, config.grad_clip)
        trainer.optimizer.step()

    return gradients, step


def training_step(config: RunConfig, batch_size: int = 0) -> Callable[[], object]:
    """Build one micro-batch and an optimiser step of a configuration, on random weights and noise.

    Parameters
    ----------
    config : RunConfig
        What is trained, and how.
    batch_size : int
        Instead of the configuration's; 0 for that one.
    """
    settings = replace(
        config.training,
        batch_size=batch_size or config.training.batch_size,
        accumulation=1,
        precision="fp32" if config.training.precision == "fp32" else "bf16",
    )
    net = build_network(config.model, None, for_training=True, seed=SEED)
    if settings.gradient_checkpointing:
        cast(Any, net.encoder).gradient_checkpointing = True
    structures = config.model.structures
    stream = _Noise(len(structures), settings.crop, config.model.in_channels)
    trainer = Trainer(net, SegmentationLoss(structures, config.loss), stream, settings, Path())
    batches = iter(batch_loader(stream, replace(settings, workers=0), 0))
    return lambda: trainer.step(batches)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a table there")
    parser.add_argument("--memory-of", metavar="PRESET|CONFIG")
    parser.add_argument("--batch-size", type=int, default=0, help="instead of the configuration's")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.memory_of is not None:
        config = read_run_config(options.memory_of)
        report_peak_memory(lambda: training_step(config, options.batch_size))
        return
    result = _measure(options.steps, options.turns)
    rows = [
        ("step", "seconds", "trainer takes"),
        ("trainer, two workers", _short(result, TRAINER), ""),
    ]
    for name, text in ((BARE, "forward and backward"), (OPTIMISER, "with clipping and AdamW")):
        rows.append(
            (text, _short(result, name), f"{result['trainer_over'][name]:.3f} times as long")
        )
    publish(result, rows, options.json, options.markdown)


def _measure(steps: int, turns: int) -> dict[str, Any]:
    """Time the three kinds of step in turns."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(Path(folder), steps)
        batches = iter(batch_loader(trainer.stream, trainer.config, 0))
        bare, optimiser = _bare_steps(trainer)
        contestants: dict[str, Callable[[], object]] = {
            TRAINER: lambda: trainer.step(batches),
            BARE: bare,
            OPTIMISER: optimiser,
        }
        cpu: dict[str, list[float]] = {name: [] for name in contestants}
        repeated = {name: _repeat(step, steps, cpu[name]) for name, step in contestants.items()}
        timings = time_in_turns(repeated, turns)
    cores = os.cpu_count() or 1
    ratios = {name: round(timings.ratio(TRAINER, name), 4) for name in (BARE, OPTIMISER)}
    cpu_ratios = {name: round(Timings(cpu).ratio(TRAINER, name), 4) for name in ratios}
    return {
        "benchmark": "training",
        "machine": machine(),
        "encoder": ENCODER,
        "workers": WORKERS,
        "cores_free_for_workers": cores > WORKERS,
        "seconds_per_step": {name: timings.median_s(name) / steps for name in contestants},
        "trainer_over": ratios,
        "trainer_over_cpu": cpu_ratios,  # processor time of the main process: no waiting
        "limit": LIMIT,
        "within_limit": ratios[BARE] <= LIMIT,
    }


def _repeat(step: Callable[[], object], times: int, cpu: list[float]) -> Callable[[], None]:
    """Do some steps, and note their processor time."""

    def run() -> None:
        start = time.process_time()
        for _ in range(times):
            step()
        cpu.append(time.process_time() - start)

    return run


def _short(result: dict[str, Any], name: str) -> str:
    return f"{result['seconds_per_step'][name]:.3f}"


if __name__ == "__main__":
    main()
