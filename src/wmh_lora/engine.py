"""Inference: from a FLAIR scan to a probability map, a mask and a list of lesions.

`segment` does everything in one call. `WMHInferenceEngine` keeps a loaded model for many scans and
gives access to the single steps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.nifti2 import Nifti2Header
from numpy.typing import NDArray
from torch import Tensor, nn

from wmh_lora.config import InferenceConfig, PreprocessConfig, TtaMode, from_dict
from wmh_lora.errors import DeviceError
from wmh_lora.logs import LOGGER, collect_warnings
from wmh_lora.models.network import lesion_probability
from wmh_lora.models.registry import Model, load_model
from wmh_lora.postprocess import apply_threshold, describe_lesions, remove_small_components
from wmh_lora.preprocess import Prepared, context_stack, preprocess, restore
from wmh_lora.report.outputs import OutputFiles, Segmentation
from wmh_lora.volume import Volume

__all__ = [
    "Model",
    "OutputFiles",
    "Segmentation",
    "WMHInferenceEngine",
    "choose_device",
    "load_model",
    "segment",
]

#: Called with (steps done, steps in all); a step is one slice in one view.
ProgressCallback = Callable[[int, int], None]

# Views are (quarter turns, mirrored first). The flips are members of the dihedral group: two
# quarter turns and a left-right mirror make an anterior-posterior mirror.
_VIEWS: Mapping[TtaMode, tuple[tuple[int, bool], ...]] = {
    "none": ((0, False),),
    "flip": ((0, False), (0, True), (2, False), (2, True)),
    "d4": tuple((turns, mirrored) for mirrored in (False, True) for turns in range(4)),
}
# CUDA, MPS and the CPU's allocator have no exception class in common.
_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory")
_PROBABILITY_STEPS = 4096.0
_SMALLEST_REPORTED_SHARE = 1e-4  # of voxels without a finite value


def segment(
    path: str | os.PathLike[str] | Volume,
    *,
    model: str | os.PathLike[str] | Model = "default",
    tta: TtaMode | None = None,
    threshold: float | None = None,
    min_voxels: int | None = None,
    device: str | torch.device = "auto",
    progress: ProgressCallback | None = None,
) -> Segmentation:
    """Find white matter hyperintensities in one FLAIR scan.

    Parameters
    ----------
    path : path or Volume
        A .nii, .nii.gz, .mgz or .nrrd file, or a volume in memory.
    model : str, path or Model
        See `load_model`; pass a loaded `Model` when there are many scans.
    tta : {"none", "flip", "d4"}, optional
        Test-time augmentation; 1, 4 or 8 views are averaged.
    threshold : float, optional
        Voxels of at least this probability are lesion; between 0 and 1.
    min_voxels : int, optional
        26-connected lesions with fewer voxels are removed.
    device : str or torch.device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
    progress : callable, optional
        Called with (steps done, steps in all).

    Returns
    -------
    Segmentation
        Probability, mask and lesions on the scan's own grid. What is not given above comes from
        the model file.

    Raises
    ------
    UnreadableImageError, DataError
        If the scan cannot be read or shows no head.
    ConfigError, WeightsError, DeviceError
        If a setting, the model or the device is not available.
    """
    loaded = model if isinstance(model, Model) else load_model(model)
    engine = WMHInferenceEngine(loaded, device)
    return engine.segment(
        path, tta=tta, threshold=threshold, min_voxels=min_voxels, progress=progress
    )


class WMHInferenceEngine:
    """A model on a device, for any number of scans.

    Parameters
    ----------
    model : Model or nn.Module
        From `load_model`. A bare module, which maps (B, 3, H, W) to logits whose first channel is
        the lesion, is run with the package's default settings.
    device : str or torch.device
        ``"auto"`` takes CUDA, then MPS, then the CPU.
    img_size : int
        Accepted for compatibility and not used: a slice is resampled to pixels of a physical size
        and cropped to the head, so its size follows from the anatomy. Stretching every slice to a
        square of ``img_size`` would change the proportions that the network was trained on.

    Raises
    ------
    DeviceError
        If the device is not available.

    Examples
    --------
    The steps one by one::

        engine = WMHInferenceEngine(model=load_model(), device="cpu")
        prob_volume, nifti_ref = engine.predict_volume_probs("sub-01_FLAIR.nii.gz", use_tta=True)
        mask = engine.cc_filter(engine.apply_threshold(prob_volume, threshold=0.60), min_v=3)
    """

    def __init__(
        self,
        model: Model | nn.Module,
        device: str | torch.device = "auto",
        img_size: int = 512,
    ) -> None:
        self.device = choose_device(device)
        self.img_size = img_size
        self.model_description: dict[str, str] = {}
        preprocess_config, self._inference = PreprocessConfig(), InferenceConfig()
        self._structures: tuple[str, ...] = ("wmh",)
        net: nn.Module
        if isinstance(model, Model):
            net, card = model.net, model.card
            self.model_description = model.describe()
            preprocess_config, self._inference = card.preprocess, card.inference
            self._structures = card.model.structures
        else:
            net = model
            self.model_description = {"name": type(model).__name__}
        self._preprocess = _fit_to_network(preprocess_config, net)
        with _device_errors(self.device):
            self._net = net.eval().to(self.device)

    def segment(
        self,
        path_or_volume: str | os.PathLike[str] | Volume,
        *,
        tta: TtaMode | None = None,
        threshold: float | None = None,
        min_voxels: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> Segmentation:
        """Run every step on one scan; see `segment` for parameters and errors."""
        config = self.settings(tta=tta, threshold=threshold, min_voxels=min_voxels)
        with collect_warnings() as warnings:
            volume = _as_volume(path_or_volume)
            _warn_about_missing_values(volume)
            probability = self.predict(volume, tta=config.tta, progress=progress)
        mask = remove_small_components(
            apply_threshold(probability, config.threshold), config.min_voxels
        )
        lesions = tuple(describe_lesions(mask, volume.affine))
        return Segmentation(
            volume=volume,
            probability=probability,
            mask=mask,
            lesions=lesions,
            volume_ml=int(mask.sum(dtype=np.int64)) * volume.voxel_volume_ml,
            settings={
                "threshold": config.threshold,
                "min_voxels": config.min_voxels,
                "tta": config.tta,
                "device": str(self.device),
                "preprocess": asdict(self._preprocess),
            },
            model=self.model_description,
            warnings=tuple(warnings),
        )

    def settings(
        self,
        *,
        tta: str | None = None,
        threshold: float | None = None,
        min_voxels: int | None = None,
    ) -> InferenceConfig:
        """Return the model's inference settings with the given ones in their place.

        Raises
        ------
        ConfigError
            If a value is out of range.
        """
        given = {"tta": tta, "threshold": threshold, "min_voxels": min_voxels}
        chosen = {key: value for key, value in given.items() if value is not None}
        return from_dict(InferenceConfig, {**asdict(self._inference), **chosen})

    def predict_volume_probs(
        self, path_or_volume: str | os.PathLike[str] | Volume, use_tta: bool = True
    ) -> tuple[NDArray[np.float32], nib.nifti1.Nifti1Image]:
        """Compute the lesion probability of every voxel of a scan.

        Parameters
        ----------
        path_or_volume : path or Volume
            The FLAIR scan.
        use_tta : bool
            Average the eight views of the dihedral group; otherwise use one view.

        Returns
        -------
        prob_volume : float32 array (I, J, K)
            In [0, 1], on the scan's own grid.
        nifti_ref : nibabel image
            The scan, whose ``affine`` and ``header`` place results that are saved with nibabel.

        Raises
        ------
        UnreadableImageError, DataError
            If the scan cannot be read or shows no head.
        DeviceError
            If the device runs out of memory.
        """
        volume = _as_volume(path_or_volume)
        return self.predict(volume, tta="d4" if use_tta else "none"), _nifti_reference(volume)

    def predict(
        self, volume: Volume, *, tta: TtaMode = "none", progress: ProgressCallback | None = None
    ) -> NDArray[np.float32]:
        """Compute the lesion probability (I, J, K) of a volume, averaged over the views of `tta`.

        Probabilities are rounded to 1/4096, far below what they mean, because maps then take an
        eighth of the space on disk; masks are made from the rounded values, so that a saved map
        gives the same mask again.

        Raises
        ------
        DataError
            If the scan shows no head.
        DeviceError
            If the device runs out of memory.
        """
        prepared = preprocess(volume, self._preprocess)
        with _device_errors(self.device):
            probability = self._predict_slices(prepared, _VIEWS[tta], progress)
        native = restore(probability, prepared)
        native *= _PROBABILITY_STEPS
        np.rint(native, out=native)
        native /= _PROBABILITY_STEPS
        return np.clip(native, 0.0, 1.0, out=native)

    @staticmethod
    def apply_threshold(prob_volume: NDArray[Any], threshold: float = 0.60) -> NDArray[np.uint8]:
        """Mark voxels of at least this probability, see `wmh_lora.postprocess.apply_threshold`."""
        return apply_threshold(np.asarray(prob_volume), threshold)

    @staticmethod
    def cc_filter(mask: NDArray[Any], min_v: int = 3) -> NDArray[np.uint8]:
        """Remove 26-connected components of fewer than ``min_v`` voxels."""
        return remove_small_components(np.asarray(mask), min_v)

    @torch.inference_mode()
    def _predict_slices(
        self,
        prepared: Prepared,
        views: tuple[tuple[int, bool], ...],
        progress: ProgressCallback | None,
    ) -> NDArray[np.float32]:
        """Probabilities (S, H, W) on the network's grid."""
        count = len(prepared.slices)
        probability = np.empty(prepared.slices.shape, dtype=np.float32)
        done, total = 0, count * len(views)
        for start in range(0, count, self._inference.batch_size):
            indices = range(start, min(start + self._inference.batch_size, count))
            slices = torch.from_numpy(context_stack(prepared, indices)).to(self.device)
            summed = torch.zeros((), device=self.device)
            for turns, mirrored in views:
                logits = self._net(_turn(slices, turns, mirrored))
                view = lesion_probability(logits, self._structures)
                summed = summed + _turn_back(view, turns, mirrored)
                done += len(indices)
                if progress is not None:
                    progress(done, total)
            probability[start : start + len(indices)] = (summed / len(views)).cpu().numpy()
        return probability


def _fit_to_network(config: PreprocessConfig, net: nn.Module) -> PreprocessConfig:
    """Pad slices to sizes that the network takes, whatever the settings ask for."""
    multiple = math.lcm(config.multiple_px, int(getattr(net, "size_multiple", 1)))
    return replace(config, multiple_px=multiple)


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


@contextmanager
def _device_errors(device: torch.device) -> Iterator[None]:
    """Turn a device's out-of-memory error into a sentence."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        if not isinstance(error, MemoryError) and not any(mark in text for mark in _NO_MEMORY):
            raise
        advice = "close other programs" if device.type == "cpu" else "use the device cpu"
        raise DeviceError(
            f"The device {device} does not have enough memory for this scan; {advice}."
        ) from error


def _turn(slices: Tensor, turns: int, mirrored: bool) -> Tensor:
    """Show (..., H, W) as one member of the dihedral group; odd turns swap H and W."""
    if mirrored:
        slices = slices.flip(-1)
    return torch.rot90(slices, turns, (-2, -1))


def _turn_back(maps: Tensor, turns: int, mirrored: bool) -> Tensor:
    maps = torch.rot90(maps, -turns, (-2, -1))
    return maps.flip(-1) if mirrored else maps


def _as_volume(path_or_volume: str | os.PathLike[str] | Volume) -> Volume:
    if isinstance(path_or_volume, Volume):
        return path_or_volume
    return Volume.read(Path(path_or_volume))


def _warn_about_missing_values(volume: Volume) -> None:
    share = 1.0 - float(np.mean(np.isfinite(volume.data)))
    if share > _SMALLEST_REPORTED_SHARE:
        LOGGER.warning(
            "%s: %.2g %% of the voxels hold no finite number and count as background.",
            volume.path or "the scan",
            100.0 * share,
        )


def _nifti_reference(volume: Volume) -> nib.nifti1.Nifti1Image:
    """Return the scan as a nibabel image with the geometry of the file that it came from."""
    if isinstance(volume.header, Nifti2Header):
        image: nib.nifti1.Nifti1Image = nib.nifti2.Nifti2Image(
            volume.data, volume.affine, volume.header
        )
    else:
        image = nib.nifti1.Nifti1Image(volume.data, volume.affine, volume.header)
    image.set_data_dtype(np.float32)
    return image
