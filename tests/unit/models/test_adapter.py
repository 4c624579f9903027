"""The channel adapter starts as the identity on the centre slice, and can leave it."""

from __future__ import annotations

import pytest
import torch

from wmh_lora.models.adapter import ChannelAdapter


def _trained(generator: torch.Generator, t1_channels: int) -> ChannelAdapter:
    """An adapter none of whose tensors is at its start."""
    adapter = ChannelAdapter(3, 4, t1_channels=t1_channels)
    for tensor in adapter.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.2)
    return adapter


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("training", [True, False])
def test_untrained_adapter_repeats_the_centre_slice(
    channels: int, training: bool, torch_generator: torch.Generator
) -> None:
    slices = torch.rand(2, channels, 6, 7, generator=torch_generator)
    centre = slices[:, channels // 2 : channels // 2 + 1]
    adapted = ChannelAdapter(channels).train(training)(slices)
    assert torch.equal(adapted, centre.expand(-1, 3, -1, -1))


def test_the_branch_learns_from_the_neighbours_and_is_not_clamped(
    torch_generator: torch.Generator,
) -> None:
    adapter = ChannelAdapter(3)
    torch.nn.init.constant_(adapter.branch[3].weight, 0.1)  # type: ignore[arg-type]
    slices = torch.rand(2, 3, 6, 7, generator=torch_generator, requires_grad=True)
    adapted = adapter(slices + 1)
    adapted.sum().backward()
    assert slices.grad is not None
    assert slices.grad[:, [0, 2]].abs().max() > 0
    assert adapted.max() > 1


def test_an_even_number_of_slices_has_no_centre() -> None:
    with pytest.raises(ValueError, match="odd"):
        ChannelAdapter(2)


@pytest.mark.parametrize("training", [True, False])
def test_an_untrained_adapter_does_not_look_at_t1(
    training: bool, torch_generator: torch.Generator
) -> None:
    slices = torch.rand(2, 3, 6, 7, generator=torch_generator)
    adapter = ChannelAdapter(3, t1_channels=3).train(training)
    for t1 in (None, 100 * slices, torch.zeros_like(slices)):
        assert torch.equal(adapter(slices, t1), slices[:, 1:2].expand(-1, 3, -1, -1))


def test_missing_t1_is_one_and_the_same_whatever_stands_in_its_place(
    torch_generator: torch.Generator,
) -> None:
    adapter = _trained(torch_generator, t1_channels=3).eval()
    slices = torch.rand(3, 3, 6, 7, generator=torch_generator)
    t1 = torch.rand(3, 3, 6, 7, generator=torch_generator)
    t1[1] = float("nan")
    t1.requires_grad_()
    present = torch.tensor([True, False, False])
    adapted = adapter(slices, t1, present)
    alone = adapter(slices)
    torch.testing.assert_close(adapted[1:], alone[1:])
    assert (adapted[0] - alone[0]).abs().max() > 0.01
    torch.testing.assert_close(adapted[:1], adapter(slices[:1], t1[:1]))
    adapted.square().sum().backward()
    assert t1.grad is not None
    assert torch.all(t1.grad[1:] == 0)
    assert t1.grad[0].abs().max() > 0
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert adapter.t1_missing.grad is not None
    assert adapter.t1_missing.grad.abs().min() > 0


def test_t1_can_be_added_to_a_model_of_flair_alone(torch_generator: torch.Generator) -> None:
    flair = _trained(torch_generator, t1_channels=0)
    both = ChannelAdapter(3, 4, t1_channels=1)
    added = both.state_dict().keys() - flair.state_dict().keys()
    assert added == {"t1_stem.weight", "t1_missing"}
    both.load_state_dict(flair.state_dict(), strict=False)
    slices = torch.rand(2, 3, 6, 7, generator=torch_generator)
    t1 = torch.rand(2, 1, 6, 7, generator=torch_generator)
    for given in (None, t1):
        assert torch.equal(both(slices, given), flair(slices))


def test_t1_for_an_adapter_without_it_is_refused(torch_generator: torch.Generator) -> None:
    slices = torch.rand(1, 3, 6, 7, generator=torch_generator)
    with pytest.raises(ValueError, match="t1_channels = 0"):
        ChannelAdapter(3)(slices, slices)
