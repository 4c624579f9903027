"""Getting the data of the WMH Segmentation Challenge, from where its owners published them.

From DataverseNL, every file is compared with the checksum in the published list. From Kaggle, the
user names a copy and brings credentials; a ZIP's own checksums are all that can be compared there.
Whatever goes wrong is an error: nothing else is ever put in place of the data.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from wmh_lora._version import __version__
from wmh_lora.data.archives import extract_zip, safe_path
from wmh_lora.downloads import PublishedFile, download
from wmh_lora.errors import ConfigError, DataError, WeightsError
from wmh_lora.files import open_atomic
from wmh_lora.logs import Progress

__all__ = [
    "CHALLENGE_DOI",
    "DATAVERSE_SERVER",
    "KAGGLE_SERVER",
    "LICENCE_NOTICE",
    "RemoteFile",
    "fetch_dataverse",
    "fetch_kaggle",
    "kaggle_credentials",
    "list_dataverse",
]

CHALLENGE_DOI = "doi:10.34894/AECRSD"
DATAVERSE_SERVER = "https://dataverse.nl"
KAGGLE_SERVER = "https://www.kaggle.com"

LICENCE_NOTICE = f"""\
Data of the White Matter Hyperintensity (WMH) Segmentation Challenge
  source    https://doi.org/{CHALLENGE_DOI.removeprefix("doi:")}
  licence   CC BY-NC 4.0, https://creativecommons.org/licenses/by-nc/4.0/
  cite      Kuijf et al., IEEE Transactions on Medical Imaging 38 (2019),
            doi:10.1109/TMI.2019.2905770
You may use them with attribution and for non-commercial purposes only. The term also binds weights
that are trained on them: say so where you pass such weights on. These are scans of people: do not
try to identify them."""

_RECORD = "source.json"
_TIMEOUT_S = 60.0
_MAX_LIST_BYTES = 64 << 20
_ALGORITHMS = {"MD5": "md5", "SHA-1": "sha1", "SHA-256": "sha256", "SHA-512": "sha512"}
# What training and evaluation read; the 3-D T1 scans, masks of defaced regions, registrations and
# the scans without bias correction make up most of the rest.
_NEEDED = re.compile(r"(?:.*/)?(?:pre/(?:FLAIR|T1)\.nii\.gz|wmh\.nii\.gz|readme\.pdf)")
_KAGGLE_NAME = re.compile(r"[\w-]+/[\w-]+")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a Dataverse data set.

    Attributes
    ----------
    path : PurePosixPath
        Its place below the data set's folder.
    identifier : int
        Number by which the server knows it.
    size_bytes : int
        Its size.
    checksum : str
        Algorithm and digest, such as ``sha1:2fd4e1...``.
    restricted : bool
        Whether the server refuses it to strangers.
    """

    path: PurePosixPath
    identifier: int
    size_bytes: int
    checksum: str
    restricted: bool


# --- Dataverse --------------------------------------------------------------------------------


def list_dataverse(server: str, doi: str) -> tuple[tuple[RemoteFile, ...], str]:
    """Ask a Dataverse server for the files of a data set's latest version, and for its licence.

    Returns
    -------
    files : tuple of RemoteFile
        Sorted by path.
    licence : str
        Name of the licence; empty where the server does not tell.

    Raises
    ------
    DataError
        The server cannot be reached, or its answer is not such a list.
    """
    query = urllib.parse.urlencode({"persistentId": doi})
    document = _get_json(f"{server}/api/datasets/:persistentId/?{query}")
    try:
        version = document["data"]["latestVersion"]
        files = sorted((_remote_file(row) for row in version["files"]), key=lambda f: f.path)
        licence = version.get("license") or ""
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{server} answered with a list of files that cannot be read ({error!r}); its API may "
            f"have changed. Fetch {doi} with a browser."
        ) from error
    if not files:
        raise DataError(f"{server} lists no file in {doi}; check the identifier.")
    return tuple(files), str(licence["name"] if isinstance(licence, dict) else licence)


def _remote_file(row: Mapping[str, Any]) -> RemoteFile:
    file = row["dataFile"]
    folder, name = row.get("directoryLabel") or "", row.get("label") or file["filename"]
    algorithm = _ALGORITHMS[file["checksum"]["type"]]
    return RemoteFile(
        path=safe_path(f"{folder}/{name}" if folder else name),
        identifier=int(file["id"]),
        size_bytes=int(file["filesize"]),
        checksum=f"{algorithm}:{str(file['checksum']['value']).lower()}",
        restricted=bool(row.get("restricted", False)),
    )


def fetch_dataverse(
    folder: Path,
    *,
    everything: bool = False,
    server: str = DATAVERSE_SERVER,
    doi: str = CHALLENGE_DOI,
    progress: Progress | None = None,
) -> list[PurePosixPath]:
    """Fetch the files of a data set, and compare every one with its published checksum.

    Files that are there and right are not fetched again; an interrupted file goes on where it
    ended.

    Parameters
    ----------
    folder : Path
        Where they go; made if needed.
    everything : bool
        All files, instead of FLAIR, T1 (both of ``pre/``), reference masks and the description.
    server, doi : str
        Where the data set is.
    progress : Progress, optional
        Called with (bytes there, bytes in all, path of the file).

    Returns
    -------
    list of PurePosixPath
        The files, below `folder`.

    Raises
    ------
    DataError
        The server cannot be reached, refuses a file or serves another one than the published, or
        another file is in the way. What has arrived is kept.
    """
    files, licence = list_dataverse(server, doi)
    chosen = [f for f in files if everything or _NEEDED.fullmatch(str(f.path))]
    if not chosen:
        raise DataError(
            f"None of the {len(files)} files of {doi} is a FLAIR, T1 or mask of the challenge; "
            "fetch everything (--all) and look."
        )
    if refused := [str(file.path) for file in chosen if file.restricted]:
        raise DataError(
            f"{server} restricts access to {len(refused)} files of {doi}, {refused[0]} among them; "
            "ask for access with a browser."
        )
    total, done = sum(file.size_bytes for file in chosen), 0
    for file in chosen:

        def show(have: int, _: int, __: str, file: RemoteFile = file, before: int = done) -> None:
            if progress is not None:
                progress(before + have, total, str(file.path))

        _fetch(file, folder, server, show)
        done += file.size_bytes
        show(0, 0, "", before=done)
    origin = {"source": server, "identifier": doi, "licence": licence}
    _record(folder, origin, {str(file.path): file.checksum for file in chosen})
    return [file.path for file in chosen]


def _fetch(file: RemoteFile, folder: Path, server: str, progress: Progress) -> None:
    url = f"{server}/api/access/datafile/{file.identifier}"
    published = PublishedFile((url,), file.size_bytes, file.checksum)
    target = folder / file.path
    if target.exists():
        if published.matches(target):
            return
        raise DataError(
            f"{target} exists already and is not the published file; remove it, or choose another "
            "folder."
        )
    _download(published, target, progress)


# --- Kaggle -----------------------------------------------------------------------------------


def kaggle_credentials(
    environment: Mapping[str, str] = os.environ, home: Path | None = None
) -> tuple[str, str]:
    """Return the user's own Kaggle name and key.

    They are looked for in KAGGLE_USERNAME and KAGGLE_KEY, then in ``~/.kaggle/kaggle.json``.

    Raises
    ------
    ConfigError
        There are none.
    """
    name, key = environment.get("KAGGLE_USERNAME"), environment.get("KAGGLE_KEY")
    if name and key:
        return name, key
    path = (home or Path.home()) / ".kaggle" / "kaggle.json"
    try:
        document = json.loads(path.read_bytes())
        return str(document["username"]), str(document["key"])
    except FileNotFoundError as error:
        raise ConfigError(
            "Kaggle wants your own credentials: set KAGGLE_USERNAME and KAGGLE_KEY, or save the "
            f"token from your account's settings as {path}."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} holds no Kaggle credentials (user name and key as JSON); save the token from "
            "your account's settings there again."
        ) from error


def fetch_kaggle(
    folder: Path,
    dataset: str,
    credentials: tuple[str, str],
    *,
    server: str = KAGGLE_SERVER,
    progress: Progress | None = None,
) -> list[PurePosixPath]:
    """Fetch a copy of the challenge data from Kaggle and unpack it.

    Parameters
    ----------
    folder : Path
        Where the files go; made if needed.
    dataset : str
        ``OWNER/NAME`` of the copy.
    credentials : tuple of str
        User name and key. They are sent to `server` alone, not to where it redirects.
    server : str
        Where Kaggle is.
    progress : Progress, optional
        Called with (bytes there, bytes in all, name of the file).

    Returns
    -------
    list of PurePosixPath
        The files, below `folder`.

    Raises
    ------
    ConfigError
        `dataset` is not of the form ``OWNER/NAME``.
    DataError
        Kaggle cannot be reached or refuses, or the archive is damaged or unsafe.
    """
    if not _KAGGLE_NAME.fullmatch(dataset):
        raise ConfigError(f"{dataset!r} is not a data set on Kaggle; write OWNER/NAME.")
    place = _kaggle_archive(f"{server}/api/v1/datasets/download/{dataset}", credentials)
    archive = folder / f"{dataset.replace('/', '_')}.zip"
    _download(PublishedFile((place,), _announced_size(place), ""), archive, progress)
    try:
        paths = extract_zip(archive, folder, progress=progress)
    finally:
        # Kept, a bad archive would be taken for complete the next time.
        archive.unlink(missing_ok=True)
    _record(folder, {"source": server, "identifier": dataset, "licence": ""}, map(str, paths))
    return paths


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Stops at a redirection, so that credentials are not sent on."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _kaggle_archive(url: str, credentials: tuple[str, str]) -> str:
    """Ask Kaggle where an archive lies; the address it gives needs no credentials."""
    token = base64.b64encode(":".join(credentials).encode()).decode()
    request = _request(url, {"Authorization": f"Basic {token}"})
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=_TIMEOUT_S):
            raise DataError(f"{url} answered without naming an archive; Kaggle may have changed.")
    except urllib.error.HTTPError as error:
        with error:
            place = str(error.headers["Location"] or "")
        if 300 <= error.code < 400 and place:
            return urllib.parse.urljoin(url, place)
        advice = {
            401: "check the user name and the key",
            403: "accept the data set's terms on its page",
            404: "check OWNER/NAME",
        }.get(error.code, "try again later")
        raise DataError(f"{url}: Kaggle answered {error.code} {error.reason}; {advice}.") from error
    except (OSError, http.client.HTTPException) as error:
        raise DataError(_unreachable(url, error)) from error


def _announced_size(url: str) -> int:
    """Ask for the size of a file; some stores answer GET alone, so the body is left unread."""
    try:
        with urllib.request.build_opener().open(_request(url), timeout=_TIMEOUT_S) as response:
            return int(response.headers["Content-Length"])
    except (OSError, http.client.HTTPException) as error:
        raise DataError(_unreachable(_without_query(url), error)) from error
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{_without_query(url)} does not tell the size of the archive, so it cannot be "
            "checked; fetch it with a browser."
        ) from error


def _without_query(url: str) -> str:
    """Drop the signature from an address that is shown."""
    return url.partition("?")[0]


# --- both -------------------------------------------------------------------------------------


def _download(published: PublishedFile, target: Path, progress: Progress | None) -> None:
    """Download into a folder that is made if needed; its errors are those of data here."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A lock for each of hundreds of files would litter the folder.
        download(published, target, progress=progress, lock=False)
    except WeightsError as error:
        message = str(error).replace(published.urls[0], _without_query(published.urls[0]))
        raise DataError(f"{message} What has arrived is kept: run the command again.") from error
    except OSError as error:
        raise DataError(f"Cannot write {target}: {error.strerror or error}.") from error


def _record(
    folder: Path, origin: Mapping[str, str], files: Mapping[str, str] | Iterable[str]
) -> None:
    """Write down beside the files where they come from and under which terms."""
    document = {
        **origin,
        "notice": LICENCE_NOTICE.splitlines(),
        "files": dict(files) if isinstance(files, Mapping) else list(files),
    }
    with open_atomic(folder / _RECORD, overwrite=True) as stream:
        stream.write((json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


def _get_json(url: str) -> Any:
    try:
        with urllib.request.build_opener().open(_request(url), timeout=_TIMEOUT_S) as response:
            return json.loads(response.read(_MAX_LIST_BYTES))
    except (OSError, http.client.HTTPException) as error:
        raise DataError(_unreachable(url, error)) from error
    except ValueError as error:
        raise DataError(f"{url} did not answer with JSON ({error}); try again later.") from error


def _request(url: str, headers: Mapping[str, str] | None = None) -> urllib.request.Request:
    agent = {"User-Agent": f"wmh-lora/{__version__}"}
    return urllib.request.Request(url, headers={**agent, **(headers or {})})


def _unreachable(url: str, error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        return f"{url} answered {error.code} {error.reason}; try again later, or use a browser."
    return (
        f"{url} cannot be reached ({getattr(error, 'reason', None) or error}); check the network "
        "and the proxy settings, then run the command again."
    )
