from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LinearLR,
    LRScheduler,
)

from wmh_lora.training.schedule import learning_rate
from wmh_lora.training.settings import TrainingConfig

PEAK = 3e-3


def _rates(scheduler: Callable[..., LRScheduler], count: int, **settings: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    oracle = scheduler(optimizer, **settings)
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()
    return rates


def test_cosine_agrees_with_torch() -> None:
    config = TrainingConfig(steps=50, warmup_steps=7, eta_min=1e-6)
    expected = _rates(CosineAnnealingLR, 43, T_max=43, eta_min=1e-6)
    found = [learning_rate(step, PEAK, config) for step in range(7, 50)]
    assert found == pytest.approx(expected, rel=1e-9)


def test_warm_restarts_agree_with_torch() -> None:
    config = TrainingConfig(
        steps=60, warmup_steps=5, eta_min=1e-6, schedule="warm-restarts", restart_steps=20
    )
    expected = _rates(CosineAnnealingWarmRestarts, 55, T_0=20, eta_min=1e-6)
    found = [learning_rate(step, PEAK, config) for step in range(5, 60)]
    assert found == pytest.approx(expected, rel=1e-9)


def test_warm_up_agrees_with_torch() -> None:
    config = TrainingConfig(steps=60, warmup_steps=5)
    expected = _rates(LinearLR, 5, start_factor=0.2, end_factor=1.0, total_iters=4)
    assert [learning_rate(step, PEAK, config) for step in range(5)] == pytest.approx(expected)


def test_the_published_schedule_in_epochs_agrees_with_torch() -> None:
    """5 epochs of linear warm-up, then restarts every 25, stepped within the epochs."""
    per_epoch = 7
    config = TrainingConfig(epochs=100, schedule="warm-restarts", eta_min=1e-6, batch_size=4)
    config = config.in_steps(epoch_samples=4 * per_epoch)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    oracle = CosineAnnealingWarmRestarts(optimizer, T_0=25, eta_min=1e-6)
    expected = []
    for step in range(95 * per_epoch):
        oracle.step(step / per_epoch)
        expected.append(optimizer.param_groups[0]["lr"])
    found = [learning_rate(step, PEAK, config) for step in range(config.steps)]
    warm_up = [PEAK * (step + 1) / 35 for step in range(35)]
    assert found == pytest.approx(warm_up + expected, rel=1e-6)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(0, PEAK, TrainingConfig(steps=10, warmup_steps=0)) == PEAK


def test_steps_after_the_end_stay_at_the_minimum() -> None:
    config = TrainingConfig(steps=10, warmup_steps=0, eta_min=1e-5)
    assert learning_rate(25, PEAK, config) == pytest.approx(1e-5)
