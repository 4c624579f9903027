"""A linear layer that uses the faster of PyTorch's CPU products when no gradient is wanted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Linear"]

# PyTorch multiplies float32 matrices with MKL, and builds in oneDNN as well. oneDNN's product has
# no public name; without it, the layer is a plain one.
_ONE_DNN = "_linear_pointwise"


class Linear(nn.Linear):
    """``nn.Linear`` that uses oneDNN for float32 inference on CPUs.

    The result differs from that of ``nn.Linear`` by rounding alone. On processors that MKL was not
    written for, the product takes about a fifth less time.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if not self._has_fast_product(tokens):
            return super().forward(tokens)
        product = getattr(torch.ops.mkldnn, _ONE_DNN)
        out: Tensor = product(tokens, self.weight, self.bias, "none", [], "")
        return out

    def _has_fast_product(self, tokens: Tensor) -> bool:
        return (
            not torch.is_grad_enabled()
            and tokens.device.type == self.weight.device.type == "cpu"
            and tokens.dtype == self.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, _ONE_DNN)
        )
