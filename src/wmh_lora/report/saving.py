"""Let files appear together or not at all, in a folder that can be written to.

They are written to a hidden folder beside their targets and then renamed.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from wmh_lora.errors import ConfigError, DataError
from wmh_lora.files import move_new, write_failure

__all__ = ["output_folder", "saved_together"]


@contextmanager
def saved_together(
    targets: Sequence[Path], *, overwrite: bool = False
) -> Iterator[dict[Path, Path]]:
    """Let several files of one folder appear at once, or none of them.

    Parameters
    ----------
    targets : sequence of Path
        Files in one folder, which is made if it is absent.
    overwrite : bool
        Replace files that are there already.

    Yields
    ------
    dict
        For each target the temporary path to write instead. All must exist when the block ends.

    Raises
    ------
    DataError
        If a target exists and ``overwrite`` is not set, or on an error of the file system.
    ConfigError
        If the folder cannot be made or written to.
    """
    existing = [path for path in targets if os.path.lexists(path)]
    if existing and not overwrite:
        raise DataError(
            f"{existing[0]} exists already and is left as it is; allow overwriting, or choose "
            "another output folder."
        )
    folder = targets[0].parent
    with output_folder(folder):
        temporary = folder / f".wmh-lora-{secrets.token_hex(6)}"
        try:
            temporary.mkdir()
            yield {path: temporary / path.name for path in targets}
            _place(temporary, targets, overwrite=overwrite)
        except OSError as error:
            reason = write_failure(targets[0], error)
            raise DataError(f"Cannot write results to {folder}: {reason}.") from error
        except DataError as error:
            # the reader knows the target, not the temporary name
            raise type(error)(str(error).replace(str(temporary), str(folder))) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Make a folder that can be written to, and remove it again if nothing was put there.

    Raises
    ------
    ConfigError
        If the folder cannot be made or written to.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".wmh-lora-{secrets.token_hex(6)}"
            probe.mkdir()
            probe.rmdir()
        except FileExistsError as error:
            raise ConfigError(
                f"The output folder {folder} is a file; choose another output folder."
            ) from error
        except OSError as error:
            reason = write_failure(folder / "results", error)
            raise ConfigError(f"Cannot use the output folder {folder}: {reason}.") from error
        yield
    finally:
        for path in missing:  # the deepest first
            try:
                path.rmdir()
            except OSError:  # it holds results, or was never made
                break


def _place(temporary: Path, targets: Sequence[Path], *, overwrite: bool) -> None:
    """Rename the finished files; if one cannot be, put back what was there before."""
    aside = temporary / "before"
    aside.mkdir()
    placed: list[Path] = []
    try:
        for target in targets:
            finished = temporary / target.name
            if not overwrite:
                move_new(finished, target)
            else:
                if os.path.lexists(target):
                    target.replace(aside / target.name)
                finished.replace(target)
            placed.append(target)
    except BaseException:
        for target in placed:
            target.unlink(missing_ok=True)
        for before in aside.iterdir():
            before.replace(targets[0].parent / before.name)
        raise
