"""The configurations that come with the package, by name: of trainings, and of comparisons."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from wmh_lora.errors import ConfigError

__all__ = ["PresetKind", "config_path", "preset_summary", "presets"]

PresetKind = Literal["train", "compare"]

_CONFIGS = Path(__file__).parents[1] / "assets" / "configs"
_FOLDERS: dict[PresetKind, Path] = {"train": _CONFIGS, "compare": _CONFIGS / "comparison"}


def presets(kind: PresetKind = "train") -> dict[str, Path]:
    """Return the configuration files in the package for one command, by name.

    Examples
    --------
    >>> "compact" in presets()
    True
    """
    return {path.stem: path for path in sorted(_FOLDERS[kind].glob("*.toml"))}


def config_path(name_or_path: str | os.PathLike[str], kind: PresetKind = "train") -> Path:
    """Find a configuration by the name of a preset or by its path.

    A name alone means the preset, also where a file of that name exists: ``./compact`` is the file.

    Parameters
    ----------
    name_or_path
        A key of `presets`, or a TOML file.
    kind
        The command that it is for.

    Raises
    ------
    ConfigError
        If it is neither.
    """
    text = os.fspath(name_or_path)
    known = presets(kind)
    if text in known:
        return known[text]
    path = Path(text)
    if path.is_file():
        return path
    message = f"There is no configuration file {path}"
    if path.stem in known:
        raise ConfigError(f"{message}; for the preset, write {path.stem} alone.")
    raise ConfigError(f"{message} and no preset of that name; presets are {', '.join(known)}.")


def preset_summary(path: Path) -> str:
    """Return what a configuration says about itself: the first paragraph of its comment.

    Examples
    --------
    >>> preset_summary(presets()["compact"])[:20]
    'The compact encoder,'
    """
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or not text:
            break
        lines.append(text)
    return " ".join(lines)
