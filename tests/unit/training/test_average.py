from __future__ import annotations

import torch
from torch import nn

from wmh_lora.training.average import averaged_weights, copy_state, update_average


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    net[0].weight.requires_grad_(False)
    return net


def test_running_statistics_are_averaged_with_the_trained_parameters() -> None:
    net = _net()
    average = copy_state(net)
    assert set(average) == {"0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"}
    net(10.0 + torch.randn(4, 1, 8, 8))
    update_average(average, net, steps_done=10_000, decay=0.9)
    moved = net.get_buffer("1.running_mean")
    assert moved.abs().min() > 0
    torch.testing.assert_close(average["1.running_mean"], 0.1 * moved)


def test_the_network_shows_the_average_and_gets_its_own_state_back() -> None:
    net = _net()
    average = {name: tensor + 1.0 for name, tensor in copy_state(net).items()}
    before = copy_state(net)
    with averaged_weights(net, average):
        assert not net.training
        assert all(torch.equal(value, average[name]) for name, value in copy_state(net).items())
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in copy_state(net).items())
