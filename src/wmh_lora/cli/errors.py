"""How errors are told on the command line."""

from __future__ import annotations

from wmh_lora.errors import DataError, WMHError

__all__ = ["EXIT_INPUT", "EXIT_USAGE", "describe_error", "exit_code"]

EXIT_INPUT = 1
EXIT_USAGE = 2


def exit_code(error: Exception) -> int:
    """Return 1 for trouble with an input or anything unforeseen, 2 for settings and weights."""
    if isinstance(error, WMHError) and not isinstance(error, DataError):
        return EXIT_USAGE
    return EXIT_INPUT


def describe_error(error: Exception) -> str:
    """Say in one line what went wrong; errors nobody foresaw say how to learn more."""
    if isinstance(error, WMHError):
        return " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return "There is not enough memory; close other programs, or resample the scan."
    detail = " ".join(f"{type(error).__name__}: {error}".split())
    return f"Unexpected error ({detail}); run `wmh-lora --debug ...` to see where, and report it."
