"""Unpacking a ZIP archive from elsewhere without trusting what it says."""

from __future__ import annotations

import re
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from wmh_lora.errors import DataError
from wmh_lora.files import open_atomic
from wmh_lora.logs import Progress

__all__ = ["MAX_UNPACKED_BYTES", "extract_zip", "safe_path"]

#: More than any archive of labelled scans that this is for; the challenge's data have 9 GB.
MAX_UNPACKED_BYTES = 64 * 10**9
_MAX_MEMBERS = 200_000
_CHUNK_BYTES = 1 << 20
_UNSAFE = re.compile(r'[\x00-\x1f<>:"|?*\\]')


def safe_path(name: str) -> PurePosixPath:
    """Return a path from elsewhere as one that stays below a folder, on every file system.

    Dots and spaces at the end of a name, which Windows cannot store, are dropped.

    Raises
    ------
    ValueError
        The path is empty or absolute, leads upward, or has characters that some systems refuse.

    Examples
    --------
    >>> str(safe_path("test/Philips_VU .PETMR_01./161/wmh.nii.gz"))
    'test/Philips_VU .PETMR_01/161/wmh.nii.gz'
    """
    parts = [part.rstrip(". ") for part in name.split("/")]
    if not all(parts) or _UNSAFE.search(name):
        raise ValueError(f"{name!r} is not a path below a folder")
    return PurePosixPath(*parts)


def extract_zip(
    archive: Path,
    folder: Path,
    *,
    max_bytes: int = MAX_UNPACKED_BYTES,
    progress: Progress | None = None,
) -> list[PurePosixPath]:
    """Unpack an archive, every file complete and verified (CRC-32) before it has its name.

    Files that are there already are kept if they are the same, so that an interrupted extraction
    can be repeated.

    Parameters
    ----------
    archive : Path
        The ZIP file.
    folder : Path
        Where its files go; it exists.
    max_bytes : int
        Largest size, all files together, that the archive may announce.
    progress : Progress, optional
        Called with (bytes done, bytes in all, name of the file).

    Returns
    -------
    list of PurePosixPath
        The files, below `folder`.

    Raises
    ------
    DataError
        The archive is damaged or encrypted, holds links or paths that lead elsewhere, would be too
        large, or has a file that differs from one that is there. Nothing is written before all
        names and sizes are checked.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = _checked(archive, opened, max_bytes)
            _check_space(archive, folder, sum(info.file_size for info in members.values()))
            total, done = sum(info.file_size for info in members.values()), 0
            for path, info in members.items():
                if progress is not None:
                    progress(done, total, path.name)
                _extract(opened, info, folder / path)
                done += info.file_size
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DataError(f"{archive} is a damaged archive ({error}); fetch it again.") from error
    return list(members)


def _checked(
    archive: Path, opened: zipfile.ZipFile, max_bytes: int
) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """Return the files of an archive by path, or refuse all of it."""
    infos = [info for info in opened.infolist() if not info.is_dir()]
    size_bytes = sum(info.file_size for info in infos)
    if len(infos) > _MAX_MEMBERS or size_bytes > max_bytes:
        raise DataError(
            f"{archive} announces {len(infos):,} files of {size_bytes:,} bytes, where at most "
            f"{_MAX_MEMBERS:,} of {max_bytes:,} are unpacked; check what it is."
        )
    members: dict[PurePosixPath, zipfile.ZipInfo] = {}
    names: set[str] = set()
    for info in infos:
        try:
            path = safe_path(info.filename)
        except ValueError as error:
            raise DataError(f"{archive} is refused: {error}.") from error
        if stat.S_ISLNK(info.external_attr >> 16) or info.flag_bits & 1:
            raise DataError(f"{archive} is refused: {info.filename} is a link or encrypted.")
        if str(path).casefold() in names:
            raise DataError(f"{archive} is refused: it holds {path} twice.")
        names.add(str(path).casefold())
        members[path] = info
    return members


def _check_space(archive: Path, folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise DataError(
            f"{archive} needs {needed_bytes / 1e9:.1f} GB in {folder}, {free_bytes / 1e9:.1f} GB "
            "are free; make room, or choose another folder."
        )


def _extract(opened: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    if target.is_file():
        if target.stat().st_size == info.file_size and _crc(target) == info.CRC:
            return
        raise DataError(
            f"{target} exists already and differs from the archive's; remove it, or choose another "
            "folder."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # The reader stops at the announced size and then compares the checksum.
    with opened.open(info) as source, open_atomic(target) as stream:
        shutil.copyfileobj(source, stream, _CHUNK_BYTES)


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc
