"""A network on a device: which device, in which precision, and in batches that its memory holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wmh_lora.config import Precision
from wmh_lora.engine_views import Seen, ViewKey, turn, turn_back
from wmh_lora.errors import DeviceError
from wmh_lora.logs import LOGGER
from wmh_lora.models.export_runtime import ExportedNetwork
from wmh_lora.models.network import WMHNet, lesion_probability
from wmh_lora.models.precision import fast_dtype, to_precision

__all__ = ["NetworkOnDevice", "choose_device", "choose_dtype", "device_errors"]

# CUDA, MPS and the CPU's allocator have no exception class in common.
_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory")
_BYTE_SCALE = 255.0
_USABLE_STRUCTURES = ("ventricles", "brain")


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """Turn ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"`` into an available device.

    Raises
    ------
    DeviceError
        If the device is unknown or not available on this machine.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if str(device) == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"Unknown device {device!r}; use auto, cpu, cuda or mps.") from error
    available = {"cpu": True, "cuda": cuda, "mps": mps}.get(chosen.type, False)
    if chosen.type == "cuda" and available and (chosen.index or 0) >= torch.cuda.device_count():
        available = False
    if not available:
        raise DeviceError(
            f"The device {chosen} is not available to this torch installation; "
            "use auto or cpu, or install a torch build for it."
        )
    return chosen


def choose_dtype(device: torch.device, precision: Precision) -> torch.dtype:
    """Return the type that the network's products are computed in.

    ``"auto"`` is the fastest, see `fast_dtype`. ``"bfloat16"`` on a device without it is float32,
    with a warning.
    """
    if precision == "float32":
        return torch.float32
    half = fast_dtype(device)
    if precision == "bfloat16" and half != torch.bfloat16:
        LOGGER.warning("The device %s does not compute in bfloat16; float32 is used.", device)
        return torch.float32
    return half


@contextmanager
def device_errors(device: torch.device) -> Iterator[None]:
    """Turn a device's out-of-memory error into a sentence."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        advice = "close other programs" if device.type == "cpu" else "use the device cpu"
        raise DeviceError(
            f"The device {device} does not have enough memory for this scan; {advice}."
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(mark in text for mark in _NO_MEMORY)


class _Answer(NamedTuple):
    """What the network says of some slices: probability of lesion, and of structures in 1/255."""

    lesion: Tensor
    structures: Mapping[str, Tensor]


class NetworkOnDevice:
    """Slices in, probabilities out.

    Parameters
    ----------
    net : nn.Module
        Maps (B, C, H, W) to logits (B, structures, H, W).
    structures : sequence of str
        What its outputs mean.
    device : torch.device
        Where it is moved to.

    Attributes
    ----------
    batch_limit : int or None
        Largest number of slices that went through at once after the memory did not suffice for
        more; None as long as it always did.
    """

    def __init__(self, net: nn.Module, structures: Sequence[str], device: torch.device) -> None:
        self.device = device
        self.batch_limit: int | None = None
        self._structures = tuple(structures)
        with device_errors(device):
            self._nets = {torch.float32: net.eval().to(device)}

    def dtype(self, precision: Precision) -> torch.dtype:
        """Return the type that this network's products are computed in here, see `choose_dtype`.

        What was exported computes in float32 on a CPU: it cannot be rounded layer by layer.
        """
        if self.device.type == "cpu" and isinstance(self._nets[torch.float32], ExportedNetwork):
            return torch.float32
        return choose_dtype(self.device, precision)

    def see(
        self,
        slices: NDArray[np.float32],
        view: ViewKey,
        dtype: torch.dtype = torch.float32,
        t1: NDArray[np.float32] | None = None,
    ) -> Seen:
        """Show slices in one view.

        Where the device's memory does not suffice, the batch is halved until it does, and stays
        as small from then on.

        Parameters
        ----------
        slices : float32 array (B, C, H, W)
            Slices with their neighbours.
        view : tuple
            See `wmh_lora.engine_views`.
        dtype : torch.dtype
            Of the products, see `choose_dtype`.
        t1 : float32 array (B, T, H, W), optional
            T1 slices beside them, for networks that take some.

        Returns
        -------
        Seen
            Maps (B, H, W), turned back. Structures only of the plain view.

        Raises
        ------
        RuntimeError, MemoryError
            If the memory does not suffice for one slice; see `device_errors`.
        """
        parts: list[Seen] = []
        start = 0
        while start < len(slices):
            count = min(self.batch_limit or len(slices), len(slices) - start)
            shown = slices[start : start + count]
            beside = None if t1 is None else t1[start : start + count]
            answer = self._try(shown, view, dtype, beside)
            if answer is None:  # out of the except block, so that what failed is freed
                self.batch_limit = count // 2
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                LOGGER.warning(
                    "The device %s has no memory for %d slices at once; going on with %d.",
                    self.device,
                    count,
                    self.batch_limit,
                )
                continue
            parts.append(answer)
            start += count
        return parts[0] if len(parts) == 1 else Seen.joined(parts)

    def _try(
        self,
        slices: NDArray[np.float32],
        view: ViewKey,
        dtype: torch.dtype,
        t1: NDArray[np.float32] | None,
    ) -> Seen | None:
        """Show slices; None if there is no memory for as many but may be for fewer."""
        try:
            with torch.inference_mode():
                pictures = [self._on_device(part) for part in (slices, t1) if part is not None]
                answer = self._answer(pictures, view, dtype)
                others = {name: part.cpu().numpy() for name, part in answer.structures.items()}
                return Seen(answer.lesion.cpu().numpy(), others)
        except (MemoryError, RuntimeError) as error:
            if len(slices) == 1 or not _is_out_of_memory(error):
                raise
        return None

    def _on_device(self, slices: NDArray[np.float32]) -> Tensor:
        batch = torch.from_numpy(slices)
        if self.device.type == "cuda":
            # pinned memory is copied while the device computes; its convolutions prefer channels
            # last, as the network's weights are laid out
            batch = batch.contiguous(memory_format=torch.channels_last).pin_memory()
        return batch.to(self.device, non_blocking=self.device.type == "cuda")

    def _answer(self, pictures: Sequence[Tensor], view: ViewKey, dtype: torch.dtype) -> _Answer:
        with self._computing_in(dtype):
            logits = self._net_for(dtype)(*(turn(picture, view) for picture in pictures))
        lesion = turn_back(lesion_probability(logits, self._structures), view)
        structures = {}
        if view == (0, False):
            for name in _USABLE_STRUCTURES:
                if name in self._structures:
                    part = torch.sigmoid(logits[:, self._structures.index(name)].float())
                    structures[name] = (part * _BYTE_SCALE).round().to(torch.uint8)
        return _Answer(lesion, structures)

    def _net_for(self, dtype: torch.dtype) -> nn.Module:
        """Return the network, or on a CPU its copy with rounded weights, made when needed."""
        plain = self._nets[torch.float32]
        if dtype == torch.bfloat16 and self.device.type == "cpu" and isinstance(plain, WMHNet):
            if dtype not in self._nets:
                self._nets[dtype] = to_precision(plain, "bfloat16")
            return self._nets[dtype]
        return plain

    def _computing_in(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        """Let torch round what the network does not round itself."""
        if dtype == torch.float32 or self._net_for(dtype) is not self._nets[torch.float32]:
            return nullcontext()
        return torch.autocast(self.device.type, dtype)
