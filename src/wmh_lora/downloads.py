"""Fetching one published file over HTTP: resumed, verified, and in its place only when complete.

What has arrived is kept as ``<file>.part`` beside the target, so that an interrupted download goes
on where it ended, whichever mirror then serves it. Size and checksum are known beforehand: a server
that announces another size is not read, and a file with another checksum is not kept.

Proxies are those of the environment (``HTTPS_PROXY``, ``HTTP_PROXY``, ``NO_PROXY``), certificates
those of the system or of ``SSL_CERT_FILE``.
"""

from __future__ import annotations

import errno
import http.client
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from wmh_lora._version import __version__
from wmh_lora.errors import ChecksumError, WeightsError
from wmh_lora.files import file_digest
from wmh_lora.logs import LOGGER, Progress

__all__ = ["PublishedFile", "download"]

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 60.0  # without a single byte
_ATTEMPTS = 3  # in a row that bring nothing, until a mirror is given up
_PAUSE_S = 2.0
_BUSY = (429, 500, 502, 503, 504)  # HTTP states that may be over in a moment


@dataclass(frozen=True)
class PublishedFile:
    """A file on the web, and how to know it.

    Attributes
    ----------
    urls : tuple of str
        Mirrors, the preferred one first.
    size_bytes : int
        Size of the file.
    checksum : str
        Algorithm and hexadecimal digest, such as ``sha256:9f86d0...``; md5, sha1, sha256 and sha512
        will do. Empty where the publisher gives none: the size alone is checked then.
    """

    urls: tuple[str, ...]
    size_bytes: int
    checksum: str

    def matches(self, path: Path) -> bool:
        """Tell whether a file is this one, byte for byte."""
        return path.stat().st_size == self.size_bytes and (
            not self.checksum or self.checksum_of(path) == self.checksum
        )

    def checksum_of(self, path: Path) -> str:
        """Return the checksum of a file in the notation, and by the algorithm, of this one's."""
        algorithm = self.checksum.partition(":")[0]
        return f"{algorithm}:{file_digest(path, algorithm)}"


class _MirrorError(Exception):
    """One mirror cannot give the file."""


class _InterruptedError(_MirrorError):
    """The transfer broke off, or the server is busy: the same mirror may do better soon."""


def download(
    file: PublishedFile, target: Path, *, progress: Progress | None = None, lock: bool = True
) -> None:
    """Fetch a file into its place, or go on with fetching it.

    Parameters
    ----------
    file : PublishedFile
        What to fetch.
    target : Path
        Its place; the folder exists. A file that is there is replaced, unless it is the right one.
    progress : Progress, optional
        Called with (bytes there, bytes in all, name of the file).
    lock : bool
        Let processes that want the same file wait for the one that is fetching it. This leaves an
        empty hidden file beside it.

    Raises
    ------
    ChecksumError
        If the mirrors serve another file; nothing is kept then.
    WeightsError
        If no mirror can be reached or has the file. What has arrived is kept for the next time.
    OSError
        If the folder cannot be written, or the disk is too small.
    """
    with _alone(target) if lock else nullcontext():
        if _is_complete(target, file):  # another process was faster
            return
        part = target.with_name(f"{target.name}.part")
        problems: list[WeightsError] = []
        for url in file.urls:
            try:
                _fetch(url, part, file, progress)
            except WeightsError as error:
                problems.append(error)
                continue
            part.replace(target)
            return
    raise _worst(problems)


def _worst(problems: Sequence[WeightsError]) -> WeightsError:
    """Join what went wrong at the mirrors; a wrong checksum is what has to be known first."""
    wrong = [error for error in problems if isinstance(error, ChecksumError)]
    if wrong:
        return wrong[0]
    return WeightsError(" ".join(str(error) for error in problems))


def _is_complete(path: Path, file: PublishedFile) -> bool:
    try:
        return file.matches(path)
    except FileNotFoundError:
        return False


def _fetch(url: str, part: Path, file: PublishedFile, progress: Progress | None) -> None:
    """Complete the part from one mirror, and verify it."""
    resumed = _size(part) > 0
    while True:
        _receive_all(url, part, file, progress)
        if file.matches(part):
            return
        found = file.checksum_of(part)
        part.unlink()
        if not resumed:
            raise ChecksumError(
                f"{url} served another file: expected {file.checksum}, found {found}; nothing "
                "was kept. Check for a proxy that alters downloads."
            )
        resumed = False  # the part may have been damaged: once more, from the start


def _receive_all(url: str, part: Path, file: PublishedFile, progress: Progress | None) -> None:
    """Receive until the part has the expected size, over as many connections as that takes."""
    name = part.name.removesuffix(".part")
    failures = 0
    while (have := _size(part)) != file.size_bytes:
        if have > file.size_bytes:
            part.unlink()
            have = 0
        _check_space(part, file.size_bytes - have)
        try:
            _receive(url, part, have, file.size_bytes, name, progress)
        except _InterruptedError as error:
            failures = 0 if _size(part) > have else failures + 1
            if failures == _ATTEMPTS:
                raise WeightsError(f"{url}: {error}.") from error
            time.sleep(_PAUSE_S)
        except _MirrorError as error:
            raise WeightsError(f"{url}: {error}.") from error


def _receive(
    url: str, part: Path, have: int, size: int, name: str, progress: Progress | None
) -> None:
    """Receive over one connection what it gives, appended to the `have` bytes that are there."""
    response = _request(url, have)
    with response:
        start = _start_of_body(response, have, size)
        with part.open("r+b" if part.exists() else "xb") as stream:
            stream.truncate(start)
            stream.seek(start)
            _copy(response, stream, start, size, name, progress)
            stream.flush()
            os.fsync(stream.fileno())


def _request(url: str, have: int) -> http.client.HTTPResponse:
    # A range of a compressed transfer would be a range of other bytes.
    headers = {"User-Agent": f"wmh-lora/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    # An opener of its own: urlopen() keeps the proxies that it saw when it was first called.
    opener = urllib.request.build_opener()
    try:
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            message = f"the server answered {error.code} {error.reason}"
        kind = _InterruptedError if error.code in _BUSY else _MirrorError
        raise kind(message) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise _InterruptedError(f"no connection ({reason})") from error
    assert isinstance(response, http.client.HTTPResponse)
    return response


def _start_of_body(response: http.client.HTTPResponse, have: int, size: int) -> int:
    """Where in the file the answer begins; refuse an answer of another file than the expected."""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers["Content-Range"] or "")
        if match is None or int(match[1]) != have:
            raise _MirrorError("the server sent another part of the file than was asked for")
        total = size if match[2] == "*" else int(match[2])
        start = have
    else:  # the whole file, from a server that does not know ranges
        total = int(response.headers["Content-Length"] or size)
        start = 0
    if total != size:
        raise _MirrorError(f"the file has {total} bytes there, expected {size}")
    return start


def _copy(
    response: http.client.HTTPResponse,
    stream: BinaryIO,
    done: int,
    size: int,
    name: str,
    progress: Progress | None,
) -> None:
    while done < size:
        try:
            chunk = response.read(min(_CHUNK_BYTES, size - done))
        except (OSError, http.client.HTTPException) as error:
            raise _InterruptedError(
                f"the connection broke off after {done} of {size} bytes"
            ) from error
        if not chunk:
            raise _InterruptedError(f"the connection broke off after {done} of {size} bytes")
        stream.write(chunk)
        done += len(chunk)
        if progress is not None:
            progress(done, size, name)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_space(part: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(part.parent).free
    if free_bytes < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{needed_bytes / 1e6:.0f} MB are needed in {part.parent}, "
            f"{free_bytes / 1e6:.0f} MB are free",
        )


# --- one process at a time --------------------------------------------------------------------


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Keep other processes from fetching the same file while the block runs.

    The lock is the system's, so it ends with the process, however that ends. Its empty file stays:
    removing it would let two others lock two files of the same name.
    """
    with target.with_name(f".{target.name}.lock").open("ab") as stream:
        waited = False
        while not _try_lock(stream):
            if not waited:
                LOGGER.warning("Another process is fetching %s; waiting for it.", target.name)
            waited = True
            time.sleep(0.2)
        yield


if sys.platform == "win32":
    import msvcrt

    def _try_lock(stream: BinaryIO) -> bool:
        try:
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

else:
    import fcntl

    def _try_lock(stream: BinaryIO) -> bool:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
