"""Sizes of memory as people write them."""

from __future__ import annotations

import re

from wmh_lora.errors import ConfigError

__all__ = ["format_size", "parse_size"]

_UNITS = ("", "K", "M", "G", "T")


def parse_size(text: str) -> int:
    """Read a size in bytes: a number and K, M, G or T, which are powers of 1024.

    Raises
    ------
    ConfigError
        If it is no such size.

    Examples
    --------
    >>> parse_size("1.5G"), parse_size("800 MB")
    (1610612736, 838860800)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", text.upper())
    size = float(match[1]) * 1024.0 ** _UNITS.index(match[2]) if match else 0.0
    if size < 1.0:
        raise ConfigError(f"A size of memory is written as '2G' or '800M', found {text!r}.")
    return int(size)


def format_size(size_bytes: float) -> str:
    """Write a size so that `parse_size` reads no less from it.

    Examples
    --------
    >>> format_size(1.5 * 2**30), format_size(2**20 + 1)
    ('1.5G', '2M')
    """
    if size_bytes > 2**30:
        return f"{-int(-size_bytes * 10 // 2**30) / 10:g}G"
    return f"{-int(-size_bytes // 2**20)}M"
