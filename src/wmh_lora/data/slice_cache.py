"""Labelled scans on the network's grid, in files that every process maps into its memory.

A file is found by the contents of what it is made from and by the settings, so that a common folder
serves many runs. Lesions, other structures and T1 have files of their own: a run that asks for more
adds what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wmh_lora.config import PreprocessConfig
from wmh_lora.config_reading import from_dict, to_dict
from wmh_lora.data.manifest import Scan
from wmh_lora.data.sources import LabelledScans, read_masks
from wmh_lora.data.synthesis import IGNORED
from wmh_lora.files import open_atomic
from wmh_lora.preprocess import Prepared, preprocess, to_model_grid
from wmh_lora.t1 import T1_VERSION, prepare_t1
from wmh_lora.volume import Volume

__all__ = ["CachedScan", "ScanCache"]

_FORMAT = 1


@dataclass(frozen=True)
class _Entry:
    """What the cache says about a scan beside its arrays.

    Attributes
    ----------
    context_offset
        Distance of the neighbours in slices.
    count
        Slices.
    lesion
        Slices that hold a lesion.
    """

    context_offset: int
    count: int
    lesion: tuple[int, ...]


@dataclass(frozen=True)
class CachedScan:
    """A scan in the cache.

    Attributes
    ----------
    context_offset, count, lesion
        Distance of the neighbours in slices, slices in all, and those that hold a lesion.
    files
        NumPy files (S, H, W) by what they hold: ``image`` float32 in [0, 1]; ``target`` float16,
        the share of a pixel that is lesion, NaN in other pathology; float16 shares of other
        structures by name; and ``t1`` float32 in [0, 1] where it was asked for and is there.
    """

    context_offset: int
    count: int
    lesion: tuple[int, ...]
    files: Mapping[str, Path]

    def array(self, what: str) -> npt.NDArray[Any]:
        """Map one of the files into memory."""
        mapped: npt.NDArray[Any] = np.load(self.files[what], mmap_mode="r")
        return mapped


class _Source:
    """A scan to be preprocessed, once and only if something is missing."""

    def __init__(self, image: Path, config: PreprocessConfig) -> None:
        self.image, self.config = image, config

    @cached_property
    def volume(self) -> Volume:
        return Volume.read(self.image)

    @cached_property
    def prepared(self) -> Prepared:
        return preprocess(self.volume, self.config)


class ScanCache:
    """Preprocessed scans in a folder.

    Parameters
    ----------
    folder
        Made when something is stored.
    config
        Of preprocessing, the same as at inference.
    """

    def __init__(self, folder: Path, config: PreprocessConfig) -> None:
        self.folder, self.config = folder, config

    def scan(
        self, part: LabelledScans, scan: Scan, structures: Sequence[str], *, t1: bool
    ) -> CachedScan:
        """Find a scan, after what is missing is made.

        Parameters
        ----------
        part, scan
            The scan, and what it is part of.
        structures
            Those wanted beside lesions; the scan may lack masks of them.
        t1
            Whether its T1 is wanted, if it has one.

        Raises
        ------
        DataError
            A file cannot be read, or the T1 shows another place than the FLAIR.
        """
        source = _Source(part.manifest.file(scan.image), self.config)
        key = self._key(scan.image_sha256, scan.mask_sha256)
        entry = self._entry(source, part.manifest.file(scan.mask), key)
        files = {what: self._file(key, what) for what in ("image", "target")}
        for name, mask in part.masks(scan):
            if name in structures and name != "wmh":
                hashes = scan.image_sha256, scan.structures_sha256[name]
                files[name] = self._file(self._key(*hashes), "mask")
                if not files[name].is_file():
                    labels = Volume.read(mask, allow_constant=True).data > 0
                    share = to_model_grid(labels, source.prepared)
                    _store(files[name], share.astype(np.float16))
        path = part.t1(scan) if t1 else None
        if path is not None:
            files["t1"] = self._file(self._key(scan.image_sha256, scan.t1_sha256, T1_VERSION), "t1")
            if not files["t1"].is_file():
                planes = prepare_t1(Volume.read(path), source.prepared, source.volume)
                _store(files["t1"], planes)
        return CachedScan(entry.context_offset, entry.count, entry.lesion, files)

    def _key(self, *contents: object) -> str:
        settings = [_FORMAT, to_dict(self.config)]
        text = json.dumps([*contents, *settings])
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def _file(self, key: str, what: str) -> Path:
        return self.folder / f"{key}_{what}.npy"

    def _entry(self, source: _Source, mask: Path, key: str) -> _Entry:
        """Read a scan's entry; make it, with image and target, where there is none."""
        path = self.folder / f"{key}.json"
        if path.is_file():
            return from_dict(_Entry, json.loads(path.read_text(encoding="utf-8")))
        self.folder.mkdir(parents=True, exist_ok=True)
        masks = read_masks(source.image, [("wmh", mask)]).masks
        prepared = source.prepared
        target = to_model_grid(masks["wmh"], prepared)
        lesion = np.flatnonzero((target > 0).any(axis=(1, 2)))
        target[to_model_grid(masks[IGNORED], prepared) >= 0.5] = np.nan
        _store(self._file(key, "image"), prepared.slices)
        # half precision is exact enough for the share of a pixel that is lesion
        _store(self._file(key, "target"), target.astype(np.float16))
        entry = _Entry(prepared.context_offset, len(target), tuple(lesion.tolist()))
        with open_atomic(path, overwrite=True) as stream:  # last: it says that the rest is there
            stream.write(json.dumps(to_dict(entry)).encode())
        return entry


def _store(path: Path, array: npt.NDArray[Any]) -> None:
    with open_atomic(path, overwrite=True) as stream:
        np.save(stream, array)
