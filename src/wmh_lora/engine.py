"""Inference: from a FLAIR scan to a probability map, a mask and a list of lesions.

`segment` does everything in one call. `WMHInferenceEngine` keeps a loaded model for many scans and
gives access to the single steps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from wmh_lora.config import InferenceConfig, PreprocessConfig, TtaMode
from wmh_lora.engine_brain import below_skull, within_brain
from wmh_lora.engine_contrast import without_haze
from wmh_lora.engine_device import NetworkOnDevice, choose_device, device_errors
from wmh_lora.engine_looks import Looks, Stack, average_looks, planes_seen, whole_stack
from wmh_lora.engine_memory import ScanSize, looks_within
from wmh_lora.engine_scan import (
    Scan,
    ScanMaps,
    as_volume,
    find_lesions,
    maps_on_scan,
    nifti_reference,
    told_settings,
    warn_about_missing_values,
)
from wmh_lora.engine_views import (
    VIEWS,
    JoinedProgress,
    Look,
    ProgressCallback,
    Seen,
    SliceMaps,
    ViewKey,
    average_views,
)
from wmh_lora.errors import ConfigError
from wmh_lora.logs import collect_warnings
from wmh_lora.models.export_runtime import ExportedNetwork
from wmh_lora.models.registry import Model, load_model
from wmh_lora.postprocess import apply_threshold, remove_small_components
from wmh_lora.preprocess import Prepared, context_stack, preprocess
from wmh_lora.report.outputs import OutputFiles, Segmentation
from wmh_lora.t1 import prepare_t1, require_t1_channels
from wmh_lora.volume import Volume

__all__ = [
    "Model",
    "OutputFiles",
    "ProgressCallback",
    "ScanMaps",
    "Segmentation",
    "WMHInferenceEngine",
    "choose_device",
    "load_model",
    "segment",
]


def segment(
    path: Scan,
    *,
    model: str | os.PathLike[str] | Model = "default",
    adapter: str | os.PathLike[str] | None = None,
    t1: Scan | None = None,
    register_t1: bool = False,
    tta: TtaMode | None = None,
    threshold: float | None = None,
    min_voxels: int | None = None,
    device: str | torch.device = "auto",
    progress: ProgressCallback | None = None,
    **settings: Any,
) -> Segmentation:
    """Find white matter hyperintensities in one FLAIR scan.

    Parameters
    ----------
    path : path, Volume or nibabel SpatialImage
        A .nii, .nii.gz, .mgz or .nrrd file, or an image in memory.
    model : str, path or Model
        See `load_model`; pass a loaded `Model` when there are many scans.
    adapter : path, optional
        File that ``wmh-lora adapt`` made of this model; a loaded `Model` has its own.
    t1 : path, Volume or nibabel SpatialImage, optional
        T1-weighted scan of the same session, on any grid, for models that take one.
    register_t1 : bool
        Correct movement between the two first (needs SimpleITK); otherwise headers are believed.
    tta : "none", "flip" or "d4", optional
        Test-time augmentation; 1, 4 or 8 views are averaged.
    threshold : float, optional
        Voxels of at least this probability are lesion; between 0 and 1.
    min_voxels : int, optional
        26-connected lesions with fewer voxels are removed.
    device : str or torch.device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
    progress : callable, optional
        Called with (steps done, steps in all).
    **settings
        Other fields of `wmh_lora.config.InferenceConfig` by name, such as ``adaptive=False``.

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
        If a setting, the model or the device is not available, the adapter belongs to another
        model, or the model takes no T1.
    GridMismatchError
        If the headers of FLAIR and T1 say that they do not show one head.
    """
    if not isinstance(model, Model):
        model = load_model(model, adapter=adapter)
    elif adapter is not None:
        raise ConfigError("The model is loaded already; give its adapter to load_model.")
    engine = WMHInferenceEngine(model, device)
    return engine.segment(
        path,
        t1=t1,
        register_t1=register_t1,
        progress=progress,
        tta=tta,
        threshold=threshold,
        min_voxels=min_voxels,
        **settings,
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
    The steps one by one, with the published threshold::

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
        structures: tuple[str, ...] = ("wmh",)
        self._encoder, self._in_channels, self._t1_channels = "", 3, 0
        net: nn.Module
        if isinstance(model, Model):
            net, card = model.net, model.card
            self.model_description = model.describe()
            preprocess_config, self._inference = card.preprocess, card.inference
            structures, self._encoder = card.model.structures, card.model.encoder
            self._in_channels = card.model.in_channels
            exported = isinstance(net, ExportedNetwork)
            self._t1_channels = 0 if exported else card.model.t1_channels
        else:
            net = model
            self.model_description = {"name": type(model).__name__}
        if isinstance(net, ExportedNetwork) and net.on_cpu_alone:
            self.device = torch.device("cpu")
        self._preprocess = _fit_to_network(preprocess_config, net)
        self._network = NetworkOnDevice(net, structures, self.device)

    def segment(
        self,
        path_or_volume: Scan,
        *,
        prepared: Prepared | None = None,
        t1: Scan | None = None,
        register_t1: bool = False,
        progress: ProgressCallback | None = None,
        **settings: Any,
    ) -> Segmentation:
        """Run every step on one scan; `segment` says which errors there are.

        Parameters
        ----------
        path_or_volume : path, Volume or nibabel SpatialImage
            The FLAIR scan.
        prepared : Prepared, optional
            What `prepare` made of this volume, where that was done ahead.
        t1, register_t1
            See `segment`.
        progress : callable, optional
            Called with (steps done, steps in all).
        **settings
            Fields of `wmh_lora.config.InferenceConfig` by name; None leaves one to the model.
        """
        config = self.settings(**settings)
        with collect_warnings() as warnings:
            volume = as_volume(path_or_volume)
            prepared = prepared or self.prepare(volume)
            second = None if t1 is None else as_volume(t1)
            t1_slices = None
            if second is not None:
                t1_slices = self.prepare_t1(second, prepared, volume, register_t1)
            maps = self.predict_maps(prepared, config, t1=t1_slices, progress=progress)
        used = config.changed(threshold=config.threshold_of(maps.looks.planes))
        mask, lesions = find_lesions(maps.probability, volume, used)
        return Segmentation(
            volume=volume,
            probability=maps.probability,
            mask=mask,
            lesions=lesions,
            volume_ml=int(mask.sum(dtype=np.int64)) * volume.voxel_volume_ml,
            settings={
                **told_settings(config, maps, self.device),
                "t1": second is not None,
                "register_t1": second is not None and register_t1,
                "preprocess": asdict(self._preprocess),
            },
            model=self.model_description,
            warnings=tuple(warnings),
            structure_masks=maps.structure_masks,
            uncertainty=maps.uncertainty,
            t1_path=None if second is None else second.path,
        )

    def settings(self, **given: Any) -> InferenceConfig:
        """Return the model's inference settings with the given ones in their place.

        Parameters
        ----------
        **given
            Fields of `wmh_lora.config.InferenceConfig`, see its `changed`.

        Raises
        ------
        ConfigError
            If a value is out of range, or there is no such setting.
        """
        return self._inference.changed(**given)

    def predict_volume_probs(
        self, path_or_volume: Scan, use_tta: bool = True
    ) -> tuple[NDArray[np.float32], nib.nifti1.Nifti1Image]:
        """Compute the lesion probability of every voxel of a scan.

        The model's `min_contrast` is left out: what is faint keeps its probability. Islands that
        touch no brain, or lie just below the skin, have none.

        Parameters
        ----------
        path_or_volume : path, Volume or nibabel SpatialImage
            The FLAIR scan.
        use_tta : bool
            Average the eight views of the dihedral group, all of them of every slice; otherwise
            use one view. Planes and `zoom` are those of the model.

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
        ConfigError
            If the scan needs more memory than the model's settings allow.
        DeviceError
            If the device runs out of memory.
        """
        volume = as_volume(path_or_volume)
        config = self.settings(tta="d4" if use_tta else "none", adaptive=False, min_contrast=0.0)
        maps = self.predict_maps(preprocess(volume, self._preprocess), config, structures=False)
        return maps.probability, nifti_reference(volume)

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
        maps = self.predict_maps(
            preprocess(volume, self._preprocess),
            self.settings(tta=tta),
            structures=False,
            progress=progress,
        )
        return maps.probability

    def prepare(self, volume: Volume) -> Prepared:
        """Bring a scan to the network's grid, and warn of what is missing in it.

        Raises
        ------
        DataError
            If the scan shows no head.
        """
        warn_about_missing_values(volume)
        return preprocess(volume, self._preprocess)

    def require_t1(self) -> None:
        """Raise ConfigError unless the model takes a T1."""
        require_t1_channels(self.model_description.get("name"), self._t1_channels)

    def prepare_t1(
        self, t1: Scan, prepared: Prepared, flair: Volume, register: bool = False
    ) -> NDArray[np.float32]:
        """Bring a T1 to the network's grid of its FLAIR: (S, H, W) in [0, 1].

        Parameters
        ----------
        t1, register
            See `segment`.
        prepared, flair
            The FLAIR, prepared and as it was read.

        Raises
        ------
        ConfigError
            If the model takes no T1, or SimpleITK is needed and not installed.
        GridMismatchError, DataError
            If the two do not show one head, or the T1 shows none.
        """
        self.require_t1()
        second = as_volume(t1)
        if register:
            from wmh_lora.t1_registration import register_t1

            second = register_t1(second, flair)
        return prepare_t1(second, prepared, flair)

    def predict_maps(
        self,
        prepared: Prepared,
        config: InferenceConfig,
        *,
        t1: NDArray[np.float32] | None = None,
        structures: bool = True,
        progress: ProgressCallback | None = None,
    ) -> ScanMaps:
        """Compute all that the network says of a scan.

        Parameters
        ----------
        prepared : Prepared
            See `prepare`.
        config : InferenceConfig
            See `settings`.
        t1 : float32 array (S, H, W), optional
            See `prepare_t1`.
        structures : bool
            Bring ventricles and brain back to the scan's grid as well.
        progress : callable, optional
            Called with (steps done, steps in all).

        Raises
        ------
        ConfigError
            If the scan needs more memory than ``config.max_memory``.
        DeviceError
            If the device runs out of memory.
        """
        with device_errors(self.device):
            stack = whole_stack(prepared, t1)
            dtype = self._network.dtype(config.precision)
            maps, looks = self._predict_slices(stack, prepared, config, dtype, progress)
        return maps_on_scan(maps, prepared, looks, dtype, structures=structures)

    @staticmethod
    def apply_threshold(prob_volume: NDArray[Any], threshold: float = 0.60) -> NDArray[np.uint8]:
        """Mark voxels of at least this probability, see `wmh_lora.postprocess.apply_threshold`."""
        return apply_threshold(np.asarray(prob_volume), threshold)

    @staticmethod
    def cc_filter(mask: NDArray[Any], min_v: int = 3) -> NDArray[np.uint8]:
        """Remove 26-connected components of fewer than ``min_v`` voxels."""
        return remove_small_components(np.asarray(mask), min_v)

    def _predict_slices(
        self,
        slices: Stack,
        prepared: Prepared,
        config: InferenceConfig,
        dtype: torch.dtype,
        progress: ProgressCallback | None,
    ) -> tuple[SliceMaps, Looks]:
        """Maps (S, H, W) on the network's grid, and how the scan was seen."""
        views = VIEWS[config.tta]
        batch_size = config.batch_size
        looks = Looks(planes_seen(config, prepared.view), config.zoom)
        if config.max_memory is not None:
            scan = ScanSize.of(prepared, len(views), looks)
            looks, batch_size = looks_within(config.max_memory, scan, self._encoder, batch_size)
        steps = None if progress is None else JoinedProgress(progress, looks.count)

        def see(stack: Stack, shown: NDArray[np.bool_] | None) -> SliceMaps:
            return average_views(
                self._look(stack, dtype),
                (len(stack.slices), *stack.slices.shape[1:]),
                views,
                batch_size,
                shown=shown,
                reach=stack.context_offset if config.adaptive else None,
                progress=None if steps is None else steps.part(),
            )

        maps = see(slices, prepared.shows_head if config.adaptive else None)
        if looks.count > 1:
            maps = average_looks(slices, prepared, maps, see, looks, evidence_only=config.adaptive)
        if steps is not None:
            steps.finish()
        pixel_mm = prepared.config.pixel_size_mm
        maps = within_brain(maps, pixel_mm)
        maps = below_skull(maps, prepared)
        return without_haze(maps, prepared.slices, pixel_mm, config.min_contrast), looks

    def _look(self, stack: Stack, dtype: torch.dtype) -> Look:
        """Make what shows batches of slices to the network."""

        def look(indices: Sequence[int], view: ViewKey) -> Seen:
            t1 = None
            if stack.t1 is not None:
                t1 = context_stack(stack, indices, self._t1_channels, slices=stack.t1)
            pictures = context_stack(stack, indices, self._in_channels)
            return self._network.see(pictures, view, dtype, t1)

        return look


def _fit_to_network(config: PreprocessConfig, net: nn.Module) -> PreprocessConfig:
    """Pad slices to sizes that the network takes, whatever the settings ask for."""
    multiple = math.lcm(config.multiple_px, int(getattr(net, "size_multiple", 1)))
    return replace(config, multiple_px=multiple)
