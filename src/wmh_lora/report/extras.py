"""Libraries that a part of the reports needs and the rest does without."""

from __future__ import annotations

from importlib.util import find_spec

from wmh_lora.errors import ConfigError

__all__ = ["require"]


def require(library: str, *, extra: str, purpose: str, instead: str = "") -> None:
    """Say in a sentence what is missing, before its import fails.

    Parameters
    ----------
    library : str
        Name to import.
    extra : str
        The extra of this package that installs it.
    purpose : str
        Begins the sentence, such as ``"A figure"``.
    instead : str
        What to do without it.

    Raises
    ------
    ConfigError
        If the library is not installed.
    """
    if find_spec(library) is None:
        raise ConfigError(
            f"{purpose} needs {library}, which is not installed: pip install 'wmh-lora[{extra}]'"
            + (f", or {instead}." if instead else ".")
        )
