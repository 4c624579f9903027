from __future__ import annotations

import math

import pytest
import torch

from wmh_lora.comparators.losses import RegionLoss
from wmh_lora.models.decoder import DecoderOutput
from wmh_lora.training.losses import LossTerms

TARGET = (torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8) % 5 == 0).float()
VALID = torch.ones(2, 3, dtype=torch.bool)


def _loss(logits: torch.Tensor, *heads: torch.Tensor, target: torch.Tensor = TARGET) -> LossTerms:
    return RegionLoss(cross_entropy=True)(DecoderOutput(logits, heads), target, VALID)


def test_right_answers_cost_nothing_and_wrong_ones_much() -> None:
    right = 40 * (TARGET[:, None] - 0.5)
    assert float(_loss(right).total) == pytest.approx(0, abs=1e-4)
    assert float(_loss(-right).total) > 20
    dice = RegionLoss(cross_entropy=False)(DecoderOutput(-right, ()), TARGET, VALID)
    assert float(dice.total) == pytest.approx(1, abs=1e-3)
    assert set(dice.parts) == {"dice"}


def test_cross_entropy_is_the_mean_over_what_is_known() -> None:
    target = TARGET.clone()
    target[0, 0] = math.nan
    logits = torch.zeros(2, 1, 3, 8, 8, requires_grad=True)
    terms = _loss(logits, target=target)
    assert float(terms.parts["cross_entropy"]) == pytest.approx(math.log(2))
    terms.total.backward()
    assert logits.grad is not None
    assert not logits.grad[0, 0, 0].any()
    assert logits.grad[0, 0, 1:].all()
    known = RegionLoss(cross_entropy=True)(
        DecoderOutput(logits[1:], ()), TARGET[1:], VALID[1:] & torch.tensor([True, False, True])
    )
    assert float(known.parts["cross_entropy"]) == pytest.approx(math.log(2))


def test_a_volume_costs_as_much_as_its_slices_side_by_side() -> None:
    logits = torch.linspace(-2, 2, 2 * 3 * 64).reshape(2, 1, 3, 8, 8)
    beside = DecoderOutput(logits.reshape(2, 1, 24, 8), ())
    flat = RegionLoss(cross_entropy=True)(beside, TARGET.reshape(2, 1, 24, 8), VALID[:, :1])
    assert float(flat.total) == pytest.approx(float(_loss(logits).total))


def test_each_level_weighs_half_of_the_one_before() -> None:
    right, wrong = 40 * (TARGET[:, None] - 0.5), -40 * (TARGET[:, None] - 0.5)
    whole = float(_loss(wrong).total)
    assert float(_loss(wrong, right, right).total) == pytest.approx(whole * 4 / 7, rel=1e-3)
    assert float(_loss(right, wrong, right).total) == pytest.approx(whole * 2 / 7, rel=1e-3)
