"""Names of image files, the search for them in folders, and safe writing.

Nothing heavy is imported here, so that the command line may use it before it needs an image.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from wmh_lora.errors import DataError

__all__ = [
    "IMAGE_SUFFIXES",
    "file_digest",
    "file_sha256",
    "find_images",
    "image_stem",
    "image_suffix",
    "images_below",
    "is_folder",
    "move_new",
    "open_atomic",
    "printable",
    "read_tsv",
    "write_failure",
]

#: File name endings that `wmh_lora.volume.Volume.read` understands, in any letter case.
IMAGE_SUFFIXES: tuple[str, ...] = (".nii.gz", ".nii", ".mgz", ".mgh", ".nrrd")

# What lies beside the scans and is no input: segmentations, ours among them, and scans resampled
# between two visits by `wmh-lora longitudinal`.
_NO_INPUT = re.compile(r"_(?:mask|probseg|dseg|space-halfway)(?:[_.]|$)")


def read_tsv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a BIDS table, in which quotes mean nothing."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))


def image_suffix(path: str | os.PathLike[str]) -> str | None:
    """Return the member of `IMAGE_SUFFIXES` that the file name ends in, or None.

    Examples
    --------
    >>> image_suffix("scan.NII.GZ")
    '.nii.gz'
    >>> image_suffix("scan.dcm") is None
    True
    """
    name = Path(path).name.lower()
    return next((suffix for suffix in IMAGE_SUFFIXES if name.endswith(suffix)), None)


def image_stem(path: str | os.PathLike[str]) -> str:
    """Return the file name without extension and without a trailing ``_FLAIR`` (or ``_flair``).

    Dots inside the name stay; a file called only ``FLAIR.nii.gz`` keeps its name.

    Examples
    --------
    >>> image_stem("study/sub-01_FLAIR.nii.gz")
    'sub-01'
    >>> image_stem("FLAIR.nii.gz")
    'FLAIR'
    >>> image_stem("scan.v2.mgz")
    'scan.v2'
    """
    stem = _bare_name(Path(path))
    return re.sub(r"(?<=.)_(?:FLAIR|flair)$", "", stem)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Expand folders into the images to segment; keep files as they are given.

    A folder is searched with all its subfolders. Hidden entries, ``derivatives`` folders below the
    given one and label files (``_mask``, ``_probseg``, ``_dseg`` in the name) are left out. Where
    any image below the given folder is called ``*_FLAIR`` or ``FLAIR`` (BIDS), only such images are
    taken, so that a T1w of a subject without FLAIR is not segmented by mistake.

    Parameters
    ----------
    paths : sequence of Path
        Files and folders. A path that does not exist counts as a file: reading it gives the error,
        and the rest of a batch is still done.

    Returns
    -------
    list of Path
        In the order given, each folder's images sorted, duplicates dropped.

    Raises
    ------
    DataError
        A folder holds no image, or cannot be listed.
    """
    found: list[Path] = []
    for path in paths:
        found.extend(_images_to_segment(path) if is_folder(path) else [path])
    return list(dict.fromkeys(found))


def printable(name: str) -> str:
    r"""Write a file name so that it can be encoded: what is no UTF-8 in it as escapes.

    Examples
    --------
    >>> printable("M\udcfcller.nii")
    'M\\udcfcller.nii'
    """
    return name.encode("utf-8", "backslashreplace").decode()


def is_folder(path: Path) -> bool:
    """Say whether a path leads to a folder; where the file system refuses to tell, to none."""
    try:
        return path.is_dir()
    except OSError:  # no permission, or too long a name
        return False


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    return file_digest(path, "sha256")


def file_digest(path: str | os.PathLike[str], algorithm: str) -> str:
    """Return a checksum of a file's bytes in hexadecimal; ``algorithm`` as in `hashlib`."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with Path(path).open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def open_atomic(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only once it is complete.

    The bytes go to a temporary file in the same folder, which is renamed at the end of the ``with``
    block, or removed when anything goes wrong, an interruption included. The block should do
    nothing but write: an `OSError` in it is reported as a failure to write `path`.

    Parameters
    ----------
    path : path-like
        The final name. Its folder must exist.
    overwrite : bool
        Replace a file that exists.

    Raises
    ------
    DataError
        The target exists, or the file system refuses (no space, no permission, no folder).
    """
    target = Path(path)
    if is_folder(target):
        raise DataError(f"Cannot write {target}: it is a folder; choose another name.")
    if not overwrite and os.path.lexists(target):
        raise _exists(target)
    temporary = target.with_name(f".wmh-lora-{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as stream:
            yield stream
            # Network file systems report a full disk or a quota only when data are forced out.
            stream.flush()
            os.fsync(stream.fileno())
        if overwrite:
            temporary.replace(target)
        else:
            move_new(temporary, target)
    except OSError as error:
        raise DataError(f"Cannot write {target}: {write_failure(target, error)}.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def move_new(temporary: Path, target: Path) -> None:
    """Give a finished file its name; the temporary one may stay behind, to be removed.

    Raises
    ------
    DataError
        If another process has taken the name in the meantime.
    OSError
        If the file system refuses.
    """
    try:
        os.link(temporary, target)
    except FileExistsError as error:
        raise _exists(target) from error
    except OSError:  # no links on this file system
        temporary.replace(target)


def _exists(target: Path) -> DataError:
    return DataError(
        f"{target} exists already and is left as it is; add --overwrite to replace it, "
        "or choose another output folder."
    )


def _bare_name(path: Path) -> str:
    suffix = image_suffix(path)
    return path.name[: -len(suffix)] if suffix else path.stem


def images_below(folder: Path, *, skip: Collection[str] = ()) -> Iterator[Path]:
    """Find the image files in a folder and below it, in a fixed order, hidden ones left out.

    Links to folders are followed (studies are often assembled from links), each folder once.

    Parameters
    ----------
    folder : Path
        Where to look.
    skip : collection of str
        Names of folders that are not entered.

    Raises
    ------
    DataError
        If a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise DataError(
            f"Cannot list the folder {error.filename}: {error.strerror}; check its permissions."
        ) from error

    seen: set[str] = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # links may lead in circles
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n not in skip)
        for name in sorted(names):
            if image_suffix(name) is not None and not name.startswith("."):
                yield Path(root, name)


def _images_to_segment(folder: Path) -> list[Path]:
    images = [
        path
        for path in images_below(folder, skip=("derivatives",))
        if not _NO_INPUT.search(path.name)
    ]
    flairs = [path for path in images if _is_named_flair(path)]
    if not images:
        raise DataError(
            f"No image to segment in the folder {folder}; expected files ending in "
            f"{', '.join(IMAGE_SUFFIXES)} that are not label files."
        )
    return sorted(flairs or images)


def _is_named_flair(path: Path) -> bool:
    return f"_{_bare_name(path)}".lower().endswith("_flair")


def write_failure(target: Path, error: OSError) -> str:
    """Say in words why the file system refused to write `target`, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space is left on the disk; free some, or choose another output folder"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write in {target.parent}; choose another output folder"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"{target.parent} is not an existing folder; create it first"
    return f"{error.strerror or error}; choose another output folder"
