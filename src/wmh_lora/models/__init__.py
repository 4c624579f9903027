"""The parts of the network and where their weights come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmh_lora.models.encoders import build_encoder

__all__ = ["build_encoder"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing this package must not wait for torch.
    if name == "build_encoder":
        from wmh_lora.models.encoders import build_encoder

        return build_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
