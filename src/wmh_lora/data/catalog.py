"""From a folder of labelled scans to a manifest: find them, read every file, say what is wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import numpy.typing as npt

from wmh_lora.data.layouts import Found, Listing, list_bids, list_challenge, list_flat
from wmh_lora.data.manifest import UNUSABLE, Manifest, Problem, Scan
from wmh_lora.errors import ConfigError, DataError, UnreadableImageError
from wmh_lora.files import IMAGE_SUFFIXES, file_sha256, images_below, read_tsv
from wmh_lora.logs import Progress
from wmh_lora.t1 import SMALLEST_OVERLAP, share_in_view
from wmh_lora.volume import Volume, grid_difference

__all__ = ["LAYOUTS", "LayoutName", "make_manifest"]

LayoutName = Literal["auto", "challenge", "bids", "flat"]
LAYOUTS: tuple[LayoutName, ...] = ("auto", "challenge", "bids", "flat")

_FOREGROUND, _IGNORED = 1, 2
_SHOWN = 5  # values or names in a message


def make_manifest(
    root: Path,
    layout: LayoutName = "auto",
    *,
    derivatives: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Find the labelled scans of a folder and read all of their files, one scan at a time.

    Parameters
    ----------
    root : Path
        The folder; see `wmh_lora.data.layouts` for how it may be arranged.
    layout : str
        A member of `LAYOUTS`; ``auto`` decides by what is there.
    derivatives : str, optional
        In BIDS, the pipeline whose masks are the reference; needed where there are several.
    progress : Progress, optional
        Called with (scans done, scans in all, name of the scan).

    Returns
    -------
    Manifest
        Scans that cannot be used are in it too, marked.

    Raises
    ------
    DataError
        The folder holds no scan, or cannot be listed.
    ConfigError
        The layout is unknown, or masks of several pipelines fit one scan.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"There is no layout {layout!r}; choose one of {', '.join(LAYOUTS)}.")
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the folder that holds the scans.")
    paths = sorted(PurePosixPath(p.relative_to(root).as_posix()) for p in images_below(root))
    chosen = _recognise(paths) if layout == "auto" else layout
    listing = _list(root, paths, chosen, derivatives)
    if not listing.scans:
        raise DataError(_nothing_found(root, paths, chosen))
    found = sorted(listing.scans, key=lambda f: (f.site, f.subject, f.session, f.run))
    _refuse_equal_names(found)
    scans = []
    for done, entry in enumerate(found):
        if progress is not None:
            progress(done, len(found), entry.subject)
        scans.append(_inspect(root, entry))
    return Manifest(
        root=root,
        layout=chosen,
        scans=tuple(_with_duplicates(scans)),
        unmatched_masks=tuple(map(str, listing.unmatched_masks)),
    )


# --- finding ----------------------------------------------------------------------------------


def _recognise(paths: Iterable[PurePosixPath]) -> LayoutName:
    """Say how a folder is arranged: the first of challenge and BIDS that has a mark, or flat."""
    bids = False
    for path in paths:
        name = path.name.lower()
        if name.startswith("wmh.nii") or (
            name.startswith("flair.nii") and path.parent.name in ("pre", "orig")
        ):
            return "challenge"
        bids |= path.parent.name == "anat" and name.startswith("sub-") and "_flair" in name
    return "bids" if bids else "flat"


def _list(
    root: Path, paths: list[PurePosixPath], layout: LayoutName, derivatives: str | None
) -> Listing:
    name = root.resolve().name
    if derivatives is not None and layout != "bids":
        raise ConfigError(f"--derivatives is for BIDS folders, but {root} is read as {layout}.")
    if layout == "challenge":
        return list_challenge(paths, name)
    if layout == "bids":
        datasets = {root, *(path.parent for path in root.glob("*/participants.tsv"))}
        sites: dict[tuple[str, str], str] = {}
        for dataset in datasets:
            sites |= _sites(root, dataset)
        return list_bids(paths, name, derivatives=derivatives, sites=sites)
    return list_flat(paths, name, channels=_channels(root))


def _sites(root: Path, dataset: Path) -> dict[tuple[str, str], str]:
    """Read the column site of a BIDS participants.tsv, if it has one."""
    table = dataset / "participants.tsv"
    try:
        rows = read_tsv(table)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"Cannot read {table} ({error}); correct or remove it.") from error
    place = "" if dataset == root else dataset.relative_to(root).as_posix()
    return {
        (place, f"sub-{row['participant_id'].removeprefix('sub-')}"): row["site"]
        for row in rows
        if row.get("participant_id") and row.get("site") not in (None, "", "n/a")
    }


def _channels(root: Path) -> dict[str, str] | None:
    """Read from an nnU-Net dataset.json which channel is the FLAIR and which the T1."""
    description = root / "dataset.json"
    try:
        document = json.loads(description.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {description} ({error}); correct or remove it.") from error
    is_table = isinstance(document, Mapping)
    names = (document.get("channel_names") or document.get("modality")) if is_table else None
    if not is_table or (isinstance(names, Mapping) and not all(map(str.isdecimal, names))):
        raise DataError(
            f"{description} does not number the channels as nnU-Net does, such as "
            '{"channel_names": {"0": "FLAIR"}}; correct or remove it.'
        )
    if not isinstance(names, Mapping):
        return None
    roles = {}
    for number, name in names.items():
        word = str(name).lower()
        role = "flair" if "flair" in word else "t1" if word in ("t1", "t1w", "mprage") else "other"
        roles[f"{int(number):04d}"] = role
    # One unnamed channel can only be the FLAIR.
    return roles if "flair" in roles.values() else None


def _nothing_found(root: Path, paths: list[PurePosixPath], layout: LayoutName) -> str:
    if not paths:
        return (
            f"No image in the folder {root}; expected files ending in {', '.join(IMAGE_SUFFIXES)}."
        )
    expected = {
        "challenge": "<site>/<subject>/wmh.nii.gz beside pre/FLAIR.nii.gz",
        "bids": "sub-*/[ses-*/]anat/*_FLAIR.nii.gz",
        "flat": "pairs such as X_FLAIR.nii.gz and X_mask.nii.gz, or folders images and labels",
    }[layout]
    return (
        f"None of the {len(paths)} images in {root} is a FLAIR of the layout {layout!r}, which "
        f"expects {expected}; check the folder, or choose another --layout."
    )


def _refuse_equal_names(found: list[Found]) -> None:
    names = Counter((entry.subject, entry.session, entry.run) for entry in found)
    for entry in found:
        key = (entry.subject, entry.session, entry.run)
        if names[key] > 1:
            same = [str(f.image) for f in found if (f.subject, f.session, f.run) == key]
            raise DataError(
                f"{' and '.join(same)} would both be called {entry.subject}; rename one, or "
                "prepare their folders apart."
            )


# --- reading ----------------------------------------------------------------------------------


def _inspect(root: Path, found: Found) -> Scan:
    """Read every file of a scan, and compare them."""
    problems: list[Problem] = []
    image = _read(root, found.image, "image", problems)
    mask: Volume | None = None
    if len(found.masks) == 1:
        mask = _read(root, found.masks[0], "mask", problems)
    elif found.masks:
        names = ", ".join(map(str, found.masks))
        problems.append(Problem("several-masks", f"{names} all fit; keep the one that counts"))
    else:
        problems.append(Problem("missing-mask", "no reference mask was found for it"))
    counts = _label_counts(mask, problems) if mask is not None else None
    volumes_ml: dict[int, float] = {}
    if image is not None and mask is not None and _on_one_grid(image, mask, problems):
        for label in (_FOREGROUND, _IGNORED) if counts is not None else ():
            volumes_ml[label] = round((counts or {}).get(label, 0) * image.voxel_volume_ml, 6)
        if volumes_ml.get(_FOREGROUND) == 0:
            problems.append(
                Problem("empty-mask", "its mask holds no lesion; check that this is so")
            )
    # Last, so that the mask is not held in memory beside it.
    del mask
    if found.t1 is not None:
        _check_t1(image, _read(root, found.t1, "t1", problems), problems)
    structures = _usable_structures(root, found, image, problems)
    mask_path = found.masks[0] if len(found.masks) == 1 else None
    return Scan(
        subject=found.subject,
        session=found.session,
        run=found.run,
        site=found.site,
        usable=not any(problem.code in UNUSABLE for problem in problems),
        image=str(found.image),
        image_sha256=_sha256(root, found.image),
        mask="" if mask_path is None else str(mask_path),
        mask_sha256=_sha256(root, mask_path),
        t1="" if found.t1 is None else str(found.t1),
        t1_sha256=_sha256(root, found.t1),
        structures={name: str(path) for name, path in structures.items()},
        structures_sha256={name: _sha256(root, path) for name, path in structures.items()},
        shape=None if image is None else image.shape,
        spacing_mm=None if image is None else _rounded(image.spacing_mm),
        reference_ml=volumes_ml.get(_FOREGROUND),
        ignored_ml=volumes_ml.get(_IGNORED),
        labels=tuple(sorted(counts)) if counts is not None else (),
        problems=tuple(problems),
    )


def _check_t1(image: Volume | None, t1: Volume | None, problems: list[Problem]) -> None:
    """Any grid will do, for the T1 is resampled, but it has to show the same region."""
    if image is None or t1 is None:
        return
    share = share_in_view(t1, image)
    if share < SMALLEST_OVERLAP:
        problems.append(
            Problem(
                "t1-apart",
                f"the T1 covers {100 * share:.0f} % of its field of view and is left out; register "
                "it, or correct its header",
            )
        )


def _usable_structures(
    root: Path, found: Found, image: Volume | None, problems: list[Problem]
) -> dict[str, PurePosixPath]:
    """Masks of other structures that can be read and are on the image's grid."""
    usable = {}
    for name, path in sorted(found.structures.items()):
        mask = _read(root, path, "structure", problems)
        if mask is None or image is None:
            continue
        if differs := grid_difference(image, mask):
            problems.append(Problem("structure-grid", f"image and mask of {name}: {differs}"))
        else:
            usable[name] = path
    return usable


def _read(root: Path, path: PurePosixPath, kind: str, problems: list[Problem]) -> Volume | None:
    try:
        return Volume.read(root / path, allow_constant=kind in ("mask", "structure"))
    except UnreadableImageError as error:
        # Where the folder lay on somebody's disk is nobody's business.
        message = str(error).replace(str(root / path), str(path))
        problems.append(Problem(f"unreadable-{kind}", message))
        return None


def _sha256(root: Path, path: PurePosixPath | None) -> str:
    try:
        return "" if path is None else file_sha256(root / path)
    except OSError:  # told as unreadable already
        return ""


def _rounded(spacing_mm: tuple[float, float, float]) -> tuple[float, float, float]:
    i, j, k = (round(length, 4) for length in spacing_mm)
    return i, j, k


def _label_counts(mask: Volume, problems: list[Problem]) -> dict[int, int] | None:
    """Count voxels by value; None, with a problem, where a value is no label of a lesion mask."""
    values, counts = _distinct(mask.data)
    labels = np.rint(values)
    known = np.isin(labels, (_FOREGROUND, _IGNORED)) & np.isclose(values, labels, atol=1e-3)
    if (known | (values == 0)).all():
        found: Counter[int] = Counter()
        for label, count in zip(labels, counts):
            found[int(label)] += int(count)
        return dict(found)
    shown = ", ".join(f"{value:g}" for value in values[:_SHOWN])
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    problems.append(
        Problem(
            "label-values",
            f"{mask.path.name if mask.path else 'the mask'} holds the values {shown}{more}; save "
            "it with 0 background, 1 lesion and, if need be, 2 to ignore",
        )
    )
    return None


def _distinct(
    data: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return the distinct values of a volume and their counts; zeros are not sorted, being most."""
    others = data[data != 0]
    values, counts = np.unique(others, return_counts=True)
    zeros = data.size - others.size
    if zeros:
        values, counts = np.append(values, np.float32(0)), np.append(counts, zeros)
    order = np.argsort(values, kind="stable")
    return values[order], counts[order]


def _on_one_grid(image: Volume, mask: Volume, problems: list[Problem]) -> bool:
    if (difference := grid_difference(image, mask)) is None:
        return True
    problems.append(Problem("grid-mismatch", f"image and mask: {difference}; resample the mask"))
    return False


def _with_duplicates(scans: list[Scan]) -> list[Scan]:
    """Note at each scan which others have the same image file."""
    same: defaultdict[str, list[str]] = defaultdict(list)
    for scan in scans:
        if scan.image_sha256:
            same[scan.image_sha256].append(scan.name)
    noted = []
    for scan in scans:
        others = [name for name in same[scan.image_sha256] if name != scan.name]
        if others:
            more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
            names = ", ".join(others[:_SHOWN])
            message = f"the same image file as {names}{more}; a split keeps them together"
            problems = (*scan.problems, Problem("duplicate-image", message))
            scan = dataclasses.replace(scan, problems=problems)
        noted.append(scan)
    return noted
