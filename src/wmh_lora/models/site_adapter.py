"""The adapter file: what a model learned from a few scans of one site, in less than two megabytes.

An adapter belongs to one model file, its base, whose network it changes when both are loaded. The
base's file stays as it is, so any number of adapters can be kept and switched.

Tensors
    ``lora.<module>.lora_a`` and so on: low-rank updates of the encoder's linear layers, on top of
    what the base model made of them. ``adapter.*`` and ``decoder.*``: the parameters that take the
    places of the base's. BatchNorm's running statistics stay those of the base.
Metadata
    Under the key ``wmh_lora_adapter``, a JSON object with the fields of `AdapterCard`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wmh_lora._version import __version__
from wmh_lora.errors import AdapterMismatchError, WeightsError
from wmh_lora.files import file_sha256
from wmh_lora.models.lora import check_tensors, extract_lora, lora_shapes, merge_lora
from wmh_lora.models.lora_settings import LoraSettings
from wmh_lora.models.model_file import ModelCard
from wmh_lora.models.network import WMHNet
from wmh_lora.models.tensor_file import TensorFile, as_float, storable

__all__ = [
    "LARGEST_BYTES",
    "RANKS",
    "AdapterCard",
    "SiteAdapter",
    "adapter_ranks",
    "adapter_tensors",
    "load_adapter",
    "save_adapter",
]

#: An adapter file is smaller.
LARGEST_BYTES = 2_000_000

#: Ranks of an adapter, the largest first: the first whose file is small enough is taken.
RANKS = (8, 4, 2, 1)

_FORMAT_VERSION = 1
_LORA = "lora."
_PARTS = ("adapter", "decoder")
_CARD_BYTES = 64_000  # left for names and the card


@dataclass(frozen=True)
class AdapterCard:
    """What an adapter file says about itself.

    Attributes
    ----------
    name : str
        Name of the adapter.
    base_name, base_sha256 : str
        The model it belongs to, and the SHA-256 of that model's file.
    lora_ranks : mapping of str to int
        Rank by the layer's own name; alpha is the rank.
    threshold : float
        From which probability on a voxel is lesion, chosen in cross-validation.
    min_voxels : int
        Smallest lesion kept, chosen likewise.
    planes : int
        In how many planes the site's scans are seen: the base's threshold for others stays. 0 if
        the threshold is for all.
    training : dict
        Seed, steps, rates and time.
    scans : tuple of dict
        ``image_sha256`` and ``mask_sha256`` of each scan that it learned from.
    cross_validation : dict
        Folds with their scans (numbers from 0) and Dice, and the means of base and adapter.
    versions : mapping of str to str
        Of the programs that made it.
    package_version : str
        Version of the package that wrote the file.
    format_version : int
        Of this layout.
    """

    name: str
    base_name: str
    base_sha256: str
    lora_ranks: Mapping[str, int]
    threshold: float
    min_voxels: int
    planes: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    scans: tuple[dict[str, str], ...] = ()
    cross_validation: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    package_version: str = __version__
    format_version: int = _FORMAT_VERSION


_FILE = TensorFile("adapter", "wmh_lora_adapter", AdapterCard, _FORMAT_VERSION)


@dataclass(frozen=True)
class SiteAdapter:
    """An adapter file in memory.

    Attributes
    ----------
    card : AdapterCard
    tensors : mapping of str to Tensor
        Float32, named as in the file.
    path : Path
        The file.
    sha256 : str
        Of the file.
    """

    card: AdapterCard
    tensors: Mapping[str, Tensor]
    path: Path
    sha256: str

    def require_base(self, base: Path, base_sha256: str) -> None:
        """Compare the checksum of a model file with that of the adapter's base.

        Raises
        ------
        AdapterMismatchError
            If they differ.
        """
        if self.card.base_sha256 != base_sha256:
            raise AdapterMismatchError(
                f"The adapter {self.path} was made for the model {self.card.base_name} with sha256 "
                f"{self.card.base_sha256[:12]}..., but {base} has {base_sha256[:12]}...; name its "
                "own model with --model, or adapt this model with `wmh-lora adapt`."
            )

    def apply(self, net: WMHNet) -> None:
        """Change the network of the base, in place.

        Parameters
        ----------
        net : WMHNet
            From `wmh_lora.models.model_file.assemble_network`.

        Raises
        ------
        AdapterMismatchError
            If names or shapes of the tensors are not those of the network. Nothing is changed then.
        """
        settings = LoraSettings(self.card.lora_ranks)
        own = _own_parameters(net)
        shapes = {f"{_LORA}{n}": s for n, s in lora_shapes(net.encoder, settings).items()}
        shapes.update({name: tuple(parameter.shape) for name, parameter in own.items()})
        check_tensors(self.tensors, shapes, f"the network that {self.path} was made for")
        lora = {
            name.removeprefix(_LORA): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(_LORA)
        }
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(self.tensors[name])
        merge_lora(net.encoder, lora, settings)

    def adapt_card(self, card: ModelCard) -> ModelCard:
        """Return the base's card with the threshold and size that go with the adapter."""
        inference = card.inference.changed(min_voxels=self.card.min_voxels)
        inference = inference.with_threshold(self.card.threshold, self.card.planes)
        return replace(card, inference=inference)


def load_adapter(path: str | os.PathLike[str]) -> SiteAdapter:
    """Read an adapter file.

    Raises
    ------
    WeightsError
        If the file is absent, damaged or no adapter.
    """
    path = Path(path)
    card, tensors = _FILE.read(path)
    return SiteAdapter(card, as_float(tensors), path, file_sha256(path))


def save_adapter(
    path: str | Path, tensors: Mapping[str, Tensor], card: AdapterCard, *, overwrite: bool = False
) -> None:
    """Write an adapter file, which appears under its name only when it is complete.

    Parameters
    ----------
    path : str or Path
        Target, in a folder that exists.
    tensors : mapping of str to Tensor
        From `adapter_tensors`; stored as float16.
    card : AdapterCard
        Metadata.
    overwrite : bool
        Replace a file that exists.

    Raises
    ------
    WeightsError
        If a value is NaN or infinite, or the file would not be smaller than `LARGEST_BYTES`.
    DataError
        If the file cannot be written, or exists and is not to be replaced.
    """
    stored = storable(tensors, path, half=True)
    size = len(_FILE.content(stored, card))
    if size >= LARGEST_BYTES:
        raise WeightsError(
            f"The adapter would take {size} bytes, more than the {LARGEST_BYTES} that an adapter "
            f"file may have; {path} is not written. Fine-tune the whole model instead."
        )
    _FILE.write(path, stored, card, overwrite=overwrite)


def adapter_tensors(net: WMHNet) -> dict[str, Tensor]:
    """Return what a network has learned since `add_lora` prepared its encoder."""
    lora = {f"{_LORA}{name}": tensor for name, tensor in extract_lora(net.encoder).items()}
    return {**lora, **_own_parameters(net)}


def adapter_ranks(net: WMHNet, targets: tuple[str, ...]) -> dict[str, int]:
    """Choose the largest rank of `RANKS` whose file is small enough; none at all if none is.

    Parameters
    ----------
    net : WMHNet
        Network of the base.
    targets : tuple of str
        Own names of the linear layers that are adapted.

    Raises
    ------
    WeightsError
        If decoder and channel adapter alone are too large.
    """
    own = sum(parameter.numel() for parameter in _own_parameters(net).values())
    for rank in (*RANKS, 0):
        ranks = dict.fromkeys(targets, rank) if rank else {}
        shapes = lora_shapes(net.encoder, LoraSettings(ranks))
        values = own + sum(a * b for a, b in shapes.values())
        if 2 * values + _CARD_BYTES < LARGEST_BYTES:
            return ranks
    raise WeightsError(
        f"Decoder and channel adapter of this model have {own} parameters, more than the "
        f"{LARGEST_BYTES} bytes of an adapter file hold; fine-tune the whole model instead."
    )


def _own_parameters(net: WMHNet) -> dict[str, nn.Parameter]:
    """Parameters of the parts that an adapter replaces whole."""
    return {
        f"{part}.{name}": parameter
        for part in _PARTS
        for name, parameter in getattr(net, part).named_parameters()
    }
