"""Training within a time budget, by the steps of the package's own trainer.

How many steps fit is not known before, so the schedule follows the share of the budget that is
used up: at every step, the number of steps in all is estimated from those done so far. Everything
else (optimiser, accumulation, clipping, averaging, refusal of bad steps) is `Trainer.step`.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from wmh_lora.comparators.settings import Budget
from wmh_lora.models.decoder import DecoderOutput
from wmh_lora.models.network import WMHNet
from wmh_lora.training.batches import StreamLike, batch_loader
from wmh_lora.training.checkpoint import (
    Checkpoint,
    load_newest_checkpoint,
    load_trained_state,
    save_checkpoint,
    trained_state,
)
from wmh_lora.training.optimizer import with_current_settings
from wmh_lora.training.processes import Processes
from wmh_lora.training.records import append_record, forget_records_after
from wmh_lora.training.settings import TrainingConfig
from wmh_lora.training.trainer import Loss, Trainer

__all__ = ["ComparatorNet", "Spent", "clock", "train_within"]

_log = logging.getLogger("wmh_lora")

_WARMUP_SHARE = 0.05
_FIRST_ESTIMATE = 1000  # steps in all, before the first step is done
_ENDLESS = 10**9


class ComparatorNet(nn.Module):
    """Give a network what `Trainer` asks for; all of it is trained, at the rate ``encoder_lr``.

    Parameters
    ----------
    network : nn.Module
        Maps slices (B, C, h, w) or volumes (B, C, D, h, w) to logits (B, 1, ...) or, while it is
        trained, to those of several levels (B, levels, 1, ...), the finest first.
    channels : int, optional
        C of a network for volumes. Batches then hold their slices as (B, C * D, h, w).
    """

    def __init__(self, network: nn.Module, channels: int | None = None) -> None:
        super().__init__()
        self.encoder = network
        self.channels = channels

    def forward_train(
        self, images: Tensor, t1: Tensor | None = None, t1_present: Tensor | None = None
    ) -> DecoderOutput:
        """Return the logits of all levels for a batch; T1 is one of its channels."""
        if self.channels is not None:
            images = images.unflatten(1, (self.channels, -1))
        output: Tensor = self.encoder(images)
        if output.ndim == images.ndim:
            return DecoderOutput(output, ())
        finest, *others = output.unbind(1)
        return DecoderOutput(finest, tuple(others))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 1, ...) of slices (B, C, h, w) or volumes (B, C, D, h, w)."""
        logits: Tensor = self.encoder(images)
        return logits


@dataclass(frozen=True)
class Spent:
    """What a training took: optimiser steps, seconds of the budget's clock, and its last loss."""

    steps: int
    seconds: float
    loss: float


def clock(budget: Budget) -> Callable[[], float]:
    """Return the function that reads the budget's clock, in seconds."""
    return time.process_time if budget.clock == "cpu" else time.monotonic


def train_within(
    net: nn.Module,
    loss: Loss,
    stream: StreamLike,
    config: TrainingConfig,
    budget: Budget,
    folder: Path,
    *,
    members: int = 1,
    on_progress: Callable[[float], None] | None = None,
) -> Spent:
    """Train a network for its share of the budget, or go on where a stopped training was.

    Parameters
    ----------
    net
        `WMHNet` or `ComparatorNet`; ends in evaluation mode, with averaged weights if
        ``config.ema_decay`` asks for them.
    loss, stream
        See `wmh_lora.training.trainer.Trainer`.
    config
        ``steps`` and ``warmup_steps`` have no effect: the budget ends the training, and the rate
        rises over the first twentieth of it.
    budget
        The seconds of all members together.
    folder
        Of ``metrics.jsonl`` and ``checkpoints/``.
    members
        Networks that share the budget.
    on_progress
        Called after every step with the share of the budget that is used up.

    Returns
    -------
    Spent
        Sums over all parts of an interrupted training; what an interruption lost is not counted.
    """
    now, seconds = clock(budget), budget.seconds / members
    processes = Processes.launched(config.device)
    # the trainer uses what WMHNet and ComparatorNet have in common
    trainer = Trainer(
        cast(WMHNet, net),
        loss,
        stream,
        replace(config, steps=_ENDLESS),
        folder,
        processes=processes,
    )
    spent = _resume(trainer, folder)
    batches = iter(batch_loader(stream, trainer.config, trainer.samples_seen, processes))
    net.train()
    saved = spent.seconds
    started = now() - spent.seconds
    # a step more, if half of it still lies in the budget
    while spent.steps == 0 or spent.seconds * (1 + 0.5 / spent.steps) <= seconds:
        trainer.config = _on_schedule(config, spent, seconds)
        record = trainer.step(batches)
        spent = Spent(trainer.steps_done, now() - started, record["loss"])
        line = {"step": spent.steps, "kind": "train", "seconds": spent.seconds, **record}
        append_record(folder / "metrics.jsonl", line)
        if spent.seconds - saved >= 60 * budget.checkpoint_minutes:
            _save(trainer, folder)
            saved = spent.seconds
        if on_progress is not None:
            on_progress(min(1.0, spent.seconds / seconds))
    _save(trainer, folder, finished=True)
    if trainer.average:
        state = net.state_dict()  # the average holds running statistics as well
        for name, mean in trainer.average.items():
            state[name].copy_(mean)
    net.eval()
    _log.info("%s: %d steps in %.0f s, loss %.3f", folder, *vars(spent).values())
    return spent


def _on_schedule(config: TrainingConfig, spent: Spent, seconds: float) -> TrainingConfig:
    """Return the settings with the number of steps that the budget allows, as far as is known."""
    steps = _FIRST_ESTIMATE
    if spent.steps:
        steps = max(spent.steps + 1, round(spent.steps * seconds / spent.seconds))
    return replace(config, steps=steps, warmup_steps=max(1, round(_WARMUP_SHARE * steps)))


def _resume(trainer: Trainer, folder: Path) -> Spent:
    """Restore the newest checkpoint, if there is one, and what had been spent until then."""
    metrics = folder / "metrics.jsonl"
    checkpoint = load_newest_checkpoint(folder / "checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        metrics.write_text("", encoding="utf-8")
        return Spent(0, 0.0, math.nan)
    load_trained_state(trainer.net, checkpoint.model, f"the checkpoint in {folder}")
    if checkpoint.optimizer:
        trainer.optimizer.load_state_dict(with_current_settings(checkpoint, trainer.optimizer))
    for name, mean in trainer.average.items():
        mean.copy_(checkpoint.average[name])
    trainer.steps_done, trainer.samples_seen = checkpoint.step, checkpoint.samples_seen
    if checkpoint.scaler:
        trainer.scaler.load_state_dict(checkpoint.scaler)
    forget_records_after(metrics, checkpoint.step, checkpoint.step)
    last: dict[str, Any] = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])
    _log.info("resumed %s at step %d", folder, checkpoint.step)
    loss = math.nan if last["loss"] is None else last["loss"]
    return Spent(checkpoint.step, last["seconds"], loss)


def _save(trainer: Trainer, folder: Path, *, finished: bool = False) -> None:
    """Write a checkpoint; a finished training needs no moments, two thirds of its size."""
    checkpoint = Checkpoint(
        step=trainer.steps_done,
        samples_seen=trainer.samples_seen,
        model=trained_state(trainer.net),
        optimizer={} if finished else trainer.optimizer.state_dict(),
        average={name: mean.cpu() for name, mean in trainer.average.items()},
        scaler=trainer.scaler.state_dict(),
    )
    save_checkpoint(checkpoint, folder / "checkpoints", keep=1)
