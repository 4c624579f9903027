"""Anatomies on disk, found again by the contents of the files that they were made of.

Registering one takes seconds, and training draws from all of them in every run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from wmh_lora.data.anatomy import Anatomy, head_anatomy
from wmh_lora.data.real_painting import RealAnatomy, real_anatomy
from wmh_lora.data.sources import read_masks
from wmh_lora.files import file_sha256

__all__ = ["kept_head", "kept_scan"]


def kept_head(cache: Path, label_map: Path) -> Path:
    """Return the file of a head's `Anatomy`, made if this label map was not seen yet."""
    target = _place(cache, label_map.name.split(".")[0], [label_map])
    if not target.exists():
        _save(head_anatomy(label_map), target)
    return target


def kept_scan(cache: Path, image: Path, masks: Iterable[tuple[str, Path]]) -> Path | None:
    """Return the file of a real scan's `RealAnatomy`, or None where `real_anatomy` makes none."""
    files = dict(masks)
    target = _place(cache, "scan", (image, *files.values()))
    if not target.exists():
        anatomy = real_anatomy(read_masks(image, files.items()))
        if anatomy is None:
            return None
        _save(anatomy, target)
    return target


def _place(cache: Path, name: str, contents: Iterable[Path]) -> Path:
    digests = "".join(file_sha256(path) for path in contents)
    key = hashlib.sha256(digests.encode()).hexdigest()
    return cache / f"{name}-{key[:16]}.npz"


def _save(anatomy: Anatomy | RealAnatomy, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    anatomy.save(target)
