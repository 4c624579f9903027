"""Probability maps of scans for several sets of views, computed once and kept on disk.

The maps are those of the inference engine, bit for bit, so that a mask made from a kept map is the
mask that ``wmh-lora segment`` writes.
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wmh_lora._version import __version__
from wmh_lora.config import TtaMode
from wmh_lora.config_reading import to_dict
from wmh_lora.engine import WMHInferenceEngine
from wmh_lora.engine_device import choose_device, choose_dtype
from wmh_lora.engine_looks import Stack, planes_seen
from wmh_lora.engine_views import Look, Seen, ViewKey
from wmh_lora.errors import DataError
from wmh_lora.files import image_stem, open_atomic, write_failure
from wmh_lora.logs import LOGGER
from wmh_lora.models.model_file import read_model_card, weights_sha256
from wmh_lora.models.registry import load_model
from wmh_lora.view import choose_view
from wmh_lora.volume import Volume

__all__ = ["MapProgress", "ProbabilityMaps"]

Map = NDArray[np.float32]

#: Called with a set of views, steps done and steps in all.
MapProgress = Callable[[TtaMode, int, int], None]

_FORMAT = 3


class ProbabilityMaps:
    """The maps of one model, computed when they are first asked for and kept in a folder.

    A map is found again by the model's weights, network and preprocessing settings, the image's
    bytes, the package's version, the views, the kind of device, the contrast that a lesion must
    have and the approximations that the model's settings allow. A kept map whose checksum is wrong
    is computed again.

    Parameters
    ----------
    model : Path
        Model file.
    folder : Path
        Where maps are kept; it is made if needed.
    base_weights : Path, optional
        Checkpoint of the base encoder; by default the installed or cached one.
    device : str
        Where the network runs; see `wmh_lora.engine.choose_device`.

    Raises
    ------
    WeightsError
        If the model file is absent, damaged or not a model.
    DeviceError
        If the device is not available.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        *,
        base_weights: Path | None = None,
        device: str = "auto",
    ) -> None:
        self._model, self._folder = model, folder
        self._base_weights, self._device = base_weights, choose_device(device)
        self._card = card = read_model_card(model)
        self._identity = {
            "format": _FORMAT,
            "package": __version__,
            # not the file's checksum: settings that are written into its card change no map
            "weights": weights_sha256(model),
            "base": [card.base_sha256, card.base_seed],
            "model": to_dict(card.model),
            "preprocess": to_dict(card.preprocess),
            "device": self._device.type,
            "planes": card.inference.planes,
            "zoom": card.inference.zoom,
            "min_contrast": card.inference.min_contrast,
            "shortcuts": [
                card.inference.adaptive,
                str(choose_dtype(self._device, card.inference.precision)),
            ],
        }

    @cached_property
    def _engine(self) -> _EachViewOnce:
        return _EachViewOnce(load_model(self._model, base_weights=self._base_weights), self._device)

    def planes_of(self, volume: Volume) -> int:
        """Return in how many planes a scan is seen, 1 or 3; its threshold depends on that."""
        view = choose_view(volume, self._card.preprocess.pixel_size_mm)
        return planes_seen(self._card.inference, view)

    def of(
        self,
        volume: Volume,
        image_sha256: str,
        views: Sequence[TtaMode],
        progress: MapProgress | None = None,
    ) -> Iterator[tuple[TtaMode, Map]]:
        """Yield each set of views with its map (I, J, K), one at a time.

        The network sees each view of the scan once, however many sets hold it.

        Parameters
        ----------
        volume : Volume
            The scan.
        image_sha256 : str
            Checksum of the file that it was read from.
        views : sequence of str
            Sets of views, see `wmh_lora.config.InferenceConfig`.
        progress : callable, optional
            Called while a map is computed.

        Raises
        ------
        DataError
            If the scan shows no head, or the folder cannot be written to.
        WeightsError, DeviceError
            If the network cannot be loaded, or run on the device.
        """
        engine: _EachViewOnce | None = None
        for tta in views:
            path, key = self._place(volume, image_sha256, tta)
            probability = _read(path, key, volume.shape)
            if probability is None:
                if engine is None:
                    engine = self._engine
                    engine.start_scan()
                report = None if progress is None else partial(progress, tta)
                probability = engine.predict(volume, tta=tta, progress=report)
                _write(path, key, probability)
            yield tta, probability

    def _place(self, volume: Volume, image_sha256: str, tta: TtaMode) -> tuple[Path, str]:
        identity = {**self._identity, "image": image_sha256, "tta": tta}
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        stem = image_stem(volume.path or "scan")
        return self._folder / f"{stem}_{tta}_{key[:16]}.map", key


class _EachViewOnce(WMHInferenceEngine):
    """An engine that keeps the views of one scan, so that a larger set of them adds the rest."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._kept: dict[tuple[Hashable, ...], Seen] = {}

    def start_scan(self) -> None:
        """Drop the views of the scan before."""
        self._kept.clear()

    def _look(self, stack: Stack, dtype: torch.dtype) -> Look:
        look = super()._look(stack, dtype)

        def look_once(indices: Sequence[int], view: ViewKey) -> Seen:
            # where a further look is cut depends on what all views of the first have found
            key = (stack.plane, stack.zoom, stack.slices.shape[1:], stack.rows, stack.columns, view)
            if any((*key, index) not in self._kept for index in indices):
                for index, part in zip(indices, look(indices, view).split(), strict=True):
                    self._kept[(*key, index)] = part
            return Seen.joined([self._kept[(*key, index)] for index in indices])

        return look_once


def _read(path: Path, key: str, shape: tuple[int, ...]) -> Map | None:
    """Return a map that `_write` wrote; None if there is none or it is not what it was."""
    try:
        head, _, body = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        LOGGER.warning("%s cannot be read (%s); it is computed again.", path, error.strerror)
        return None
    if head == _head(key, body):
        kept = np.load(io.BytesIO(zlib.decompress(body)), allow_pickle=False)
        if kept.shape == shape and kept.dtype == np.float32:
            return np.asarray(kept, dtype=np.float32)
    LOGGER.warning("%s is damaged; it is computed again.", path)
    return None


def _write(path: Path, key: str, probability: Map) -> None:
    # Rounded by the engine and mostly zero, a map shrinks to a fiftieth.
    buffer = io.BytesIO()
    np.save(buffer, probability, allow_pickle=False)
    body = zlib.compress(buffer.getbuffer(), 2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = write_failure(path.parent, error)
        raise DataError(f"Cannot make the folder {path.parent}: {reason}.") from error
    with open_atomic(path, overwrite=True) as stream:
        stream.write(_head(key, body) + b"\n" + body)


def _head(key: str, body: bytes) -> bytes:
    return f"wmh-lora-map {key} {hashlib.sha256(body).hexdigest()}".encode()
