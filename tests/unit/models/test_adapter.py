"""The channel adapter starts as the identity on the centre slice, and can leave it."""

from __future__ import annotations

import pytest
import torch

from wmh_lora.models.adapter import ChannelAdapter


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
