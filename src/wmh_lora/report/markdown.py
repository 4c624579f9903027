"""What reports in Markdown are made of: tables, numbers with intervals, and names as they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["MINUS", "NOT_AVAILABLE", "escape", "fixed", "table", "with_interval"]

_MARKUP = re.compile(r"[\\`*<|]|(?<![^\W_])_|_(?![^\W_])|(?<=\])\(")

MINUS = "\N{MINUS SIGN}"
NOT_AVAILABLE = "n/a"  # as BIDS writes it


def escape(text: str) -> str:
    r"""Keep names of files and people's labels from being read as Markdown.

    Brackets of intervals and underscores within names mean nothing there, and stay.

    Examples
    --------
    >>> print(escape("a_b*c|d"), escape("_a_ <b>"), escape("[x](y) [0.1, 0.2]"))
    a_b\*c\|d \_a\_ \<b> [x]\(y) [0.1, 0.2]
    """
    return " ".join(_MARKUP.sub(r"\\\g<0>", text).split())


def fixed(value: float | None, digits: int, *, sign: bool = False) -> str:
    """Write a number with so many decimals; with ``sign``, also the plus of what is above zero.

    Examples
    --------
    >>> fixed(0.126, 2, sign=True), fixed(-0.001, 2, sign=True), fixed(None, 2)
    ('+0.13', '0.00', 'n/a')
    """
    if value is None:
        return NOT_AVAILABLE
    rounded = round(value, digits) + 0.0  # no negative zero
    return format(rounded, f"{'+' if sign and rounded else ''}.{digits}f").replace("-", MINUS)


def with_interval(
    value: float | None, interval: Sequence[float | None], digits: int, *, sign: bool = False
) -> str:
    """Write a number and, where there is one, its interval in brackets.

    Examples
    --------
    >>> with_interval(0.5, (0.25, 0.75), 2), with_interval(0.5, (None, None), 2)
    ('0.50 [0.25, 0.75]', '0.50')
    """
    text = fixed(value, digits, sign=sign)
    if value is None or interval[0] is None:
        return text
    low, high = (fixed(bound, digits, sign=sign) for bound in interval)
    return f"{text} [{low}, {high}]"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table whose columns are as wide as their widest cell; cells are escaped."""
    lines = [[escape(cell) for cell in row] for row in (head, *rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(width) for cell, width in zip(line, widths)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
