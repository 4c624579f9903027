from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.training.fakes import BlobStream, FakeSample
from wmh_lora.comparators.budget import ComparatorNet, Spent, train_within
from wmh_lora.comparators.losses import RegionLoss
from wmh_lora.comparators.settings import Budget, DynUNetSettings
from wmh_lora.comparators.unet2d import UNet2d
from wmh_lora.comparators.volumetric import build_dynunet, plan_network
from wmh_lora.training.settings import TrainingConfig
from wmh_lora.training.trainer import Trainer

CONFIG = TrainingConfig(
    batch_size=4, crop=32, workers=0, encoder_lr=4e-2, eta_min=0.0, device="cpu"
)


class Slices:
    """The blobs of the trainer's tests, one structure."""

    def item(self, index: int) -> FakeSample:
        return BlobStream(structures=1).item(index)


class Patches:
    """Blobs through four slices, as channels."""

    def item(self, index: int) -> FakeSample:
        sample = BlobStream(structures=1).item(index)
        image = np.repeat(sample.image[1:2], 4, axis=0)
        target = np.repeat(sample.target, 4, axis=0)
        return FakeSample(image, target, np.ones(4, np.bool_))


def _net(seed: int = 0, width: int = 8) -> ComparatorNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ComparatorNet(UNet2d((width, 12, 16)))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny networks gain nothing from a second one, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which every step takes a second, whatever the machine does."""

    def clock(_budget: Budget) -> Callable[[], float]:
        counter = itertools.count()
        return lambda: float(next(counter))

    monkeypatch.setattr("wmh_lora.comparators.budget.clock", clock)


def _train(folder: Path, seconds: float, **options: Any) -> tuple[ComparatorNet, Spent]:
    net = options.pop("net", None) or _net()
    budget = Budget(seconds=seconds, checkpoint_minutes=options.pop("minutes", 10.0))
    loss = RegionLoss(cross_entropy=False)
    config = options.pop("config", CONFIG)
    stream = options.pop("stream", Slices())
    return net, train_within(net, loss, stream, config, budget, folder, **options)


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("ticking")
def test_the_schedule_follows_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = Trainer.step

    def noting(self: Any, batches: Any) -> dict[str, float]:
        record = step(self, batches)
        rates.append(self.optimizer.param_groups[-1]["lr"])
        return record

    monkeypatch.setattr(Trainer, "step", noting)
    shares: list[float] = []
    _, spent = _train(tmp_path, 20, net=_net(width=2), on_progress=shares.append)
    assert spent.steps == 20
    assert spent.seconds == 20
    assert rates[0] < 0.1 * max(rates)  # warm-up
    assert max(rates) == pytest.approx(4e-2, rel=0.05)
    assert rates[10] == pytest.approx(2e-2, rel=0.2)
    assert rates[-1] < 0.03 * max(rates)
    assert shares == sorted(shares)
    assert shares[-1] == 1


@pytest.mark.usefixtures("ticking")
def test_members_share_the_budget(tmp_path: Path) -> None:
    assert _train(tmp_path, 12, members=3)[1].steps == 4


@pytest.mark.usefixtures("ticking")
def test_a_stopped_training_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainingConfig(batch_size=1, crop=32, workers=0, ema_decay=0.9, device="cpu")
    options: dict[str, Any] = {"config": config, "minutes": 4 / 60}
    whole, _ = _train(tmp_path / "whole", 12, **options)

    def stop(share: float) -> None:
        if share > 0.75:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "parts", 12, on_progress=stop, **options)
    assert len(_records(tmp_path / "parts")) == 10
    done: list[float] = []
    parts, spent = _train(tmp_path / "parts", 12, net=_net(5), on_progress=done.append, **options)
    assert len(done) == 4  # two of the ten steps were lost
    assert (spent.steps, spent.seconds) == (12, 12.0)
    records = _records(tmp_path / "parts")
    assert [r["step"] for r in records] == list(range(1, 13))
    for (name, expected), found in zip(whole.state_dict().items(), parts.state_dict().values()):
        assert torch.equal(expected, found), name
    # and once more, now that it is finished: nothing is trained
    again, spent = _train(tmp_path / "parts", 12, net=_net(6), **options)
    assert spent.steps == 12
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters()))


def test_processor_time_is_what_is_spent(tmp_path: Path) -> None:
    net, spent = _train(tmp_path, 0.5)
    assert 0.3 < spent.seconds < 0.8
    assert spent.steps == len(_records(tmp_path))
    assert not net.training


def _dice_of_blobs(net: ComparatorNet, stream: Any) -> float:
    samples = [stream.item(1000 + i) for i in range(8)]
    images = torch.stack([torch.from_numpy(s.image) for s in samples])
    target = np.stack([s.target for s in samples]) > 0.5
    with torch.inference_mode():
        logits = net.forward_train(images).fused_logits
    found = logits.numpy().reshape(target.shape) > 0
    return float(2 * (found & target).sum() / (found.sum() + target.sum()))


@pytest.mark.usefixtures("ticking")
def test_a_unet_learns_to_find_blobs(tmp_path: Path) -> None:
    net, spent = _train(tmp_path, 40)
    losses = [record["loss"] for record in _records(tmp_path)]
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])
    assert math.isclose(losses[-1], spent.loss)
    assert _dice_of_blobs(net, Slices()) > 0.9


@pytest.mark.usefixtures("ticking")
def test_a_3d_network_learns_to_find_blobs(tmp_path: Path) -> None:
    settings = DynUNetSettings(filters=(8, 12, 16), patch_px=(4, 32, 32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plan = plan_network((8.0, 1.0, 1.0), settings.patch_px, 3)
        net = ComparatorNet(build_dynunet(settings, plan), channels=1)
    config = TrainingConfig(batch_size=2, crop=32, workers=0, encoder_lr=2e-2, device="cpu")
    loss = RegionLoss(cross_entropy=True)
    train_within(net, loss, Patches(), config, Budget(seconds=30), tmp_path)
    losses = [record["loss"] for record in _records(tmp_path)]
    assert np.mean(losses[-5:]) < 0.4 * np.mean(losses[:5])
    assert _dice_of_blobs(net, Patches()) > 0.9
