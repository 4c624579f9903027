"""Losses against hand-computed values and torch's own cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wmh_lora.errors import ConfigError
from wmh_lora.models.decoder import DecoderOutput
from wmh_lora.training.losses import (
    LossConfig,
    SegmentationLoss,
    boundary_band,
    boundary_bce,
    focal,
    soft_dice,
)

ALL = torch.ones(1, 1, dtype=torch.bool)
STRUCTURES = ("wmh", "brain")


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def _output(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> DecoderOutput:
    fused, *heads = (
        torch.randn(2, 2, s, s, generator=generator).to(dtype).requires_grad_()
        for s in (16, 2, 4, 8, 16)
    )
    return DecoderOutput(fused, tuple(heads))


def _target(generator: torch.Generator) -> Tensor:
    return (torch.rand(2, 2, 16, 16, generator=generator) > 0.8).float()


def test_focal_by_hand() -> None:
    logits = torch.tensor([_logit(0.8), _logit(0.3)]).view(1, 1, 1, 2)
    target = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    expected = (0.75 * 0.2**2 * -math.log(0.8) + 0.25 * 0.3**2 * -math.log(0.7)) / 2
    assert focal(logits, target, ALL).item() == pytest.approx(expected, rel=1e-5)


def test_focal_without_focus_is_half_the_cross_entropy(torch_generator: torch.Generator) -> None:
    logits = torch.randn(2, 1, 4, 4, generator=torch_generator)
    target = torch.rand(2, 1, 4, 4, generator=torch_generator)
    valid = torch.ones(2, 1, dtype=torch.bool)
    ours = focal(logits, target, valid, alpha=0.5, gamma=0.0)
    torch.testing.assert_close(ours[0], F.binary_cross_entropy_with_logits(logits, target) / 2)


def test_focal_of_a_soft_target_is_least_at_the_target() -> None:
    logits = torch.tensor(_logit(0.3)).view(1, 1, 1, 1).requires_grad_()
    focal(logits, torch.full((1, 1, 1, 1), 0.3), ALL).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


def test_dice_by_hand_pools_the_batch() -> None:
    p = torch.tensor([[0.9, 0.2], [0.1, 0.4]]).view(2, 1, 1, 2)
    target = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).view(2, 1, 1, 2)
    loss = soft_dice(torch.logit(p), target, torch.ones(2, 1, dtype=torch.bool))
    assert loss.item() == pytest.approx(1 - 2 * 0.9 / (1.6 + 1.0), abs=1e-4)
    only_first = soft_dice(torch.logit(p), target, torch.tensor([[True], [False]]))
    assert only_first.item() == pytest.approx(1 - 2 * 0.9 / (1.1 + 1.0), abs=1e-4)


def test_band_is_dilation_minus_erosion() -> None:
    target = torch.zeros(1, 1, 12, 12)
    target[..., 3:9, 4:12] = 1.0  # reaches the border, which is no boundary
    expected = torch.zeros(12, 12)
    expected[1:11, 2:12] = 1.0
    expected[5:7, 6:12] = 0.0
    assert torch.equal(boundary_band(target)[0, 0], expected)
    assert boundary_band(torch.ones(1, 1, 6, 6)).abs().max() == 0


def test_boundary_bce_against_torch(torch_generator: torch.Generator) -> None:
    logits = torch.randn(1, 1, 12, 12, generator=torch_generator)
    target = torch.zeros(1, 1, 12, 12)
    target[..., 4:8, 4:8] = 1.0
    weight = torch.where(boundary_band(target) > 0, 3.0, 1.0)
    expected = F.binary_cross_entropy_with_logits(logits, target, weight=weight)
    torch.testing.assert_close(boundary_bce(logits, target, ALL)[0], expected)
    flat = torch.zeros_like(target)
    expected = F.binary_cross_entropy_with_logits(logits, flat)
    torch.testing.assert_close(boundary_bce(logits, flat, ALL)[0], expected)


def test_total_is_the_weighted_sum(torch_generator: torch.Generator) -> None:
    output, target = _output(torch_generator), _target(torch_generator)
    valid = torch.ones(2, 2, dtype=torch.bool)
    terms = SegmentationLoss(STRUCTURES)(output, target, valid)
    expected = torch.zeros(())
    for channel, weight in enumerate((1.0, 0.2)):
        t = target[:, channel : channel + 1]
        v = valid[:, :1]
        logits = output.fused_logits[:, channel : channel + 1]
        both = focal(logits, t, v) + soft_dice(logits, t, v) + boundary_bce(logits, t, v)
        expected = expected + weight * both.sum()
        for head_weight, head in zip((0.1, 0.2, 0.3, 0.4), output.head_logits, strict=True):
            small = F.avg_pool2d(t, 16 // head.shape[-1])
            h = head[:, channel : channel + 1]
            both = focal(h, small, v) + soft_dice(h, small, v)
            expected = expected + weight * head_weight * both.sum()
    torch.testing.assert_close(terms.total, expected)
    shares = sum(terms.parts[name] for name in ("focal", "dice", "boundary", "heads"))
    torch.testing.assert_close(shares, terms.total.detach())
    assert all(not part.requires_grad for part in terms.parts.values())


@pytest.mark.parametrize("content", [0.0, float("nan")])
def test_an_unlabelled_structure_gets_exactly_no_gradient(
    content: float, torch_generator: torch.Generator
) -> None:
    output, target = _output(torch_generator), _target(torch_generator)
    target[:, 1] = content
    valid = torch.tensor([[True, False], [True, False]])
    terms = SegmentationLoss(STRUCTURES)(output, target, valid)
    terms.total.backward()
    assert terms.parts["dice/brain"] == 0
    for logits in (output.fused_logits, *output.head_logits):
        assert logits.grad is not None
        assert torch.all(logits.grad[:, 1] == 0)
        assert torch.all(logits.grad[:, 0] != 0)


@pytest.mark.parametrize("part", [focal, soft_dice, boundary_bce])
def test_each_part_gives_an_unlabelled_case_no_gradient_at_any_level(
    part: Callable[[Tensor, Tensor, Tensor], Tensor], torch_generator: torch.Generator
) -> None:
    """One case of the batch lacks its second structure; everything else learns."""
    valid = torch.tensor([[True, True], [True, False]])
    output, target = _output(torch_generator), _target(torch_generator)
    for logits in (output.fused_logits, *output.head_logits):
        coarse = F.adaptive_avg_pool2d(target, logits.shape[-1])
        part(logits, coarse, valid).sum().backward()
        assert logits.grad is not None
        assert torch.all(logits.grad[1, 1] == 0)
        assert torch.all(logits.grad[valid].abs().sum(dim=(-2, -1)) > 0)


def test_an_unlabelled_case_leaves_the_others_as_they_were(
    torch_generator: torch.Generator,
) -> None:
    output, target = _output(torch_generator), _target(torch_generator)
    loss = SegmentationLoss(STRUCTURES)
    valid = torch.tensor([[True, True], [False, False]])
    first = DecoderOutput(output.fused_logits[:1], tuple(h[:1] for h in output.head_logits))
    alone = loss(first, target[:1], valid[:1])
    # The Dice is unchanged but for its smoothing, a share of the whole batch's area.
    torch.testing.assert_close(loss(output, target, valid).total, alone.total, rtol=1e-4, atol=1e-4)


def test_extreme_logits_and_empty_targets_are_finite(torch_generator: torch.Generator) -> None:
    for value in (-80.0, 0.0, 80.0):
        output = DecoderOutput(
            torch.full((1, 2, 16, 16), value, requires_grad=True),
            tuple(torch.full((1, 2, s, s), value, requires_grad=True) for s in (2, 4, 8, 16)),
        )
        valid = torch.ones(1, 2, dtype=torch.bool)
        total = SegmentationLoss(STRUCTURES)(output, torch.zeros(1, 2, 16, 16), valid).total
        total.backward()
        assert torch.isfinite(total)
        assert output.fused_logits.grad is not None
        assert torch.isfinite(output.fused_logits.grad).all()


def test_under_autocast_it_computes_in_float32(torch_generator: torch.Generator) -> None:
    half, target = _output(torch_generator, torch.bfloat16), _target(torch_generator)
    full = DecoderOutput(half.fused_logits.float(), tuple(h.float() for h in half.head_logits))
    valid = torch.ones(2, 2, dtype=torch.bool)
    loss = SegmentationLoss(STRUCTURES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = loss(half, target, valid).total
    assert total.dtype == torch.float32
    assert torch.equal(total, loss(full, target, valid).total)


def test_mismatched_shapes_and_settings_are_refused(torch_generator: torch.Generator) -> None:
    output = _output(torch_generator)
    with pytest.raises(ValueError, match="target of that shape"):
        SegmentationLoss(STRUCTURES)(output, torch.zeros(2, 1, 16, 16), ALL)
    with pytest.raises(ConfigError, match="head_weights"):
        LossConfig(head_weights=(1.0,))
    with pytest.raises(ConfigError, match="focal_gamma"):
        LossConfig(focal_gamma=-1.0)


class TestIgnoredPixels:
    """Pixels whose target is NaN: other pathology, neither lesion nor background."""

    def _known(self) -> Tensor:
        known = torch.ones(2, 2, 16, 16, dtype=torch.bool)
        known[0, 0, 4:9, 3:12] = False
        known[1, 1] = False
        return known

    @pytest.mark.parametrize("part", [focal, soft_dice, boundary_bce])
    def test_get_no_gradient_in_any_part(
        self, part: Callable[[Tensor, Tensor, Tensor], Tensor], torch_generator: torch.Generator
    ) -> None:
        known = self._known()
        logits = _output(torch_generator).fused_logits
        part(logits, _target(torch_generator) * known, known.float()).sum().backward()
        assert logits.grad is not None
        assert torch.all(logits.grad[~known] == 0)
        assert torch.all(logits.grad[known] != 0)

    def test_get_no_gradient_in_the_whole_loss(self, torch_generator: torch.Generator) -> None:
        known = self._known()
        output = _output(torch_generator)
        target = _target(torch_generator).masked_fill(~known, math.nan)
        terms = SegmentationLoss(STRUCTURES)(output, target, torch.ones(2, 2, dtype=torch.bool))
        terms.total.backward()
        assert torch.isfinite(terms.total)
        for logits in (output.fused_logits, *output.head_logits):
            assert logits.grad is not None
            # a coarse pixel learns as long as any of it is known
            some = F.adaptive_max_pool2d(known.float(), logits.shape[-1]) > 0
            assert torch.equal(logits.grad != 0, some)

    def test_what_the_network_says_there_does_not_matter(
        self, torch_generator: torch.Generator
    ) -> None:
        known = self._known()
        output, target = _output(torch_generator), _target(torch_generator)
        target = target.masked_fill(~known, math.nan)
        loss, valid = SegmentationLoss(STRUCTURES), torch.ones(2, 2, dtype=torch.bool)
        other = output.fused_logits.detach().masked_fill(~known, 9.0)
        changed = DecoderOutput(other, output.head_logits)
        torch.testing.assert_close(
            loss(changed, target, valid).total, loss(output, target, valid).total
        )

    def test_the_rest_is_a_mean_over_itself(self, torch_generator: torch.Generator) -> None:
        """A batch of half-ignored planes costs what its other half costs alone."""
        logits = torch.randn(2, 1, 16, 16, generator=torch_generator)
        target = (torch.rand(2, 1, 16, 16, generator=torch_generator) > 0.7).float()
        known = torch.zeros(2, 1, 16, 16)
        known[..., :8] = 1
        valid = torch.ones(2, 1, dtype=torch.bool)
        half = logits[..., :8], target[..., :8], valid
        torch.testing.assert_close(focal(logits, target * known, known), focal(*half))
        torch.testing.assert_close(
            soft_dice(logits, target * known, known), soft_dice(*half), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(boundary_bce(logits, target * known, known), boundary_bce(*half))
