"""The linear layer: always nn.Linear's result, whichever product computes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from wmh_lora.models import linear
from wmh_lora.models.linear import Linear


def _layers(bias: bool = True) -> tuple[Linear, nn.Linear]:
    fast, plain = Linear(24, 40, bias=bias), nn.Linear(24, 40, bias=bias)
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def _tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 5, 24), (0, 24)])
def test_inference_equals_a_plain_layer(shape: tuple[int, ...], bias: bool) -> None:
    fast, plain = _layers(bias)
    tokens = _tokens(*shape)
    with torch.no_grad():
        torch.testing.assert_close(fast(tokens), plain(tokens), atol=1e-6, rtol=1e-5)


def test_inference_takes_any_memory_layout() -> None:
    fast, plain = _layers()
    tokens = _tokens(24, 7, 2).permute(2, 1, 0)
    with torch.inference_mode():
        torch.testing.assert_close(fast(tokens), plain(tokens), atol=1e-6, rtol=1e-5)


def test_without_the_private_operator_the_layer_is_a_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fast, plain = _layers()
    monkeypatch.setattr(linear, "_ONE_DNN", "an_operator_that_does_not_exist")
    with torch.no_grad():
        assert torch.equal(fast(_tokens(5, 24)), plain(_tokens(5, 24)))


def test_gradients_are_those_of_a_plain_layer() -> None:
    fast, plain = _layers()
    for layer in (fast, plain):
        layer(_tokens(5, 24)).square().sum().backward()
    assert plain.weight.grad is not None
    assert fast.weight.grad is not None
    assert torch.equal(fast.weight.grad, plain.weight.grad)


def test_autocast_and_other_types_are_left_to_pytorch() -> None:
    fast, plain = _layers()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert fast(_tokens(5, 24)).dtype == torch.bfloat16
        tokens = _tokens(5, 24).double()
        assert torch.equal(fast.double()(tokens), plain.double()(tokens))
