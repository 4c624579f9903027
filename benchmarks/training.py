"""What a training step costs beside the bare arithmetic.

    python -m benchmarks.training [--steps N] [--json FILE]
    python -m benchmarks.training --memory-of configs/litemedsam.toml [--batch-size N]

The same steps in turns: ``trainer`` takes its samples from two loader workers, as `wmh-lora train`
does, and keeps records; ``bare`` is forward, loss, backward, clipping and AdamW on samples that lie
ready. Loader workers need cores of their own: on a machine with fewer than ``workers + 1`` free
ones the ratio tells the cost of making the samples as well, and the output says so. Prints JSON.

``--memory-of`` prints the resident memory of one micro-batch of a configuration instead: forward,
backward and optimiser on the CPU, in its precision, on random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from benchmarks.harness import machine, report_peak_memory, time_in_turns
from wmh_lora.models.network import build_network
from wmh_lora.models.presets import model_preset
from wmh_lora.training.batches import batch_loader
from wmh_lora.training.losses import SegmentationLoss
from wmh_lora.training.settings import TrainingConfig, read_run_config
from wmh_lora.training.trainer import Trainer

WORKERS = 2
ENCODER = "compact"
SEED = 0


class _Sample(NamedTuple):
    image: npt.NDArray[np.float32]
    target: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]


class _Noise:
    """Samples that cost next to nothing to make: the overhead of the loop is what is measured."""

    def __init__(self, structures: int, crop: int) -> None:
        self.structures, self.crop = structures, crop

    def item(self, index: int) -> _Sample:
        rng = np.random.default_rng(index)
        image = rng.random((3, self.crop, self.crop), dtype=np.float32)
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


def _bare_step(trainer: Trainer) -> Callable[[], None]:
    """Optimiser step on one batch that is always the same."""
    config = trainer.config
    batch = next(iter(batch_loader(trainer.stream, config, 0)))

    def step() -> None:
        output = trainer.net.forward_train(batch.image)
        trainer.loss(output, batch.target, batch.valid).total.backward()
        nn.utils.clip_grad_norm_(trainer.parameters, config.grad_clip)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)

    return step


def _one_step(path: Path, batch_size: int) -> Callable[[], object]:
    """One micro-batch and an optimiser step of a configuration."""
    config = read_run_config(path)
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
    stream = _Noise(len(structures), settings.crop)
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
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--memory-of", type=Path, metavar="CONFIG")
    parser.add_argument("--batch-size", type=int, default=0, help="instead of the configuration's")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.memory_of is not None:
        report_peak_memory(lambda: _one_step(options.memory_of, options.batch_size))
        return
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(Path(folder), options.steps)
        batches = iter(batch_loader(trainer.stream, trainer.config, 0))
        bare = _bare_step(trainer)

        def run_trainer() -> None:
            for _ in range(options.steps):
                trainer.step(batches)

        def run_bare() -> None:
            for _ in range(options.steps):
                bare()

        timings = time_in_turns({"trainer": run_trainer, "bare": run_bare}, options.turns)
    result = {
        "machine": machine(),
        "encoder": ENCODER,
        "workers": WORKERS,
        "cores": os.cpu_count(),
        "cores_free_for_workers": (os.cpu_count() or 1) > WORKERS,
        "trainer_s_per_step": timings.median_s("trainer") / options.steps,
        "bare_s_per_step": timings.median_s("bare") / options.steps,
        "ratio": timings.ratio("trainer", "bare"),
    }
    text = json.dumps(result, indent=2) + "\n"
    sys.stdout.write(text)
    if options.json is not None:
        options.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
