"""One training on the scans of a site, for so many steps or for so long."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmh_lora.data.dataset import build_stream
from wmh_lora.models.model_file import ModelCard
from wmh_lora.training.adapt_settings import AdaptConfig
from wmh_lora.training.average import averaged_weights
from wmh_lora.training.losses import SegmentationLoss
from wmh_lora.training.processes import Processes
from wmh_lora.training.start import SettledNet
from wmh_lora.training.trainer import Trainer

__all__ = ["Fit", "learn"]

_CROP_MM = 128.0


@dataclass(frozen=True)
class Fit:
    """A trained network, and what it took: seconds before the first step, and for each step."""

    net: SettledNet
    steps: int
    start_s: float
    step_s: float


def learn(
    net: SettledNet,
    card: ModelCard,
    data: Mapping[str, Any],
    config: AdaptConfig,
    *,
    steps: int,
    seconds: float,
    folder: Path,
    on_step: Callable[[int, float], None],
) -> Fit:
    """Train what may be trained of a network, to the end of the steps or of the time.

    Parameters
    ----------
    net : SettledNet
        Changed in place; holds the average of its weights afterwards.
    card : ModelCard
        Of the model that it came from.
    data : mapping
        The ``[data]`` table, see `SiteScans.data_table` and `AdaptConfig.data`.
    config : AdaptConfig
        Rates, batches and seed.
    steps : int
        Of the schedule.
    seconds : float
        After so many it stops, wherever the schedule is.
    folder : Path
        For what training writes.
    on_step : callable
        Called with (steps done, loss).

    Raises
    ------
    KeyboardInterrupt
        If a signal asked to stop.
    """
    began = time.monotonic()
    multiple = math.lcm(net.size_multiple, card.preprocess.multiple_px)
    crop = multiple * -(-int(_CROP_MM / card.preprocess.pixel_size_mm) // multiple)
    stream = build_stream(
        data,
        config.seed,
        crop,
        card.preprocess,
        card.model.structures,
        in_channels=card.model.in_channels,
    )
    trainer = Trainer(
        net,
        SegmentationLoss(card.model.structures),
        stream,
        config.training(steps, crop),
        Path(tempfile.mkdtemp(dir=folder)),
        processes=Processes.launched("auto"),
    )
    times: list[float] = []

    def count(step: int, loss: float) -> None:
        times.append(time.monotonic())
        on_step(step, loss)
        if step < steps and times[-1] - began > seconds:
            raise _OutOfTimeError

    try:
        if not trainer.run(on_step=count):
            raise KeyboardInterrupt
    except _OutOfTimeError:
        pass  # the caller sees by the steps
    with averaged_weights(net, trainer.average):
        learned = copy.deepcopy(net.state_dict())
    net.load_state_dict(learned)
    step_s = (times[-1] - times[0]) / max(1, len(times) - 1)
    return Fit(net, len(times), times[0] - began - step_s, step_s)


class _OutOfTimeError(Exception):
    """Ends a training at its deadline."""
