"""Safetensors files that say what they are: tensors, and a card in the metadata.

A kind of file keeps its card, a dataclass of plain values, as JSON under a key of its own.
Floating-point tensors may be stored in half precision, except running statistics (a variance can be
below what float16 represents) and DoRA's magnitudes (they scale whole rows of the base weights).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from wmh_lora.config_reading import from_dict, to_dict
from wmh_lora.errors import ConfigError, WeightsError
from wmh_lora.files import open_atomic

__all__ = ["TensorFile", "as_float", "storable"]

CardT = TypeVar("CardT")

_FULL_PRECISION = ("running_mean", "running_var", ".magnitude")


@dataclass(frozen=True)
class TensorFile(Generic[CardT]):
    """A kind of file.

    Attributes
    ----------
    what : str
        Its name in messages, e.g. ``"model"``.
    key : str
        Of the card in the metadata.
    card : type
        Dataclass with the field ``format_version``.
    version : int
        The ``format_version`` that is read.
    """

    what: str
    key: str
    card: type[CardT]
    version: int

    def write(
        self, path: str | Path, tensors: Mapping[str, Tensor], card: CardT, *, overwrite: bool
    ) -> int:
        """Write a file, which appears under its name only when it is complete.

        Returns
        -------
        int
            Its size in bytes.

        Raises
        ------
        DataError
            If the file cannot be written, or exists and is not to be replaced.
        """
        content = self.content(tensors, card)
        with open_atomic(path, overwrite=overwrite) as stream:
            stream.write(content)
        return len(content)

    def content(self, tensors: Mapping[str, Tensor], card: CardT) -> bytes:
        """Return the bytes that `write` writes."""
        return serialise(dict(tensors), {self.key: json.dumps(to_dict(card), sort_keys=True)})

    def read(
        self, path: str | Path, *, with_tensors: bool = True
    ) -> tuple[CardT, dict[str, Tensor]]:
        """Read the card and, on request, the tensors as stored.

        Raises
        ------
        WeightsError
            If the file is absent, damaged or not of this kind.
        """
        path = Path(path)
        if not path.is_file():
            raise WeightsError(f"The {self.what} file {path} does not exist or is not a file.")
        try:
            with safe_open(path, framework="pt", device="cpu") as stream:
                metadata = stream.metadata() or {}
                names = stream.keys() if with_tensors else []
                tensors = {name: stream.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise WeightsError(
                f"{path} is not a complete safetensors file ({error}); get the {self.what} file "
                "again."
            ) from error
        return self._parse(path, metadata), tensors

    def _parse(self, path: Path, metadata: Mapping[str, str]) -> CardT:
        """Read the card out of a file's metadata."""
        if self.key not in metadata:
            raise WeightsError(f"{path} is a safetensors file, but not a WMH-LoRA {self.what}.")
        try:
            plain: Any = json.loads(metadata[self.key])
            version = plain.get("format_version") if isinstance(plain, dict) else None
            if version != self.version:
                raise WeightsError(
                    f"{path} has {self.what} format {version}, this version of wmh-lora reads "
                    f"{self.version}; install the version that fits."
                )
            return from_dict(self.card, plain)
        except (ConfigError, json.JSONDecodeError) as error:
            raise WeightsError(
                f"The metadata of the {self.what} file {path} is invalid: {error}"
            ) from error


def storable(
    tensors: Mapping[str, Tensor], path: str | Path, *, half: bool = False
) -> dict[str, Tensor]:
    """Return the tensors as they are written: on the CPU, contiguous, possibly float16.

    Raises
    ------
    WeightsError
        If a value is NaN or infinite; ``path`` is only named.
    """
    stored = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu()
        if half and value.is_floating_point() and not name.endswith(_FULL_PRECISION):
            value = value.half()
        if not torch.isfinite(value).all():
            raise WeightsError(f"The trained tensor {name!r} is not finite; {path} is not written.")
        stored[name] = value.contiguous()
    return stored


def as_float(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return stored tensors for use: floating-point ones as float32."""
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
