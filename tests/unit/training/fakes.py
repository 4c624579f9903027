"""A network and a sample stream small enough to train within a second.

As a program it trains them: ``python fakes.py RUN_DIR STEPS SECONDS_A_SAMPLE [--resume] [--full]``,
on its own or as one of several processes; ``--full`` also trains the encoder with its BatchNorm.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wmh_lora.models.adapter import ChannelAdapter
from wmh_lora.models.decoder import PyramidDecoder
from wmh_lora.models.network import WMHNet
from wmh_lora.training.losses import SegmentationLoss
from wmh_lora.training.processes import Processes
from wmh_lora.training.settings import TrainingConfig
from wmh_lora.training.trainer import Trainer

STRUCTURES = ("wmh", "brain")


class LowRank(nn.Module):
    """An update as of LoRA, with its dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_dropout = nn.Dropout(0.2)
        self.lora_A = nn.Conv2d(16, 2, 1, bias=False)
        self.lora_B = nn.Conv2d(2, 16, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        update: Tensor = self.lora_B(self.lora_A(self.lora_dropout(features)))
        return features + update


class TinyEncoder(nn.Module):
    """Two stages, frozen at first, and one low-rank update."""

    pyramid_channels = (8, 16)
    pyramid_strides = (1, 4)
    size_multiple = 4

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 4, stride=4)
        self.norm = nn.BatchNorm2d(16)
        self.requires_grad_(False)
        self.proj = LowRank()

    def forward_pyramid(self, images: Tensor) -> tuple[Tensor, ...]:
        fine = torch.relu(self.stem(images))
        return fine, self.proj(self.norm(self.down(fine)))


def tiny_net(
    seed: int = 0, t1_channels: int = 0, adaptation: Literal["lora", "full"] = "lora"
) -> WMHNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = TinyEncoder()
        if adaptation == "full":
            encoder.requires_grad_(True)
            encoder.proj.requires_grad_(False)
        decoder = PyramidDecoder(
            encoder.pyramid_channels, encoder.pyramid_strides, (8, 8, 8, 8), len(STRUCTURES)
        )
        adapter = ChannelAdapter(3, 4, t1_channels=t1_channels)
        return WMHNet(adapter, encoder, decoder, adaptation=adaptation)


class FakeSample(NamedTuple):
    image: npt.NDArray[np.float32]
    target: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]
    t1: npt.NDArray[np.float32] | None = None


class BlobStream:
    """Bright squares on a noisy field are the target of the first structure.

    With ``t1``, two samples of three have a T1 slice, on which the squares are dark.
    """

    def __init__(
        self,
        distinct: int = 1_000_000,
        seconds: float = 0.0,
        structures: int = 2,
        t1: bool = False,
    ):
        self.distinct, self.seconds, self.structures, self.t1 = distinct, seconds, structures, t1

    def item(self, index: int) -> FakeSample:
        time.sleep(self.seconds)
        number = index % self.distinct
        rng = np.random.default_rng(number)
        image = rng.uniform(0.2, 0.4, (3, 32, 32)).astype(np.float32)
        target = np.ones((self.structures, 32, 32), np.float32)
        target[0] = 0
        row, column = rng.integers(4, 20, 2)
        target[0, row : row + 8, column : column + 8] = 1
        image += 0.5 * target[0]
        valid = np.ones(self.structures, np.bool_)
        valid[1:] = number % 2 == 0
        t1 = 1 - target[:1] if self.t1 and number % 3 else None
        return FakeSample(image, target, valid, t1)


def tiny_config(**changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = dict(
        steps=12,
        batch_size=2,
        accumulation=2,
        crop=32,
        warmup_steps=2,
        workers=0,
        checkpoint_steps=4,
        log_steps=2,
        lora_lr=1e-2,
        adapter_lr=1e-2,
        decoder_lr=1e-2,
        validate_steps=4,
    )
    return TrainingConfig(**{**settings, **changes})


def tiny_trainer(
    run_dir: Path, stream: Any = None, net: WMHNet | None = None, **changes: Any
) -> Trainer:
    processes = changes.pop("processes", None)
    config = tiny_config(**changes)
    loss = SegmentationLoss(STRUCTURES)
    stream = stream or BlobStream()
    return Trainer(net or tiny_net(), loss, stream, config, run_dir, processes=processes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, steps, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    trainer = tiny_trainer(
        folder,
        BlobStream(seconds=seconds),
        tiny_net(adaptation="full" if "--full" in sys.argv else "lora"),
        processes=Processes.launched("cpu"),
        steps=steps,
        accumulation=3 if "--full" in sys.argv else 2,
        workers=1,
    )
    sys.exit(0 if trainer.run(resume="--resume" in sys.argv) else 1)
